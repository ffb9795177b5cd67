"""`SharedBatch`: an MoE layer of ranks that hold the same tokens, as those of a tensor-parallel group do.

Every rank has the tokens already, so nothing is dispatched: it computes those of its own slots, shows the results to
all, and each rank adds up all sums, in the order and with the bits of `ExpertParallel.combine`. That is one exchange
for a layer where splitting the batch takes two and a gathering of the parts, for more rows added up on each rank: the
better way for few tokens.

Shapes: T tokens, the same on all ranks, H hidden, K experts per token, S slots, W ranks, R rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
import torch

from evenmoe.contract.layout import make_layout
from evenmoe.errors import ConstraintError
from evenmoe.ops.exchange import Routing, route, sums
from evenmoe.ops.weighted_sum import sum_dtype, sum_rows
from evenmoe.rules import RULES
from evenmoe.rules.rule import Chooser, IntArray
from evenmoe.runtime.arguments import check_dispatch, check_floats
from evenmoe.runtime.expert_parallel import ExpertParallel
from evenmoe.runtime.outside_graph import outside_graph
from evenmoe.runtime.rows import positions_in_order
from evenmoe.transport.agreement import LAYER, Header, dtype_code
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.packets import Outgoing

_COMBINE = "SharedBatch.combine"


@dataclass(frozen=True)
class SharedRows:
    """What one rank computes on; made by `SharedBatch.select`, used by `SharedBatch.combine`.

    Attributes:
        rows: (R, H), dtype of x, ordered by slot of this rank, then token.
        num_tokens_per_expert: int64 (slots of this rank,), rows per slot; they add up to R.
        topk_weights: float32 (T, K), or float64 where they were so.
        routing: the assignments of the batch, by rank, slot and token.
        digest: of the slots chosen, equal on ranks that chose the same.
    """

    rows: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    topk_weights: torch.Tensor
    routing: Routing
    digest: int


class SharedBatch:
    """A layer of `ExpertParallel` for batches that all of its ranks hold; without gradients.

    The slots chosen, and so the load of every rank, are those of `ExpertParallel` where rank r has the r-th of W parts
    of the batch, each of ceil(T / W) tokens or what is left.

    Args:
        layer: whose group, table, rule and number are used.

    Two ranks, each expert adds its number; the token of weights 1 and 2 asks for experts 1 and 0:

    >>> import evenmoe as em
    >>> def step(rank):
    ...     layer = em.ExpertParallel(rank.ep, em.Placement([[0, 1]], num_ranks=2).eplb_table(0), num_slots=2)
    ...     batch = SharedBatch(layer)
    ...     shared = batch.select(torch.ones(1, 1), torch.tensor([[1, 0]]), torch.tensor([[1.0, 2.0]]))
    ...     return batch.combine(shared, shared.rows + rank.index).tolist()
    >>> with em.local_world(ep_size=2) as world:
    ...     world.run(step)  # 1 · (1 + 1) + 2 · (1 + 0)
    [[[4.0]], [[4.0]]]
    """

    def __init__(self, layer: ExpertParallel) -> None:
        self._setup = layer.setup
        self._group = layer.setup.group
        # Where every expert has one slot, nothing is to be chosen, and the simplest rule gives the same as any.
        one_each = bool((layer.setup.table[:, 0] == 1).all())
        self._only = replace(layer.setup, rule=RULES.get("rank")).chooser(0) if one_each else None
        self._choosers: dict[int, Chooser] = {}

    @outside_graph
    def select(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> SharedRows:
        """Choose slots for the batch, and take the rows of this rank's; nothing is exchanged.

        Args:
            x: (T, H), float16, bfloat16, float32 or float64.
            topk_ids: int32 or int64 (T, K), logical experts, or −1 for an assignment that is not computed.
            topk_weights: any float dtype (T, K).

        Raises:
            ConstraintError, UnsupportedTypeError: on this rank's arguments; the other ranks get a
                RankDisagreementError in `combine` that says so.
        """
        with together(GroupCall(self._group, _COMBINE, x)):
            check_dispatch(x, topk_ids, topk_weights)
            (num_tokens, hidden), top_k = x.shape, topk_ids.shape[1]
            setup, ep = self._setup, self._group
            slots = self._slots(topk_ids)
            layout = make_layout(
                ep=ep.world_size,
                rank=ep.rank,
                num_experts=setup.num_slots,
                num_tokens=num_tokens,
                hidden=hidden,
                top_k=top_k,
            )
            routing = route(slots, layout)
            stop = int(sums(routing.counts[: ep.rank + 1], 1).sum())
            per_slot = routing.counts[ep.rank]
            own = routing.token[stop - int(per_slot.sum()) : stop]
            chosen = crc32(slots.cpu().contiguous().numpy().tobytes())
            weights = topk_weights.detach().to(sum_dtype(topk_weights.dtype), copy=True)
            return SharedRows(x.detach().index_select(0, own), per_slot, weights, routing, chosen)

    @outside_graph
    def combine(self, shared: SharedRows, expert_out: torch.Tensor) -> torch.Tensor:
        """Show the experts' rows to all ranks, and add up those of every token, weighted; a collective of the group.

        Args:
            shared: what `select` returned.
            expert_out: (R, H′), one row for each of `shared.rows`, in their order; any float dtype.

        Returns:
            (T, H′), dtype of expert_out: the sums of `ExpertParallel.combine`, of all tokens, the same on every rank.

        Raises:
            ConstraintError, UnsupportedTypeError: rows that are not one for each selected row, or not of a float
                dtype; the other ranks get a RankDisagreementError that says so.
            RankDisagreementError: the ranks hold other batches, or H′ or the dtype differ between them, or the call
                failed on another rank; the same error on every rank.
            LostRankError: as in `ExpertParallel.dispatch`.
        """
        call = GroupCall(self._group, _COMBINE, expert_out)
        with together(call):
            check_floats("expert_out", expert_out)
            num_rows, world_size = shared.rows.shape[0], self._group.world_size
            if expert_out.dim() != 2 or expert_out.shape[0] != num_rows:
                raise ConstraintError(
                    "expert_out",
                    f"of shape {tuple(expert_out.shape)}",
                    f"must have one row for each of the {num_rows} selected rows",
                    "apply each slot's expert to its num_tokens_per_expert rows and keep their order",
                )
            sizes = {
                LAYER: self._setup.layer,
                "hidden size of `expert_out`": expert_out.shape[1],
                "dtype of `expert_out`": dtype_code(expert_out.dtype),
                "digest of the slots chosen": shared.digest,
            }
            rows = expert_out.detach()
            outgoing = Outgoing([0] * world_size, [num_rows] * world_size, tuple(rows.shape[1:]), rows)
            to_all = torch.arange(num_rows, device=rows.device).repeat(world_size)
            nothing = torch.zeros((world_size, 0), dtype=torch.int64)
            _, incoming = call.send(Header(_COMBINE, sizes), nothing, outgoing, rows, to_all)
            came, weights = torch.from_numpy(incoming.rows[:, None]), shared.topk_weights
            position = positions_in_order(shared.routing, came, tuple(weights.shape))
            assert position is not None, "ranks that chose the same slots have the same numbers of rows"
            return sum_rows(incoming, position, weights.to(sum_dtype(rows.dtype)))

    def _slots(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Integers (T, K), S where nothing is computed; each rank's part of the tokens by its own chooser."""
        setup, counted = self._setup, self._setup.counted(topk_ids)
        if self._only is not None:
            return setup.slots(self._only, topk_ids, counted, None)
        size = max(1, -(-len(topk_ids) // self._group.world_size))
        parts = [slice(start, start + size) for start in range(0, len(topk_ids), size)]
        by_rank = self._count(topk_ids, parts) if setup.rule.needs_counts else None
        slots = [
            setup.slots(self._chooser(rank), topk_ids[part], None if counted is None else counted[part], by_rank)
            for rank, part in enumerate(parts)
        ]
        return torch.cat(slots) if slots else topk_ids

    def _chooser(self, rank: int) -> Chooser:
        if rank not in self._choosers:
            self._choosers[rank] = self._setup.chooser(rank)
        return self._choosers[rank]

    def _count(self, topk_ids: torch.Tensor, parts: list[slice]) -> IntArray:
        """int64 (W, E), what `ExpertParallel` would count on every rank."""
        num_experts = self._setup.table.shape[0]
        by_rank = np.zeros((self._group.world_size, num_experts), np.int64)
        ids = topk_ids.cpu().numpy()
        for rank, part in enumerate(parts):
            own = ids[part]
            by_rank[rank] = np.bincount(own[own >= 0], minlength=num_experts)
        return by_rank
