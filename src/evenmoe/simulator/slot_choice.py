"""Which slots take the assignments of a batch, by one rule on one placement: compiled, or by calling the rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from evenmoe.placement import Placement
from evenmoe.rules.rule import Chooser, Rule
from evenmoe.rules.split_batch import SplitPlan
from evenmoe.simulator.batches import Cluster, Counts

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
            chosen = choose(torch.from_numpy(ids), torch.from_numpy(counted), by_rank).numpy()
            scratch.per_slot[:, rank] = np.bincount(chosen[counted], minlength=len(scratch.per_slot))
            if experts is not None:
                scratch.chosen[rank] = chosen

    def _prepare(self, layer: int) -> list[Chooser]:
        table, num_slots = self._placement.eplb_table(layer), self._placement.num_slots
        ranks = range(self._cluster.num_ranks)
        return [self._rule.prepare(table, num_slots, rank, self._cluster.num_ranks) for rank in ranks]

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
