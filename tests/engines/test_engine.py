"""An engine's own balancer, replayed by a plain loop."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from evenmoe import plan
from evenmoe.engines import ENGINES
from evenmoe.engines.engine import beside_own_balancer
from evenmoe.engines.modulo import RULE
from evenmoe.evidence import hold_out
from evenmoe.metrics import peak_to_average
from evenmoe.placement import Placement
from evenmoe.planner.greedy import plan_greedy
from evenmoe.planner.options import PlanOptions
from evenmoe.rules import RULES

OPTIONS = PlanOptions(num_ranks=4, num_slots=12)


def drifting(windows: int, layers: int = 4) -> np.ndarray:
    random = np.random.default_rng(1)
    return random.poisson(50 * random.gamma(1.0, 1.0, (windows, layers, 8)))


@pytest.mark.parametrize(("window", "interval"), [(4, 2), (100, 3), (3, 100), (None, None), (None, 1)])
def test_the_balancer_sees_the_past_alone(window, interval):
    load = drifting(21)
    held, ours = hold_out(load), plan(load[:14], num_ranks=4, num_slots=12)
    engine = dataclasses.replace(ENGINES.get("sglang"), window=window, interval=interval)
    found = beside_own_balancer(engine, held, ours, OPTIONS)
    pars, plans, own = [], 0, None
    for step in range(14, 21):
        if own is None or (interval and (step - 14) % interval == 0):
            first = 0 if window is None else max(0, step - window)
            own, plans = plan_greedy(load[first:step], num_ranks=4, num_slots=12), plans + 1
        pars.append(peak_to_average(load[step], own))
    assert found.plans == plans
    assert found.par.tolist() == pytest.approx(np.mean(pars, axis=0).tolist(), rel=1e-12)  # sums of 7 numbers
    after = peak_to_average(load[14:], ours).mean()
    assert found.gain.percent == pytest.approx(100 * (1 - after / np.mean(pars)), abs=1e-9)


def test_one_window_is_planned_once():
    load = drifting(1)
    found = beside_own_balancer(ENGINES.get("sglang"), hold_out(load), plan(load, num_ranks=4, num_slots=12), OPTIONS)
    assert found.plans == 1
    assert found.gain.blocks == 8


@pytest.mark.parametrize("num_ranks", [1, 3, 4, 8])
def test_modulo_shares_are_what_the_ranks_choose(num_ranks):
    slots = [*range(6), *[0] * 3, 1, *[2] * ((-10) % num_ranks)]
    placement = Placement([slots], num_ranks)
    table, taken = placement.eplb_table(0), np.zeros(len(slots))
    for rank in range(num_ranks):
        chosen = RULE.prepare(table, len(slots), rank, num_ranks)(torch.arange(6)[:, None])
        for expert, slot in enumerate(chosen[:, 0].tolist()):
            replicas = [index for index, held in enumerate(slots) if held == expert]
            assert slot == replicas[rank % len(replicas)]
            taken[slot] += 1 / num_ranks
    assert RULE.shares(placement)[0].tolist() == pytest.approx(taken.tolist(), abs=1e-12)
    assert RULE.reachable([1, 9], num_ranks).tolist() == [1, min(9, num_ranks)]
    assert RULES.get(RULE) is RULE
