"""`ElasticBuffer`: a token crosses once to each rank that it has an expert on (specification §16).

Shapes: W ranks, L experts of each, Bs tokens, H hidden, K experts per token, A rows received.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

from evenmoe.ascend.cann_ops_transformer import engram
from evenmoe.ascend.cann_ops_transformer.elastic_checks import check_cached, check_new, check_rows, check_tokens
from evenmoe.ascend.cann_ops_transformer.ep_handle import EPHandle
from evenmoe.ascend.cann_ops_transformer.groups import npu_errors, transport_behind
from evenmoe.ascend.cann_ops_transformer.sizes import MEBIBYTE, elastic_megabytes, engram_bytes
from evenmoe.errors import ConstraintError, EvenmoeError, LostRankError, MissingArgumentError, as_integer, require
from evenmoe.ops.numerics import reinterpret
from evenmoe.ops.operator import check_tensors
from evenmoe.ops.token_slots import return_rows, send_tokens
from evenmoe.transport.agreement import Header, dtype_code
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.packets import Outgoing

Tensor = torch.Tensor
_MOE_SIZES = ("num_max_tokens_per_rank", "hidden", "num_topk")


class ElasticBuffer:
    """The group of an expert-parallel layer, and of a table that every rank holds a part of.

    Args:
        group: a torch.distributed ProcessGroup, one axis of a DeviceMesh, or `rank.ep` of an open world; of 2 to 128
            ranks for dispatch and combine.
        num_cpu_bytes: bytes for this rank's part of the table, whole 2 MiB.
        num_max_tokens_per_rank, hidden, num_topk: the largest Bs of any rank, H, and the largest K; all three, or none
            where only the table is used.

    Two ranks with two experts each. Token 0 of rank 0 has both experts of rank 1, and crosses once:

    >>> import evenmoe as em
    >>> def step(rank):
    ...     buffer = ElasticBuffer(rank.ep, num_max_tokens_per_rank=1, hidden=2, num_topk=2)
    ...     x = torch.full((1, 2), 1.0 + rank.index, dtype=torch.bfloat16)
    ...     ids = torch.tensor([[2, 3], [0, 2]][rank.index : rank.index + 1], dtype=torch.int32)
    ...     rows, _, _, handle = buffer.dispatch(x, topk_idx=ids, num_experts=4)
    ...     y, _ = buffer.combine(rows, handle)
    ...     return handle.num_recv_tokens, rows[:, 0].tolist(), y[0, 0].item()
    >>> with em.local_world(ep_size=2) as world:
    ...     world.run(step)
    [(1, [2.0], 2.0), (2, [1.0, 2.0, 1.0], 4.0)]
    """

    def __init__(
        self,
        group: object,
        *,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int | None = None,
        hidden: int | None = None,
        num_topk: int | None = None,
    ) -> None:
        with npu_errors():
            rule = "must be whole 2 MiB"
            whole = num_cpu_bytes >= 0 and num_cpu_bytes % (2 * MEBIBYTE) == 0
            require(whole, "num_cpu_bytes", num_cpu_bytes, rule, "use get_engram_storage_size_hint")
            sizes = dict(zip(_MOE_SIZES, (num_max_tokens_per_rank, hidden, num_topk), strict=True))
            missing = [name for name, value in sizes.items() if value is None]
            if 0 < len(missing) < len(sizes):
                rule = "must be given with the two others"
                raise MissingArgumentError(missing[0], None, rule, "pass all three, or none of them")
            self._sizes = sizes
            self._transport = transport_behind(group)
        self._num_cpu_bytes = num_cpu_bytes
        self._table: engram.Table | None = None
        self._destroyed = False

    @staticmethod
    def get_moe_ep_ccl_buffer_size(
        world_size: int, num_max_tokens_per_rank: int, hidden: int, num_experts: int, topk: int
    ) -> int:
        """MB that the communication buffer needs, what `HCCL_BUFFSIZE` is set to on the chip.

        >>> ElasticBuffer.get_moe_ep_ccl_buffer_size(2, 128, 4096, 8, 4)
        4
        """
        with npu_errors():
            return elastic_megabytes(world_size, num_max_tokens_per_rank, hidden, num_experts, topk)

    @staticmethod
    def get_engram_storage_size_hint(num_entries: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that a table of so many entries needs, as `num_cpu_bytes`.

        >>> ElasticBuffer.get_engram_storage_size_hint(10000, 4096)
        83886080
        """
        with npu_errors():
            engram.check_table_dtype("dtype", str(dtype).removeprefix("torch."))
            return engram_bytes(num_entries, hidden, dtype.itemsize)

    def engram_write(self, storage: Tensor) -> None:
        """Give this rank's part of the table to all ranks; a collective.

        Args:
            storage: bfloat16, float16 or float32 (entries, hidden), equal in shape and dtype on all ranks, hidden a
                multiple of 128, no larger than num_cpu_bytes.
        """
        with npu_errors():
            self._check_alive("engram_write")
            self._table = engram.write(self._transport, storage, self._num_cpu_bytes)

    def engram_fetch(self, indices: Tensor) -> Callable[[], Tensor]:
        """Read entries of any rank's part; the table is that of the last `engram_write`.

        Args:
            indices: int32 (n,), rank · entries + entry. Rows of indices out of range are zero.

        Returns:
            A function that returns the entries, (n, hidden) in the table's dtype; to be called before the next fetch.
        """
        with npu_errors():
            self._check_alive("engram_fetch")
            if self._table is None:
                rule, fix = "must come after an engram_write", "write the table on all ranks first"
                raise ConstraintError("engram_fetch", "called before a table was written", rule, fix)
            return self._table.fetch(indices)

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False) -> None:
        """Wait until all ranks have come; a collective.

        Args:
            use_comm_stream, with_cpu_sync: bool, on the chip on which stream, and whether the host waits too. Here the
                call returns when all ranks have come, whatever they are.
        """
        with npu_errors(), together(part := GroupCall(self._transport, "ElasticBuffer.barrier")):
            self._check_alive("barrier")
            for name, value in (("use_comm_stream", use_comm_stream), ("with_cpu_sync", with_cpu_sync)):
                require(isinstance(value, bool), name, repr(value), "must be True or False", "pass a bool")
            self._meet(part)

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        *,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        handle: EPHandle | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        do_cpu_sync: bool | None = None,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], None, Tensor | None, EPHandle]:
        """Send each token to the ranks of its experts; a collective.

        Args:
            x: bfloat16, float16, float8_e5m2 or float8_e4m3fn (Bs, H), 1 to num_max_tokens_per_rank tokens; float8 as
                (tokens, scales), with float32 (Bs, ⌈H / 128⌉) or float8_e8m0fnu or uint8 (Bs, ⌈H / 32⌉ made even).
            topk_idx: int32 (Bs, K), expert e lives on rank e // (num_experts / W). A negative id is not sent; ids may
                repeat. None with a handle.
            topk_weights: float32 (Bs, K), which travel with the rows; None with a handle.
            handle: of an earlier dispatch, whose routing is used again.
            num_experts: 2 to 2048, a multiple of W.
            num_max_tokens_per_rank: in place of the buffer's.
            expert_alignment: only 1.
            do_cpu_sync: True (default) for as many rows as came; False for W · num_max_tokens_per_rank · min(num_topk,
                L) of them, whatever came. Not with a handle.

        Returns:
            The rows (A, H), by local expert, source rank, token, k, or (rows, scales); None; float32 (A,), the weight
            of each row, or None without topk_weights; and an `EPHandle`. Rows that did not come are zero.

        Raises:
            NpuCallError: what the chip does not take, and ranks that disagree.
        """
        with (
            npu_errors(),
            together(
                part := GroupCall(self._transport, "ElasticBuffer.dispatch", x[0] if isinstance(x, tuple) and x else x)
            ),
        ):
            self._check_alive("dispatch")
            most, hidden, num_topk = self._moe_sizes()
            tokens, scales = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
            if handle is None:
                check_new(topk_idx, num_experts, expert_alignment, do_cpu_sync)
                ids, experts = topk_idx, as_integer("num_experts", num_experts)
                if num_max_tokens_per_rank is not None:
                    most = as_integer("num_max_tokens_per_rank", num_max_tokens_per_rank)
            else:
                require(isinstance(handle, EPHandle), "handle", repr(handle), "must be an EPHandle", "pass dispatch's")
                check_cached(
                    do_cpu_sync,
                    topk_idx=topk_idx,
                    topk_weights=topk_weights,
                    num_experts=num_experts,
                    num_max_tokens_per_rank=num_max_tokens_per_rank,
                    expert_alignment=expert_alignment,
                )
                ids, experts, most = handle.topk_idx, handle.num_experts, handle.num_max_tokens_per_rank
            check_tensors(x=tokens, topk_idx=ids)
            assert isinstance(tokens, Tensor)
            assert isinstance(ids, Tensor)
            check_tokens(
                tokens,
                scales,
                ids,
                topk_weights,
                num_experts=experts,
                num_max_tokens_per_rank=most,
                world_size=part.group.world_size,
                hidden=hidden,
                num_topk=num_topk,
            )
            header = Header(
                "ElasticBuffer.dispatch",
                {
                    "hidden size of `x`": hidden,
                    "dtype of `x`": dtype_code(tokens.dtype),
                    "bytes of the scales of a row": 0 if scales is None else scales.shape[1] * scales.element_size(),
                    "top-k of `topk_idx`": ids.shape[1],
                    "`num_experts`": experts,
                    "`num_max_tokens_per_rank`": most,
                    "presence of `topk_weights`": topk_weights is not None,
                },
            )
            rows = torch.cat([_as_bytes(tensor) for tensor in (tokens, scales) if tensor is not None], dim=1)
            local, number = experts // part.group.world_size, part.number
            came = send_tokens(part, header, rows, ids, topk_weights, local)
        room = len(came.rows)
        if handle is not None:
            room = len(handle.recv_src_metadata)
        elif do_cpu_sync is False:
            room = self._transport.world_size * most * min(num_topk, local)
        width = hidden * tokens.element_size()
        received = reinterpret(_room_for(came.rows[:, :width], room), tokens.dtype)
        new_handle = EPHandle(
            dst_buffer_slot_idx=came.slots,
            recv_src_metadata=_room_for(came.metadata, room),
            num_recv_tokens_per_rank=came.per_rank,
            num_recv_tokens_per_expert=came.per_expert,
            num_experts=experts,
            expert_alignment=1,
            num_max_tokens_per_rank=most,
            topk_idx=ids.clone() if handle is None else ids,
            number=number,
        )
        weights = None if came.weights is None else _room_for(came.weights, room)
        if scales is None:
            return received, None, weights, new_handle
        rows_of_scales = reinterpret(_room_for(came.rows[:, width:], room), scales.dtype)
        return (received, rows_of_scales), None, weights, new_handle

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        *,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the experts' rows to their tokens and add them up, unweighted; a collective.

        Args:
            x: bfloat16 or float16 (A, H), the experts' outputs in dispatch's row order, weighted already.
            handle: what dispatch returned.
            topk_weights: float32 (A,), a number for each row that travels back with it.
            bias: only None.

        Returns:
            (Bs, H) in the dtype of x, the sum in float32, k ascending, rounded once; and float32 (Bs, K), the numbers
            that came back, zero where nothing was sent, or None without topk_weights.

        Raises:
            NpuCallError: as in `dispatch`, and rows of different dispatches.
        """
        with npu_errors(), together(part := GroupCall(self._transport, "ElasticBuffer.combine", x)):
            self._check_alive("combine")
            self._moe_sizes()
            require(isinstance(handle, EPHandle), "handle", repr(handle), "must be an EPHandle", "pass dispatch's")
            require(bias is None, "bias", "given", "must be None", "add it to the result")
            came = check_rows(x, topk_weights, handle, part.group.world_size)
            header = Header(
                "ElasticBuffer.combine",
                {
                    "hidden size of `x`": x.shape[1],
                    "dtype of `x`": dtype_code(x.dtype),
                    "presence of `topk_weights`": topk_weights is not None,
                },
            )
            weights = None if topk_weights is None else topk_weights[:came]
            metadata = handle.recv_src_metadata[:came]
            total, returned = return_rows(part, header, handle.number, x[:came], weights, metadata, handle.topk_idx)
        return total.to(x.dtype), returned

    def destroy(self) -> None:
        """Wait until all ranks have come, if they do, and let go of the table; no call may follow but this one."""
        if not self._destroyed:
            with (
                suppress(LostRankError, EvenmoeError),
                together(part := GroupCall(self._transport, "ElasticBuffer.barrier")),
            ):
                self._meet(part)
            self._destroyed, self._table = True, None

    def _meet(self, part: GroupCall) -> None:
        nothing = torch.zeros((part.group.world_size, 0), dtype=torch.int64)
        none = [0] * part.group.world_size
        row = torch.zeros((0, 1), dtype=torch.uint8)
        part.send(Header("ElasticBuffer.barrier", {}), nothing, Outgoing(none, none, (1,), row), row)

    def _check_alive(self, call: str) -> None:
        rule = "must not follow destroy()"
        require(not self._destroyed, call, "called on a buffer that was destroyed", rule, "make another buffer")

    def _moe_sizes(self) -> tuple[int, int, int]:
        """The buffer's num_max_tokens_per_rank, hidden and num_topk."""
        for name, value in self._sizes.items():
            if value is None:
                rule, fix = "must be given for dispatch and combine", "pass it when the buffer is made"
                raise MissingArgumentError(name, None, rule, fix)
        world_size = self._transport.world_size
        require(2 <= world_size <= 128, "group", f"of {world_size} ranks", "must have 2 to 128", "use another group")
        most, hidden, top_k = (as_integer(name, value) for name, value in self._sizes.items())
        return most, hidden, top_k


def _as_bytes(rows: Tensor) -> Tensor:
    """The same rows as uint8 (Bs, bytes of a row)."""
    return rows.contiguous().view(torch.uint8).reshape(len(rows), -1)


def _room_for(came: Tensor, room: int) -> Tensor:
    """`room` rows: those that came, and zeros behind them."""
    if len(came) == room:
        return came
    padded = came.new_zeros((room, *came.shape[1:]))
    padded[: len(came)] = came
    return padded
