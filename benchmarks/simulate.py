"""The simulator at real scale: DeepSeek-V3 on 320 ranks, 1,000 steps of 128 tokens a rank.

    python benchmarks/simulate.py [--steps N] [--ranks N] [--slots N] [--workers N] [--together] [policy ...]

One line per policy: CPU and wall seconds of the whole replay with identity and that policy, so what both need (drawing
the counts of 58 layers x 256 experts x 320 source ranks a step) is in every line; with --together one line for all.
Peak memory is that of the process so far. Compilation is done before.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time

from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.policies import default_policies
from evenmoe.simulator.replay import simulate
from evenmoe.traces.models import find_model
from evenmoe.traces.synthesis import synthesize

RANKS_PER_NODE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="*", default=list(default_policies(320, 320, once=False)))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=320)
    parser.add_argument("--slots", type=int, default=320)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--together", action="store_true")
    options = parser.parse_args()
    shape = find_model("deepseek-v3")
    num_nodes = max(1, options.ranks // RANKS_PER_NODE)
    costs = CostModel.for_model(shape.name)
    started = time.process_time()
    trace = synthesize(
        shape,
        num_windows=options.windows,
        tokens_per_window=options.ranks * options.tokens,
        requests=options.ranks,
        request_windows=4,
    )
    print(f"{platform.processor() or platform.machine()}; trace made in {time.process_time() - started:.1f} s of CPU")

    def run(policies: list[str], steps: int) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        found = simulate(
            trace,
            policies,
            num_ranks=options.ranks,
            num_nodes=num_nodes,
            tokens_per_rank=options.tokens,
            costs=costs,
            num_slots=options.slots,
            num_steps=steps,
            refresh=max(2, options.steps // 10),
            workers=options.workers,
        )
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if steps < options.steps:
            return
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{' '.join(policies)}: {cpu:.1f} s CPU, {wall:.1f} s wall, {memory:.2f} GiB", flush=True)
        for policy in found.policies:
            print(
                f"    {policy.name:28} PAR {policy.par.mean():.3f}, step {policy.step_time.mean() / 1e3:.2f} ms, "
                f"{policy.copies.sum():,} copies, break-even {policy.break_even_steps:.1f} steps"
            )

    groups = [options.policies] if options.together else [[policy] for policy in options.policies]
    run(options.policies, min(max(3, options.steps // 10 + 1), options.steps - 1))  # compiles everything, plans once
    for policies in groups:
        run(policies, options.steps)


if __name__ == "__main__":
    main()
