"""The steps of a replay one after the other, all policies on the same batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from evenmoe.metrics import FloatArray
from evenmoe.simulator.batches import Batches
from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.policy_state import PolicyState
from evenmoe.simulator.slot_choice import StepLayers
from evenmoe.traces.trace import Trace


class Run:
    """The state of a replay between steps.

    Attributes:
        load, judged_load: int64 (L, E), rows per logical expert of all steps so far, and of the judged ones.
        fresh_steps: steps before the first that has a token that an earlier one has had; all so far if none has.
    """

    def __init__(
        self,
        trace: Trace,
        batches: Batches,
        states: list[PolicyState],
        costs: CostModel,
        seed: int,
        top_k: int,
        pool: ThreadPoolExecutor,
        workers: int,
        first_judged: int = 0,
    ) -> None:
        layers, experts = trace.num_layers, trace.num_experts
        cluster = states[0].cluster
        self.load, self.judged_load = np.zeros((2, layers, experts), np.int64)
        self.fresh_steps, self._first_judged = 0, first_judged
        self._batches, self._states, self._costs, self._seed, self._pool = batches, states, costs, seed, pool
        self._counts = np.zeros((layers, experts, cluster.num_ranks), cluster.count_type)
        self._totals = np.zeros((layers, experts), np.int64)
        longest = max(state.policy.window for state in states)
        self._past: deque[FloatArray] = deque(maxlen=longest)
        ends = np.arange(workers + 1) * layers // workers
        self._parts = [slice(begin, end) for begin, end in pairwise(ends.tolist()) if begin < end]
        top_k = top_k if trace.routing is not None else 0
        self._scratch = [[state.new_scratch(top_k) for state in states] for _ in self._parts]

    def advance(self, step: int) -> None:
        """Replay one step: plans from the past, then its batch, then what the policies make of it."""
        due = [state for state in self._states if state.begin_step(step)]
        self._plan(step, due, [np.stack(list(self._past)[-state.policy.window :]) for state in due])
        self._batches.advance()
        self._each(self._count)
        seeing = [state for state in self._states if state.policy.sees_the_step]
        self._plan(step, seeing, [self._totals[None].astype(np.float64)] * len(seeing))
        self._each(lambda part: self._run_layers(step, part))
        if self.fresh_steps == step and not self._batches.repeated:
            self.fresh_steps += 1
        judged = self._first_judged <= step < self.fresh_steps
        for state in self._states:
            state.finish_step(step, self._costs, judged=judged)
        self.load += self._totals
        if judged:
            self.judged_load += self._totals
        self._past.append(self._totals.astype(np.float64))

    def _plan(self, step: int, states: list[PolicyState], seen: list[FloatArray]) -> None:
        keys = [state.plan_key() for state in states]
        asked = {key: (state, past) for key, state, past in zip(keys, states, seen, strict=True)}
        planned = self._pool.map(lambda each: each[0].plan(each[1], self._seed), asked.values())
        plans = dict(zip(asked, planned, strict=True))
        for key, state in zip(keys, states, strict=True):
            state.replace(step, plans[key], self._costs)

    def _each(self, work: Callable[[int], None]) -> None:
        """Call `work` for every part of the layers, each in a thread of its own."""
        list(self._pool.map(work, range(len(self._parts))))

    def _count(self, part: int) -> None:
        from evenmoe.simulator import step_kernels  # not at the top: importing numba takes 0.3 s

        layers = self._parts[part]
        for layer in range(layers.start, layers.stop):
            self._batches.count(layer, self._counts[layer])
        step_kernels.add_ranks(self._counts[layers], self._totals[layers])

    def _run_layers(self, step: int, part: int) -> None:
        layers, key = self._parts[part], (self._seed, step)
        batch = StepLayers(layers.start, key, self._counts[layers], self._totals[layers], self._batches.experts(layers))
        for state, scratch in zip(self._states, self._scratch[part], strict=True):
            state.run_layers(batch, scratch)
