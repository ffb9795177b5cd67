"""What both buffers have in common: the group behind what the caller passes, and errors in torch_npu's class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from evenmoe.ascend.groups import find_group
from evenmoe.ascend.status import NpuCallError
from evenmoe.errors import EvenmoeError, MissingArgumentError, UnsupportedTypeError
from evenmoe.transport.transport import Transport


def transport_behind(group: object) -> Transport:
    """This rank's end of a group, which torch_npu's functions find under the same name.

    Args:
        group: a torch.distributed ProcessGroup, one axis of a DeviceMesh, or `rank.ep` of an open world.

    Raises:
        MissingArgumentError, UnsupportedTypeError: it is none of these.
    """
    if isinstance(group, Transport):
        return group
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    fix = "pass a ProcessGroup, one axis of a DeviceMesh, or rank.ep of an open world"
    if group is None:
        raise MissingArgumentError("group", None, "must be the group of the ranks", fix)
    if not isinstance(group, dist.ProcessGroup):
        rule = "must be a group of which this process is a member"
        raise UnsupportedTypeError("group", f"a {type(group).__name__}", rule, fix)
    return find_group("group", group.group_name, group.rank(), group.size())


@contextmanager
def npu_errors() -> Iterator[None]:
    """Inside, an error of evenmoe becomes an `NpuCallError`, as torch_npu's functions raise."""
    try:
        yield
    except NpuCallError:
        raise
    except EvenmoeError as error:
        raised = NpuCallError(error.argument, error.value, error.rule, error.fix)
        raised.status = error.status
        raise raised from error
