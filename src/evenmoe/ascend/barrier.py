"""`_npu_distribute_barrier`: the ranks of a group wait for each other (specification §18)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evenmoe.ascend.groups import find_own_group
from evenmoe.ascend.status import NpuCallError
from evenmoe.contract.tensor_spec import check_dtype, check_shape
from evenmoe.errors import ConstraintError, EvenmoeError
from evenmoe.ops.operator import check_tensors, spec_of
from evenmoe.transport.agreement import Header, digest
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.process_group import RemappedTransport
from evenmoe.transport.transport import Transport

_NOTHING: Sequence[int] = ()


def _npu_distribute_barrier(
    x_ref: torch.Tensor,
    group: str,
    world_size: int,
    *,
    time_out: torch.Tensor | None = None,
    elastic_info: torch.Tensor | None = None,
) -> torch.Tensor:
    """Wait until all ranks of a group have come this far; a collective.

    Args:
        x_ref: any tensor, which ties the barrier into the program; it is not looked at.
        group: the name of a group with one rank in each process.
        world_size: its ranks.
        time_out: int32 (1,), microseconds of the chip, whose clock is not emulated: the group's own time-out holds.
        elastic_info: int32 (4 + 2·world_size,), as in dispatch; only the ranks that are left wait.

    Returns:
        x_ref itself.

    Raises:
        NpuCallError: what the chip does not take, a group that is not open here, ranks that disagree.
        LostRankError: a rank did not come.
    """
    try:
        check_tensors(x_ref=x_ref)
        transport = find_own_group("group", group, world_size)
        part = GroupCall(transport, "barrier", heard=elastic_info is None)
        with together(part):
            if time_out is not None:
                _check_int32("time_out", time_out, 1, "one number of microseconds")
            info: Sequence[int] = _NOTHING
            if elastic_info is not None:
                rule = "flag, three counts and two tables of the ranks"
                _check_int32("elastic_info", elastic_info, 4 + 2 * world_size, rule)
                info = elastic_info.tolist()
                part.narrow(_active(transport, info))
            header = Header("barrier", {"digest of `elastic_info`": digest(tuple(info))})
            part.agree(header, torch.zeros((part.group.world_size, 0), dtype=torch.int64))
    except EvenmoeError as error:
        raise NpuCallError.of(error) from error
    return x_ref


def _check_int32(name: str, tensor: torch.Tensor, length: int, meaning: str) -> None:
    check_tensors(**{name: tensor})
    check_dtype(name, spec_of(tensor), ("int32",))
    check_shape(name, spec_of(tensor), (length,), meaning)


def _active(transport: Transport, info: Sequence[int]) -> Transport:
    """The ranks that are left, by their new numbers."""
    if info[0] != 1:
        return transport
    world_size, left = transport.world_size, info[1]
    fix = "pass what dispatch of the same group is given"
    if not 1 <= left <= world_size:
        raise ConstraintError("elastic_info", f"{left} ranks at 1", f"must leave 1 to {world_size} ranks", fix)
    new_rank_of, old_rank_of = info[4 : 4 + world_size], info[4 + world_size :][:left]
    inverse = all(0 <= old < world_size and new_rank_of[old] == new for new, old in enumerate(old_rank_of))
    if not inverse or transport.rank not in old_rank_of:
        value, rule = f"tables {list(new_rank_of)} and {list(old_rank_of)}", "must be each other's inverse"
        raise ConstraintError("elastic_info", value, f"{rule} and keep rank {transport.rank}, which calls", fix)
    return RemappedTransport(transport, old_rank_of)
