"""Planners on every shape: CPU time of one thread for all layers, peak-to-average load (PAR), bound, copies.

    python benchmarks/planner.py [--seeds N] [--repeat N] [case …]

Time is the median of warm runs, of `em.plan` as a user calls it, checks and `Placement` included; `search` is the
planner alone. The greedy is DeepSeek's algorithm compiled by numba, without groups, as a yardstick of the machine;
vLLM and SGLang appear where they are installed. Copies are the slots a layer that must be loaded anew to get from the
plan of a load to the plan of the same load after a drift of 15 %; "previous" plans the second from the first.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np

import evenmoe as em
from planner_loads import CASES, Case, drift
from planner_peers import greedy, installed

DRIFT = 0.15


def milliseconds(run: Callable[[], object], repeat: int) -> float:
    run()
    spent = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        spent.append(time.process_time() - start)
    return float(np.median(spent)) * 1e3


def measure(case: Case, seeds: int, repeat: int) -> None:
    loads = [case.load(seed) for seed in range(seeds)]
    later = [drift(load, DRIFT, seed) for seed, load in enumerate(loads)]
    shape = {"num_ranks": case.ranks, "num_slots": case.slots, "num_nodes": case.nodes, "num_groups": case.groups}
    bound = np.mean([em.lower_bound(load, **shape) for load in loads])
    kind = f"{case.kind}({case.parameter})"
    goal = f", goal {case.goal}" if case.goal else ""
    print(f"\n{case.name}: {case.layers} x {case.experts} -> {case.slots}, {case.ranks} ranks, {kind}{goal}")
    print(f"  {'planner':22}{'CPU ms':>9}{'x greedy':>9}{'PAR':>9}{'worst':>9}{'bound':>9}{'copies':>8}")

    def placed(slots: np.ndarray) -> em.Placement:
        return em.Placement(slots, case.ranks, num_experts=case.experts)

    rows: dict[str, Callable[[np.ndarray], em.Placement]] = {"evenmoe": lambda load: em.plan(load, **shape)}
    rows["greedy (numba)"] = lambda load: placed(greedy(load, case))
    for name, peer in installed().items():
        rows[name] = lambda load, peer=peer: placed(peer(load, case))
    yardstick = milliseconds(lambda: greedy(loads[0], case), repeat)
    for name, plan in rows.items():
        spent = yardstick if name == "greedy (numba)" else milliseconds(lambda plan=plan: plan(loads[0]), repeat)
        plans = [plan(load) for load in loads]
        par = np.stack([em.peak_to_average(load, p) for load, p in zip(loads, plans, strict=True)])
        copies = np.mean([em.count_copies(p, plan(load)) for p, load in zip(plans, later, strict=True)])
        print(
            f"  {name:22}{spent:9.2f}{spent / yardstick:9.2f}{par.mean():9.5f}{par.max():9.4f}{bound:9.5f}{copies:8.1f}"
        )
    used = em.plan(loads[0], **shape)
    spent = milliseconds(lambda: em.plan(later[0], **shape, previous=used), repeat)
    after = em.plan(later[0], **shape, previous=used)
    par = em.peak_to_average(later[0], after)
    limit = em.lower_bound(later[0], **shape).mean()
    copies = em.count_copies(used, after).mean()
    print(
        f"  {'evenmoe, previous':22}{spent:9.2f}{spent / yardstick:9.2f}{par.mean():9.5f}{par.max():9.4f}"
        f"{limit:9.5f}{copies:8.1f}"
    )
    search(case, loads[0], yardstick, repeat)


def search(case: Case, load: np.ndarray, yardstick: float, repeat: int) -> None:
    from evenmoe.planner.hierarchical import plan_hierarchical
    from evenmoe.planner.options import check_shape
    from evenmoe.planner.static import plan_static

    if case.groups > 1:
        counts = check_shape(case.experts, case.ranks, case.slots, case.nodes, case.groups)
        spent = milliseconds(lambda: plan_hierarchical(load, counts), repeat)
    else:
        spent = milliseconds(lambda: plan_static(load, case.ranks, case.slots, 0), repeat)
    print(f"  {'evenmoe, search':22}{spent:9.2f}{spent / yardstick:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="parts of the names of cases; all by default")
    parser.add_argument("--seeds", type=int, default=3, help="loads a case")
    parser.add_argument("--repeat", type=int, default=7, help="warm runs that time is the median of")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, one thread")
    for case in CASES:
        if not options.case or any(part.lower() in case.name.lower() for part in options.case):
            measure(case, options.seeds, options.repeat)


if __name__ == "__main__":
    main()
