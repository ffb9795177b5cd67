"""docs/validation.md says what benchmarks/results/costs.json holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows() -> list[list[str]]:
    text = (ROOT / "docs/validation.md").read_text("utf-8")
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)
    ]


def test_every_figure_of_the_kernels_is_in_the_file():
    found = json.loads((ROOT / "benchmarks/results/costs.json").read_text("utf-8"))
    expected = [
        [f"{table['table'].split('_')[0].upper()} {table['phase']}", kind]
        + [f"{table[kind][name]:g}" for name in ("median", "mean", "p90", "cells")]
        for table in found["kernels"]
        for kind in ("skewed rows", "noise of the draws", "balance assumed")
    ]
    shown = [row for row in rows() if len(row) == 6 and row[0] != "table" and "-" not in row[0]]
    assert sorted(shown) == sorted(expected)
    crossed = [
        [f"{row['gpu']} {row['phase']}", row["from"], *(f"{row[name]:g}" for name in ("median", "mean", "p90"))]
        for row in found["across"]
    ]
    assert sorted(row for row in rows() if len(row) == 5 and row[1] in ("H100", "B200")) == sorted(crossed)


def test_every_figure_of_the_exchanges_is_in_the_file():
    found = json.loads((ROOT / "benchmarks/results/costs.json").read_text("utf-8"))
    kinds = {"decode": "low latency", "prefill": "high throughput"}
    expected = [
        [f"{table['table'].split('_')[0].upper()}, {kinds[table['phase']]}"]
        + [f"{table[part][name]:g}" for part in ("dispatch", "combine") for name in ("median", "mean")]
        for table in found["exchanges"]
    ]
    assert sorted(row for row in rows() if "," in row[0]) == sorted(expected)
