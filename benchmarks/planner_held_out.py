"""Plans of one summed load against windows that are not in it, beside the published greedy: does a plan generalize?

    python benchmarks/planner_held_out.py [--traces FOLDER] [--splits N] [--layers N] [recording …]

A cell is a recording and a shape. Windows are split into halves at random, N times; both planners get the sum of one
half, and are judged by the mean PAR over the windows and layers of the other. `ratio` is evenmoe's over the greedy's,
the mean over splits, and `s.e.` its standard error; a cell is significantly worse where the ratio is above 1 by more
than two of them. `in` is evenmoe's PAR over em.lower_bound on the load that it was planned from, mean and worst.

The constants of evenmoe's static plan were fitted to the recordings marked *; the others were looked at while they were
chosen, so that none of these recordings is a judge that nobody knew. Recordings are read from FOLDER (by default
../shared/data/traces) where it is there; the rest is synthetic.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import evenmoe as em
from evenmoe.traces.synthesis import synthesize
from planner_history import TRACES, by_runs, moving, routed
from planner_loads import Case, Load
from planner_peers import greedy

# (ranks, slots) by number of experts: no extra slots, few, and few slots a rank.
SHAPES = {
    8: ((4, 8), (4, 12), (8, 16)),
    16: ((8, 16), (8, 24), (16, 32)),
    32: ((8, 32), (8, 40), (16, 48), (32, 64)),
    64: ((8, 64), (8, 72), (16, 80), (32, 96), (64, 128)),
    128: ((16, 128), (16, 144), (64, 192)),
    256: ((32, 256), (32, 288), (64, 320), (128, 384), (144, 288)),
}


class Recording(NamedTuple):
    name: str
    windows: npt.NDArray[np.number]  # (T, L, E)
    tuned: bool


def measured(folder: Path) -> Iterator[Recording]:
    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
            return dict(file)

    gpt = read("gpt_oss_20b_mmlu_pro_and_other")
    long = gpt["load"][:, 0].sum(axis=1) >= 400  # selections: 100 tokens
    loops = gpt["seq_repetition"]
    yield Recording("gpt-oss-20b requests", gpt["load"][long & ~loops], True)
    yield Recording("gpt-oss-20b loops", gpt["load"][long & loops], False)
    mixtral = read("mixtral_8x7b_mmlu")
    topics = np.stack([mixtral["load"][mixtral["subject_id"] == topic].sum(axis=0) for topic in range(57)])
    yield Recording("Mixtral-8x7B topics", topics, False)
    yield Recording("Mixtral-8x7B prompts", by_runs(mixtral["load"][::7], 8), False)
    for task, size, tuned in (("intent", 4, True), ("law", 1, False), ("summary", 2, False)):
        load = by_runs(read(f"deepseek_v2_lite_esft_{task}")["load"], size)
        yield Recording(f"DeepSeek-V2-Lite {task}", load, tuned)
    yield Recording("OLMoE domains", read("olmoe_1b7b_base")["load"], True)
    flash = read("deepseek_v4_flash_decode")["routing"]
    runs = [routed(part, 256) for part in np.array_split(flash, len(flash) // 48)]
    yield Recording("DeepSeek-V4-Flash runs", np.stack(runs), False)


def synthetic() -> Iterator[Recording]:
    yield Recording("few strong factors", moving(7, (32, 8, 256), 8, 0.5, 0.05), True)
    yield Recording("independent", moving(7, (32, 8, 256), -1, 0.3, 0.0), False)
    for model in ("qwen3-30b-a3b", "olmoe-1b-7b", "llama-4-scout", "gpt-oss-20b", "deepseek-v3"):
        trace = synthesize(model, num_windows=32, tokens_per_window=4096, requests=32, request_windows=4, seed=7)
        yield Recording(f"synthetic:{model}", trace.load, False)


class Cell(NamedTuple):
    recording: str
    tuned: bool
    ranks: int
    slots: int
    ratio: float  # held out, evenmoe over greedy
    error: float
    inside: float  # in-sample PAR over the bound
    worst: float
    milliseconds: float  # CPU, a layer

    @property
    def significantly_worse(self) -> bool:
        return self.ratio > 1 + 2 * self.error


def measure(recording: Recording, ranks: int, slots: int, splits: int, layers: int) -> Cell:
    windows = np.asarray(recording.windows, float)
    chosen = np.unique(np.linspace(0, windows.shape[1] - 1, layers).round().astype(int))
    windows = windows[:, chosen]
    num_experts = windows.shape[2]
    case = Case(recording.name, len(chosen), num_experts, slots, ranks, "", 0)
    pasts, halves = [], []
    for split in range(splits):
        order = np.random.default_rng(split).permutation(len(windows))
        pasts.append(windows[order[: len(order) // 2]].sum(axis=0))
        halves.append(order[len(order) // 2 :])
    stacked = np.concatenate(pasts)
    em.plan(stacked[:1], num_ranks=ranks, num_slots=slots)
    start = time.process_time()
    ours = em.plan(stacked, num_ranks=ranks, num_slots=slots).slot_to_expert
    spent = (time.process_time() - start) * 1e3 / len(stacked)
    theirs = greedy(stacked, case)

    def held_out(plan: npt.NDArray, split: int) -> float:
        part = plan[split * len(chosen) : (split + 1) * len(chosen)]
        return float(np.nanmean(par(windows[halves[split]], em.Placement(part, ranks, num_experts=num_experts))))

    ratios = np.array([held_out(ours, split) / held_out(theirs, split) for split in range(splits)])
    inside = em.peak_to_average(stacked, em.Placement(ours, ranks, num_experts=num_experts))
    inside /= em.lower_bound(stacked, num_ranks=ranks, num_slots=slots)
    error = float(ratios.std(ddof=1) / np.sqrt(splits))
    figures = float(inside.mean()), float(inside.max()), spent
    return Cell(recording.name, recording.tuned, ranks, slots, float(ratios.mean()), error, *figures)


def par(windows: Load, placement: em.Placement) -> Load:
    found = em.peak_to_average(windows, placement)
    found[~windows.any(axis=2)] = np.nan  # nothing was recorded there
    return found


def summary(name: str, cells: list[Cell]) -> None:
    if cells:
        ratio = np.exp(np.mean(np.log([cell.ratio for cell in cells])))
        worse = sum(cell.significantly_worse for cell in cells)
        better = sum(cell.ratio < 1 - 2 * cell.error for cell in cells)
        print(f"{name}: {len(cells)} cells, geometric mean {ratio:.4f}, {better} better, {worse} worse (2 s.e.)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="recordings, by the beginning of their names; all by default")
    parser.add_argument("--traces", type=Path, default=TRACES)
    parser.add_argument("--splits", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8, help="layers of each recording, spread evenly")
    options = parser.parse_args()
    recordings = [*(measured(options.traces) if options.traces.is_dir() else ()), *synthetic()]
    cells = []
    print(f"{'recording':28}{'shape':>16}{'ratio':>9}{'s.e.':>8}{'in':>9}{'worst':>9}{'ms':>7}")
    for recording in recordings:
        if options.names and not recording.name.lower().startswith(tuple(name.lower() for name in options.names)):
            continue
        experts = recording.windows.shape[2]
        for ranks, slots in SHAPES[experts]:
            cell = measure(recording, ranks, slots, options.splits, options.layers)
            cells.append(cell)
            name = f"{cell.recording}{'*' if cell.tuned else ''}"
            print(
                f"{name:28}{f'{experts}/{slots}/{ranks}':>16}{cell.ratio:9.4f}{cell.error:8.4f}{cell.inside:9.5f}"
                f"{cell.worst:9.4f}{cell.milliseconds:7.2f}{' worse' if cell.significantly_worse else ''}",
                flush=True,
            )
    summary("fitted to (*)", [cell for cell in cells if cell.tuned])
    summary("others", [cell for cell in cells if not cell.tuned])
    summary("all", cells)


if __name__ == "__main__":
    main()
