"""One policy on its way through the steps: the placement in use, the slots its rule takes, and what has been found.

The rule takes the slots compiled, or by being called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import count_copies, peak_over_mean
from evenmoe.placement import Placement
from evenmoe.rules.rule import Chooser, Rule, prepared
from evenmoe.rules.split_batch import SplitPlan
from evenmoe.simulator.batches import Cluster, Counts
from evenmoe.simulator.costs import CostModel, route_copies
from evenmoe.simulator.policies import Policy
from evenmoe.simulator.result import Details, PolicyResult, Traffic

Experts = npt.NDArray[np.integer]  # (G, B, K), of every token


@dataclass
class Scratch:
    """Memory of one thread for one policy.

    Attributes:
        per_slot: `Cluster.count_type` (S, G), assignments that each slot takes from each source rank.
        chosen: int32 (G, B, K), the slot of every assignment; empty where only counts are known.
    """

    per_slot: Counts
    chosen: npt.NDArray[np.int32]


class SlotChoice(Protocol):
    """A rule on a placement."""

    def fill(self, key: tuple[int, int, int], counts: Counts, experts: Experts | None, scratch: Scratch) -> None:
        """Fill `scratch` for one layer of one step.

        Args:
            key: seed, step and layer, which decide random numbers.
            counts: `Cluster.count_type` (E, G), assignments of each expert on each source rank.
            experts: the assignments themselves, or None.
        """
        ...


def choose_by(rule: Rule, placement: Placement, cluster: Cluster) -> SlotChoice:
    """The rule's compiled kernel if it has one; else the rule itself is called, rank by rank."""
    return (CalledRule if rule.kernel is None else CompiledRule)(rule, placement, cluster)


class CompiledRule:
    """One of the rules that `layer_kernels` knows."""

    def __init__(self, rule: Rule, placement: Placement, cluster: Cluster) -> None:
        from evenmoe.simulator import layer_kernels  # not at the top: importing numba takes 0.3 s

        assert rule.kernel is not None
        self._kernel, self._tokens_per_rank = rule.kernel, cluster.tokens_per_rank
        layers, slots = placement.slot_to_expert.shape
        self._first = np.zeros((layers, placement.num_experts + 1), np.int64)
        np.cumsum(placement.num_replicas, axis=1, out=self._first[:, 1:])
        self._slots = np.empty((layers, slots), np.int64)
        position = np.take_along_axis(self._first, placement.slot_to_expert.astype(np.int64), axis=1)
        np.put_along_axis(self._slots, position + placement.replica_index, np.arange(slots)[None], axis=1)
        self._splits = [
            SplitPlan(row, placement.num_ranks, placement.num_experts)
            for row in (placement.slot_to_expert if self._kernel == layer_kernels.BATCH else ())
        ]

    def fill(self, key: tuple[int, int, int], counts: Counts, experts: Experts | None, scratch: Scratch) -> None:
        """See `SlotChoice`."""
        from evenmoe.simulator import batch_kernels, layer_kernels

        layer = key[2]
        first, slots = self._first[layer], self._slots[layer]
        quotas = np.zeros(len(slots), np.int64)
        if self._splits:
            quotas = self._splits[layer].split(counts.sum(axis=1, dtype=np.int64))
        if experts is not None:
            layer_kernels.choose_slots(experts, first, slots, self._kernel, quotas, scratch.chosen)
            layer_kernels.count_chosen(scratch.chosen, scratch.per_slot)
        elif self._kernel == layer_kernels.TOKEN:
            batch_kernels.share_by_row(counts, self._tokens_per_rank, first, slots, *key, scratch.per_slot)
        else:
            layer_kernels.share_counts(counts, first, slots, self._kernel, quotas, scratch.per_slot)


class CalledRule:
    """Any other rule: its chooser is called for the batch of every rank.

    Where only counts are known, the tokens that each expert is assigned to are drawn, without replacement.
    """

    def __init__(self, rule: Rule, placement: Placement, cluster: Cluster) -> None:
        self._rule, self._placement, self._cluster = rule, placement, cluster
        self._choosers: dict[int, list[Chooser]] = {}  # of every rank, by layer

    def fill(self, key: tuple[int, int, int], counts: Counts, experts: Experts | None, scratch: Scratch) -> None:
        """See `SlotChoice`."""
        import torch

        layer = key[2]
        if layer not in self._choosers:
            self._choosers[layer] = self._prepare(layer)
        by_rank = np.ascontiguousarray(counts.T, np.int64)
        random = np.random.default_rng(key)
        for rank, choose in enumerate(self._choosers[layer]):
            if experts is None:
                ids, counted = self._draw(by_rank[rank], random)
            else:
                ids = experts[rank].astype(np.int64)
                counted = np.ones(ids.shape, bool)
            with self._rule.blaming():  # a chooser may be a user's, too
                chosen = choose(torch.from_numpy(ids), torch.from_numpy(counted), by_rank).numpy()
            scratch.per_slot[:, rank] = np.bincount(chosen[counted], minlength=len(scratch.per_slot))
            if experts is not None:
                scratch.chosen[rank] = chosen

    def _prepare(self, layer: int) -> list[Chooser]:
        table, num_slots = self._placement.eplb_table(layer), self._placement.num_slots
        ranks = range(self._cluster.num_ranks)
        return [prepared(self._rule, table, num_slots, rank, self._cluster.num_ranks) for rank in ranks]

    def _draw(
        self, counts: npt.NDArray[np.int64], random: np.random.Generator
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Experts (B, most of a token), filled up with expert 0, and which of them count."""
        experts = np.repeat(np.arange(len(counts)), counts)
        tokens = np.concatenate([random.permutation(self._cluster.tokens_per_rank)[:count] for count in counts])
        order = np.argsort(tokens, kind="stable")
        tokens, experts = tokens[order], experts[order]
        column = np.arange(len(tokens)) - np.searchsorted(tokens, tokens)
        shape = self._cluster.tokens_per_rank, int(column.max(initial=0)) + 1
        ids, counted = np.zeros(shape, np.int64), np.zeros(shape, bool)
        ids[tokens, column], counted[tokens, column] = experts, True
        return ids, counted


class StepResult:
    """What one step shows, layer by layer.

    Attributes:
        tokens, busy: int64 (L, G), rows that each rank computes, and its slots that have any.
        sent, received: float64 (L, 2, 2, G): a row per assignment, then once per rank; within, then between nodes.
    """

    def __init__(self, num_layers: int, num_ranks: int) -> None:
        self.tokens, self.busy = np.zeros((2, num_layers, num_ranks), np.int64)
        self.sent, self.received = np.zeros((2, num_layers, 2, 2, num_ranks))


class PolicyState:
    """A policy's placement and figures; `replay` moves it on."""

    def __init__(
        self,
        policy: Policy,
        cluster: Cluster,
        num_layers: int,
        num_experts: int,
        num_steps: int,
        *,
        copy_overlap: bool,
        details: bool = False,
    ) -> None:
        ranks = cluster.num_ranks
        self.policy, self.cluster = policy, cluster
        self._copy_overlap = copy_overlap
        self._coming: tuple[Placement, float] | None = None  # whose copies are under way, and their time left
        self._found = StepResult(num_layers, ranks)
        self._copies = np.zeros((num_steps, num_layers), np.int64)
        self._copy_time, self._step_time = np.zeros((2, num_steps))
        self._par = np.zeros((num_steps, num_layers))
        self._rows = np.zeros((num_steps, 4))
        self._rank_tokens = np.zeros((num_layers, ranks), np.int64)
        self._judged_tokens = np.zeros((num_layers, ranks), np.int64)
        self._refreshes: list[int] = []
        self._details = None
        if details:
            loads = np.zeros((num_steps, num_layers, ranks), np.int64)
            self._details = Details(loads, np.zeros((num_steps, num_layers, 4)))
        self._has_planned = False
        self._initial = policy.first_placement(cluster, num_layers, num_experts)
        self._use(self._initial)

    def _use(self, placement: Placement) -> None:
        self.placement = placement
        self._choice = choose_by(self.policy.rule, placement, self.cluster)

    def begin_step(self, step: int) -> bool:
        """Use what has been copied; whether a plan is made now, which no policy does while copies are under way."""
        if self._coming is not None and self._coming[1] <= 0:
            self._use(self._coming[0])
            self._coming = None
        return self._coming is None and self.policy.is_due(step)

    def plan(self, past: npt.NDArray[np.float64], seed: int) -> Placement:
        """The policy's next placement, from `past`, tokens (steps, L, E)."""
        previous = None if self.policy.starts_anew(self._has_planned) else self.placement
        return self.policy.plan(self.cluster, past, previous, seed)

    def replace(self, step: int, placement: Placement, costs: CostModel) -> None:
        """Use another placement from this step on. Before step 0 it becomes the first one, which costs nothing.

        The change from the default placement serves at once, since its copies are charged over the horizon. Those of
        later changes come before the step, or beside the steps, and then the placement serves once they are done.
        """
        self._has_planned = True
        if placement == self.placement:
            return
        if step == 0:
            self._initial = placement
        else:
            self._refreshes.append(step)
            self._copies[step] = count_copies(self.placement, placement)
            if not self.policy.sees_the_step:
                routed = route_copies(self.placement, placement, self.cluster.ranks_per_node)
                self._copy_time[step] = costs.copy_time(*routed)
                if self._copy_overlap and len(self._refreshes) > 1 and self._copy_time[step] > 0:
                    self._coming = placement, self._copy_time[step]
                    return
        self._use(placement)

    def new_scratch(self, top_k: int) -> Scratch:
        """`top_k` is 0 where only counts are known."""
        ranks = self.cluster.num_ranks
        return Scratch(
            np.empty((self.policy.num_slots, ranks), self.cluster.count_type),
            np.empty((ranks, self.cluster.tokens_per_rank, top_k), np.int32),
        )

    def run_layer(self, key: tuple[int, int, int], counts: Counts, experts: Experts | None, scratch: Scratch) -> None:
        """Find what one layer of one step does under the placement in use; the arguments are those of `SlotChoice`."""
        from evenmoe.simulator import layer_kernels as kernels  # not at the top: importing numba takes 0.3 s

        self._choice.fill(key, counts, experts, scratch)
        layer, per_slot, found = key[2], scratch.per_slot, self._found
        sent, received = found.sent[layer], found.received[layer]
        kernels.rank_work(per_slot, self.cluster.num_ranks, found.tokens[layer], found.busy[layer])
        near, width = self.cluster.ranks_per_node, self.placement.slots_per_rank
        kernels.count_rows(per_slot, near, sent[0], received[0])
        if width == 1:  # a token's experts are distinct, so no two of them go to one rank
            sent[1], received[1] = sent[0], received[0]
        elif experts is None:
            kernels.expect_rows_once(per_slot, self.cluster.tokens_per_rank, near, sent[1], received[1])
        else:
            kernels.count_rows_once(scratch.chosen, width, near, sent[1], received[1])

    def finish_step(self, step: int, costs: CostModel, *, judged: bool) -> None:
        """Enter what all layers of a step have found."""
        found = self._found
        way = 1 if costs.one_row_per_rank else 0
        self._par[step] = peak_over_mean(found.tokens.astype(np.float64))
        self._step_time[step] = costs.layer_time(
            found.tokens, found.busy, found.sent[:, way], found.received[:, way]
        ).sum()
        rows = found.sent.sum(axis=3).reshape(-1, 4)
        self._rows[step] = rows.sum(axis=0)
        self._rank_tokens += found.tokens
        if judged:
            self._judged_tokens += found.tokens
        if self._coming is not None:
            self._coming = self._coming[0], self._coming[1] - float(self._step_time[step])
        if self._details is not None:
            self._details.rank_loads[step], self._details.rows[step] = found.tokens, rows

    def result(self, baseline: PolicyState, costs: CostModel, judged: slice | None) -> PolicyResult:
        """Everything found; `baseline` is the default placement's state, `judged` None for all steps."""
        rows = np.rint(self._rows).astype(np.int64)
        placement = self.placement
        return PolicyResult(
            name=self.policy.name,
            description=self.policy.description,
            rule=self.policy.rule.name,
            par=self._par,
            rank_tokens=self._rank_tokens if judged is None else self._judged_tokens,
            copies=self._copies,
            refreshes=np.array(self._refreshes, np.int64),
            traffic=Traffic(*(np.ascontiguousarray(column) for column in rows.T)),
            step_time=self._step_time,
            copy_time=self._copy_time,
            initial=self._initial,
            final=placement,
            memory_per_rank=round(placement.num_layers * placement.slots_per_rank * costs.expert_bytes),
            break_even_steps=self._break_even(baseline, judged or slice(None)),
            details=self._details,
        )

    def _break_even(self, baseline: PolicyState, judged: slice) -> float:
        """Mean time of a refresh's copies over the mean time that a judged step gains."""
        spent = self._copy_time.sum()
        if spent == 0:
            return 0.0
        gain = float((baseline._step_time[judged] - self._step_time[judged]).mean())
        return spent / len(self._refreshes) / gain if gain > 0 else np.inf
