"""`ExpertParallel`: table, rule, dispatch and combine of one MoE layer in one object.

Shapes: T tokens of this rank, H hidden, K experts per token, E logical experts, S slots, W ranks, R rows received.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from evenmoe.contract.layout import Layout, make_layout
from evenmoe.errors import ConstraintError, UnsupportedTypeError
from evenmoe.ops.exchange import copy_rows, exchange
from evenmoe.ops.groups import refusing_together
from evenmoe.ops.routing import Routing, route
from evenmoe.ops.weighted_sum import add_rows
from evenmoe.runtime.replica_choice import RULES, ReplicaChoice, refuse_other_types
from evenmoe.transport.agreement import digest, dtype_code, exchange_counts
from evenmoe.transport.contract import Transport

_DISPATCH, _COMBINE = "ExpertParallel.dispatch", "ExpertParallel.combine"


@dataclass(frozen=True)
class DispatchedRows:
    """What one rank computes on; made by `ExpertParallel.dispatch`, consumed by `ExpertParallel.combine`.

    Attributes:
        rows: (R, H), dtype of x, ordered by slot of this rank, source rank, token.
        num_tokens_per_expert: int64 (slots of this rank,), rows per slot; they add up to R.
        source_rank, source_token, source_k: int32 (R,), the (rank, token, k) that each row serves.
    """

    rows: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    source_rank: torch.Tensor
    source_token: torch.Tensor
    source_k: torch.Tensor
    routing: Routing
    topk_weights: torch.Tensor
    step: int


class ExpertParallel:
    """One MoE layer across the ranks of a group: logical top-k in, weighted sums out.

    Inference only: gradients do not cross ranks, so tensors that require them are refused.

    Args:
        ep: this rank's transport; the ranks hold equally many slots, slot s on rank s // (S / W).
        eplb_table: int32 (E, F), row e = [count, slot ids…, don't care]; slot ids are unique over the table. The
            same on every rank (`Placement.eplb_table`).
        num_slots: S, a multiple of W.
        rule: which replica a token uses: "rank", "token", "occurrence", or "batch" (the split of the whole batch
            that minimises the busiest rank's load; the counts it needs travel instead of the usual ones).
        check_values: look at ids at every step. False saves the pass; a wrong value is then undefined.

    Raises:
        ConstraintError: a table, a number of slots or a rule that cannot work, said before anything is exchanged.

    Two ranks, expert 0 on both; each rank's expert adds its slot number, and every token asks for expert 0 alone:

    >>> import evenmoe as em
    >>> placement = em.Placement([[0, 1, 0, 2]], num_ranks=2)
    >>> def step(rank):
    ...     ep = em.ExpertParallel(rank.ep, placement.eplb_table(0), num_slots=4, rule="rank")
    ...     dispatched = ep.dispatch(torch.ones(2, 1), torch.tensor([[0], [0]]), torch.ones(2, 1))
    ...     slots = torch.arange(2).repeat_interleave(dispatched.num_tokens_per_expert) + 2 * rank.index
    ...     return ep.combine(dispatched, dispatched.rows + slots[:, None]).flatten().tolist()
    >>> with em.local_world(ep_size=2) as world:
    ...     world.run(step)  # rank 0 uses slot 0, rank 1 slot 2
    [[1.0, 1.0], [3.0, 3.0]]
    """

    def __init__(
        self,
        ep: Transport,
        eplb_table: torch.Tensor,
        *,
        num_slots: int,
        rule: str = "rank",
        check_values: bool = True,
    ) -> None:
        self._ep, self.num_slots, self.rule, self._check_values = ep, num_slots, rule, check_values
        if num_slots < 1 or num_slots % ep.world_size:
            nearest = max(1, round(num_slots / ep.world_size)) * ep.world_size
            raise ConstraintError(
                "num_slots",
                num_slots,
                f"must be a multiple of the {ep.world_size} ranks",
                f"use {nearest}, the nearest that is",
            )
        self._choice = ReplicaChoice(eplb_table, rule, num_slots, ep.rank, ep.world_size)
        self.num_experts = eplb_table.shape[0]
        self._table_digest = digest(self._choice.counted_entries())
        self._step = 0

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> DispatchedRows:
        """Send each token once to every rank that computes for it; a collective of the group.

        Args:
            x: (T, H), float16, bfloat16, float32 or float64. T may differ between ranks, and be 0.
            topk_ids: int32 or int64 (T, K), logical experts 0…E−1, or −1 for an entry that is not computed.
            topk_weights: any float dtype (T, K), used by `combine` in float32.

        Returns:
            `DispatchedRows`: this rank's rows, expert-major.

        Raises:
            ConstraintError, UnsupportedTypeError: on this rank's arguments; the other ranks get a
                RankDisagreementError that says so.
            RankDisagreementError: sizes that differ between ranks, the same error on every rank.
        """
        routing = None
        with self._refusing(_DISPATCH, x=x, topk_ids=topk_ids, topk_weights=topk_weights):
            self._check(x, topk_ids, topk_weights)
            layout = self._layout(x, topk_ids)
            counted = topk_ids >= 0
            if self.rule == "batch":
                experts = torch.where(counted, topk_ids, self.num_experts).flatten().long()
                by_expert = torch.bincount(experts, minlength=self.num_experts + 1)[: self.num_experts]
                mine = by_expert.expand(layout.ep, -1)  # every rank needs them all
            else:
                routing = route(self._slots(topk_ids, counted), layout, None)
                mine = routing.counts
        counts = exchange_counts(self._ep, _DISPATCH, self._sizes(x, topk_ids), mine, {"`rule`": RULES})
        if routing is None:
            by_rank = counts.cpu().numpy()
            routing = route(self._slots(topk_ids, counted, by_rank), layout, None)
            first = layout.rank * layout.experts_per_rank
            to_slots = self._choice.slot_counts(by_rank)[:, first : first + layout.experts_per_rank]
            counts = torch.from_numpy(to_slots.copy()).to(x.device)
        received = exchange(self._ep, routing, counts, x.shape[0], lambda token, _: copy_rows(self._ep, x, token))
        self._step += 1
        return DispatchedRows(
            received.rows,
            counts.sum(dim=0),
            received.source,
            received.token,
            received.k,
            routing,
            topk_weights,
            self._step,
        )

    def combine(self, dispatched: DispatchedRows, expert_out: torch.Tensor) -> torch.Tensor:
        """Bring the experts' rows home and add them up, weighted; a collective of the group.

        Args:
            dispatched: of the last `dispatch`.
            expert_out: (R, H′), one row for each of `dispatched.rows`, in their order; any float dtype.

        Returns:
            (T, H′), dtype of expert_out: float32 sums, k ascending, every product rounded before it is added, rounded
            once. A token with no computed entry is zero.

        Raises:
            ConstraintError, UnsupportedTypeError: rows that are not one for each dispatched row, or not of a float
                dtype; the other ranks get a RankDisagreementError that says so.
            RankDisagreementError: H′ or the dtype differ between ranks, the same error on every rank.
        """
        with self._refusing(_COMBINE, expert_out=expert_out):
            if expert_out.dim() != 2 or expert_out.shape[0] != dispatched.rows.shape[0]:
                raise ConstraintError(
                    "expert_out",
                    f"of shape {tuple(expert_out.shape)}",
                    f"must have one row for each of the {dispatched.rows.shape[0]} dispatched rows",
                    "apply each slot's expert to its num_tokens_per_expert rows and keep their order",
                )
            _refuse_whole_numbers("expert_out", expert_out)
            _refuse_gradients("expert_out", expert_out)
            back = torch.bincount(dispatched.source_rank, minlength=self._ep.world_size)[:, None]
        sizes = {
            "hidden size of `expert_out`": expert_out.shape[1],
            "dtype of `expert_out`": dtype_code(expert_out.dtype),
            "step of the dispatch": dispatched.step,
        }
        home = exchange_counts(self._ep, _COMBINE, sizes, back)[:, 0]
        order = torch.sort(dispatched.source_rank, stable=True).indices
        rows = copy_rows(self._ep, expert_out, order)
        rows = self._ep.exchange_rows(rows, back[:, 0].tolist(), home.tolist(), into_scratch=True)
        return _weighted_sum(rows, dispatched.routing, dispatched.topk_weights)

    @contextmanager
    def _refusing(self, operator: str, **tensors: torch.Tensor) -> Iterator[None]:
        """Whatever is refused inside, beginning with arguments that are no tensors, is refused on every rank."""
        first = next(iter(tensors.values()))
        with refusing_together(first if isinstance(first, torch.Tensor) else None, [(self._ep, operator)]):
            refuse_other_types(**tensors)
            yield

    def _slots(self, topk_ids: torch.Tensor, counted: torch.Tensor, by_rank: np.ndarray | None = None) -> torch.Tensor:
        """Slot ids; S, which `route` leaves at home, where nothing is to be computed."""
        experts = torch.where(counted, topk_ids, 0)
        return torch.where(counted, self._choice(experts, counted, by_rank), self.num_slots)

    def _layout(self, x: torch.Tensor, topk_ids: torch.Tensor) -> Layout:
        return make_layout(
            ep=self._ep.world_size,
            rank=self._ep.rank,
            num_experts=self.num_slots,
            num_tokens=x.shape[0],
            hidden=x.shape[1],
            top_k=topk_ids.shape[1],
        )

    def _sizes(self, x: torch.Tensor, topk_ids: torch.Tensor) -> dict[str, int]:
        return {
            "hidden size of `x`": x.shape[1],
            "dtype of `x`": dtype_code(x.dtype),
            "top-k of `topk_ids`": topk_ids.shape[1],
            "logical experts": self.num_experts,
            "`num_slots`": self.num_slots,
            "`rule`": RULES.index(self.rule),
            "digest of the EPLB table": self._table_digest,
        }

    def _check(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        if x.dim() != 2:
            raise ConstraintError("x", f"of shape {tuple(x.shape)}", "must be (tokens, hidden)", "flatten the batch")
        if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0] or topk_ids.shape[1] < 1:
            raise ConstraintError(
                "topk_ids",
                f"of shape {tuple(topk_ids.shape)}",
                f"must be (tokens, k) with the {x.shape[0]} tokens of x",
                "pass the router's indices",
            )
        if topk_weights.shape != topk_ids.shape:
            raise ConstraintError(
                "topk_weights",
                f"of shape {tuple(topk_weights.shape)}",
                f"must have the shape of topk_ids, {tuple(topk_ids.shape)}",
                "pass one weight per index",
            )
        if topk_ids.dtype not in (torch.int32, torch.int64):
            raise UnsupportedTypeError("topk_ids", topk_ids.dtype, "must be int32 or int64", "convert it")
        for name, tensor in (("x", x), ("topk_weights", topk_weights)):
            _refuse_whole_numbers(name, tensor)
            _refuse_gradients(name, tensor)
        if self._check_values and topk_ids.numel():
            low, high = torch.aminmax(topk_ids)
            if low < -1 or high >= self.num_experts:
                token, k = ((topk_ids < -1) | (topk_ids >= self.num_experts)).nonzero()[0].tolist()
                raise ConstraintError(
                    "topk_ids",
                    f"{int(topk_ids[token, k])} for token {token}, k {k}",
                    f"must be a logical expert, 0 to {self.num_experts - 1}, or -1 for none",
                    "route to the experts of the table",
                )


def _weighted_sum(rows: torch.Tensor, routing: Routing, topk_weights: torch.Tensor) -> torch.Tensor:
    """Rows come home in the order in which `routing` sent the tokens out, so each one's place is known."""
    num_tokens, top_k = topk_weights.shape
    place = torch.full((num_tokens, top_k), -1, dtype=torch.int64, device=rows.device)
    place[routing.token, routing.k] = torch.arange(len(rows), device=rows.device)
    total = torch.zeros((num_tokens, rows.shape[1]), dtype=torch.float32, device=rows.device)
    add_rows(total, rows, place, topk_weights.float())
    return total.to(rows.dtype)


def _refuse_whole_numbers(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise UnsupportedTypeError(name, tensor.dtype, "must be a float dtype", "convert it")


def _refuse_gradients(name: str, tensor: torch.Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ConstraintError(
            name,
            "a tensor that requires gradients",
            "must not, since gradients do not cross ranks here",
            "call under torch.no_grad() or torch.inference_mode(), or pass a detached tensor",
        )
