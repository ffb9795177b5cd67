"""`tools/fit_costs.py` on tables that were made from known constants."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from evenmoe.costs import KernelModel
from tools.drawn_loads import busiest, distinct_tokens, draw_counts
from tools.fit_costs import errors, kernel_report
from tools.measured_tables import Row, read_table, with_loads

KNOWN = {
    "decode": KernelModel(2.5e12, 8e14, start_us=15.0, slot_us=2.0, tile=64),
    "prefill": KernelModel(2.2e12, 9e14, start_us=150.0, floor_us=300.0, token_us=6e-3, tile=128),
}


def told(phase: str, tokens: int, ranks: int, kind: str, latency: float) -> dict[str, object]:
    name = "moe_context" if phase == "prefill" else "moe_generation"
    return {
        "framework": "SGLang", "version": "0", "op_name": name, "kernel_source": "made", "moe_dtype": "fp8_block",
        "num_tokens": tokens, "hidden_size": 7168, "inter_size": 2048, "topk": 8, "num_experts": 256,
        "moe_tp_size": 1, "moe_ep_size": ranks, "distribution": kind, "latency": latency,
    }  # fmt: skip


def table(path: Path, phase: str, generation: str) -> Path:
    """Times of the known constants, to the last digit on uniform rows, the mean of five other draws on skewed ones."""
    rows = []
    for ranks in (4, 8, 32, 64):
        for tokens in (64, 256, 2048, 16384):
            for kind in ("uniform", "power_law_0.8", "power_law_1.2"):
                row = told(phase, tokens, ranks, kind, 1.0)
                (found,) = with_loads([row], phase, generation, seed=7)  # pyright: ignore[reportArgumentType]
                loads = Row(row, found.loads[:5], found.is_uniform)
                padded, active = loads.features(phase)
                received = tokens if phase == "prefill" else 0
                time = KNOWN[phase].time_us(padded, active, 256 // ranks, 3 * 7168 * 2048, 6 * 7168 * 2048, received)
                rows.append(row | {"latency": time.mean() / 1e3})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows([*rows, told(phase, 64, 8, "uniform", 1.0) | {"latency": ""}])
    return path


@pytest.mark.parametrize("phase", KNOWN)
def test_known_constants_are_found_again(tmp_path, phase):
    report, model, _, kind = kernel_report(table(tmp_path / "h100_made.csv", phase, "later"), "auto")
    assert (kind, report["loads"]) == (phase, "later")
    for name in ("memory_bytes_per_s", "flops_per_s", "start_us", "slot_us", "floor_us", "token_us"):
        # Times are exact but for the last bits; the search ends where a step changes the cost by less than 1e-8.
        assert getattr(model, name) == pytest.approx(getattr(KNOWN[phase], name), rel=1e-3), name
    assert report["uniform rows"]["mean"] < 0.01  # pyright: ignore[reportIndexIssue]
    # Other draws of the same distribution: what is left is their noise, far below that of a load taken for balanced.
    assert report["skewed rows"]["mean"] < 6  # pyright: ignore[reportIndexIssue]
    assert report["balance assumed"]["mean"] > 3 * report["skewed rows"]["mean"]  # pyright: ignore


def test_rows_without_a_time_are_left_out(tmp_path):
    assert len(read_table(table(tmp_path / "h100_made.csv", "decode", "later"))) == 48


@pytest.mark.parametrize("generation", ["earlier", "later"])
@pytest.mark.parametrize(("tokens", "ranks"), [(1, 2), (2, 64), (33, 256), (4096, 8)])
@pytest.mark.parametrize("alpha", [0.6, 1.01, 1.2])
def test_draws_hold_what_the_collector_says(generation, tokens, ranks, alpha):
    for seed in range(5):
        counts = draw_counts(np.random.default_rng(seed), tokens, 256, 8, ranks, alpha, generation)
        assert counts.sum() == 8 * tokens
        assert counts.min() >= 0
        assert counts.max() <= tokens
        assert busiest(counts, ranks).sum() == counts.reshape(ranks, -1).sum(axis=1).max()


def test_distinct_tokens_by_filling_columns():
    rng = np.random.default_rng(0)
    for _ in range(50):
        tokens = int(rng.integers(1, 20))
        counts = draw_counts(rng, tokens, 16, 4, 4, 0.8, "later")
        order = np.argsort(-counts, kind="stable")
        experts = np.repeat(order, counts[order]).reshape(4, tokens).T
        mine = rng.random(16) < 0.3
        assert distinct_tokens(counts, tokens, mine) == int(mine[experts].any(axis=1).sum())


def test_errors_by_hand():
    assert errors([1.1, 0.8, 1.0], [1.0, 1.0, 1.0]) == {
        "median": 10.0, "mean": 10.0, "p90": 18.0, "bias": 1.0, "cells": 3,
    }  # fmt: skip
