"""How the tokens of a step choose their slots by a rule, and what ranks then compute and exchange.

The rule takes the slots compiled, or by being called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from evenmoe.placement import Placement
from evenmoe.rules.batch import BatchRule
from evenmoe.rules.rule import Chooser, Rule, prepared
from evenmoe.rules.split_batch import SplitPlan
from evenmoe.simulator.batches import Cluster, Counts

Experts = npt.NDArray[np.integer]  # (G, B, K), of every token, or (L, G, B, K)


@dataclass
class Scratch:
    """Memory of one thread for one policy.

    Attributes:
        per_slot: `Cluster.count_type` (S, G), assignments that each slot takes from each source rank; 0 from the start
            for numbers that no slot has, see `padded_slots`.
        chosen: int32 (G, B, K), the slot of every assignment; empty where only counts are known.
    """

    per_slot: Counts
    chosen: npt.NDArray[np.int32]


@dataclass(frozen=True)
class StepLayers:
    """Layers of one step, from number `first` on, and what is known of their batch.

    Attributes:
        first: number of the first layer.
        key: seed and step, which with the layer decide random numbers.
        counts: `Cluster.count_type` (L, E, G), assignments of each expert on each source rank.
        totals: int64 (L, E), of all ranks.
        experts: integers (L, G, B, K), the assignments themselves, or None.
    """

    first: int
    key: tuple[int, int]
    counts: Counts
    totals: npt.NDArray[np.int64]
    experts: Experts | None


class StepResult:
    """What one step shows, layer by layer.

    Attributes:
        tile: rows that a slot's are padded to.
        tokens, busy, padded: int64 (L, G), rows that each rank computes, its slots that have any, and the rows once
            each slot's are padded to tiles.
        sent, received: float64 (L, 2, 2, G): a row per assignment, then once per rank; within, then between nodes.
    """

    def __init__(self, num_layers: int, num_ranks: int, tile: int = 1) -> None:
        self.tile = tile
        self.tokens, self.busy, self.padded = np.zeros((3, num_layers, num_ranks), np.int64)
        self.sent, self.received = np.zeros((2, num_layers, 2, 2, num_ranks))

    def part(self, first: int, number: int) -> tuple[int | npt.NDArray, ...]:
        """The tile and the arrays in this order, of `number` layers from `first` on, to be written to."""
        arrays = self.tokens, self.busy, self.padded, self.sent, self.received
        return self.tile, *(array[first : first + number] for array in arrays)


class SlotChoice(Protocol):
    """A rule on a placement."""

    def run(self, layers: StepLayers, scratch: Scratch, found: StepResult) -> None:
        """Enter into `found` what the layers do when tokens choose their slots by the rule."""
        ...


def choose_by(rule: Rule, placement: Placement, cluster: Cluster) -> SlotChoice:
    """The rule's compiled kernel if it has one; else the rule itself is called, rank by rank."""
    return (CalledRule if rule.kernel is None else CompiledRule)(rule, placement, cluster)


def padded_slots(placement: Placement) -> npt.NDArray[np.int64]:
    """int64 (S,): the number of each slot in the kernels, which take slot s for one of rank s // width.

    Ranks with fewer slots than the widest have numbers there that no slot has, and to which nothing goes.

    >>> padded_slots(Placement([[0, 1, 2, 0, 3]], num_ranks=2, rank_sizes=[3, 2])).tolist()
    [0, 1, 2, 3, 4]
    >>> padded_slots(Placement([[0, 1, 2, 0, 3]], num_ranks=2, rank_sizes=[2, 3])).tolist()
    [0, 1, 3, 4, 5]
    """
    ranks = placement.slot_to_rank
    before = np.cumsum([0, *placement.rank_sizes[:-1]])
    return ranks * max(placement.rank_sizes) + np.arange(placement.num_slots) - before[ranks]


def num_padded_slots(placement: Placement) -> int:
    """Numbers of slots in the kernels: as many on every rank as the widest has slots."""
    return placement.num_ranks * max(placement.rank_sizes)


class CompiledRule:
    """One of the rules that `layer_kernels` knows."""

    def __init__(self, rule: Rule, placement: Placement, cluster: Cluster) -> None:
        from evenmoe.simulator import layer_kernels  # not at the top: importing numba takes 0.3 s

        assert rule.kernel is not None
        self._kernel, self._cluster, self._placement = rule.kernel, cluster, placement
        layers, self._numbers = placement.num_layers, padded_slots(placement)
        slots = placement.num_slots
        self._first = np.zeros((layers, placement.num_experts + 1), np.int64)
        np.cumsum(placement.num_replicas, axis=1, out=self._first[:, 1:])
        self._slots = np.empty((layers, slots), np.int64)
        position = np.take_along_axis(self._first, placement.slot_to_expert.astype(np.int64), axis=1)
        np.put_along_axis(self._slots, position + placement.replica_index, self._numbers[None], axis=1)
        self._weight_rows = rule.weight_rows if isinstance(rule, BatchRule) else 0
        self._quotas = np.zeros((layers, num_padded_slots(placement)), np.int64)
        self._splits: dict[tuple[int, int], SplitPlan] | None = {} if self._kernel == layer_kernels.BATCH else None

    def run(self, layers: StepLayers, scratch: Scratch, found: StepResult) -> None:
        """See `SlotChoice`."""
        from evenmoe.simulator import step_kernels

        number, near = len(layers.counts), self._cluster.ranks_per_node
        part = slice(layers.first, layers.first + number)
        first, slots = self._first[part], self._slots[part]
        quotas = self._quotas[part]
        if self._splits is not None:
            key = (part.start, part.stop)  # a thread has the same layers in every step
            if key not in self._splits:
                held, sizes = self._placement.slot_to_expert[part], self._placement.rank_sizes
                self._splits[key] = SplitPlan(held, len(sizes), first.shape[1] - 1, rank_sizes=sizes)
            quotas[:, self._numbers] = self._splits[key].split(layers.totals, weight_rows=self._weight_rows)
        entries = found.part(layers.first, number)
        if layers.experts is None:
            step_kernels.run_counts(
                layers.first, layers.counts, self._cluster.tokens_per_rank, first, slots, self._kernel, quotas,
                *layers.key, near, scratch.per_slot, entries,
            )  # fmt: skip
        else:
            step_kernels.run_routed(
                layers.experts, first, slots, self._kernel, quotas, near, scratch.chosen, scratch.per_slot, entries
            )


class CalledRule:
    """Any other rule: its chooser is called for the batch of every rank.

    Where only counts are known, the tokens that each expert is assigned to are drawn, without replacement.
    """

    def __init__(self, rule: Rule, placement: Placement, cluster: Cluster) -> None:
        self._rule, self._placement, self._cluster = rule, placement, cluster
        self._choosers: dict[int, list[Chooser]] = {}  # of every rank, by layer

    def run(self, layers: StepLayers, scratch: Scratch, found: StepResult) -> None:
        """See `SlotChoice`."""
        from evenmoe.simulator import layer_kernels as kernels  # not at the top: importing numba takes 0.3 s

        near, width, per_slot = self._cluster.ranks_per_node, self._placement.slots_per_rank, scratch.per_slot
        for i, counts in enumerate(layers.counts):
            layer, experts = layers.first + i, None if layers.experts is None else layers.experts[i]
            self._fill((*layers.key, layer), counts, experts, scratch)
            sent, received = found.sent[layer], found.received[layer]
            work = found.tokens[layer], found.busy[layer], found.padded[layer]
            kernels.rank_work(per_slot, self._cluster.num_ranks, found.tile, *work)
            kernels.count_rows(per_slot, near, sent[0], received[0])
            if width == 1:  # a token's experts are distinct, so no two of them go to one rank
                sent[1], received[1] = sent[0], received[0]
            elif experts is None:
                kernels.expect_rows_once(per_slot, self._cluster.tokens_per_rank, near, sent[1], received[1])
            else:
                kernels.count_rows_once(scratch.chosen, width, near, sent[1], received[1])

    def _fill(self, key: tuple[int, int, int], counts: Counts, experts: Experts | None, scratch: Scratch) -> None:
        """Fill `scratch` for one layer: `key` is seed, step and layer, `counts` (E, G), `experts` (G, B, K) or None."""
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
