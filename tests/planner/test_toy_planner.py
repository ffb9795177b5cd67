"""A planner of one's own, in one file, goes where evenmoe's go."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import evenmoe as em
from evenmoe.formats import read
from evenmoe.traces.synthesis import small_trace
from tests.cli.running import Run, runner
from tests.planner import toy_planner

TOY = f"py:{Path(toy_planner.__file__)}:plan"
SIZES = ("--expert-bytes", 4e6, "--expert-flops", 1e7, "--hidden", 64)
# One step takes all 2,048 tokens of the small trace, in whatever order.
SMALL = ("--ranks", 4, "--slots", 40, "--tokens-per-rank", 512, "--steps", 3, "--workers", 1, *SIZES)


@pytest.fixture
def evenmoe(monkeypatch, capsys) -> Run:
    return runner(monkeypatch, capsys)


def test_simulate_compares_it(evenmoe, tmp_path):
    trace = small_trace()
    np.savez(tmp_path / "trace.npz", load=trace.load, routing=trace.routing)
    policies = (f"{TOY}:refresh=1", f"static:planner={TOY},window=1", f"oracle:planner={TOY},rule=even")
    options = [word for policy in policies for word in ("-p", policy)]
    done = evenmoe("simulate", tmp_path / "trace.npz", *SMALL, *options, "--json")
    assert done.code == 0, done.err
    found = {policy["name"]: policy for policy in json.loads(done.out)["policies"]}
    assert list(found) == ["identity", *policies]
    assert TOY in found[policies[0]]["description"]
    # The oracle plans a step from the step itself, and the replicas of an expert share evenly.
    total = trace.load.sum(axis=0)
    expected = em.peak_to_average(total, toy_planner.plan(total, num_ranks=4, num_slots=40))
    assert found[policies[2]]["mean_par_per_layer"] == pytest.approx(expected.tolist())


def test_plan_writes_its_placement(evenmoe, tmp_path):
    load = np.random.default_rng(5).integers(1, 100, (2, 16))
    np.savez(tmp_path / "load.npz", load=load[None])
    out = tmp_path / "placement.json"
    sizes = ("--ranks", 4, "--slots", 20)
    done = evenmoe("plan", tmp_path / "load.npz", *sizes, "--planner", TOY, "-o", out)
    assert done.code == 0, done.err
    assert read(out).placement == toy_planner.plan(load, num_ranks=4, num_slots=20)
    done = evenmoe("plan", tmp_path / "load.npz", *sizes, "--planner", TOY, "--previous", out)
    assert done.code == 2
    assert "which takes no `--previous`" in done.err
