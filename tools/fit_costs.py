"""Fit the constants of `evenmoe.costs` to public tables of measured kernels, and print how far they are right.

    python tools/fit_costs.py TABLE [TABLE ...] [--json errors.json] [--constants src/evenmoe/costs/constants.json]

A kernel table (SGLang's `…_context_moe_perf` and `…_generation_moe_perf` of aiconfigurator) is fitted on its uniform
rows alone and judged on its skewed ones, beside a model that takes every load for balanced, and beside the noise of
the draws: what a perfect model would show, since the loads of a row are known only as draws of the same distribution.
Where tables of several accelerators are given, each is also predicted from every other's constants and both data
sheets. A table of DeepEP's dispatch and combine is fitted on all of its rows of the usual 20 multiprocessors.

Which of two generations of the collector drew a table's loads stands in no column. It is the one whose skewed rows the
fitted constants predict better: one bit a table, which no constant depends on; `--loads` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from evenmoe.costs.hardware import constants, scaled
from evenmoe.costs.kernel import KernelModel
from tools.drawn_loads import Generation
from tools.measured_tables import DECODE_TILE, PREFILL_TILE, Row, number, phase_of, read_table, with_loads

FloatArray = npt.NDArray[np.float64]

#: Of each phase, the constants that are fitted and where the search starts. Prefill's start is the launches of its
#: kernels, its floor the host's; in decode, which runs as a graph, there is no floor.
STARTS = {
    "decode": {"start_us": 20.0, "slot_us": 1.0, "memory_bytes_per_s": 3e12, "flops_per_s": 1e15},
    "prefill": {
        "start_us": 20.0,
        "memory_bytes_per_s": 3e12,
        "flops_per_s": 1e15,
        "floor_us": 400.0,
        "token_us": 7e-3,
    },
}
_TIMED_DRAWS = 5  # which the collector times and averages
_USUAL_SMS = 20  # DeepEP's default for kernels of high throughput
_NODE_RANKS = 8  # of the tables of DeepEP, which are of one node


def predicted(model: KernelModel, rows: list[Row], phase: str) -> list[FloatArray]:
    """Microseconds of each draw of each row."""
    found = []
    for row in rows:
        padded, active = row.features(phase)
        tokens = number(row.told, "num_tokens") if phase == "prefill" else 0
        found.append(model.time_us(padded, active, row.loads.shape[1], row.expert_bytes, row.expert_flops, tokens))
    return found


def fit_kernel(rows: list[Row], phase: str) -> KernelModel:
    """The constants that predict these rows best: least squares of the logarithm, of which outliers count less."""
    names, measured = list(STARTS[phase]), np.array([row.time_us for row in rows])
    features = [row.features(phase) for row in rows]
    padded, active = (np.array([each[i].mean() for each in features]) for i in range(2))
    slots = np.array([row.loads.shape[1] for row in rows])
    tokens = np.array([number(row.told, "num_tokens") if phase == "prefill" else 0 for row in rows])
    sizes = rows[0].expert_bytes, rows[0].expert_flops
    tile = PREFILL_TILE if phase == "prefill" else DECODE_TILE

    def model_of(logs: FloatArray) -> KernelModel:
        return KernelModel(**dict(zip(names, np.exp(logs).tolist(), strict=True)), tile=tile)

    def residuals(logs: FloatArray) -> FloatArray:
        return np.log(model_of(logs).time_us(padded, active, slots, *sizes, tokens) / measured)

    # 0.03: repeated uniform cells differ by 1-3 %; what is further off is another regime, not noise.
    result = least_squares(residuals, np.log(list(STARTS[phase].values())), loss="soft_l1", f_scale=0.03)
    return model_of(result.x)


def errors(guessed: npt.ArrayLike, measured: npt.ArrayLike) -> dict[str, float]:
    """Absolute errors in per cent: median, mean, 90th percentile, and the median of guessed over measured."""
    ratio = np.asarray(guessed, np.float64) / np.asarray(measured, np.float64)
    off = 100 * np.abs(ratio - 1)
    return {
        "median": round(float(np.median(off)), 2),
        "mean": round(float(off.mean()), 2),
        "p90": round(float(np.quantile(off, 0.9)), 2),
        "bias": round(float(np.median(ratio)), 3),
        "cells": len(ratio),
    }


def noise_floor(draws: list[FloatArray]) -> dict[str, float]:
    """Errors of the model about itself, where the mean of five draws is what was measured."""
    rng = np.random.default_rng(0)
    measured = [float(rng.choice(each, _TIMED_DRAWS).mean()) for each in draws]
    return errors([float(each.mean()) for each in draws], measured)


def balanced(rows: list[Row]) -> list[Row]:
    """The rows as if every expert had as many assignments."""
    found = []
    for row in rows:
        tokens, experts, top_k = (number(row.told, name) for name in ("num_tokens", "num_experts", "topk"))
        slots = row.loads.shape[1]
        each = tokens * top_k / experts
        active = max(1, min(slots, round(slots * min(1.0, each))))
        loads = np.zeros((1, slots), np.int64)
        loads[0, :active] = max(1, round(each))
        found.append(Row(row.told, loads, False))
    return found


def kernel_report(path: Path, how: str) -> tuple[dict[str, object], KernelModel, list[Row], str]:
    """Fit one table on its uniform rows, judge it on the others."""
    told = read_table(path)
    phase = phase_of(told)
    generations: list[Generation] = ["earlier", "later"] if how == "auto" else [how]  # pyright: ignore
    best: tuple[float, dict[str, object], KernelModel, list[Row]] | None = None
    for generation in generations:
        rows = with_loads(told, phase, generation)
        uniform = [row for row in rows if row.is_uniform]
        skewed = [row for row in rows if not row.is_uniform]
        model = fit_kernel(uniform, phase)
        draws = predicted(model, skewed, phase)
        measured = [row.time_us for row in skewed]
        found = errors([each.mean() for each in draws], measured)
        report: dict[str, object] = {
            "table": path.name,
            "phase": phase,
            "loads": generation,
            "uniform rows": errors(np.concatenate(predicted(model, uniform, phase)), [row.time_us for row in uniform]),
            "skewed rows": found,
            "noise of the draws": noise_floor(draws),
            "balance assumed": errors(np.concatenate(predicted(model, balanced(skewed), phase)), measured),
        }
        if best is None or found["mean"] < best[0]:
            best = found["mean"], report, model, skewed
    assert best is not None
    return best[1], best[2], best[3], phase


def exchange_rows(path: Path) -> dict[str, object]:
    """Latency and speed of dispatch and combine of one table, a row once per destination rank."""
    told = read_table_of_exchanges(path)
    normal = "dispatch_transmit_us" in told[0]
    parts = {}
    for name, row_bytes in (("dispatch", 1.0), ("combine", 2.0)):
        column = f"{name}_transmit_us" if normal else f"{name}_avg_t_us"
        rows = [
            row
            for row in told
            if row.get(column) not in (None, "")
            and float(str(row[column])) > 0
            and (not normal or number(row, f"{name}_sms") == _USUAL_SMS)
            and number(row, "num_experts") > 2 * _NODE_RANKS  # fewer take 4 to 7 times as long: another regime
        ]
        sent = np.array(
            [
                number(row, "num_token")
                * _destinations(number(row, "num_experts"), number(row, "num_topk"))
                * number(row, "hidden_size")
                * row_bytes
                for row in rows
            ]
        )
        measured = np.array([float(str(row[column])) for row in rows])
        logs = least_squares(
            lambda x, sent=sent, measured=measured: np.log((np.exp(x[0]) + sent / np.exp(x[1])) / measured),
            [3.0, math.log(1e5)],
            loss="soft_l1",
            f_scale=0.05,
        ).x
        parts[name] = (
            math.exp(logs[0]),
            math.exp(logs[1]) * 1e6,
            errors(np.exp(logs[0]) + sent / np.exp(logs[1]), measured),
        )
    speed = 3.0 / (1.0 / parts["dispatch"][1] + 2.0 / parts["combine"][1])
    return {
        "table": path.name,
        "phase": "prefill" if normal else "decode",
        "latency_us": (parts["dispatch"][0] + parts["combine"][0]) / 2,
        "bytes_per_s": speed,
        "dispatch": parts["dispatch"][2],
        "combine": parts["combine"][2],
    }


def read_table_of_exchanges(path: Path) -> list[dict[str, object]]:
    """A table of DeepEP's kernels, whose times have other columns."""
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def _destinations(num_experts: int, top_k: int) -> float:
    """Ranks that a token goes to, on average, if its experts are any `top_k` distinct ones."""
    width = num_experts // _NODE_RANKS
    missing = math.comb(num_experts - width, top_k) / math.comb(num_experts, top_k)
    return _NODE_RANKS * (1 - missing)


def gpu_of(told: str) -> str:
    """The accelerator of a table, from its file's name."""
    return told.split("_", 1)[0].upper()


def across(models: dict[tuple[str, str], KernelModel], skewed: dict[tuple[str, str], list[Row]]) -> list[dict]:
    """Every table from every other accelerator's constants and the data sheets of both."""
    found, sheets = [], constants()["hardware"]
    for (gpu, phase), rows in skewed.items():
        for (other, same), model in models.items():
            if other == gpu or same != phase or not {gpu, other} <= sheets.keys():
                continue
            guess = scaled(model, sheets[gpu], sheets[other])
            draws = predicted(guess, rows, phase)
            measured = [row.time_us for row in rows]
            found.append(
                {"gpu": gpu, "phase": phase, "from": other, **errors([each.mean() for each in draws], measured)}
            )
    return found


def main() -> None:
    """Fit, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--loads", choices=("auto", "earlier", "later"), default="auto")
    parser.add_argument("--json", type=Path, help="write the errors")
    parser.add_argument("--constants", type=Path, help="put what was fitted into this file")
    given = parser.parse_args()
    kernels, exchanges, models, skewed = [], [], {}, {}
    entries: dict[str, list[dict]] = {"kernels": [], "exchanges": []}
    for path in given.tables:
        if "deepep" in path.name:
            found = exchange_rows(path)
            exchanges.append(found)
            values = {name: found[name] for name in ("latency_us", "bytes_per_s")}
            entries["exchanges"].append(
                {"gpu": gpu_of(path.name), "phase": found["phase"], "engine": "SGLang", "version": "0.5.12"}
                | {"kernel": "DeepEP", "table": path.name, "values": values}
            )
            continue
        report, model, rows, phase = kernel_report(path, given.loads)
        kernels.append(report | {"constants": asdict(model)})
        models[gpu_of(path.name), phase], skewed[gpu_of(path.name), phase] = model, rows
        row = rows[0].told
        entries["kernels"].append(
            {"gpu": gpu_of(path.name), "phase": phase, "engine": str(row["framework"])}
            | {"version": str(row["version"]), "kernel": str(row["kernel_source"]), "dtype": str(row["moe_dtype"])}
            | {"table": path.name, "values": asdict(model)}
        )
    result = {"kernels": kernels, "exchanges": exchanges, "across": across(models, skewed)}
    _print(result)
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    if given.constants is not None:
        told = json.loads(given.constants.read_text())
        for kind, rows in entries.items():
            told[kind] = [
                row for row in told[kind] if (row["gpu"], row["phase"]) not in {(e["gpu"], e["phase"]) for e in rows}
            ] + rows
        given.constants.write_text(json.dumps(told, indent=1) + "\n")


def _print(result: dict[str, list[dict]]) -> None:
    line = "{:44} {:>7} {:>7} {:>7} {:>7} {:>6}"
    print(line.format("absolute error, %", "median", "mean", "p90", "bias", "cells"))
    for found in result["kernels"]:
        print(f"{found['table']} ({found['loads']} loads)")
        for name in ("uniform rows", "skewed rows", "noise of the draws", "balance assumed"):
            print(line.format("  " + name, *found[name].values()))
    for found in result["exchanges"]:
        print(found["table"])
        for name in ("dispatch", "combine"):
            print(line.format("  " + name, *found[name].values()))
    for found in result["across"]:
        told = f"{found['gpu']} {found['phase']} from {found['from']} and data sheets"
        print(line.format(told, *list(found.values())[3:]))


if __name__ == "__main__":
    main()
