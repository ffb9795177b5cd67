"""`simulate`: a trace's batches under several policies, step by step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from evenmoe.engines import ENGINES
from evenmoe.engines.engine import Engine
from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.metrics import FloatArray
from evenmoe.planner.options import whole_number
from evenmoe.simulator.batches import Batches, Cluster, new_batches, recorded_part
from evenmoe.simulator.costs import CostModel, costs_of
from evenmoe.simulator.engine_view import EngineView
from evenmoe.simulator.fixed import ReplayedTrace
from evenmoe.simulator.given import Policies, parse_policies
from evenmoe.simulator.own_balancer import policies_for
from evenmoe.simulator.policies import Policy, Refreshed, check_policy, default_policies
from evenmoe.simulator.policy_state import PolicyState
from evenmoe.simulator.result import Simulation
from evenmoe.simulator.run import Run
from evenmoe.simulator.schedule import choose_refresh, make_schedule
from evenmoe.simulator.settings import describe_settings
from evenmoe.traces.models import ModelShape, shape_of
from evenmoe.traces.trace import Trace

Progress = Callable[[int, int], None]
_Replayed = tuple[Run, list[PolicyState], Batches]

_MOST_DRAWN = 100  # steps, where no token is known and their number is not given


def simulate(
    trace: Trace,
    policies: Policies | None = None,
    *,
    num_ranks: int,
    num_nodes: int = 1,
    tokens_per_rank: int = 128,
    costs: CostModel | ModelShape | str | None = None,
    num_slots: int | None = None,
    num_groups: int = 1,
    engine: Engine | str | None = None,
    num_steps: int | None = None,
    refresh: int | None = None,
    window: int | None = None,
    horizon: int | None = None,
    copy_overlap: bool = True,
    chunk: int | None = None,
    top_k: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    details: bool = False,
    progress: Progress | None = None,
) -> Simulation:
    """Replay a trace under policies.

    Every policy sees the same batches. A plan is made before a step from the steps before it alone (the oracle
    excepted); what comes later cannot change what came before. The steps before the last policy has made its first
    plan are the warm-up; those after it are judged, up to the first that has a token which was replayed before.

    Args:
        trace: with tokens every assignment is replayed, else counts are drawn from the loads (`simulator.batches`), of
            the windows and layers in which anything was recorded.
        policies: a sequence, or a dict that names them, of texts as `--policy` takes them (`simulator.policies`;
            "file:p.json" is a placement's file), `Placement`s, functions that are called as `evenmoe.plan` is, rules
            (`evenmoe.rules.rule.Rule`), and `simulator.policies.Policy` objects. The first identity comes first, added
            if missing. Default: every kind (`policies.default_policies`), or what compares with the engine's own
            balancer (`own_balancer.policies_for`).
        num_ranks: G, every one of which is a source rank and holds experts.
        num_nodes: nodes that share the ranks evenly, in rank order.
        tokens_per_rank: B, tokens of one source rank in one step.
        costs: what times are made from: the name or shape of a known model (`evenmoe.traces.MODELS`), or figures of
            your own (`CostModel`). Default: of the model that the trace names, or that alone has its sizes.
        num_slots: S of policies that do not say. Default: one slot per rank more than the experts need.
        num_groups: expert groups of policies that do not say, kept inside nodes; 1 plans across nodes.
        engine: the serving engine that policies are compared for (`evenmoe.engines.ENGINES`), or its name: those that
            do not say have its replica rule, `own` is its own balancer at its own interval, and the headline is of
            those that it can run. Default: none.
        num_steps: N. Default: as many as the trace fills once; at most 100 where only loads are known.
        refresh: steps between plans, of policies that do not say. Default: the engine's interval, else chosen from
            the warm-up (`schedule`).
        window: past steps a plan is made from, of policies that do not say. Default: `refresh`; where that is not given
            either, a third of the steps, at most 1000.
        horizon: steps that a plan serves in production, over which the copies of a policy's first one are charged.
            Default: the engine's interval, else 3000.
        copy_overlap: whether experts are copied beside the steps, the old placement serving until all are there; else
            steps wait for the copies.
        chunk: consecutive tokens that one request gives to a step; divides the tokens per rank, which is the default.
        top_k: experts per token; needed for traces that do not say and are of no known model.
        seed: of draws and planners, 0 or more.
        workers: threads. Default: one per processor. The result does not depend on it.
        details: whether to keep the loads of every rank in every step and layer.
        progress: called after every step with the steps that are done and all of them.

    Raises:
        ConstraintError: a trace or costs of another type, counts that do not go together, or a policy that cannot be.
        UnsupportedTypeError: something that is no policy.
        MissingArgumentError: a trace without tokens or `top_k`; or of no known model, without costs.

    One request of two tokens on two ranks of one expert each; both tokens want expert 0:

    >>> trace = Trace("tiny", np.array([[[2, 0]]]), np.zeros((2, 1, 1), np.uint16), np.array([0, 2]))
    >>> costs = CostModel(1, 1, 1, 1, 1)
    >>> found = simulate(trace, ["identity"], num_ranks=2, tokens_per_rank=1, costs=costs, num_slots=2).policies[0]
    >>> found.par.tolist(), found.rank_tokens.tolist(), found.traffic.within_node.tolist()
    ([[2.0]], [[2, 0]], [1])
    """
    if not isinstance(trace, Trace):
        rule, fix = "must be an evenmoe.Trace", "read a trace file with evenmoe.traces.load_trace"
        raise ConstraintError("trace", f"{str(trace)[:60]!r} of type {type(trace).__name__}", rule, fix)
    if costs is not None and not isinstance(costs, CostModel | ModelShape | str):
        rule, fix = "must be a CostModel, or a model's name or shape", "name a model, or state your own figures"
        raise ConstraintError("costs", f"{str(costs)[:60]!r} of type {type(costs).__name__}", rule, fix)
    cluster = Cluster(num_ranks, num_nodes, tokens_per_rank)
    given, shape = trace, None
    if not isinstance(costs, CostModel):
        shape = shape_of(trace, costs)
        costs = costs_of(shape)
    trace, empty_windows, left_out = recorded_part(given)
    chunk = _check_chunk(chunk, cluster)
    top_k = _find_top_k(trace, top_k, shape)
    recorded = _recorded_tokens(trace, top_k)
    num_steps = _find_steps(trace, cluster, recorded, num_steps)
    engine = None if engine is None else ENGINES.get(engine)
    schedule = make_schedule(num_steps, refresh, window, horizon, copy_overlap, engine)
    fewest = cluster.fewest_slots(trace.num_experts)
    num_slots = fewest + num_ranks if num_slots is None else whole_number("num_slots", num_slots, 1)
    replayed = ReplayedTrace.of(given, trace)
    num_groups = whole_number("num_groups", num_groups, 1)
    seed = whole_number("seed", seed, 0)
    workers = (os.cpu_count() or 1) if workers is None else whole_number("workers", workers, 1)

    def read(policies: Policies) -> tuple[Policy, ...]:
        return parse_policies(
            policies,
            cluster,
            num_experts=trace.num_experts,
            num_slots=num_slots,
            num_groups=num_groups,
            refresh=schedule.refresh,
            window=schedule.window,
            first=schedule.first,
            replayed=replayed,
            engine=engine,
        )

    def replay(chosen: Sequence[Policy], steps: int, warmup: int, progress: Progress | None) -> _Replayed:
        for policy in chosen:
            check_policy(policy, cluster, trace.num_experts)
        sizes = cluster, trace.num_layers, trace.num_experts, steps
        states = [
            PolicyState(policy, *sizes, copy_overlap=copy_overlap, tile=int(costs.tile), details=details)
            for policy in chosen
        ]
        batches = new_batches(trace, cluster, num_steps, top_k, seed, chunk)
        with ThreadPoolExecutor(workers) as pool:
            run = Run(trace, batches, states, costs, seed, top_k, pool, workers, warmup)
            for step in range(steps):
                run.advance(step)
                if progress is not None:
                    progress(step + 1, steps)
        return run, states, batches

    def trial(first: int, until: int, intervals: list[int]) -> list[FloatArray]:
        _, plan = read(["evenmoe:rule=even"])
        assert isinstance(plan, Refreshed)
        tried = [replace(plan, first=first, window=first, refresh=interval) for interval in intervals]
        _, states, _ = replay(tried, until, 0, None)
        found = [state.result(states[0], costs, None) for state in states]
        waits = 0.0 if copy_overlap else 1.0
        return [policy.step_time[first:] + waits * policy.later_copy_time[first:] for policy in found]

    chosen_here = refresh is None and engine is None
    if chosen_here and (policies is None or any(policy.is_scheduled(schedule.first) for policy in read(policies))):
        schedule = choose_refresh(schedule, trial)
    if policies is None and engine is not None:
        policies = policies_for(engine, num_slots, fewest)
    chosen = read(default_policies(num_slots, fewest, once=schedule.once) if policies is None else policies)
    first_plan = max(policy.first_plan for policy in chosen)
    warmup = min(first_plan, num_steps)
    run, states, batches = replay(chosen, num_steps, warmup, progress)
    num_judged = max(0, run.fresh_steps - warmup)
    judged = slice(warmup, warmup + num_judged) if num_judged else None
    view = None if engine is None else EngineView.of(engine)
    return Simulation(
        trace=trace.name,
        settings=describe_settings(trace, cluster, costs, num_slots, num_groups, schedule, chunk, seed, view),
        num_ranks=num_ranks,
        num_nodes=num_nodes,
        num_experts=trace.num_experts,
        top_k=top_k,
        tokens=np.full(num_steps, num_ranks * tokens_per_rank, np.int64),
        load=run.load if judged is None else run.judged_load,
        policies=tuple(state.result(states[0], costs, judged) for state in states),
        notes=(*batches.notes, *left_out),
        empty_windows=empty_windows,
        num_warmup_steps=warmup,
        num_judged_steps=num_judged,
        horizon_steps=schedule.horizon,
        copy_overlap=copy_overlap,
        recorded_tokens=recorded,
        recorded_windows=0 if trace.routing is not None else trace.num_windows,
        assignments_per_step=num_ranks * tokens_per_rank * top_k,
        recorded_assignments_per_step=0.0 if trace.routing is not None else recorded * top_k / num_steps,
        hardware=costs.hardware,
        first_plan=first_plan if first_plan >= num_steps else 0,
        engine=view,
    )


def _find_top_k(trace: Trace, top_k: int | None, shape: ModelShape | None) -> int:
    known = trace.top_k if trace.top_k is not None else trace.metadata.get("top_k")
    if known is None:
        if top_k is None and shape is not None:
            top_k = shape.top_k
        if top_k is None:
            raise MissingArgumentError(
                "top_k", "not given", "is needed for a trace without tokens", "say how many experts a token has"
            )
        known = whole_number("top_k", top_k, 1)
    elif not isinstance(known, int):
        raise ConstraintError(
            "trace", f"one whose `top_k` is {known!r}", "must have a whole number there", "correct its metadata"
        )
    elif top_k is not None and top_k != known:
        raise ConstraintError("top_k", top_k, f"must be that of the trace, {known}", "leave it out")
    if not 1 <= int(known) <= trace.num_experts:
        raise ConstraintError("top_k", known, f"must be 1 to {trace.num_experts}, the experts", "check the model")
    return int(known)


def _recorded_tokens(trace: Trace, top_k: int) -> int:
    """Tokens of the trace; of loads alone, what the layer with the most assignments says."""
    if trace.routing is not None:
        return len(trace.routing)
    return int(trace.load.sum(axis=(0, 2)).max()) // top_k


def _find_steps(trace: Trace, cluster: Cluster, recorded: int, num_steps: int | None) -> int:
    if trace.routing is not None and not len(trace.routing):
        raise ConstraintError("trace", "without a token", "must have some to replay", "record more")
    if num_steps is not None:
        return whole_number("num_steps", num_steps, 1)
    filled = recorded // (cluster.num_ranks * cluster.tokens_per_rank)
    return max(1, filled if trace.routing is not None else min(filled, _MOST_DRAWN))


def _check_chunk(chunk: int | None, cluster: Cluster) -> int:
    if chunk is None:
        return cluster.tokens_per_rank
    chunk = whole_number("chunk", chunk, 1)
    if cluster.tokens_per_rank % chunk:
        fitting = [size for size in range(1, cluster.tokens_per_rank + 1) if cluster.tokens_per_rank % size == 0]
        raise ConstraintError(
            "chunk", chunk, f"must divide the {cluster.tokens_per_rank} tokens per rank", f"use one of {fitting}"
        )
    return chunk
