"""The batches of a replay: what the tokens of every source rank are assigned to, step by step.

`RoutedBatches` takes recorded tokens, whose every assignment is known. `DrawnBatches` draws counts from loads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.metrics import FloatArray
from evenmoe.planner.options import whole_number
from evenmoe.traces.trace import Trace

Counts = npt.NDArray[np.signedinteger]  # of `Cluster.count_type`


@dataclass(frozen=True)
class Cluster:
    """Ranks, nodes and the batch of each rank.

    Attributes:
        num_ranks: G, every one of which is a source rank and holds experts.
        num_nodes: nodes that share the ranks evenly, in rank order.
        tokens_per_rank: B, tokens of one source rank in one step.

    Raises:
        ConstraintError: a count below 1, or nodes that do not divide the ranks.

    >>> Cluster(8, 2, 128).ranks_per_node
    4
    """

    num_ranks: int
    num_nodes: int = 1
    tokens_per_rank: int = 128

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_nodes", "tokens_per_rank"):
            whole_number(name, getattr(self, name), 1)
        if self.num_ranks % self.num_nodes:
            fitting = [nodes for nodes in range(1, self.num_ranks + 1) if self.num_ranks % nodes == 0]
            raise ConstraintError(
                "num_nodes", self.num_nodes, f"must divide the {self.num_ranks} ranks evenly", f"use one of {fitting}"
            )

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    def fewest_slots(self, num_experts: int) -> int:
        """The fewest slots that hold every expert and that the ranks can share."""
        return -(-num_experts // self.num_ranks) * self.num_ranks

    @property
    def count_type(self) -> type[np.signedinteger]:
        """The smallest integers that count an expert's assignments on a rank: a replay waits for their memory."""
        return np.int16 if self.tokens_per_rank < 1 << 15 else np.int32


class Batches(Protocol):
    """Batches of all steps, in order.

    Attributes:
        notes: sentences on how they come about.
        repeated: of the step's tokens, how many an earlier step has had.
    """

    notes: tuple[str, ...]
    repeated: int

    def advance(self) -> None:
        """Go to the next step; the first call goes to step 0."""
        ...

    def experts(self, layers: slice) -> npt.NDArray[np.integer] | None:
        """The experts of every token in this step, (L, G, B, K); None where only counts are known."""
        ...

    def count(self, layer: int, counts: Counts) -> None:
        """Fill `counts` (E, G) with this step's assignments of each expert on each source rank."""
        ...


def new_batches(trace: Trace, cluster: Cluster, num_steps: int, top_k: int, seed: int, chunk: int) -> Batches:
    """The batches of a trace: its own tokens where it has them, else drawn ones."""
    if trace.routing is not None:
        return RoutedBatches(trace, cluster, chunk)
    return DrawnBatches(trace, cluster, num_steps, top_k, seed)


class RoutedBatches:
    """Recorded tokens, assigned to the source ranks request by request.

    Every rank has B / chunk streams, each of which gives `chunk` consecutive tokens of one request to every step
    (`batch_kernels.assign_tokens`). With chunk = B a rank works through one request after the other, as in prefill;
    with chunk = 1 each of its B requests advances by one token a step, as in decode. A trace without `seq_start` counts
    as requests of one token.
    """

    def __init__(self, trace: Trace, cluster: Cluster, chunk: int) -> None:
        assert trace.routing is not None
        self._routing = trace.routing
        self._cluster = cluster
        starts = np.arange(len(trace.routing) + 1) if trace.seq_start is None else trace.seq_start
        self._starts = np.ascontiguousarray(starts, np.int64)
        streams = cluster.num_ranks * cluster.tokens_per_rank // chunk
        self._position, self._end = np.zeros(streams, np.int64), np.zeros(streams, np.int64)
        self._following = 0
        self._tokens = np.empty((streams, chunk), np.int64)
        self._seen = np.zeros(len(trace.routing), bool)
        self.repeated = 0
        self._batch: npt.NDArray[np.integer] | None = None
        self.notes: tuple[str, ...] = (
            "Every token-expert assignment is the recorded one: rank loads, rows and copies are exact.",
            f"Requests are assigned to source ranks in the order of the trace, {chunk} tokens of one request at a "
            "time; after the last request comes the first again.",
        )

    def advance(self) -> None:
        from evenmoe.simulator import batch_kernels  # not at the top: importing numba takes 0.3 s

        self._following = batch_kernels.assign_tokens(
            self._starts, self._tokens.shape[1], self._position, self._end, self._following, self._tokens
        )
        self.repeated = int(self._seen[self._tokens].sum())
        self._seen[self._tokens] = True
        chosen = self._routing[self._tokens.reshape(self._cluster.num_ranks, -1)]
        self._batch = np.ascontiguousarray(chosen.transpose(2, 0, 1, 3))

    def experts(self, layers: slice) -> npt.NDArray[np.integer]:
        assert self._batch is not None
        return self._batch[layers]

    def count(self, layer: int, counts: Counts) -> None:
        from evenmoe.simulator import batch_kernels

        assert self._batch is not None
        batch_kernels.count_assignments(self._batch[layer], counts)


class DrawnBatches:
    """Counts drawn from loads, because no token is known.

    Step n of N takes the windows from n × T // N on, up to those of step n + 1 and at least one, added up: a short
    trace is stretched over the steps and a long one condensed. Steps that share a window have disjoint parts of it, to
    which each of its assignments goes by chance, so that none is judged on what an earlier one has shown. Each of a
    source rank's B tokens goes to expert e with
    the chance K × load / total load of the layer, at most 1, independently; so a token has K experts on average.
    Where the trace knows loads by source rank they give every rank its own chances: source rank g of G takes recorded
    rank g × R // G, or with G < R the sum of the ranks from there to (g + 1) × R // G.

    Every token passes through every layer, so windows without a token in a layer only do not know its load: a step of
    such windows draws that layer from the last window before them that does, or else from the first one after.
    """

    def __init__(self, trace: Trace, cluster: Cluster, num_steps: int, top_k: int, seed: int) -> None:
        load = trace.load[:, None] if trace.load_by_rank is None else trace.load_by_rank
        self._load = load
        self._cluster = cluster
        self._num_steps = num_steps
        self._top_k = top_k
        self._seed = seed
        self._step = -1
        self._window: tuple[int, int] = (0, 0)
        self._left = load[:0]  # of a window that several steps share
        self._chances: FloatArray = np.zeros((0, 0, 0))
        self.repeated = 0
        self._known = np.asarray(load.any(axis=(1, 3)))  # (T, L)
        by_rank = "" if trace.load_by_rank is None else " of its own"
        self.notes: tuple[str, ...] = (
            f"The trace has no tokens: every source rank draws its counts of tokens from the windows' loads{by_rank}, "
            "each token going to each expert independently. Rank loads and rows per expert follow from the counts as "
            "the rule works; where it goes by row, the rows that go to an expert are drawn too.",
            "Rows once per rank are expected values: a rank's tokens are taken to combine their experts independently.",
        )
        if num_steps >= len(load) > 1:
            self.notes += (
                "Every step is drawn from one window of the trace, as if that were a step: where it is a request, "
                "steps are more uneven than a server's, which mix requests (--mix sums windows).",
            )
        partly = int((np.asarray(self._known.any(axis=0)) & ~self._known.all(axis=0)).sum())
        if partly:
            self.notes += (
                f"{partly} of {load.shape[2]} layers have no token in some windows: steps of those draw the layer from "
                "the last window before that has some, or else from the first one after.",
            )

    def advance(self) -> None:
        self._step += 1
        windows, steps = len(self._load), self._num_steps
        begin = self._step * windows // steps
        end = max(begin + 1, (self._step + 1) * windows // steps)
        if (begin, end) != self._window:
            self._window = (begin, end)
            self._left = self._filled_in(self._load[begin:end].sum(axis=0), begin)
        until = -(-end * steps // windows) if windows < steps else self._step + 1  # the first step of the next window
        load = self._part(until - self._step)
        if len(load) > 1:
            load = _fit_ranks(load, self._cluster.num_ranks)
        # (L, E, R), as the draws go through it
        self._chances = np.ascontiguousarray(expert_chances(load, self._top_k).transpose(1, 2, 0))

    def _part(self, shares: int) -> FloatArray:
        """Take one of as many equal shares of what is left of the window, assignment by assignment, as float64.

        A layer of which nothing falls to the share is drawn from all that is left.
        """
        left = self._left
        if shares == 1:
            return left.astype(np.float64)
        part = np.random.default_rng((self._seed, self._step)).binomial(left, 1 / shares)
        self._left = left - part
        empty = ~part.any(axis=(0, 2))
        part[:, empty] = left[:, empty]
        return part.astype(np.float64)

    def _filled_in(self, load: npt.NDArray[np.int64], begin: int) -> npt.NDArray[np.int64]:
        """`load` (R, L, E), from window `begin` on, whose layers without a token have those of another window."""
        for layer in np.flatnonzero(~load.any(axis=(0, 2))).tolist():
            known = np.flatnonzero(self._known[:, layer])
            if known.size:
                before = known[known < begin]
                load[:, layer] = self._load[before[-1] if before.size else known[0], :, layer]
        return load

    def experts(self, layers: slice) -> None:
        return None

    def count(self, layer: int, counts: Counts) -> None:
        from evenmoe.simulator import batch_kernels

        batch_kernels.draw_counts(
            self._chances[layer], self._cluster.tokens_per_rank, self._seed, self._step, layer, counts
        )


def expert_chances(load: FloatArray, top_k: int) -> FloatArray:
    """The chance that a token goes to each expert: load float64 (…, E) -> float64 (…, E), of sum K where any has load.

    In proportion to the load. An expert whose chance would exceed 1 gets 1, and the others share the rest in
    proportion; with K or fewer experts that have load, all of those get 1.

    >>> expert_chances(np.array([6.0, 1.0, 1.0, 0.0]), 2).tolist()
    [1.0, 0.5, 0.5, 0.0]
    """
    chances = np.zeros_like(load)
    certain = np.zeros(load.shape, bool)
    while True:
        open_load = np.where(certain, 0.0, load)
        total = open_load.sum(axis=-1, keepdims=True)
        left = top_k - certain.sum(axis=-1, keepdims=True)
        chances = np.where(certain, 1.0, np.divide(open_load * left, total, out=np.zeros_like(load), where=total > 0))
        beyond = (chances > 1.0) & ~certain
        if not beyond.any():
            return chances
        certain |= beyond


def _fit_ranks(load: FloatArray, num_ranks: int) -> FloatArray:
    """Loads of the recorded ranks (R, L, E) as loads of the source ranks (G, L, E)."""
    recorded = len(load)
    begin = np.arange(num_ranks) * recorded // num_ranks
    end = np.maximum(begin + 1, (np.arange(num_ranks) + 1) * recorded // num_ranks)
    return np.stack([load[first:last].sum(axis=0) for first, last in zip(begin, end, strict=True)])


def recorded_part(trace: Trace) -> tuple[Trace, int, tuple[str, ...]]:
    """A trace of loads without empty windows and layers, the number of those windows, and notes on what is gone.

    A trace with tokens stays as it is, since they are replayed and not its windows; and so does one of nothing at all.

    >>> part, empty, notes = recorded_part(Trace("ring", np.array([[[0, 0], [3, 1]], [[0, 0], [0, 0]]])))
    >>> part.load.tolist(), empty, notes
    ([[[3, 1]]], 1, ('1 of 2 windows of the trace were left out: nothing was recorded in them.', \
'1 of 2 layers were left out, without a token: 0.'))
    """
    if trace.routing is not None:
        return trace, 0, ()
    windows, layers = np.asarray(trace.load.any(axis=(1, 2))), np.asarray(trace.load.any(axis=(0, 2)))
    if not windows.any() or (windows.all() and layers.all()):
        return trace, 0, ()
    notes = []
    empty = int((~windows).sum())
    if empty:
        notes.append(f"{empty} of {len(windows)} windows of the trace were left out: nothing was recorded in them.")
    if not layers.all():
        numbers = np.arange(len(layers)) if trace.layer_ids is None else trace.layer_ids
        gone = ", ".join(str(number) for number in numbers[~layers].tolist())
        notes.append(f"{int((~layers).sum())} of {len(layers)} layers were left out, without a token: {gone}.")
    by_rank = trace.load_by_rank
    part = replace(
        trace,
        load=trace.load[windows][:, layers],
        load_by_rank=None if by_rank is None else by_rank[windows][:, :, layers],
        layer_ids=None if trace.layer_ids is None else trace.layer_ids[layers],
    )
    return part, empty, tuple(notes)
