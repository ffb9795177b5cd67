"""`MoeDistributeBuffer`: dispatch and combine of Atlas A3 behind an object that holds the group (specification §15).

Shapes: Bs tokens, H hidden, K experts per token, ep ranks, L experts per rank, A capacity in rows (§2.4).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from evenmoe.ascend import torch_npu
from evenmoe.ascend.cann_ops_transformer.groups import npu_errors, transport_behind
from evenmoe.ascend.cann_ops_transformer.sizes import MEBIBYTE, low_latency_megabytes
from evenmoe.ascend.context import make_context, write_context
from evenmoe.ascend.patching import limits_in_effect
from evenmoe.contract.dispatch import check_dispatch_call
from evenmoe.errors import ConstraintError, MissingArgumentError, require
from evenmoe.ops.operator import CALL_TYPES, specs_of
from evenmoe.transport.call import GroupCall, together

Tensor = torch.Tensor


class MoeDistributeBuffer:
    """The group of an expert-parallel layer; dispatch and combine are collectives of it.

    Args:
        group: a torch.distributed ProcessGroup, one axis of a DeviceMesh, or `rank.ep` of an open world.
        ccl_buffer_size: MB of the communication buffer, as `get_low_latency_ccl_buffer_size` returns them, against
            which every dispatch is checked as on the chip. 0: not checked, since evenmoe needs no such buffer.
        comm_alg: only 0; upstream takes it and does not use it.

    Attributes: `group`, `rank_id`, `world_size`, `group_name`, `ccl_buffer_size` (bytes, twice what was passed, as HCCL
    allocates it), and `context` (int32 (4100,), for the V5 functions; `update_ctx` writes it anew).

    Two ranks; the token of each goes to the other one's expert and comes back doubled:

    >>> import evenmoe as em
    >>> def step(rank):
    ...     buffer = MoeDistributeBuffer(rank.ep)
    ...     x = torch.full((1, 1024), 1.0 + rank.index, dtype=torch.bfloat16)
    ...     ids = torch.tensor([[1 - rank.index]], dtype=torch.int32)
    ...     rows, _, assist_info, _, counts, _ = buffer.low_latency_dispatch(x, ids, 2)
    ...     y = buffer.low_latency_combine(2 * rows, ids, torch.ones(1, 1), assist_info, counts, num_experts=2)
    ...     return rows[0, 0].item(), y[0, 0].item()
    >>> with em.local_world(ep_size=2) as world:
    ...     world.run(step)
    [(2.0, 2.0), (1.0, 4.0)]
    """

    def __init__(self, group: object, ccl_buffer_size: int = 0, comm_alg: int = 0) -> None:
        with npu_errors():
            rule, fix = "must be 0", "choose the algorithm at each call, with its comm_alg"
            require(comm_alg == 0, "comm_alg", comm_alg, rule, fix)
            rule, fix = "must be 0 or more MB", "use get_low_latency_ccl_buffer_size"
            require(ccl_buffer_size >= 0, "ccl_buffer_size", ccl_buffer_size, rule, fix)
            self._join(group)
        self.context = make_context(self.group_name, self.rank_id, self.world_size)
        self.ccl_buffer_size = 2 * ccl_buffer_size * MEBIBYTE

    def _join(self, group: object) -> None:
        self._transport = transport_behind(group)
        self.group, self.group_name = group, self._transport.name
        self.rank_id, self.world_size = self._transport.rank, self._transport.world_size

    @staticmethod
    def get_low_latency_ccl_buffer_size(
        world_size: int,
        num_max_dispatch_tokens_per_rank: int,
        hidden: int,
        num_moe_expert: int,
        topk: int,
        num_shared_expert: int = 0,
        num_shared_expert_ranks: int = 0,
        comm_alg: str = "",
    ) -> int:
        """MB that the communication buffer needs, what `HCCL_BUFFSIZE` is set to on the chip.

        Raises:
            NpuCallError: a size that the chip does not take.

        >>> MoeDistributeBuffer.get_low_latency_ccl_buffer_size(16, 8, 7168, 32, 8)
        5
        """
        with npu_errors():
            return low_latency_megabytes(
                world_size,
                num_max_dispatch_tokens_per_rank,
                hidden,
                num_moe_expert,
                topk,
                num_shared_expert,
                num_shared_expert_ranks,
                comm_alg,
            )

    def update_ctx(self, new_group: object) -> bool:
        """Go on with another group of as many ranks; True."""
        with npu_errors():
            transport = transport_behind(new_group)
            value, rule = f"of {transport.world_size} ranks", f"must have {self.world_size} ranks, as the first group"
            require(transport.world_size == self.world_size, "new_group", value, rule, "make another buffer")
            self._join(new_group)
        write_context(self.context, self.group_name, self.rank_id, self.world_size)
        return True

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_experts: int,
        *,
        quant_mode: int = 0,
        comm_alg: str = "",
        x_smooth_scale: Tensor | None = None,
        x_active_mask: Tensor | None = None,
        topk_weights: Tensor | None = None,
        zero_expert_num: int = 0,
        copy_expert_num: int = 0,
        const_expert_num: int = 0,
        elastic_info: Tensor | None = None,
        expert_shard_type: int = 0,
        shared_expert_num: int = 1,
        shared_expert_rank_num: int = 0,
        expert_token_nums_type: int = 1,
        num_max_dispatch_tokens_per_rank: int = 0,
        y_dtype: int | None = None,
        x_dtype: int | None = None,
        x_smooth_scales_dtype: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Send each token to the ranks of its experts (§2); a collective.

        Args:
            x: float16 or bfloat16 (Bs, H).
            topk_idx: int32 (Bs, K), physical experts, distinct within a token.
            num_experts: physical experts over all ranks.
            quant_mode: 0, or 2 for int8. x_smooth_scale: float32 (shared experts + num_experts, H), only with 2.
            topk_weights: float32 (Bs, K), or None.
            num_max_dispatch_tokens_per_rank: tokens of the fullest rank, 0 where all have as many.
            y_dtype, x_dtype, x_smooth_scales_dtype: only None on this chip.
            All others: as in `torch_npu.npu_moe_distribute_dispatch_v2`.

        Returns:
            expand_x (A, H), dtype of x or int8; dynamic_scales float32 (A,); assist_info_for_combine int32; the rows of
            each local expert, int64 (L,); ep_recv_counts int32; expand_scales float32 (A,), or (0,) without
            topk_weights. As in §2.3; what the chip leaves unwritten is zero.

        Raises:
            NpuCallError: what the chip does not take, ranks that disagree, ids out of range, a buffer too small.
        """
        attributes = {
            "elastic_info": elastic_info,
            "shared_expert_num": shared_expert_num,
            "shared_expert_rank_num": shared_expert_rank_num,
            "expert_shard_type": expert_shard_type,
            "quant_mode": quant_mode,
            "global_bs": num_max_dispatch_tokens_per_rank * self.world_size,
            "expert_token_nums_type": expert_token_nums_type,
            "comm_alg": comm_alg,
            "zero_expert_num": zero_expert_num,
            "copy_expert_num": copy_expert_num,
            "const_expert_num": const_expert_num,
            "scales": x_smooth_scale,
            "x_active_mask": x_active_mask,
            "expert_scales": topk_weights,
        }
        with npu_errors(), together(GroupCall(self._transport, "dispatch", x, heard=elastic_info is None)):
            if self.ccl_buffer_size and isinstance(x, Tensor) and isinstance(topk_idx, Tensor):
                self._check_buffer(x, topk_idx, num_experts, attributes)
            expand_x, scales, assist_info, token_nums, counts, _, expand_scales = (
                torch_npu.npu_moe_distribute_dispatch_v2(
                    x,
                    topk_idx,
                    self.group_name,
                    self.world_size,
                    self.rank_id,
                    num_experts,
                    y_dtype=y_dtype,
                    x_dtype=x_dtype,
                    scales_dtype=x_smooth_scales_dtype,
                    **attributes,
                )
            )
        if topk_weights is None:
            expand_scales = expand_scales.new_empty(0)
        return expand_x, scales, assist_info, token_nums, counts, expand_scales

    def _check_buffer(self, x: Tensor, topk_idx: Tensor, num_experts: int, attributes: dict[str, object]) -> None:
        """Room in the buffer, less the 1 MiB of its state, as the host code of V5 looks at it."""
        call = CALL_TYPES["dispatch"](
            x=x,
            expert_ids=topk_idx,
            group_ep=self.group_name,
            ep_world_size=self.world_size,
            ep_rank_id=self.rank_id,
            moe_expert_num=num_experts,
            limits=limits_in_effect(),
            **attributes,
        )
        try:
            check_dispatch_call(replace(specs_of(call), hccl_buffer_bytes=self.ccl_buffer_size - MEBIBYTE))
        except ConstraintError as error:
            if error.argument != "hccl_buffer_bytes":
                raise
            raise ConstraintError("ccl_buffer_size", error.value, error.rule, error.fix) from error

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        assist_info_for_combine: Tensor,
        ep_send_counts: Tensor,
        *,
        num_experts: int = 0,
        comm_alg: str = "",
        comm_quant_mode: int = 0,
        x_active_mask: Tensor | None = None,
        expand_scales: Tensor | None = None,
        shared_expert_x: Tensor | None = None,
        elastic_info: Tensor | None = None,
        ori_x: Tensor | None = None,
        const_expert_alpha_1: Tensor | None = None,
        const_expert_alpha_2: Tensor | None = None,
        const_expert_v: Tensor | None = None,
        zero_expert_num: int = 0,
        copy_expert_num: int = 0,
        const_expert_num: int = 0,
        expert_shared_type: int = 0,
        shared_expert_num: int = 1,
        shared_expert_rank_num: int = 0,
        num_max_dispatch_tokens_per_rank: int = 0,
    ) -> Tensor:
        """Return the experts' rows to their tokens and add them up, weighted (§3); a collective.

        Args:
            x: float16 or bfloat16 (at least A, H), the experts' outputs in the order of dispatch's expand_x.
            topk_idx, and every attribute: those that dispatch was called with.
            topk_weights: float32 (Bs, K), gate weights. None is passed on as no weights, which Atlas A3 does not take.
            assist_info_for_combine, ep_send_counts: dispatch's assist_info_for_combine and ep_recv_counts.
            All others: as in `torch_npu.npu_moe_distribute_combine_v2`.

        Returns:
            (Bs, H), dtype of x. Rows of inactive tokens, which the chip leaves unwritten, are zero.

        Raises:
            NpuCallError: as in `low_latency_dispatch`.
        """
        with npu_errors(), together(GroupCall(self._transport, "combine", x, heard=elastic_info is None)):
            for name, value in (
                ("assist_info_for_combine", assist_info_for_combine),
                ("ep_send_counts", ep_send_counts),
            ):
                if value is None:
                    raise MissingArgumentError(name, None, "must be given", "pass dispatch's output")
            return torch_npu.npu_moe_distribute_combine_v2(
                x,
                topk_idx,
                assist_info_for_combine,
                ep_send_counts,
                x.new_empty(0, dtype=torch.float32) if topk_weights is None else topk_weights,
                self.group_name,
                self.world_size,
                self.rank_id,
                num_experts,
                tp_send_counts=ep_send_counts.new_empty(0),
                x_active_mask=x_active_mask,
                expand_scales=expand_scales,
                shared_expert_x=shared_expert_x,
                elastic_info=elastic_info,
                ori_x=ori_x,
                const_expert_alpha_1=const_expert_alpha_1,
                const_expert_alpha_2=const_expert_alpha_2,
                const_expert_v=const_expert_v,
                expert_shard_type=expert_shared_type,
                shared_expert_num=shared_expert_num,
                shared_expert_rank_num=shared_expert_rank_num,
                global_bs=num_max_dispatch_tokens_per_rank * self.world_size,
                comm_quant_mode=comm_quant_mode,
                comm_alg=comm_alg,
                zero_expert_num=zero_expert_num,
                copy_expert_num=copy_expert_num,
                const_expert_num=const_expert_num,
            )
