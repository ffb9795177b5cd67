"""Everything that a replay was made from, in words, for whoever reads its figures."""

from __future__ import annotations

from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.engine_view import EngineView
from evenmoe.simulator.schedule import Schedule
from evenmoe.traces.trace import Trace

_COSTS = {
    "expert_flops_per_token": ("FLOP per row of an expert", "FLOP"),
    "flops_per_s": ("achieved by a rank", "FLOP/s"),
    "expert_bytes": ("weights of an expert", "bytes"),
    "memory_bytes_per_s": ("reading weights", "bytes/s"),
    "within_bytes_per_s": ("link to ranks of the node", "bytes/s"),
    "between_bytes_per_s": ("link to other nodes", "bytes/s"),
    "latency_us": ("latency of an exchange", "µs"),
    "start_us": ("a call of the expert kernels", "µs"),
    "slot_us": ("of slots^0.8", "µs"),
    "floor_us": ("the expert kernels at least", "µs"),
    "token_us": ("a row in the expert kernels", "µs"),
    "norm": ("norm of reading and computing", ""),
    "tile": ("rows that a slot's are padded to", "rows"),
    "dispatch_row_bytes": ("row to an expert", "bytes"),
    "combine_row_bytes": ("row back", "bytes"),
    "copy_bytes": ("copied expert", "bytes"),
}


def describe_settings(
    trace: Trace,
    cluster: Cluster,
    costs: CostModel,
    num_slots: int,
    num_groups: int,
    schedule: Schedule,
    chunk: int,
    seed: int,
    engine: EngineView | None = None,
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
    if engine is not None:
        rows += [
            ("engine", engine.version, ""),
            ("the engine's replica rule", f"{engine.rule}: {engine.choice}", ""),
            ("the engine's own balancer", f"{engine.balancer}; it plans {engine.pace}", ""),
        ]
    rows += [
        ("ranks", str(cluster.num_ranks), ""),
        ("nodes", str(cluster.num_nodes), ""),
        ("slots", str(num_slots), ""),
        ("expert groups kept inside nodes", str(num_groups) if num_groups > 1 else "no", ""),
        ("tokens per rank and step", str(cluster.tokens_per_rank), "tokens"),
        ("steps", str(schedule.num_steps), ""),
        ("first plan before step", str(schedule.first), ""),
        ("refresh every", str(schedule.refresh), "steps"),
        ("refresh chosen", schedule.why, ""),
        ("window", str(schedule.window), "steps"),
        ("horizon of the first plan", str(schedule.horizon), "steps"),
        ("experts are copied", "beside the steps" if schedule.copy_overlap else "between steps", ""),
        ("seed", str(seed), ""),
    ]
    rows += [(name, f"{getattr(costs, field):.6g}", unit) for field, (name, unit) in _COSTS.items()]
    rows.append(("token rows in step times", "one per rank" if costs.one_row_per_rank else "one per expert", ""))
    return tuple(rows)
