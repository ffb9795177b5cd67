"""Rows of the public tables of measured expert kernels, with the loads that each was measured under.

A table is aiconfigurator's (Apache-2.0): `…_moe_…_context_moe_perf` and `…_generation_moe_perf`, as Parquet (needs
pyarrow) or as CSV with the same columns. What the collector does with them is in its `collect_deepep_moe.py`.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evenmoe.costs.kernel import KernelModel
from tools.drawn_loads import Generation, IntArray, busiest, draw_counts

#: Draws of a skewed row's load; the collector times five. With 20 the mean error of H100's decode moves by less than
#: 0.1 % from seed to seed.
DRAWS = 20
PREFILL_TILE, DECODE_TILE = 128, 64  # rows of a block of DeepGEMM's contiguous and masked kernels


@dataclass(frozen=True)
class Row:
    """One measured cell.

    Attributes:
        told: the table's columns.
        loads: rows of each slot of the timed rank, int64 (draws, S).
        is_uniform: whether every expert had as many.
    """

    told: dict[str, object]
    loads: IntArray
    is_uniform: bool

    @property
    def time_us(self) -> float:
        return float(str(self.told["latency"])) * 1e3

    @property
    def expert_bytes(self) -> float:
        size = {"fp8_block": 1.0, "nvfp4": 0.5, "bfloat16": 2.0}[str(self.told["moe_dtype"])]
        return 3.0 * number(self.told, "hidden_size") * number(self.told, "inter_size") * size

    @property
    def expert_flops(self) -> float:
        return 6.0 * number(self.told, "hidden_size") * number(self.told, "inter_size")

    def features(self, phase: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Padded rows and activated slots of each draw, float64 (draws,) both."""
        if phase == "prefill" and self.is_uniform:
            # The collector does not pad these: blocks of 128 rows span experts, and each reads one expert's weights.
            blocks = -(-self.loads.sum(axis=1) // PREFILL_TILE)
            return blocks * float(PREFILL_TILE), np.minimum(blocks, self.loads.shape[1]).astype(np.float64)
        tile = PREFILL_TILE if phase == "prefill" else DECODE_TILE
        rows = KernelModel(1.0, 1.0, tile=tile).padded(self.loads).sum(axis=1)
        return rows.astype(np.float64), (self.loads > 0).sum(axis=1).astype(np.float64)


def number(row: dict[str, object], name: str) -> int:
    return int(float(str(row[name])))


def read_table(path: Path) -> list[dict[str, object]]:
    """The table's rows that have a time."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows: list[dict[str, object]] = [dict(row) for row in csv.DictReader(file)]
    else:
        from pyarrow import parquet  # only this tool reads Parquet

        rows = parquet.read_table(path).to_pylist()
    return [row for row in rows if row.get("latency") not in (None, "") and math.isfinite(float(str(row["latency"])))]


def phase_of(rows: list[dict[str, object]]) -> str:
    return "prefill" if str(rows[0]["op_name"]).endswith("context") else "decode"


def with_loads(rows: list[dict[str, object]], phase: str, how: Generation, seed: int = 0) -> list[Row]:
    """The rows with their loads: the uniform one, or draws of their power law."""
    found = []
    for row in rows:
        kind = str(row["distribution"])
        if kind == "uniform":
            loads = _uniform(row, phase)
            if loads is not None:
                found.append(Row(row, loads[None], True))
            continue
        alpha = float(kind.removeprefix("power_law_"))
        rng = np.random.default_rng((seed, len(found)))
        sizes = [number(row, name) for name in ("num_tokens", "num_experts", "topk", "moe_ep_size")]
        draws = [busiest(draw_counts(rng, *sizes, alpha, how), sizes[3]) for _ in range(DRAWS)]
        found.append(Row(row, np.array(draws), False))
    return found


def _uniform(row: dict[str, object], phase: str) -> IntArray | None:
    tokens, experts, top_k, ranks = (number(row, name) for name in ("num_tokens", "num_experts", "topk", "moe_ep_size"))
    slots, each = experts // ranks, tokens * top_k // experts
    if each:
        return np.full(slots, each, np.int64)
    if phase == "prefill":
        return None  # the collector has none, or one without rows
    return (np.arange(slots) < tokens * top_k // ranks).astype(np.int64)
