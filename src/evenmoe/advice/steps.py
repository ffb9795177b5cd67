"""Modeled steps of a batch size: assignments drawn by a recorded load, slots by a rule, time by the slowest rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement
from evenmoe.rules.batch import BatchRule
from evenmoe.rules.rule import Rule
from evenmoe.rules.split_batch import SplitPlan
from evenmoe.simulator.costs import CostModel

IntArray = npt.NDArray[np.int64]

#: Steps drawn from every part of the judged recording: with eight parts, the mean over 32 draws.
DRAWS = 4


def draw_rows(load: FloatArray, tokens: int, top_k: int, rng: np.random.Generator) -> IntArray:
    """Assignments of a step to every expert, int64 (T · draws, L, E): binomial, by each part's shares.

    A token picks an expert at most once, with the chance that the part shows; which experts are picked together is
    left out. A layer without tokens in a part has the shares of all parts.

    Args:
        load: tokens per expert, (T, L, E).
        tokens: of the step, over all ranks.
        top_k: experts of a token.
        rng: where the draws come from.

    >>> rows = draw_rows(np.array([[[3.0, 1.0, 0.0]]]), 1000, 1, np.random.default_rng(0))
    >>> rows.shape, bool((abs(rows[:, 0, 0] - 750) < 60).all()), rows[:, 0, 2].tolist()
    ((4, 1, 3), True, [0, 0, 0, 0])
    """
    totals = load.sum(axis=-1, keepdims=True)
    usual = load.sum(axis=0, keepdims=True)
    shares = np.where(
        totals > 0, load / np.maximum(totals, 1e-300), usual / np.maximum(usual.sum(-1, keepdims=True), 1)
    )
    chances = np.minimum(top_k * shares, 1.0)
    return rng.binomial(tokens, np.repeat(chances, DRAWS, axis=0)).astype(np.int64)


@dataclass(frozen=True)
class Layout:
    """A placement under a rule, ready for steps.

    Attributes:
        placement: who holds what.
        rule: how tokens choose a replica.
    """

    placement: Placement
    rule: Rule

    def slot_rows(self, rows: IntArray, rng: np.random.Generator) -> IntArray:
        """Rows of every slot, int64 (N, L, S), for assignments (N, L, E).

        The batch rule splits each step exactly; under any other, every assignment chooses at random by the rule's
        shares.
        """
        placement = self.placement
        if placement.num_slots == placement.num_experts:
            index = np.broadcast_to(placement.slot_to_expert, (len(rows), *placement.slot_to_expert.shape))
            return np.take_along_axis(rows, index, axis=-1)
        if isinstance(self.rule, BatchRule):
            split = SplitPlan(placement.slot_to_expert, placement.num_ranks, placement.num_experts)
            return np.stack([split.split(step, weight_rows=self.rule.weight_rows) for step in rows])
        shares = self.rule.shares(placement)
        assert shares is not None  # only the batch rule's depend on the load
        return _divided(rows, placement, shares, rng)

    def times(self, rows: IntArray, costs: CostModel, rng: np.random.Generator) -> FloatArray:
        """Microseconds of the experts of every step and layer, float64 (N, L)."""
        per_slot = self.slot_rows(rows, rng)
        ranks, slots = self.placement.num_ranks, self.placement.num_slots // self.placement.num_ranks
        by_rank = per_slot.reshape(*per_slot.shape[:2], ranks, slots)
        padded = costs.kernel.padded(by_rank).sum(axis=-1)
        found = costs.expert_time(by_rank.sum(axis=-1), (by_rank > 0).sum(axis=-1), padded, slots)
        return found.max(axis=-1)


def _divided(rows: IntArray, placement: Placement, shares: FloatArray, rng: np.random.Generator) -> IntArray:
    """Assignments to slots by the shares of an expert's replicas: one binomial after the other is a multinomial."""
    experts, order = placement.slot_to_expert.astype(np.int64), placement.replica_index
    found = np.zeros((len(rows), *experts.shape), np.int64)
    left, share_left = rows.copy(), np.ones((placement.num_layers, placement.num_experts))
    for replica in range(int(order.max()) + 1):
        layers, slots = np.nonzero(order == replica)
        held = experts[layers, slots]
        chance = np.clip(shares[layers, slots] / np.maximum(share_left[layers, held], 1e-12), 0.0, 1.0)
        chance = np.where(placement.num_replicas[layers, held] == replica + 1, 1.0, chance)
        taken = rng.binomial(left[:, layers, held], chance)
        found[:, layers, slots] = taken
        left[:, layers, held] -= taken
        share_left[layers, held] -= shares[layers, slots]
    return found


def exchange_us(tokens: int, num_ranks: int, top_k: int, costs: CostModel) -> float:
    """Microseconds of dispatch and combine of a layer, as if balanced: the same whatever the placement.

    Every rank sends its tokens' rows once to each destination rank; no table shows what skew does to them.
    """
    width = num_ranks
    destinations = width * (1 - (1 - 1 / width) ** top_k) if width > 1 else 0.0
    rows = tokens / num_ranks * destinations * (1 - 1 / width)
    row_bytes = costs.dispatch_row_bytes + costs.combine_row_bytes
    return 2 * costs.latency_us + rows * row_bytes / costs.within_bytes_per_s * 1e6
