"""The numbers of `evenmoe simulate`, recomputed by a plain script that shares no code with it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from evenmoe.simulator.store import load_simulation
from evenmoe.traces.synthesis import small_trace
from tests.beside import measured_names
from tests.simulator.plain_loops import ByHand, Setup, replay
from tests.traces.synthetic import SYNTHETIC, trace_file

POLICIES = (
    ("identity", "identity", "rank", {}),
    ("static:rule=token", "static", "token", {}),
    ("greedy", "greedy", "rank", {}),
    ("greedy:rule=even", "greedy", "even", {}),
    ("greedy:refresh=4,window=2", "greedy", "rank", {"refresh": 4, "window": 2}),
    ("evenmoe:rule=rank", "evenmoe", "rank", {}),
    ("evenmoe:rule=occurrence,max-copies=3", "evenmoe", "occurrence", {"max_copies": 3}),
    ("evenmoe:rule=even,start=previous", "evenmoe", "even", {"start": "previous"}),
    ("evenmoe:rule=rank,start=scratch", "evenmoe", "rank", {"start": "scratch"}),
    ("evenmoe:rule=batch", "evenmoe", "batch", {}),
    ("oracle", "oracle", "batch", {}),
)
FEW = tuple(policy for policy in POLICIES if policy[1] != "static" and "start" not in policy[0])


def assert_found(setup: Setup, by_hand: dict[str, ByHand], saved: Path, printed: dict) -> None:
    """The file and the printed object hold what the loops found."""
    simulation = load_simulation(saved)
    judged = simulation.judged
    assert [policy.name for policy in simulation.policies] == list(by_hand)
    assert [policy["name"] for policy in printed["policies"]] == list(by_hand)
    for policy, shown in zip(simulation.policies, printed["policies"], strict=True):
        expected = by_hand[policy.name]
        # Loads are whole numbers below 2**53 and a PAR is one division of them by another: the same double.
        np.testing.assert_array_equal(policy.par, expected.par)
        assert policy.details is not None
        np.testing.assert_array_equal(policy.details.rank_loads, expected.loads)
        np.testing.assert_array_equal(policy.rank_tokens, np.sum(expected.loads[judged], axis=0))
        traffic = policy.traffic
        found = (traffic.within_node, traffic.between_nodes, traffic.within_node_once, traffic.between_nodes_once)
        np.testing.assert_array_equal(np.stack(found, axis=1), expected.rows)
        np.testing.assert_array_equal(policy.details.rows.sum(axis=1), expected.rows)
        np.testing.assert_array_equal(policy.copies, expected.copies)
        assert policy.refreshes.tolist() == expected.refreshes
        assert policy.memory_per_rank == expected.memory
        # About 100 roundings of at most 2**-53 each, of positive terms, in another order.
        close = {"rtol": 100 * 2**-52, "atol": 0}
        np.testing.assert_allclose(policy.step_time, expected.step_us, **close)
        np.testing.assert_allclose(policy.copy_time, expected.copy_us, **close)
        # The gain is a difference of means, so roundings of the means count as often as it goes into them.
        if math.isfinite(expected.break_even) and expected.break_even > 0:
            spent = sum(expected.copy_us) / len(expected.refreshes)
            enlarged = max(expected.step_us) / (spent / expected.break_even)
            assert policy.break_even_steps == pytest.approx(expected.break_even, rel=300 * 2**-52 * enlarged)
        else:
            assert policy.break_even_steps == expected.break_even
        rows = np.mean(expected.rows[judged], axis=0)
        assert shown["mean_par"] == pytest.approx(np.mean(expected.par[judged]), rel=1e-12)
        assert shown["worst_par"] == np.max(expected.par[judged])
        assert shown["copies"] == np.sum(expected.copies)
        assert shown["deduplicated_rows_between_nodes"] == pytest.approx(rows[3], rel=1e-12)
        assert shown["rows_within_node"] == pytest.approx(rows[0], rel=1e-12)
        assert shown["step_time_us"] == pytest.approx(np.mean(expected.step_us[judged]), rel=1e-12)
        assert shown["net_time_us"] == pytest.approx(np.mean(expected.net_us), rel=1e-12)
        base = np.mean(next(iter(by_hand.values())).net_us)
        gain = 100 * (1 - np.mean(expected.net_us) / base)
        assert shown["net_gain_percent"] == pytest.approx(gain, rel=1e-12, abs=1e-10)
    assert np.sum(simulation.load) == np.sum(next(iter(by_hand.values())).loads[judged])


def run_both(evenmoe, tmp_path: Path, path: Path, setup: Setup, policies, *extra: object) -> dict[str, ByHand]:
    out = tmp_path / "out.sim"
    options = [part for name, *_ in policies for part in ("--policy", name)]
    done = evenmoe(
        "simulate", path, "--ranks", setup.ranks, "--nodes", setup.nodes, "--tokens-per-rank", setup.tokens,
        "--chunk", setup.chunk, "--steps", setup.steps, "--refresh", setup.refresh, "--window", setup.window,
        "--slots", setup.slots, "--workers", 1, "--details", "--json", "--out", out, "--horizon", setup.horizon,
        "--copy-overlap" if setup.overlap else "--no-copy-overlap", *options,
        "--flops-per-s", setup.flops_per_s, "--memory-bytes-per-s", setup.memory_per_s, "--norm", setup.norm,
        "--within-bytes-per-s", setup.within_per_s, "--between-bytes-per-s", setup.between_per_s,
        "--latency-us", setup.latency * 1e6, "--start-us", setup.start * 1e6, "--slot-us", setup.slot * 1e6,
        "--floor-us", setup.floor * 1e6, "--token-us", setup.row * 1e6, "--tile", setup.tile, *extra,
    )  # fmt: skip
    assert done.code == 0, done.err
    with np.load(path) as file:
        routing, load = file["routing"], file["load"]
        starts = file["seq_start"].tolist() if "seq_start" in file else list(range(len(routing) + 1))
    by_hand = replay(routing, starts, load.shape[2], setup, policies)
    assert_found(setup, by_hand, out, json.loads(done.out))
    return by_hand


def small_file(tmp_path: Path) -> Path:
    """The built-in trace with requests of uneven length, one of them empty."""
    trace = small_trace()
    edges = np.array([0, 5, 5, 300, 301, 777, 1500, 2048])
    np.savez(tmp_path / "small.npz", load=trace.load, routing=trace.routing, seq_start=edges)
    return tmp_path / "small.npz"


SMALL_COSTS = ("--hidden", 64, "--expert-flops", 1e7, "--expert-bytes", 4e6)


def small_setup(**changes) -> Setup:
    sizes = {"ranks": 6, "nodes": 2, "tokens": 8, "chunk": 4, "steps": 9, "refresh": 3, "window": 4, "slots": 42}
    return Setup(**(sizes | {"flops": 1e7, "expert_bytes": 4e6, "row_bytes": 128.0} | changes))


def test_the_built_in_trace(evenmoe, tmp_path):
    """On ranks so slow that balance pays: every break-even is a number."""
    setup = small_setup(flops_per_s=1e12, memory_per_s=1e13, tile=1, floor=9e-6, row=1e-6)
    by_hand = run_both(evenmoe, tmp_path, small_file(tmp_path), setup, POLICIES, *SMALL_COSTS)
    assert all(0 < found.break_even < math.inf for name, found in by_hand.items() if name not in ("identity", "oracle"))


def test_decode_on_one_node_with_a_row_per_expert(evenmoe, tmp_path):
    setup = small_setup(ranks=4, nodes=1, chunk=1, slots=64, once=False, window=2, overlap=False, horizon=7)
    run_both(evenmoe, tmp_path, small_file(tmp_path), setup, FEW, *SMALL_COSTS, "--row-per-expert")


def test_one_slot_a_rank_and_other_links(evenmoe, tmp_path):
    setup = small_setup(
        ranks=40, nodes=4, tokens=3, chunk=3, steps=5, refresh=2, window=9, slots=40,
        within_per_s=1e9, between_per_s=2e9, memory_per_s=1e15, flops_per_s=1e12, tile=3, norm=1.5,
    )  # fmt: skip
    run_both(evenmoe, tmp_path, small_file(tmp_path), setup, POLICIES, *SMALL_COSTS)


# (hidden, intermediate, bytes a weight), which the shape of the trace tells, and the tokens of a chunk.
RECORDED = {
    "synthetic_gpt_oss_20b": ((2880, 2880, 17 / 32), 4),
    "synthetic_deepseek_v2_lite": ((2048, 1408, 2), 8),
    "gpt_oss_20b_mmlu_pro_and_other": ((2880, 2880, 17 / 32), 1),
    "deepseek_v2_lite_esft_intent": ((2048, 1408, 2), 8),
    "deepseek_v2_lite_esft_law": ((2048, 1408, 2), 8),
    "deepseek_v2_lite_esft_summary": ((2048, 1408, 2), 4),
}


@pytest.mark.parametrize("name", [*SYNTHETIC, *measured_names(*RECORDED)])
def test_recorded_traces(evenmoe, tmp_path, name):
    """The model, and so the costs, are taken from the trace's shape."""
    (hidden, inner, weight), chunk = RECORDED[name]
    setup = Setup(
        ranks=8, nodes=2, tokens=8, chunk=chunk, steps=4, refresh=2, window=2, slots=72 if hidden == 2048 else 40,
        flops=6.0 * hidden * inner, expert_bytes=float(round(3 * hidden * inner * weight)), row_bytes=2.0 * hidden,
    )  # fmt: skip
    few = [policy for policy in POLICIES if policy[0] in ("identity", "greedy", "evenmoe:rule=batch", "oracle")]
    run_both(evenmoe, tmp_path, trace_file(name, tmp_path), setup, few)
