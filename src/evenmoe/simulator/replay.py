"""`simulate`: a trace's batches under several policies, step by step."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.metrics import FloatArray
from evenmoe.simulator.batches import Batches, new_batches
from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.placing import check_policy, first_placement, plan_policy
from evenmoe.simulator.policies import DEFAULT, parse_policies
from evenmoe.simulator.recorded import recorded_part
from evenmoe.simulator.result import Simulation
from evenmoe.simulator.settings import describe_settings
from evenmoe.simulator.track import Track
from evenmoe.simulator.world import World
from evenmoe.traces.trace import Trace

Progress = Callable[[int, int], None]


def simulate(
    trace: Trace,
    policies: Sequence[str] = DEFAULT,
    *,
    world: World,
    costs: CostModel,
    num_slots: int | None = None,
    num_groups: int = 1,
    num_steps: int | None = None,
    refresh: int | None = None,
    window: int | None = None,
    chunk: int | None = None,
    top_k: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    details: bool = False,
    progress: Progress | None = None,
) -> Simulation:
    """Replay a trace under policies.

    Every policy sees the same batches. A plan is made before a step from the steps before it alone (the oracle
    excepted); what comes later cannot change what came before.

    Args:
        trace: with tokens every pick is replayed, else counts are drawn from the loads (`batches`), of the windows and
            layers in which anything was recorded (`recorded`).
        policies: as `--policy` takes them (`policies`); the first identity comes first, added where there is none.
        world: ranks, nodes and tokens per rank.
        costs: what times are made from.
        num_slots: S of policies that do not say. Default: one slot per rank more than the experts need.
        num_groups: expert groups of policies that do not say, kept inside nodes; 1 plans across nodes.
        num_steps: N. Default: with tokens as many as the trace fills once, else 100.
        refresh: steps between plans, of policies that do not say. Default: a tenth of the steps, at least 1.
        window: past steps a plan is made from, of policies that do not say. Default: `refresh`.
        chunk: consecutive tokens that one request gives to a step; divides the tokens per rank, which is the default.
        top_k: experts per token; needed for traces that do not say.
        seed: of draws and planners, 0 or more.
        workers: threads. Default: one per processor. The result does not depend on it.
        details: whether to keep the loads of every rank in every step and layer.
        progress: called after every step with the steps that are done and all of them.

    Raises:
        ConstraintError: counts that do not go together, or a policy that cannot be.
        MissingArgumentError: a trace without tokens or `top_k`.

    One request of two tokens on two ranks of one expert each; both tokens want expert 0:

    >>> trace = Trace("tiny", np.array([[[2, 0]]]), np.zeros((2, 1, 1), np.uint16), np.array([0, 2]))
    >>> costs = CostModel(1, 1, 1, 1, 1)
    >>> found = simulate(trace, ["identity"], world=World(2, 1, 1), costs=costs, num_slots=2).policies[0]
    >>> found.par.tolist(), found.rank_tokens.tolist(), found.traffic.within_node.tolist()
    ([[2.0]], [[2, 0]], [1])
    """
    trace, empty_windows, left_out = recorded_part(trace)
    chunk = _check_chunk(chunk, world)
    top_k = _find_top_k(trace, top_k)
    num_steps = _find_steps(trace, world, num_steps)
    refresh = max(1, num_steps // 10) if refresh is None else _at_least("refresh", refresh, 1)
    window = refresh if window is None else _at_least("window", window, 1)
    fewest = -(-trace.num_experts // world.num_ranks) * world.num_ranks
    num_slots = fewest + world.num_ranks if num_slots is None else num_slots
    chosen = parse_policies(
        tuple(policies),
        world,
        num_experts=trace.num_experts,
        num_slots=num_slots,
        num_groups=num_groups,
        refresh=refresh,
        window=window,
    )
    for policy in chosen:
        check_policy(policy, world, trace.num_experts)
    tracks = [
        Track(policy, world, first_placement(policy, world, trace.num_layers, trace.num_experts), num_steps, details)
        for policy in chosen
    ]
    batches = new_batches(trace, world, num_steps, top_k, _at_least("seed", seed, 0), chunk)
    workers = (os.cpu_count() or 1) if workers is None else _at_least("workers", workers, 1)
    with ThreadPoolExecutor(workers) as pool:
        run = _Run(trace, batches, tracks, costs, seed, top_k, pool, workers)
        for step in range(num_steps):
            run.advance(step)
            if progress is not None:
                progress(step + 1, num_steps)
    return Simulation(
        trace=trace.name,
        settings=describe_settings(trace, world, costs, num_slots, num_groups, num_steps, refresh, window, chunk, seed),
        num_ranks=world.num_ranks,
        num_nodes=world.num_nodes,
        num_experts=trace.num_experts,
        top_k=top_k,
        tokens=np.full(num_steps, world.num_ranks * world.tokens_per_rank, np.int64),
        load=run.load,
        policies=tuple(track.result(tracks[0], costs) for track in tracks),
        notes=(*batches.notes, *left_out),
        empty_windows=empty_windows,
    )


class _Run:
    """The state of a replay between steps."""

    def __init__(
        self,
        trace: Trace,
        batches: Batches,
        tracks: list[Track],
        costs: CostModel,
        seed: int,
        top_k: int,
        pool: ThreadPoolExecutor,
        workers: int,
    ) -> None:
        layers, experts = trace.num_layers, trace.num_experts
        world = tracks[0].world
        self.load = np.zeros((layers, experts), np.int64)
        self._batches, self._tracks, self._costs, self._seed, self._pool = batches, tracks, costs, seed, pool
        self._counts = np.zeros((layers, experts, world.num_ranks), world.count_type)
        self._totals = np.zeros((layers, experts), np.int64)
        longest = max(track.policy.window for track in tracks)
        self._past: deque[FloatArray] = deque(maxlen=longest)
        self._parts = [part for part in np.array_split(np.arange(layers), workers) if part.size]
        picks = top_k if trace.routing is not None else 0
        self._scratch = [[track.new_scratch(picks) for track in tracks] for _ in self._parts]

    def advance(self, step: int) -> None:
        """Replay one step: plans from the past, then its picks, then what they do."""
        due = [track for track in self._tracks if track.policy.is_due(step)]
        self._plan(step, due, [np.stack(list(self._past)[-track.policy.window :]) for track in due])
        self._batches.advance()
        self._each(self._count)
        oracles = [track for track in self._tracks if track.policy.kind == "oracle"]
        self._plan(step, oracles, [self._totals[None].astype(np.float64)] * len(oracles))
        self._each(lambda part: self._serve(step, part))
        for track in self._tracks:
            track.finish_step(step, self._costs)
        self.load += self._totals
        self._past.append(self._totals.astype(np.float64))

    def _plan(self, step: int, tracks: list[Track], seen: list[FloatArray]) -> None:
        def plan_one(track: Track, loads: FloatArray) -> Any:
            return plan_policy(track.policy, track.world, loads, track.start_of_plan(), self._seed)

        for track, placement in zip(tracks, self._pool.map(plan_one, tracks, seen), strict=True):
            track.replace(step, placement, self._costs)

    def _each(self, work: Callable[[int], None]) -> None:
        """Call `work` for every part of the layers, each in a thread of its own."""
        list(self._pool.map(work, range(len(self._parts))))

    def _count(self, part: int) -> None:
        for layer in self._parts[part].tolist():
            self._batches.count(layer, self._counts[layer])
            self._counts[layer].sum(axis=1, dtype=np.int64, out=self._totals[layer])

    def _serve(self, step: int, part: int) -> None:
        for layer in self._parts[part].tolist():
            experts = self._batches.experts(layer)
            for track, scratch in zip(self._tracks, self._scratch[part], strict=True):
                track.serve(step, layer, self._seed, self._counts[layer], experts, scratch)


def _find_top_k(trace: Trace, top_k: int | None) -> int:
    known = trace.top_k if trace.top_k is not None else trace.metadata.get("top_k")
    if known is None:
        if top_k is None:
            raise MissingArgumentError(
                "top_k", "not given", "is needed for a trace without tokens", "say how many experts a token picks"
            )
        known = _at_least("top_k", top_k, 1)
    elif top_k is not None and top_k != known:
        raise ConstraintError("top_k", top_k, f"must be that of the trace, {known}", "leave it out")
    if not 1 <= int(known) <= trace.num_experts:
        raise ConstraintError("top_k", known, f"must be 1 to {trace.num_experts}, the experts", "check the model")
    return int(known)


def _find_steps(trace: Trace, world: World, num_steps: int | None) -> int:
    if trace.routing is not None and not len(trace.routing):
        raise ConstraintError("trace", "without a token", "must have some to replay", "record more")
    if num_steps is not None:
        return _at_least("num_steps", num_steps, 1)
    if trace.routing is None:
        return 100
    return max(1, round(len(trace.routing) / (world.num_ranks * world.tokens_per_rank)))


def _check_chunk(chunk: int | None, world: World) -> int:
    if chunk is None:
        return world.tokens_per_rank
    if chunk < 1 or world.tokens_per_rank % chunk:
        fitting = [size for size in range(1, world.tokens_per_rank + 1) if world.tokens_per_rank % size == 0]
        raise ConstraintError(
            "chunk", chunk, f"must divide the {world.tokens_per_rank} tokens per rank", f"use one of {fitting}"
        )
    return chunk


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise ConstraintError(name, value, f"must be at least {least}", f"use {least} or more")
    return value
