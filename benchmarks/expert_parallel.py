"""What the exchange of one MoE layer costs on CPUs: dispatch and combine of 4 ranks, their CPU ms added up.

    python benchmarks/expert_parallel.py                               # everything, some minutes
    python benchmarks/expert_parallel.py --only T16 --json benchmarks/results/expert_parallel.json
    python benchmarks/expert_parallel.py --check benchmarks/results/expert_parallel.json

`ExpertParallel` and the operators over threads, shared memory and gloo, beside what one writes by hand over gloo,
transformers' own AllToAllEP, and two limits: an all_to_all of the same rows that adds nothing up (over gloo), and one
copy of each row with one pass that adds up (without any exchange). All take turns in one group of 4 processes with one
thread each, and each is compared with the dense formula in float64 first. Medians of several steps.

With `--check`, the exit status is 1 if evenmoe's CPU time, as a share of the baseline's in the same run, grew by more
than the margin. Its default leaves room for a machine that others use, too; it is chosen, not measured.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.exchange import contestants, results
from benchmarks.exchange.contestants import Work
from benchmarks.exchange.measure import Figures, measure

WORK = (Work(512, 7168, 256), Work(512, 2048, 64), Work(512, 2048, 128), Work(16, 7168, 256), Work(16, 2048, 64))
MARGIN = 1.3


def show(work: Work, found: dict[str, Figures]) -> None:
    print(f"{work.name:40}{'dispatch':>10}{'combine':>10}{'both':>10}{'least':>10}{'most':>10}{'wall':>10}")
    for name, one in found.items():
        cells = one.dispatch_cpu_ms, one.combine_cpu_ms, one.cpu_ms, one.cpu_ms_least, one.cpu_ms_most, one.wall_ms
        print(f"  {name:38}" + "".join(f"{cell:10.1f}" for cell in cells), flush=True)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="the work whose name begins so, such as T16")
    parser.add_argument("--contestants", nargs="+", default=[""], help="those whose name has one of these in it")
    parser.add_argument("--steps", type=int, default=15, help="steps that are counted")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with the figures in this file")
    parser.add_argument("--baseline", default="by hand", help="contestant by whose CPU time --check divides")
    parser.add_argument("--margin", type=float, default=MARGIN, help="by how much such a share may grow")
    given = parser.parse_args(words)
    names = [name for name in contestants.names() if any(part in name for part in given.contestants)]
    chosen = [work for work in WORK if work.name.startswith(tuple(given.only))]
    if not names or not chosen:
        parser.error(f"nothing is left; work: {[work.name for work in WORK]}, contestants: {contestants.names()}")
    if given.check and given.baseline not in names:
        parser.error(f"--baseline must be among the contestants, {names}")
    then = results.read(given.check) if given.check else None
    load = os.getloadavg()[0]
    print("CPU ms of all ranks together, median; wall ms. Not measured: " + str(contestants.absent() or "nothing"))
    measured = {}
    for work in chosen:
        measured[work.name] = measure(work, names, given.steps)
        show(work, measured[work.name])
    found = results.document(measured, steps=given.steps, load_before=load, absent=contestants.absent())
    print(f"load average {found['load_average']}")
    if given.json:
        results.write(given.json, found)
    worse = results.regressions(found, then, given.baseline, given.margin) if then else []
    print("\n".join(worse))
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
