"""What is pinned of planning: placements of `em.plan`, bounds of `em.lower_bound`, splits of `em.split_batch`."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

import evenmoe as em
from tests.pins.cases import Cases
from tests.pins.inputs import IntArray, default_placement, drifted, drifting, integers, mild, sha256, skewed

RULES = ("even", "rank", "token", "occurrence", "batch")
cases = Cases()


def _plan(load: Any, **arguments: Any) -> dict[str, Any]:
    placement = em.plan(load, **arguments)
    par = em.peak_to_average(load, placement)
    pin = {
        "sha256": sha256(placement.slot_to_expert.astype(np.int32), placement.replica_index.astype(np.int32)),
        "first_slots": placement.slot_to_expert[0, :12].tolist(),
        "par": [round(float(value), 6) for value in par.reshape(-1, par.shape[-1]).mean(axis=0)[:8]],
    }
    if arguments.get("previous") is not None:
        pin["copies"] = em.count_copies(arguments["previous"], placement).tolist()[:8]
    return pin


def plan(name: str, load: npt.NDArray, ranks: int, slots: int, **arguments: Any) -> None:
    cases.add(name, partial(_plan, load, num_ranks=ranks, num_slots=slots, **arguments))


def replan(name: str, load: IntArray, ranks: int, slots: int, previous: dict[str, Any], **arguments: Any) -> None:
    """From a placement that was planned for the undrifted load."""

    def run() -> dict[str, Any]:
        before = em.plan(load, num_ranks=ranks, num_slots=slots, **previous)
        after = drifted(load, 900)
        return _plan(after, num_ranks=ranks, num_slots=slots, previous=before, **arguments)

    cases.add(name, run)


def _static() -> None:
    plan("static/skewed 64 on 72 x 8", skewed(1, 3, 64), 8, 72)
    plan("static/mild 64 on 64 x 8", mild(2, 3, 64), 8, 64)
    plan("static/skewed 256 on 288 x 32", skewed(3, 2, 256), 32, 288)
    plan("static/skewed 256 on 320 x 32", skewed(4, 2, 256), 32, 320)
    plan("static/skewed 256 on 320 x 64", skewed(5, 1, 256), 64, 320)
    plan("static/mixtral's shape, 8 on 16 x 8", mild(6, 4, 8), 8, 16)
    plan("static/llama-4's shape, 16 on 24 x 8", skewed(7, 2, 16), 8, 24)
    plan("static/one slot a rank, 6 on 12 x 12", skewed(8, 3, 6), 12, 12)
    plan("static/30 on 42 x 7", skewed(9, 3, 30), 7, 42)
    plan("static/60 on 72 x 12, seed 5", skewed(10, 2, 60), 12, 72, seed=5)
    plan("static/fractions", skewed(11, 2, 24) / 7.0, 4, 32)
    plan("static/tiny loads", skewed(12, 2, 24) * 1e-200, 4, 32)
    plan("static/huge loads", skewed(12, 2, 24) * 1e200, 4, 32)


def _odd() -> None:
    hot = np.full((2, 32), 10)
    hot[:, 5] = 2800
    sparse = skewed(22, 3, 32) * (integers(23, 4, 3, 32) == 0)
    plan("odd/one expert, one rank", np.array([[7]]), 1, 1)
    plan("odd/one expert on four ranks", np.array([[7], [0]]), 4, 8)
    plan("odd/one rank", skewed(20, 2, 12), 1, 16)
    plan("odd/slots equal experts, one a rank", skewed(21, 2, 16), 16, 16)
    plan("odd/many replicas, 4 on 64 x 16", skewed(24, 2, 4), 16, 64)
    plan("odd/more slots than experts times ranks", skewed(25, 2, 3), 4, 24)
    plan("odd/every expert on every rank", skewed(25, 2, 5), 4, 20)
    plan("odd/no load", np.zeros((2, 16), np.int64), 4, 20)
    plan("odd/equal loads", np.full((2, 24), 11), 8, 32)
    plan("odd/one hot expert", hot, 8, 40)
    plan("odd/one hot expert, no spare slot", hot, 8, 32)
    plan("odd/three of four without load", sparse, 8, 40)
    plan("odd/a layer without load", np.concatenate([skewed(26, 1, 16), np.zeros((1, 16), np.int64)]), 4, 20)
    plan("odd/ascending", np.arange(2 * 40).reshape(2, 40), 5, 50)
    plan("odd/large primes", skewed(27, 2, 37), 11, 44)


def _nodes() -> None:
    load = skewed(30, 2, 64)
    for nodes, groups in ((1, 1), (2, 1), (2, 4), (4, 4), (4, 8), (8, 8), (2, 8), (1, 8)):
        plan(f"nodes/{nodes} with {groups} groups", load, 16, 80, num_nodes=nodes, num_groups=groups)
    plan("nodes/deepseek-v3's shape", skewed(31, 2, 256), 32, 288, num_nodes=4, num_groups=8)
    plan("nodes/12 groups on 3 nodes", skewed(32, 2, 48), 6, 60, num_nodes=3, num_groups=12)
    plan("nodes/windows", drifting(33, 4, 2, 64), 8, 72, num_nodes=2, num_groups=4)
    plan("nodes/seed 9", load, 16, 80, num_nodes=4, num_groups=8, seed=9)


def _windows() -> None:
    gaps = drifting(43, 5, 3, 32)
    gaps[1] = 0
    gaps[3, 1] = 0
    plan("windows/6 of 64 on 72 x 8", drifting(40, 6, 2, 64), 8, 72)
    plan("windows/1", drifting(41, 1, 2, 32), 4, 40)
    plan("windows/2 of mild", np.stack([mild(42, 2, 32), mild(44, 2, 32)]), 8, 32)
    plan("windows/some empty", gaps, 4, 40)
    plan("windows/all empty", np.zeros((3, 2, 16), np.int64), 4, 20)
    plan("windows/unrelated", np.stack([skewed(45 + window, 2, 64) for window in range(8)]), 8, 80)
    plan("windows/20 of 24 on 30 x 6, seed 3", drifting(46, 20, 1, 24), 6, 30, seed=3)
    plan("windows/256 on 288 x 32", drifting(47, 4, 1, 256), 32, 288)
    plan("windows/8 on 16 x 8", drifting(48, 5, 2, 8), 8, 16)


def _incremental() -> None:
    load = skewed(50, 3, 64)
    replan("incremental/as many copies as help", load, 8, 72, {})
    for copies in (0, 1, 4, 12, 200):
        replan(f"incremental/max_copies {copies}", load, 8, 72, {}, max_copies=copies)
    for par in (1.0, 1.02, 1.2, 9.0):
        replan(f"incremental/target_par {par}", load, 8, 72, {}, target_par=par)
    replan("incremental/both goals", load, 8, 72, {}, max_copies=6, target_par=1.01)
    replan("incremental/256 on 288 x 32", skewed(51, 2, 256), 32, 288, {}, max_copies=30)
    replan("incremental/no spare slot", mild(52, 2, 32), 8, 32, {})
    replan("incremental/windows", drifting(53, 4, 2, 48), 8, 64, {}, max_copies=10)
    replan("incremental/nodes", load, 8, 80, {"num_nodes": 2, "num_groups": 8}, num_nodes=2, num_groups=8)
    replan(
        "incremental/nodes and both goals", load, 8, 80, {"num_nodes": 2, "num_groups": 8},
        num_nodes=2, num_groups=8, max_copies=5, target_par=1.01, seed=2,
    )  # fmt: skip
    twice = drifting(54, 4, 3, 32)
    twice[1, 0] = 0
    before = default_placement(3, 32, 40, 8)
    plan("incremental/from the default placement", skewed(55, 3, 32), 8, 40, previous=before)
    plan("incremental/windows of which one lacks a layer", twice, 8, 40, previous=before, max_copies=12)
    numbered = em.Placement(
        [[0, 1, 2, 3, 0, 1, 4, 5]], 4, num_experts=6, replica_index=[[1, 0, 0, 0, 0, 1, 0, 0]]
    )  # fmt: skip
    plan("incremental/replica order of the previous", skewed(56, 1, 6), 4, 8, previous=numbered, max_copies=1)


def _rules() -> None:
    load, windows = skewed(60, 2, 32), drifting(61, 3, 2, 32)
    for rule in RULES:
        plan(f"rules/{rule}", load, 8, 48, rule=rule)
        plan(f"rules/{rule}, windows", windows, 8, 40, rule=rule)
        if rule != "even":
            plan(f"rules/{rule}, nodes", load, 8, 48, rule=rule, num_nodes=2, num_groups=4)
            replan(f"rules/{rule}, previous", load, 8, 48, {}, rule=rule)
            replan(f"rules/{rule}, previous and max_copies", load, 8, 48, {}, rule=rule, max_copies=5)
            replan(f"rules/{rule}, previous and windows", windows, 8, 40, {}, rule=rule, max_copies=9)
    both = {"num_nodes": 2, "num_groups": 4}
    for rule in ("rank", "occurrence", "batch"):
        replan(f"rules/{rule}, nodes, previous, windows", windows, 8, 40, both, rule=rule, max_copies=9, **both)
        replan(f"rules/{rule}, from its own plan", load, 8, 48, {"rule": rule}, rule=rule, max_copies=8)
    plan("rules/rank, 60 on 72 x 12", skewed(62, 2, 60), 12, 72, rule="rank")
    plan("rules/rank, many replicas", skewed(63, 2, 6), 12, 48, rule="rank")
    plan(
        "rules/rank, one hot expert on 7 ranks", skewed(64, 1, 10) * (1 + 9 * (np.arange(10) == 3)), 7, 21, rule="rank"
    )
    plan("rules/batch, 256 on 288 x 32", skewed(65, 1, 256), 32, 288, rule="batch")
    plan("rules/batch, no spare slot", mild(66, 2, 32), 8, 32, rule="batch")
    plan("rules/batch, seed 4", load, 8, 48, rule="batch", seed=4)
    replan("rules/token, target_par", load, 8, 48, {}, rule="token", target_par=1.05)


def _bound(load: IntArray, **arguments: int) -> dict[str, Any]:
    bound = em.lower_bound(load, **arguments)
    return {"bound": [repr(float(value)) for value in bound.reshape(-1)]}


def bound(name: str, load: IntArray, ranks: int, slots: int, **arguments: int) -> None:
    cases.add(f"bound/{name}", partial(_bound, load, num_ranks=ranks, num_slots=slots, **arguments))


def _bounds() -> None:
    hot = np.full((1, 32), 10)
    hot[:, 5] = 2800
    bound("8 on 16 x 8", mild(70, 4, 8), 8, 16)
    bound("16 on 24 x 8", skewed(71, 3, 16), 8, 24)
    bound("64 on 72 x 8", skewed(72, 3, 64), 8, 72)
    bound("64 on 64 x 8", mild(73, 3, 64), 8, 64)
    bound("256 on 288 x 32", skewed(74, 3, 256), 32, 288)
    bound("6 on 12 x 12", skewed(75, 3, 6), 12, 12)
    bound("windows", drifting(76, 3, 2, 24), 4, 28)
    bound("nodes", skewed(77, 3, 32), 8, 40, num_nodes=2, num_groups=4)
    bound("many groups", skewed(78, 2, 64), 8, 72, num_nodes=4, num_groups=32)
    bound("one hot expert", hot, 8, 40)
    bound("one hot expert, no spare slot", hot, 8, 32)
    bound("no load", np.zeros((1, 8), np.int64), 2, 8)


def _split(tokens: IntArray, placement: em.Placement) -> dict[str, Any]:
    per_slot = em.split_batch(tokens, placement.slot_to_expert, placement.num_ranks)
    ranks = per_slot.reshape(len(tokens), placement.num_ranks, -1).sum(axis=2)
    return {"sha256": sha256(per_slot), "rank_loads": ranks[0][:12].tolist(), "peak": ranks.max(axis=1).tolist()}


def split(name: str, load: IntArray, ranks: int, slots: int, tokens: IntArray) -> None:
    def run() -> dict[str, Any]:
        return _split(tokens, em.plan(load, num_ranks=ranks, num_slots=slots))

    cases.add(f"split/{name}", run)


def _splits() -> None:
    for seed, experts, slots, ranks in ((80, 64, 72, 8), (81, 256, 288, 32), (82, 30, 42, 7), (83, 4, 32, 16)):
        load = skewed(seed, 3, experts)
        split(f"{experts} on {slots} x {ranks}", load, ranks, slots, drifted(load, seed + 10))
        split(f"{experts} on {slots} x {ranks}, few tokens", load, ranks, slots, integers(seed + 20, 4, 3, experts))
    placement = default_placement(2, 16, 40, 8)
    cases.add("split/the default placement", partial(_split, skewed(84, 2, 16), placement))
    cases.add("split/no tokens", partial(_split, np.zeros((2, 16), np.int64), placement))


for _add in (_static, _odd, _nodes, _windows, _incremental, _rules, _bounds, _splits):
    _add()
