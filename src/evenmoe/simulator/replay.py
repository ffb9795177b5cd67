"""`simulate`: a trace's batches under several policies, step by step."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.metrics import FloatArray
from evenmoe.planner.options import whole_number
from evenmoe.simulator.batches import Batches, Cluster, new_batches, recorded_part
from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.policies import DEFAULT, check_policy, parse_policies
from evenmoe.simulator.policy_state import PolicyState
from evenmoe.simulator.result import Simulation
from evenmoe.traces.trace import Trace

Progress = Callable[[int, int], None]

_COSTS = {
    "expert_flops_per_token": ("FLOP per row of an expert", "FLOP"),
    "flops_per_s": ("achieved by a rank", "FLOP/s"),
    "expert_bytes": ("weights of an expert", "bytes"),
    "memory_bytes_per_s": ("reading weights", "bytes/s"),
    "within_bytes_per_s": ("link to ranks of the node", "bytes/s"),
    "between_bytes_per_s": ("link to other nodes", "bytes/s"),
    "latency_us": ("latency of an exchange", "µs"),
    "dispatch_row_bytes": ("row to an expert", "bytes"),
    "combine_row_bytes": ("row back", "bytes"),
    "copy_bytes": ("copied expert", "bytes"),
}


def simulate(
    trace: Trace,
    policies: Sequence[str] = DEFAULT,
    *,
    num_ranks: int,
    num_nodes: int = 1,
    tokens_per_rank: int = 128,
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
        trace: with tokens every assignment is replayed, else counts are drawn from the loads (`simulator.batches`), of
            the windows and layers in which anything was recorded.
        policies: as `--policy` takes them (`simulator.policies`); the first identity comes first, added if missing.
        num_ranks: G, every one of which is a source rank and holds experts.
        num_nodes: nodes that share the ranks evenly, in rank order.
        tokens_per_rank: B, tokens of one source rank in one step.
        costs: what times are made from: `CostModel.for_model` of a known model, or figures of your own.
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
        ConstraintError: a trace or costs of another type, counts that do not go together, or a policy that cannot be.
        MissingArgumentError: a trace without tokens or `top_k`.

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
    if not isinstance(costs, CostModel):
        rule = "must be an evenmoe.simulator.costs.CostModel"
        fix = "use CostModel.for_model of a known model, or CostModel.for_expert of an expert's sizes"
        raise ConstraintError("costs", f"{str(costs)[:60]!r} of type {type(costs).__name__}", rule, fix)
    cluster = Cluster(num_ranks, num_nodes, tokens_per_rank)
    trace, empty_windows, left_out = recorded_part(trace)
    chunk = _check_chunk(chunk, cluster)
    top_k = _find_top_k(trace, top_k)
    num_steps = _find_steps(trace, cluster, num_steps)
    refresh = max(1, num_steps // 10) if refresh is None else whole_number("refresh", refresh, 1)
    window = refresh if window is None else whole_number("window", window, 1)
    fewest = cluster.fewest_slots(trace.num_experts)
    num_slots = fewest + num_ranks if num_slots is None else whole_number("num_slots", num_slots, 1)
    texts = None if isinstance(policies, str) or not isinstance(policies, Iterable) else list(policies)
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise ConstraintError("policies", repr(policies), "must be a sequence of texts", "put each policy in a list")
    chosen = parse_policies(
        texts,
        cluster,
        num_experts=trace.num_experts,
        num_slots=num_slots,
        num_groups=whole_number("num_groups", num_groups, 1),
        refresh=refresh,
        window=window,
    )
    for policy in chosen:
        check_policy(policy, cluster, trace.num_experts)
    states = [
        PolicyState(policy, cluster, trace.num_layers, trace.num_experts, num_steps, details) for policy in chosen
    ]
    batches = new_batches(trace, cluster, num_steps, top_k, whole_number("seed", seed, 0), chunk)
    workers = (os.cpu_count() or 1) if workers is None else whole_number("workers", workers, 1)
    with ThreadPoolExecutor(workers) as pool:
        run = _Run(trace, batches, states, costs, seed, top_k, pool, workers)
        for step in range(num_steps):
            run.advance(step)
            if progress is not None:
                progress(step + 1, num_steps)
    return Simulation(
        trace=trace.name,
        settings=_describe_settings(
            trace, cluster, costs, num_slots, num_groups, num_steps, refresh, window, chunk, seed
        ),
        num_ranks=num_ranks,
        num_nodes=num_nodes,
        num_experts=trace.num_experts,
        top_k=top_k,
        tokens=np.full(num_steps, num_ranks * tokens_per_rank, np.int64),
        load=run.load,
        policies=tuple(state.result(states[0], costs) for state in states),
        notes=(*batches.notes, *left_out),
        empty_windows=empty_windows,
    )


def _describe_settings(
    trace: Trace,
    cluster: Cluster,
    costs: CostModel,
    num_slots: int,
    num_groups: int,
    num_steps: int,
    refresh: int,
    window: int,
    chunk: int,
    seed: int,
) -> tuple[tuple[str, str, str], ...]:
    """Everything that a replay was made from, in the order to be shown; a policy's own choices are in its name."""
    rows = [
        ("layers", str(trace.num_layers), ""),
        ("experts", str(trace.num_experts), ""),
        ("windows of the trace", str(trace.num_windows), ""),
    ]
    if trace.routing is not None:
        requests = len(trace.routing) if trace.seq_start is None else len(trace.seq_start) - 1
        rows += [
            ("recorded tokens", str(len(trace.routing)), "tokens"),
            ("recorded requests", str(requests), ""),
            ("tokens of a request per step", str(chunk), "tokens"),
        ]
    rows += [
        ("ranks", str(cluster.num_ranks), ""),
        ("nodes", str(cluster.num_nodes), ""),
        ("slots", str(num_slots), ""),
        ("expert groups kept inside nodes", str(num_groups) if num_groups > 1 else "no", ""),
        ("tokens per rank and step", str(cluster.tokens_per_rank), "tokens"),
        ("steps", str(num_steps), ""),
        ("refresh every", str(refresh), "steps"),
        ("window", str(window), "steps"),
        ("seed", str(seed), ""),
    ]
    rows += [(name, f"{getattr(costs, field):.6g}", unit) for field, (name, unit) in _COSTS.items()]
    rows.append(("token rows in step times", "one per rank" if costs.one_row_per_rank else "one per expert", ""))
    return tuple(rows)


class _Run:
    """The state of a replay between steps."""

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
    ) -> None:
        layers, experts = trace.num_layers, trace.num_experts
        cluster = states[0].cluster
        self.load = np.zeros((layers, experts), np.int64)
        self._batches, self._states, self._costs, self._seed, self._pool = batches, states, costs, seed, pool
        self._counts = np.zeros((layers, experts, cluster.num_ranks), cluster.count_type)
        self._totals = np.zeros((layers, experts), np.int64)
        longest = max(state.policy.window for state in states)
        self._past: deque[FloatArray] = deque(maxlen=longest)
        self._parts = [part for part in np.array_split(np.arange(layers), workers) if part.size]
        top_k = top_k if trace.routing is not None else 0
        self._scratch = [[state.new_scratch(top_k) for state in states] for _ in self._parts]

    def advance(self, step: int) -> None:
        """Replay one step: plans from the past, then its batch, then what the policies make of it."""
        due = [state for state in self._states if state.policy.is_due(step)]
        self._plan(step, due, [np.stack(list(self._past)[-state.policy.window :]) for state in due])
        self._batches.advance()
        self._each(self._count)
        seeing = [state for state in self._states if state.policy.sees_the_step]
        self._plan(step, seeing, [self._totals[None].astype(np.float64)] * len(seeing))
        self._each(lambda part: self._run_layers(step, part))
        for state in self._states:
            state.finish_step(step, self._costs)
        self.load += self._totals
        self._past.append(self._totals.astype(np.float64))

    def _plan(self, step: int, states: list[PolicyState], seen: list[FloatArray]) -> None:
        planned = self._pool.map(lambda state, past: state.plan(past, self._seed), states, seen)
        for state, placement in zip(states, planned, strict=True):
            state.replace(step, placement, self._costs)

    def _each(self, work: Callable[[int], None]) -> None:
        """Call `work` for every part of the layers, each in a thread of its own."""
        list(self._pool.map(work, range(len(self._parts))))

    def _count(self, part: int) -> None:
        for layer in self._parts[part].tolist():
            self._batches.count(layer, self._counts[layer])
            self._counts[layer].sum(axis=1, dtype=np.int64, out=self._totals[layer])

    def _run_layers(self, step: int, part: int) -> None:
        for layer in self._parts[part].tolist():
            key, experts = (self._seed, step, layer), self._batches.experts(layer)
            for state, scratch in zip(self._states, self._scratch[part], strict=True):
                state.run_layer(key, self._counts[layer], experts, scratch)


def _find_top_k(trace: Trace, top_k: int | None) -> int:
    known = trace.top_k if trace.top_k is not None else trace.metadata.get("top_k")
    if known is None:
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


def _find_steps(trace: Trace, cluster: Cluster, num_steps: int | None) -> int:
    if trace.routing is not None and not len(trace.routing):
        raise ConstraintError("trace", "without a token", "must have some to replay", "record more")
    if num_steps is not None:
        return whole_number("num_steps", num_steps, 1)
    if trace.routing is None:
        return 100
    return max(1, round(len(trace.routing) / (cluster.num_ranks * cluster.tokens_per_rank)))


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
