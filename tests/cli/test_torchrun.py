"""The demo over real processes, started as a user would start it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from tests.traces.npz import at, npz


def test_four_processes(tmp_path):
    """The ranks are the processes, whatever --ranks says, and one JSON object is printed for all of them."""
    load = np.array([[[40, 10, 10, 10, 10, 10, 10, 10], [10] * 8]])
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "4",
        "-m",
        "evenmoe",
        "demo",
        "--json",
        "--ranks",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, *command, "--trace", str(at(tmp_path / "eight.npz", npz(load=load)))],
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["trace"], summary["num_ranks"], summary["num_slots"]) == ("eight", 4, 12)
    assert summary["par"]["default_placement"]["worst"] == 50 / 27.5
    page, loaded, planned = summary["worlds"]
    assert page["world"] == "published demo's world: 2 EP x 2 TP ranks, 8 tokens each, H 7168, K 2"
    assert page["values_compared"] == 2 * 4 * 8 * 7168
    assert page["rows_per_rank"] == [32, 32]  # K = 2 of 2 experts: every token goes to both ranks
    for world, kind in ((loaded, "default placement"), (planned, "planned")):
        assert world["world"] == f"8 experts, K 4, 4 ranks, layer 0, {kind}"
        assert len(world["rows_per_rank"]) == 4
        assert sum(world["rows_per_rank"]) == 4 * 64 * 4
    assert all(0.05 < world["largest_difference_over_bound"] <= 1.0 for world in summary["worlds"])
    assert summary["within_rounding"] is True
