"""`CommContextManager`: makes the contexts that V5 of dispatch and combine take (specification §2.18)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from evenmoe.ascend.cann_ops_transformer.groups import npu_errors
from evenmoe.ascend.context import DEFAULT_BUFFER_BYTES, LENGTH, make_context, write_context
from evenmoe.ascend.groups import find_group, find_own_group
from evenmoe.contract.tensor_spec import check_shape
from evenmoe.errors import UnsupportedTypeError, as_integer, require
from evenmoe.ops.operator import spec_of
from evenmoe.transport.transport import Transport

_CHIP = "Ascend910_93"
_BACKENDS = ("kfc", "channel")


class CommContextManager:
    """The context of one group, for this rank.

    Args:
        group: the group's name, as `get_hccl_comm_name` gives it, or `rank.ep` of an open world, where all ranks are in
            one process and a name would not tell which is meant.
        worldSize: ranks of the group.
        backend: "kfc" or "channel", or {part of a chip's name: one of these}; the contexts are the same here.
        commAlg: "ub-mem" or "urma", and opName: taken, and without a meaning here, as on Atlas A3.
        customCclBufferSize: bytes that the buffer is said to have; 0: what HCCL allocates, 2 · 200 MiB.

    Attributes: `ccl_buffer_size` (bytes; 0 before the first context), `topo_type` (0, one super node), and
    `rank_num_per_server` (2, as upstream's "kfc").

    Raises:
        NpuCallError: no such group is open in this process, or a value that upstream does not take.

    >>> import evenmoe as em
    >>> with em.local_world(ep_size=2) as world:
    ...     manager = CommContextManager(world.ranks[1].ep, 2)
    ...     context = manager.create_context()
    >>> context.dtype, context.shape, context[0].item(), manager.ccl_buffer_size
    (torch.int32, torch.Size([4100]), 1, 419430400)
    """

    topo_type = 0
    rank_num_per_server = 2

    def __init__(
        self,
        group: str | Transport,
        worldSize: int,
        backend: str | Mapping[str, str] = "kfc",
        commAlg: str = "ub-mem",
        opName: str = "moe_dispatch_ffn_combine",
        customCclBufferSize: int = 0,
    ) -> None:
        with npu_errors():
            chosen = backend if isinstance(backend, str) else _of_this_chip(backend)
            require(chosen in _BACKENDS, "backend", chosen, "must be kfc or channel", 'use "kfc"')
            algorithms = ("ub-mem", "urma")
            require(commAlg in algorithms, "commAlg", commAlg, "must be ub-mem or urma", 'use "ub-mem"')
            size = as_integer("customCclBufferSize", customCclBufferSize)
            require(size >= 0, "customCclBufferSize", size, "must be 0 or more bytes", "use 0 for HCCL's own size")
            self._world_size = as_integer("worldSize", worldSize)
            self._bytes = size or DEFAULT_BUFFER_BYTES
            self._group = self._find(group)
        self._op_name, self.ccl_buffer_size = opName, 0

    def create_context(self) -> torch.Tensor:
        """The context, int32 (4100,)."""
        self.ccl_buffer_size = self._bytes
        return make_context(self._group.name, self._group.rank, self._group.world_size)

    def update_group(self, group: str | Transport, contextTensor: torch.Tensor) -> None:
        """Write the context of another group of as many ranks into a tensor of `create_context`."""
        with npu_errors():
            found = self._find(group)
            context = contextTensor
            if not isinstance(context, torch.Tensor) or context.dtype != torch.int32:
                value = context.dtype if isinstance(context, torch.Tensor) else type(context).__name__
                raise UnsupportedTypeError("contextTensor", value, "must be int32", "pass what create_context returned")
            check_shape("contextTensor", spec_of(context), (LENGTH,), "a context")
        self._group, self.ccl_buffer_size = found, self._bytes
        write_context(context, found.name, found.rank, found.world_size)

    def destroy(self) -> None:
        """Nothing is left behind that would have to be freed."""

    def _find(self, group: str | Transport) -> Transport:
        if isinstance(group, Transport):
            return find_group("group", group.name, group.rank, self._world_size)
        if not isinstance(group, str):
            rule = "must be a group's name"
            raise UnsupportedTypeError("group", f"a {type(group).__name__}", rule, "pass get_hccl_comm_name's")
        return find_own_group("group", group, self._world_size)


def _of_this_chip(backends: Mapping[str, str]) -> str:
    """The choice for the chip whose values these are."""
    found = [backend for part, backend in backends.items() if part in _CHIP]
    rule, fix = f"must have an entry for {_CHIP}", f'add "{_CHIP}": "kfc"'
    require(bool(found), "backend", dict(backends), rule, fix)
    return found[0]
