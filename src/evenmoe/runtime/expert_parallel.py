"""`ExpertParallel`: table, rule, dispatch and combine of one MoE layer in one object.

Shapes: T tokens of this rank, H hidden, K experts per token, E logical experts, S slots, W ranks, R rows received.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import torch

from evenmoe.contract.layout import Layout, make_layout
from evenmoe.errors import ConstraintError, require
from evenmoe.ops.exchange import prepare_sending, received, route, sums
from evenmoe.ops.weighted_sum import sum_dtype, sum_rows
from evenmoe.rules import RULES
from evenmoe.rules.rule import IntArray, Rule
from evenmoe.rules.table import counted_entries
from evenmoe.runtime.arguments import check_combine, check_dispatch
from evenmoe.runtime.gradients import Chosen, record_combine, record_dispatch, state_of
from evenmoe.runtime.outside_graph import outside_graph
from evenmoe.runtime.replica_gradients import OfSlots, find_replicas, reduce_gradients
from evenmoe.runtime.rows import DispatchedRows, PartialSums, return_rows, return_sums
from evenmoe.runtime.setup import set_up
from evenmoe.transport.agreement import (
    COMBINE_MODE,
    GRADIENTS_OF_ROWS,
    GRADIENTS_OF_WEIGHTS,
    GRADIENTS_OF_X,
    LAYER,
    OFF,
    RULE_CODE,
    Header,
    digest,
    dtype_code,
)
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.process_world import Group

_DISPATCH, _COMBINE = "ExpertParallel.dispatch", "ExpertParallel.combine"
_BATCH = "batch rule of ExpertParallel.dispatch"
_SUMS = ("exact", "reduced")
_KEPT = 256  # plans of a layer: as many batch sizes; a plan is a kilobyte


@dataclass(frozen=True)
class _Plan:
    """What follows from the shapes and dtypes of a dispatch, checked once for all that have them.

    Attributes:
        layout, header: who holds what, and what the ranks must agree on.
        gradients: what this rank says of those of x.
    """

    layout: Layout
    header: Header
    gradients: int


class ExpertParallel:
    """One MoE layer across the ranks of a group: logical top-k in, weighted sums out.

    Gradients cross ranks as rows do: `dispatch` and `combine` are differentiable in x, the experts' outputs and the
    routing weights, and their backward is a collective of all ranks. A deep copy is a layer of its own on the same
    group; a layer cannot be pickled.

    Every dispatch has an identity: the layer, the number of the group's exchange, the table. Ranks that make another
    call than the others (they skip a layer, repeat one, combine in another order) get one RankDisagreementError that
    says which rank is where, on all ranks; so does a call that is invalid or fails on one rank, on all others. The
    group is in step then, and the next call that all ranks make is right. Several dispatches may be in flight, of one
    layer or of many, and be combined in any order that is common to all ranks.

    Args:
        group: the ranks, which hold equally many slots, slot s on rank s // (S / W): this rank's transport (`rank.ep`
            of a world), a torch.distributed ProcessGroup, or one axis of a DeviceMesh (`mesh["ep"]`). The first layer
            on a group of torch.distributed is a collective of its ranks.
        eplb_table: int32 (E, F), row e = [count, slot ids…, don't care]; slot ids are unique over the table. The
            same on every rank (`Placement.eplb_table`).
        num_slots: S, a multiple of W.
        rule: which replica a token uses, a `evenmoe.rules.rule.Rule` or its name: "rank", "token", "occurrence",
            "batch" (the split of the whole batch that minimizes the busiest rank's load; the counts it needs travel
            instead of the usual ones), or one of your own (`evenmoe.rules`).
        check_values: look at ids at every step. False saves the pass; a wrong value is then undefined.
        layer: a number of the layer, 0 or more, the same on all ranks, for messages and to tell layers apart. None for
            the next number of the group, which agrees if all ranks make their layers in the same order.
        transport: how the ranks of a group of torch.distributed exchange what is on the CPU, the same on all of them:
            "shared_memory", "process_group", or "auto" for shared memory where all ranks are on one Linux host.
            `describe` says which it is. The transport of a world is chosen where that is opened.
        combine: "exact", where every row returns to its token and the sum is that of one process, bit for bit; or
            "reduced", where each rank adds up its rows of a token first and one row returns for each (token, rank).
            Fewer rows travel, 3.6 in place of 8 for 8 experts on 4 ranks; each sum is rounded to the dtype of the rows
            on its way, so that y differs from the exact sum by no more than 2 u Σ_k |weight · row| and what float32
            sums differ by, u being the dtype's unit roundoff (2^-8 for bfloat16). Weights are used in float32.

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
        group: Group,
        eplb_table: torch.Tensor,
        *,
        num_slots: int,
        rule: str | Rule = "rank",
        check_values: bool = True,
        layer: int | None = None,
        transport: str = "auto",
        combine: str = "exact",
    ) -> None:
        require(combine in _SUMS, "combine", repr(combine), "must be 'exact' or 'reduced'", "pass one of them")
        self.setup = setup = set_up(group, eplb_table, num_slots, rule, check_values, layer, transport)
        self._sums = combine
        self._group, self._rule, self._table = setup.group, setup.rule, setup.table
        self.num_slots, self.rule, self.num_experts, self.layer = num_slots, setup.rule.name, *setup.numbers
        self._choose = setup.chooser(setup.group.rank)
        experts, slots = counted_entries(self._table)
        self._table_digest = digest(experts * num_slots + slots)
        self._plans: dict[tuple[object, ...], _Plan] = {}
        self._combine_headers: dict[tuple[object, ...], Header] = {}
        self._chosen = Chosen()
        self._batch_header = Header(_BATCH, {LAYER: self.layer})

    def describe(self) -> str:
        """Return a line that says what the layer is, and by what its ranks exchange rows.

        >>> import evenmoe as em
        >>> with em.local_world(ep_size=2) as world:
        ...     table = em.Placement([[0, 1, 0, 2]], num_ranks=2).eplb_table(0)
        ...     em.ExpertParallel(world.ranks[0].ep, table, num_slots=4, layer=7).describe()
        "layer 7: 3 logical experts in 4 slots of 2 ranks, rule 'rank', exchange by threads of one process"
        """
        experts = f"{self.num_experts} logical experts in {self.num_slots} slots of {self._group.world_size} ranks"
        sums = "" if self._sums == "exact" else ", reduced sums"
        return f"layer {self.layer}: {experts}, rule {self.rule!r}{sums}, exchange by {self._group.description}"

    def __deepcopy__(self, memo: object) -> ExpertParallel:
        return ExpertParallel(
            self._group,
            self._table,
            num_slots=self.num_slots,
            rule=self._rule,
            check_values=self.setup.check_values,
            layer=self.setup.given_layer,
            combine=self._sums,
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ConstraintError(
            "ExpertParallel",
            "a layer with an open connection to other ranks",
            "cannot be pickled",
            "pickle its placement, and make the layer anew where it is loaded",
        )

    @outside_graph
    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> DispatchedRows:
        """Send each token once to every rank that computes for it; a collective of the group.

        Args:
            x: (T, H), float16, bfloat16, float32 or float64. T may differ between ranks, and be 0.
            topk_ids: int32 or int64 (T, K), logical experts 0…E−1, or −1 for an assignment that is not computed.
            topk_weights: any float dtype (T, K), used by `combine` in float32 (in float64 for rows and weights of it).

        Returns:
            `DispatchedRows`: this rank's rows, expert-major.

        Raises:
            ConstraintError, UnsupportedTypeError: on this rank's arguments; the other ranks get a
                RankDisagreementError that says so.
            RankDisagreementError: ranks make different calls or call with different sizes, or the call failed on
                another rank; the same error on every rank.
            LostRankError: a rank is gone or was interrupted; `.ranks` says which. The group is closed for good.
        """
        call = GroupCall(self._group, _DISPATCH, x)
        with together(call):
            plan = self._plan(x, topk_ids, topk_weights)
            layout, header, counted = plan.layout, plan.header, self.setup.counted(topk_ids)
            recorded = plan.gradients != OFF
            by_rank = to_slots = None
            if self._rule.needs_counts:
                by_rank = call.agree(header, self._count_experts(topk_ids)).cpu().numpy()
                recorded = recorded and call.needs(GRADIENTS_OF_X)
                to_slots, header = self._choose.slot_counts(by_rank), self._batch_header
            slots = self._slots(topk_ids, counted, by_rank, recorded=plan.gradients != OFF)
            routing = route(slots, layout)
            reduced = self._sums == "reduced"
            weights = topk_weights.detach().float() if reduced else None
            sending = prepare_sending(routing, layout.num_tokens, (layout.hidden,), x, weights=weights)
            sent = routing.counts if to_slots is None else routing.counts[:, :0]  # they follow from the others' counts
            rows = x.detach() if x.requires_grad else x
            counts, incoming = call.send(header, sent, sending.outgoing, rows, sending.token, sending.assignments)
            if not self._rule.needs_counts:
                recorded = recorded and call.needs(GRADIENTS_OF_X)
            if to_slots is not None:
                first = layout.rank * layout.experts_per_rank
                counts = torch.from_numpy(to_slots[:, first : first + layout.experts_per_rank].copy()).to(x.device)
            here = received(call, sending, counts, incoming)
            partial = None
            if here.weight is not None:
                partial = PartialSums(here.row, incoming.rows, here.weight, sending.token, sending.outgoing.rows)
        dispatched = DispatchedRows(
            here.rows,
            sums(counts, 0),
            here.source,
            here.token,
            here.k,
            slots,
            routing,
            # A copy, since the caller may write to them before combine.
            topk_weights.to(sum_dtype(topk_weights.dtype), copy=True),
            self._group.name,
            self.layer,
            call.number,
            partial,
        )
        return record_dispatch(self._group, dispatched, x) if recorded else dispatched

    @outside_graph
    def combine(self, dispatched: DispatchedRows, expert_out: torch.Tensor) -> torch.Tensor:
        """Return the experts' rows to their tokens and add them up, weighted; a collective of the group.

        Args:
            dispatched: of a `dispatch` of this layer, the same on all ranks; it may be combined again.
            expert_out: (R, H′), one row for each of `dispatched.rows`, in their order; any float dtype.

        Returns:
            (T, H′), dtype of expert_out: float32 sums (float64 for float64), k ascending, every product rounded before
            it is added, rounded once; with reduced sums, by rank and then k. A token with no computed assignment is
            zero.

        Raises:
            ConstraintError, UnsupportedTypeError: rows that are not one for each dispatched row, or not of a float
                dtype; the other ranks get a RankDisagreementError that says so.
            RankDisagreementError: the ranks combine different dispatches, or H′ or the dtype differ between them, or
                the call failed on another rank; the same error on every rank.
            LostRankError: as in `dispatch`.
        """
        call = GroupCall(self._group, _COMBINE, expert_out)
        with together(call):
            header = self._check_combine(dispatched, expert_out)
            weights = dispatched.topk_weights.to(sum_dtype(expert_out.dtype))
            rows = expert_out.detach() if expert_out.requires_grad else expert_out
            if dispatched.partial is None:
                incoming, position = return_rows(call, header, dispatched, rows)
                y = sum_rows(incoming, position, weights.detach())
            else:
                incoming, position = return_sums(call, header, dispatched, dispatched.partial, rows)
                y = sum_rows(incoming, position, torch.ones(position.shape, dtype=weights.dtype, device=rows.device))
        if not torch.is_grad_enabled():
            return y
        needed = call.needs(GRADIENTS_OF_ROWS), call.needs(GRADIENTS_OF_WEIGHTS)
        return record_combine(self._group, dispatched, expert_out, weights, y, needed) if any(needed) else y

    def reduce_replica_gradients(self, parameters: Iterable[OfSlots]) -> None:
        """Add up the gradients of each expert's replicas, in place; a collective of the group.

        Call it after backward and before the optimizer, so that replicas get equal gradients and stay equal: training
        with replicas is training without them.

        Args:
            parameters: those of this rank's slots, in the same order on all ranks. Each is one tensor (slots of this
                rank, …), or one tensor for every slot: `zip(*(expert.parameters() for expert in experts))`.

        Every replica's `.grad` becomes the sum over the expert's slots, added up by slot in float32 (float64 for
        float64) and rounded once; None counts as zero, and stays None where no replica has a gradient.

        Raises:
            ConstraintError, UnsupportedTypeError: parameters that are not those of this rank's slots.
            RankDisagreementError: other parameters on other ranks; the same error on every rank.
            LostRankError: as in `dispatch`.

        Two ranks, expert 0 on both, of which the first has gradient 1, the other 2:

        >>> import evenmoe as em
        >>> placement = em.Placement([[0, 1, 0, 2]], num_ranks=2)
        >>> def step(rank):
        ...     ep = em.ExpertParallel(rank.ep, placement.eplb_table(0), num_slots=4)
        ...     experts = torch.zeros((2, 1), requires_grad=True)
        ...     experts.grad = torch.full((2, 1), rank.index + 1.0)
        ...     ep.reduce_replica_gradients([experts])
        ...     return experts.grad.flatten().tolist()
        >>> with em.local_world(ep_size=2) as world:
        ...     world.run(step)
        [[3.0, 1.0], [3.0, 2.0]]
        """
        per_rank = self.num_slots // self._group.world_size
        replicas = find_replicas(self._table, self.layer, self._group.rank, per_rank)
        reduce_gradients(self._group, replicas, parameters)

    def _plan(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> _Plan:
        """What is known of calls with such arguments; they are checked when the first of them comes."""
        gradients = state_of(x) if isinstance(x, torch.Tensor) else OFF
        key: list[object] = [gradients]
        for tensor in (x, topk_ids, topk_weights):
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_nested:
                break  # no call with such a tensor has passed the checks
            key += tensor.shape, tensor.dtype, tensor.device
        plan = self._plans.get(tuple(key))
        if plan is None:
            check_dispatch(x, topk_ids, topk_weights)
            (num_tokens, hidden), top_k = x.shape, topk_ids.shape[1]
            layout = make_layout(
                ep=self._group.world_size,
                rank=self._group.rank,
                num_experts=self.num_slots,
                num_tokens=num_tokens,
                hidden=hidden,
                top_k=top_k,
            )
            sizes = {
                LAYER: self.layer,
                "hidden size of `x`": hidden,
                "dtype of `x`": dtype_code(x.dtype),
                "top-k of `topk_ids`": top_k,
                "logical experts": self.num_experts,
                "`num_slots`": self.num_slots,
                "`rule`": digest(self.rule.encode()),
                RULE_CODE: digest(self._rule.identity().encode()),
                "digest of the EPLB table": self._table_digest,
                GRADIENTS_OF_X: gradients,
                COMBINE_MODE: _SUMS.index(self._sums),
            }
            if len(self._plans) >= _KEPT:
                self._plans.clear()
            names = {digest(name.encode()): name for name in (*RULES, self.rule)}
            choices = {"`rule`": defaultdict(lambda: "another rule", names), COMBINE_MODE: dict(enumerate(_SUMS))}
            plan = self._plans[tuple(key)] = _Plan(layout, Header(_DISPATCH, sizes, choices), gradients)
        return plan

    def _slots(
        self, topk_ids: torch.Tensor, counted: torch.Tensor | None, by_rank: IntArray | None, recorded: bool
    ) -> torch.Tensor:
        """The slot of every assignment, S where `counted` is False."""

        def choose() -> torch.Tensor:
            return self.setup.slots(self._choose, topk_ids, counted, by_rank)

        if not recorded or type(self._rule).__module__.startswith("evenmoe."):  # ours choose the same both times
            return choose()
        return self._chosen.again(topk_ids, by_rank, choose)

    def _count_experts(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """int64 (W, E), this rank's assignments to every expert, for every rank."""
        experts = torch.where(topk_ids >= 0, topk_ids, self.num_experts).flatten()
        by_expert = torch.bincount(experts, minlength=self.num_experts + 1)[: self.num_experts]
        return by_expert.expand(self._group.world_size, -1)

    def _check_combine(self, dispatched: DispatchedRows, expert_out: torch.Tensor) -> Header:
        check_combine(dispatched, expert_out, self._group.name, self.layer)
        states = state_of(expert_out, dispatched.link), state_of(dispatched.topk_weights)
        key = expert_out.shape[1], expert_out.dtype, *states
        header = self._combine_headers.get(key)
        if header is None:
            sizes = {
                LAYER: self.layer,
                "hidden size of `expert_out`": expert_out.shape[1],
                "dtype of `expert_out`": dtype_code(expert_out.dtype),
                GRADIENTS_OF_ROWS: states[0],
                GRADIENTS_OF_WEIGHTS: states[1],
            }
            header = self._combine_headers[key] = Header(_COMBINE, sizes)
        return header
