"""One policy on its way through the steps: the placement in use, and what has been found so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import count_copies, peak_over_mean
from evenmoe.placement import Placement
from evenmoe.rules.split_batch import SplitPlan
from evenmoe.simulator.copying import route_copies
from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.policies import Policy
from evenmoe.simulator.result import Details, PolicyResult, Traffic
from evenmoe.simulator.world import World

RULE_NUMBERS = {"rank": 0, "token": 1, "occurrence": 2, "batch": 3, "even": 4}  # as in share_kernels


class Found:
    """What one step shows, layer by layer.

    Attributes:
        tokens, busy: int64 (L, G), rows that each rank computes, and its slots that have any.
        sent, received: float64 (L, 2, 2, G): one row per pick, then once per rank; within, then between nodes.
    """

    def __init__(self, num_layers: int, num_ranks: int) -> None:
        self.tokens, self.busy = np.zeros((2, num_layers, num_ranks), np.int64)
        self.sent, self.received = np.zeros((2, num_layers, 2, 2, num_ranks))


@dataclass
class Scratch:
    """Memory of one thread for one policy.

    Attributes:
        per_slot: `World.count_type` (S, G), picks that each slot takes from each source rank.
        chosen: int32 (G, B, K), the slot of every pick; empty where picks are counts.
    """

    per_slot: npt.NDArray[np.signedinteger]
    chosen: npt.NDArray[np.int32]


class Track:
    """A policy's placement and figures; `replay` moves it on."""

    def __init__(self, policy: Policy, world: World, first: Placement, num_steps: int, details: bool) -> None:
        layers, ranks = first.num_layers, world.num_ranks
        self.policy = policy
        self.world = world
        self.found = Found(layers, ranks)
        self._copies = np.zeros((num_steps, layers), np.int64)
        self._copy_time = np.zeros(num_steps)
        self._step_time = np.zeros(num_steps)
        self._par = np.zeros((num_steps, layers))
        self._rows = np.zeros((num_steps, 4))
        self._rank_tokens = np.zeros((layers, ranks), np.int64)
        self._refreshes: list[int] = []
        self._details = None
        if details:
            self._details = Details(np.zeros((num_steps, layers, ranks), np.int64), np.zeros((num_steps, layers, 4)))
        self._planned = False
        self._initial = first
        self._use(first)

    def _use(self, placement: Placement) -> None:
        """Take up a placement: its replicas in table order, and its graphs where batches are split."""
        self.placement = placement
        layers, slots = placement.slot_to_expert.shape
        self.first = np.zeros((layers, placement.num_experts + 1), np.int64)
        np.cumsum(placement.num_replicas, axis=1, out=self.first[:, 1:])
        self.slots = np.empty((layers, slots), np.int64)
        place = np.take_along_axis(self.first, placement.slot_to_expert.astype(np.int64), axis=1)
        np.put_along_axis(self.slots, place + placement.replica_index, np.arange(slots)[None], axis=1)
        self._splits = [
            SplitPlan(row, placement.num_ranks, placement.num_experts)
            for row in (placement.slot_to_expert if self.policy.rule == "batch" else ())
        ]

    def start_of_plan(self) -> Placement | None:
        """What the next plan starts from; None where it is made anew."""
        anew = self.policy.start == "scratch" or (self.policy.start == "first" and not self._planned)
        return None if anew else self.placement

    def replace(self, step: int, placement: Placement, costs: CostModel) -> None:
        """Use another placement from this step on. Before step 0 it becomes the first one, which costs nothing."""
        self._planned = True
        if placement == self.placement:
            return
        if step == 0:
            self._initial = placement
        else:
            self._refreshes.append(step)
            self._copies[step] = count_copies(self.placement, placement)
            if self.policy.kind != "oracle":
                routed = route_copies(self.placement, placement, self.world.ranks_per_node)
                self._copy_time[step] = costs.copy_time(*routed)
        self._use(placement)

    def new_scratch(self, top_k: int) -> Scratch:
        """`top_k` is 0 where picks are counts."""
        world = self.world
        return Scratch(
            np.empty((self.policy.num_slots, world.num_ranks), world.count_type),
            np.empty((world.num_ranks, world.tokens_per_rank, top_k), np.int32),
        )

    def serve(
        self,
        step: int,
        layer: int,
        seed: int,
        counts: npt.NDArray[np.signedinteger],
        experts: npt.NDArray[np.integer] | None,
        scratch: Scratch,
    ) -> None:
        """Find what one layer of one step does under the placement in use.

        Args:
            counts: `World.count_type` (E, G), picks of each expert on each source rank.
            experts: integers (G, B, K), the picks themselves, or None.
        """
        from evenmoe.simulator import (
            draw_kernels,
            flow_kernels,
            share_kernels,
        )  # not at the top: importing numba takes 0.3 s

        first, slots, rule = self.first[layer], self.slots[layer], RULE_NUMBERS[self.policy.rule]
        quotas = np.zeros(len(slots), np.int64)
        if self._splits:
            quotas = self._splits[layer].split(counts.sum(axis=1, dtype=np.int64))
        per_slot, found = scratch.per_slot, self.found
        sent, received = found.sent[layer], found.received[layer]
        if experts is None and self.policy.rule == "token":
            tokens = self.world.tokens_per_rank
            draw_kernels.share_by_row(counts, tokens, first, slots, seed, step, layer, per_slot)
        elif experts is None:
            share_kernels.share_counts(counts, first, slots, rule, quotas, per_slot)
        else:
            share_kernels.choose_slots(experts, first, slots, rule, quotas, scratch.chosen)
            share_kernels.count_chosen(scratch.chosen, per_slot)
        flow_kernels.rank_work(per_slot, self.world.num_ranks, found.tokens[layer], found.busy[layer])
        near, width = self.world.ranks_per_node, self.placement.slots_per_rank
        flow_kernels.count_rows(per_slot, near, sent[0], received[0])
        if width == 1:  # a token's picks are distinct experts, so no two of them go to one rank
            sent[1], received[1] = sent[0], received[0]
        elif experts is None:
            flow_kernels.expect_rows_once(per_slot, self.world.tokens_per_rank, near, sent[1], received[1])
        else:
            flow_kernels.count_rows_once(scratch.chosen, width, near, sent[1], received[1])

    def finish_step(self, step: int, costs: CostModel) -> None:
        """Enter what all layers of a step have found."""
        found = self.found
        way = 1 if costs.one_row_per_rank else 0
        self._par[step] = peak_over_mean(found.tokens.astype(np.float64))
        self._step_time[step] = costs.layer_time(
            found.tokens, found.busy, found.sent[:, way], found.received[:, way]
        ).sum()
        rows = found.sent.sum(axis=3).reshape(-1, 4)
        self._rows[step] = rows.sum(axis=0)
        self._rank_tokens += found.tokens
        if self._details is not None:
            self._details.rank_loads[step], self._details.rows[step] = found.tokens, rows

    def result(self, baseline: Track, costs: CostModel) -> PolicyResult:
        """Everything found, `baseline` being the identity policy's track after the same steps."""
        rows = np.rint(self._rows).astype(np.int64)
        placement = self.placement
        return PolicyResult(
            name=self.policy.name,
            description=self.policy.description,
            rule=self.policy.rule,
            par=self._par,
            rank_tokens=self._rank_tokens,
            copies=self._copies,
            refreshes=np.array(self._refreshes, np.int64),
            traffic=Traffic(*(np.ascontiguousarray(column) for column in rows.T)),
            step_time=self._step_time,
            copy_time=self._copy_time,
            initial=self._initial,
            final=placement,
            memory_per_rank=round(placement.num_layers * placement.slots_per_rank * costs.expert_bytes),
            break_even_steps=self._break_even(baseline),
            details=self._details,
        )

    def _break_even(self, baseline: Track) -> float:
        """Mean time of a refresh's copies over the mean time a step gains from the first refresh on."""
        spent = self._copy_time.sum()
        if spent == 0:
            return 0.0
        since = self._refreshes[0]
        gain = float((baseline._step_time[since:] - self._step_time[since:]).mean())
        return spent / len(self._refreshes) / gain if gain > 0 else np.inf
