"""`ExpertParallel`: table, rule, dispatch and combine of one MoE layer in one object.

Shapes: T tokens of this rank, H hidden, K experts per token, E logical experts, S slots, W ranks, R rows received.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NoReturn

import torch

from evenmoe.contract.layout import Layout, make_layout
from evenmoe.errors import ConstraintError, UnsupportedTypeError, require
from evenmoe.ops.exchange import Routing, exchange, positions_of, prepare_returning, prepare_sending, route
from evenmoe.ops.operator import check_devices, check_tensors
from evenmoe.ops.weighted_sum import add_rows
from evenmoe.rules import RULES
from evenmoe.rules.rule import Rule, prepared
from evenmoe.rules.table import check_table_of_slots, counted_entries
from evenmoe.transport.agreement import LAYER, RULE_CODE, Header, digest, dtype_code
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.process_world import Group, transport_of

_DISPATCH, _COMBINE = "ExpertParallel.dispatch", "ExpertParallel.combine"
_BATCH = "batch rule of ExpertParallel.dispatch"
_KEPT = 256  # plans of a layer: as many batch sizes; a plan is a kilobyte


@dataclass(frozen=True)
class DispatchedRows:
    """What one rank computes on; made by `ExpertParallel.dispatch`, used by `ExpertParallel.combine`.

    Attributes:
        rows: (R, H), dtype of x, ordered by slot of this rank, source rank, token.
        num_tokens_per_expert: int64 (slots of this rank,), rows per slot; they add up to R.
        source_rank, source_token, source_k: int32 (R,), the (rank, token, k) that each row serves.
        layer, number: which layer's dispatch it is, and which exchange of the group; the same on all ranks.
    """

    rows: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    source_rank: torch.Tensor
    source_token: torch.Tensor
    source_k: torch.Tensor
    routing: Routing
    topk_weights: torch.Tensor
    group_name: str
    layer: int
    number: int


@dataclass(frozen=True)
class _Plan:
    """What follows from the shapes and dtypes of a dispatch, checked once for all that have them."""

    layout: Layout
    header: Header


class ExpertParallel:
    """One MoE layer across the ranks of a group: logical top-k in, weighted sums out.

    Inference only: gradients do not cross ranks, so tensors that require them are an error. A deep copy is a layer of
    its own on the same group; a layer cannot be pickled.

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
    ) -> None:
        self._group = ep = transport_of(group, transport=transport)
        self._rule, self._check_values = RULES.get(rule), check_values
        self.num_slots, self.rule = num_slots, self._rule.name
        nearest = max(1, round(num_slots / ep.world_size)) * ep.world_size
        rule, fix = f"must be a multiple of the {ep.world_size} ranks", f"use {nearest}, the nearest that is"
        require(num_slots >= 1 and num_slots % ep.world_size == 0, "num_slots", num_slots, rule, fix)
        known = layer is None or (isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < 2**62)
        require(known, "layer", repr(layer), "must be a whole number from 0", "pass the layer's index")
        check_table_of_slots(eplb_table, num_slots)
        self._table = eplb_table.clone()  # it is read at every step, when its owner may have changed it
        self._choose = prepared(self._rule, self._table, num_slots, ep.rank, ep.world_size)
        self.num_experts = eplb_table.shape[0]
        experts, slots = counted_entries(self._table)
        self._table_digest = digest(experts * num_slots + slots)
        self._given_layer, self.layer = layer, ep.next_layer() if layer is None else layer
        self._plans: dict[tuple[object, ...], _Plan] = {}
        self._combine_headers: dict[tuple[int, torch.dtype], Header] = {}
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
        return f"layer {self.layer}: {experts}, rule {self.rule!r}, exchange by {self._group.description}"

    def __deepcopy__(self, memo: object) -> ExpertParallel:
        return ExpertParallel(
            self._group,
            self._table,
            num_slots=self.num_slots,
            rule=self._rule,
            check_values=self._check_values,
            layer=self._given_layer,
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ConstraintError(
            "ExpertParallel",
            "a layer with an open connection to other ranks",
            "cannot be pickled",
            "pickle its placement, and make the layer anew where it is loaded",
        )

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> DispatchedRows:
        """Send each token once to every rank that computes for it; a collective of the group.

        Args:
            x: (T, H), float16, bfloat16, float32 or float64. T may differ between ranks, and be 0.
            topk_ids: int32 or int64 (T, K), logical experts 0…E−1, or −1 for an assignment that is not computed.
            topk_weights: any float dtype (T, K), used by `combine` in float32.

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
            layout, header, counted = plan.layout, plan.header, self._counted(topk_ids)
            weights = topk_weights.to(torch.float32, copy=True)  # the caller may write to them before combine
            by_rank = to_slots = None
            if self._rule.needs_counts:
                by_rank = call.agree(header, self._count_experts(topk_ids)).cpu().numpy()
                to_slots, header = self._choose.slot_counts(by_rank), self._batch_header
            if counted is None:
                slots = self._choose(topk_ids, None, by_rank)
            else:
                slots = self._choose(torch.where(counted, topk_ids, 0), counted, by_rank)
                slots = torch.where(counted, slots, self.num_slots)  # which `route` leaves here
            routing = route(slots, layout)
            sending = prepare_sending(routing, layout.num_tokens, (layout.hidden,), x)
            sent = routing.counts if to_slots is None else routing.counts[:, :0]  # they follow from the others' counts
            counts = call.agree(header, sent, sending.outgoing)
            if to_slots is not None:
                first = layout.rank * layout.experts_per_rank
                counts = torch.from_numpy(to_slots[:, first : first + layout.experts_per_rank].copy()).to(x.device)
            received = exchange(call, sending, counts, x, sending.token)
            return DispatchedRows(
                received.rows,
                counts.sum(dim=0),
                received.source,
                received.token,
                received.k,
                routing,
                weights,
                self._group.name,
                self.layer,
                call.number,
            )

    def combine(self, dispatched: DispatchedRows, expert_out: torch.Tensor) -> torch.Tensor:
        """Return the experts' rows to their tokens and add them up, weighted; a collective of the group.

        Args:
            dispatched: of a `dispatch` of this layer, the same on all ranks; it may be combined again.
            expert_out: (R, H′), one row for each of `dispatched.rows`, in their order; any float dtype.

        Returns:
            (T, H′), dtype of expert_out: float32 sums, k ascending, every product rounded before it is added, rounded
            once. A token with no computed assignment is zero.

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
            source, routing, weights = dispatched.source_rank, dispatched.routing, dispatched.topk_weights
            shape, world_size = expert_out.shape[1:], self._group.world_size
            order, outgoing = prepare_returning(source, world_size, shape, expert_out, numbered=False)
            back = torch.tensor(outgoing.rows)[:, None]
            home = call.agree(header, back, outgoing, dispatched.number)[:, 0].tolist()
            sent_out = routing.counts.sum(dim=1).tolist()
            if home != sent_out:
                raise ConstraintError(
                    "dispatched",
                    f"such that {home} rows come back from the ranks where {sent_out} were sent to them",
                    "must be what dispatch returned, unchanged",
                    "pass it to combine as it is",
                )
            incoming = call.exchange(expert_out, order)
            # Rows return in the order in which `routing` sent the tokens out, so each one's position is known.
            assignments = routing.token * weights.shape[1] + routing.k
            position = positions_of(incoming, assignments, weights.numel()).view(weights.shape)
            total = expert_out.new_zeros((len(weights), expert_out.shape[1]), dtype=torch.float32)
            add_rows(total, incoming, position, weights)
            return total.to(expert_out.dtype)

    def _plan(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> _Plan:
        """What is known of calls with such arguments; they are checked when the first of them comes."""
        key: list[object] = []
        for tensor in (x, topk_ids, topk_weights):
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_nested:
                break  # no call with such a tensor has passed the checks
            trained = tensor.requires_grad and torch.is_grad_enabled()
            key += tensor.shape, tensor.dtype, tensor.device, trained
        plan = self._plans.get(tuple(key))
        if plan is None:
            self._check(x, topk_ids, topk_weights)
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
            }
            if len(self._plans) >= _KEPT:
                self._plans.clear()
            names = {digest(name.encode()): name for name in (*RULES, self.rule)}
            choices = {"`rule`": defaultdict(lambda: "another rule", names)}
            plan = self._plans[tuple(key)] = _Plan(layout, Header(_DISPATCH, sizes, choices))
        return plan

    def _counted(self, topk_ids: torch.Tensor) -> torch.Tensor | None:
        """bool (T, K), where there is an expert to compute; None where that is known to be everywhere.

        Raises:
            ConstraintError: an id that is no expert's, unless values are not looked at.
        """
        if not self._check_values or not topk_ids.numel():
            return topk_ids >= 0
        low, high = torch.aminmax(topk_ids)
        if low < -1 or high >= self.num_experts:
            token, k = ((topk_ids < -1) | (topk_ids >= self.num_experts)).nonzero()[0].tolist()
            raise ConstraintError(
                "topk_ids",
                f"{int(topk_ids[token, k])} for token {token}, k {k}",
                f"must be a logical expert, 0 to {self.num_experts - 1}, or -1 for none",
                "route to the experts of the table",
            )
        return topk_ids >= 0 if low < 0 else None

    def _count_experts(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """int64 (W, E), this rank's assignments to every expert, for every rank."""
        experts = torch.where(topk_ids >= 0, topk_ids, self.num_experts).flatten()
        by_expert = torch.bincount(experts, minlength=self.num_experts + 1)[: self.num_experts]
        return by_expert.expand(self._group.world_size, -1)

    def _check_combine(self, dispatched: DispatchedRows, expert_out: torch.Tensor) -> Header:
        check_tensors(expert_out=expert_out)
        if not isinstance(dispatched, DispatchedRows):
            raise UnsupportedTypeError(
                "dispatched",
                f"a {type(dispatched).__name__}",
                "must be what dispatch returned",
                "keep it until combine",
            )
        if (dispatched.group_name, dispatched.layer) != (self._group.name, self.layer):
            raise ConstraintError(
                "dispatched",
                f"of layer {dispatched.layer} on group {dispatched.group_name!r}",
                f"must be of this layer, {self.layer} on group {self._group.name!r}",
                "combine with the layer that dispatched",
            )
        if expert_out.dim() != 2 or expert_out.shape[0] != dispatched.rows.shape[0]:
            raise ConstraintError(
                "expert_out",
                f"of shape {tuple(expert_out.shape)}",
                f"must have one row for each of the {dispatched.rows.shape[0]} dispatched rows",
                "apply each slot's expert to its num_tokens_per_expert rows and keep their order",
            )
        check_devices({"dispatched.rows": dispatched.rows, "expert_out": expert_out})
        _check_floats("expert_out", expert_out)
        key = expert_out.shape[1], expert_out.dtype
        header = self._combine_headers.get(key)
        if header is None:
            sizes = {
                LAYER: self.layer,
                "hidden size of `expert_out`": expert_out.shape[1],
                "dtype of `expert_out`": dtype_code(expert_out.dtype),
            }
            header = self._combine_headers[key] = Header(_COMBINE, sizes)
        return header

    def _check(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        check_tensors(x=x, topk_ids=topk_ids, topk_weights=topk_weights)
        check_devices({"x": x, "topk_ids": topk_ids, "topk_weights": topk_weights})
        require(x.dim() == 2, "x", f"of shape {tuple(x.shape)}", "must be (tokens, hidden)", "flatten the batch")
        ids, weights = tuple(topk_ids.shape), tuple(topk_weights.shape)
        rule = f"must be (tokens, k) with the {x.shape[0]} tokens of x"
        fits = len(ids) == 2 and ids[0] == x.shape[0] and ids[1] >= 1
        require(fits, "topk_ids", f"of shape {ids}", rule, "pass the router's indices")
        rule = f"must have the shape of topk_ids, {ids}"
        require(weights == ids, "topk_weights", f"of shape {weights}", rule, "pass one weight per index")
        if topk_ids.dtype not in (torch.int32, torch.int64):
            raise UnsupportedTypeError("topk_ids", topk_ids.dtype, "must be int32 or int64", "convert it")
        _check_floats("x", x)
        _check_floats("topk_weights", topk_weights)


def _check_floats(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise UnsupportedTypeError(name, tensor.dtype, "must be a float dtype", "convert it")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ConstraintError(
            name,
            "a tensor that requires gradients",
            "must not, since gradients do not cross ranks here",
            "call under torch.no_grad() or torch.inference_mode(), or pass a detached tensor",
        )
