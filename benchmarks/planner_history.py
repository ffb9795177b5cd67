"""Plans from windows against loads that were not planned from: held-out peak-to-average load (PAR) and CPU time.

    python benchmarks/planner_history.py [--traces FOLDER] [--seeds N] [data set …]

Windows are split at random into past and future. Every planner sees the past; `held out` is its mean PAR over the
windows and layers of the future, `in-window` over those of the past. `oracle` plans every future window for itself.
`mean` plans for the sum of the past, as vLLM and DeepSeek do; `FlashLB-like` is vllm-ascend's policy 3 in short;
`no smoothing` a local search from there on the mean PAR of the past itself, 40,000 random moves a layer.

Measured traces are read from FOLDER (by default ../shared/data/traces) where it is there; the rest is synthetic.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import evenmoe as em
from planner_history_peers import flash, unsmoothed
from planner_loads import Load

TRACES = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces"


class History(NamedTuple):
    name: str
    load: Callable[[int], Load]  # windows (T, L, E) of a seed
    past: int
    ranks: int
    slots: int


def measured(folder: Path) -> Iterator[History]:
    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
            return dict(file)

    gpt = read("gpt_oss_20b_mmlu_pro_and_other")
    long = gpt["load"][:, 0].sum(axis=1) >= 400  # selections: 100 tokens
    honest = gpt["load"][long & ~gpt["seq_repetition"]]  # the others loop on some words
    yield History("gpt-oss-20b requests", lambda seed: honest, 35, 8, 40)
    yield History("gpt-oss-20b, loops too", lambda seed: gpt["load"][long], 40, 8, 40)
    mixtral = read("mixtral_8x7b_mmlu")
    topics = np.stack([mixtral["load"][mixtral["subject_id"] == topic].sum(axis=0) for topic in range(57)])
    yield History("Mixtral-8x7B topics", lambda seed: topics, 40, 8, 16)
    samples = [by_runs(read(f"deepseek_v2_lite_esft_{task}")["load"], n) for task, n in (("intent", 4), ("law", 2))]
    yield History("DeepSeek-V2-Lite tasks", lambda seed: np.concatenate(samples), 33, 8, 72)
    olmoe = read("olmoe_1b7b_base")["load"]
    yield History("OLMoE domains", lambda seed: olmoe, 4, 8, 72)
    flash_v4 = read("deepseek_v4_flash_decode")["routing"]
    runs = [routed(part, 256) for part in np.array_split(flash_v4, len(flash_v4) // 48)]
    yield History("DeepSeek-V4-Flash runs", lambda seed: np.stack(runs)[:, ::5], 24, 32, 288)


def by_runs(load: Load, size: int) -> Load:
    """Sums of `size` windows in a row."""
    number = len(load) // size
    return load[: number * size].reshape(number, size, *load.shape[1:]).sum(axis=1)


def routed(routing: np.ndarray, experts: int) -> Load:
    """Tokens per layer and expert of (tokens, layers, k) expert ids."""
    return np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in routing.transpose(1, 0, 2)])


def synthetic() -> Iterator[History]:
    for name, factors, sigma, noise in (
        ("few strong factors", 8, 0.5, 0.05),
        ("many weak factors", 32, 0.35, 0.1),
        ("groups of experts", 0, 0.5, 0.1),
        ("independent", -1, 0.3, 0.0),
    ):
        yield History(
            f"{name}, 256 experts",
            lambda seed, shape=(factors, sigma, noise): moving(seed, (64, 4, 256), *shape),
            32,
            32,
            288,
        )


def moving(seed: int, shape: tuple[int, int, int], factors: int, sigma: float, noise: float) -> Load:
    """Zipf(0.8) popularity times exp(normal moves of size `sigma` and `noise`), 200,000 tokens, Poisson.

    Moves are those of hidden factors, at 0 of disjoint groups of 16 experts, at -1 of every expert for itself.
    """
    random = np.random.default_rng(seed)
    windows, layers, experts = shape
    weight = np.empty(shape)
    for layer in range(layers):
        if factors > 0:
            moves = random.normal(size=(windows, factors)) @ random.normal(0, sigma / factors**0.5, (factors, experts))
        else:
            number = experts // 16 if factors == 0 else experts
            moves = random.normal(0, sigma, (windows, number))[:, random.permutation(experts) % number]
        popularity = random.permutation(np.arange(1, experts + 1) ** -0.8)
        weight[:, layer] = popularity * np.exp(moves + random.normal(0, noise, moves.shape))
    return random.poisson(weight / weight.sum(axis=2, keepdims=True) * 200_000).astype(float)


def measure(history: History, seeds: int) -> None:
    rows: dict[str, Callable[[Load], em.Placement]] = {
        "evenmoe": lambda past: em.plan(past, num_ranks=history.ranks, num_slots=history.slots),
        "mean": lambda past: em.plan(past.sum(axis=0), num_ranks=history.ranks, num_slots=history.slots),
        "FlashLB-like": lambda past: flash(past, history.ranks, history.slots),
        "no smoothing": lambda past: unsmoothed(past, history.ranks, history.slots),
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rows}
    oracle = []
    for seed in range(seeds):
        load = np.asarray(history.load(seed), float)
        load = load[np.random.default_rng(seed).permutation(len(load))]
        past, future = load[: history.past], load[history.past :]
        for name, plan in rows.items():
            if seed == 0:
                plan(past[:2, :1])  # compile
            start = time.process_time()
            placement = plan(past)
            spent = time.process_time() - start
            pars = (em.peak_to_average(part, placement).mean() for part in (future, past))
            found[name].append((*pars, spent))
        # Every future window of every layer as a layer of its own; some are enough.
        each = future.reshape(-1, future.shape[2])[:: max(1, future.shape[0] * future.shape[1] // 60)]
        oracle.append(em.peak_to_average(each, em.plan(each, num_ranks=history.ranks, num_slots=history.slots)).mean())
    windows, layers, experts = load.shape
    print(
        f"\n{history.name}: {history.past} of {windows} windows, {layers} x {experts} -> {history.slots}, "
        f"{history.ranks} ranks, {seeds} splits, oracle {np.mean(oracle):.4f}"
    )
    print(f"  {'planner':14}{'held out':>10}{'in-window':>11}{'CPU s':>8}")
    for name, figures in found.items():
        held_out, inside, spent = np.mean(figures, axis=0)
        print(f"  {name:14}{held_out:10.4f}{inside:11.4f}{spent:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="data sets, by the beginning of their names; all by default")
    parser.add_argument("--traces", type=Path, default=TRACES)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    if options.traces.is_dir():
        histories = [*measured(options.traces), *synthetic()]
    else:
        print(f"no measured traces: {options.traces} is not there")
        histories = list(synthetic())
    for history in histories:
        if not options.names or any(history.name.lower().startswith(name.lower()) for name in options.names):
            measure(history, options.seeds)


if __name__ == "__main__":
    main()
