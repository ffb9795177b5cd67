"""Both parts of a recording: nothing is in both, nothing is lost, and the later one is judged."""

from __future__ import annotations

import numpy as np
import pytest

from evenmoe.errors import ConstraintError
from evenmoe.evidence import hold_out


@pytest.mark.parametrize(
    ("windows", "judged"), [(2, 1), (3, 1), (5, 1), (6, 2), (11, 3), (12, 4), (60, 20)]
)  # fmt: skip
def test_the_last_third_of_the_windows_is_judged(windows, judged):
    load = np.random.default_rng(0).integers(0, 9, (windows, 4, 3))
    found = hold_out(load)
    assert found.planned.tolist() == load[: windows - judged].tolist()
    assert found.judged.tolist() == load[windows - judged :].tolist()
    assert found.compared is found.judged
    assert (found.unit, found.num_planned, found.num_judged, found.variance) == (
        "windows", windows - judged, judged, 1.0,
    )  # fmt: skip


def test_two_windows_of_three_layers_are_judged_in_parts():
    load = np.random.default_rng(0).integers(0, 900, (2, 3, 4))
    found = hold_out(load)
    assert found.planned.tolist() == load[:1].tolist()
    assert found.judged.tolist() == load[1:].tolist()
    assert found.compared.shape == (8, 3, 4)
    assert found.compared.sum(axis=0).tolist() == load[1].tolist()
    assert found.variance > 1
    assert found.words == "planned on the first window, judged on the last"


def test_one_window_of_counts_is_divided_at_random():
    load = np.random.default_rng(0).integers(0, 90_000, (1, 5, 8))
    load[:, 2] = 0
    found = hold_out(load)
    assert (found.planned.sum(axis=0) + found.judged.sum(axis=0)).tolist() == load[0].tolist()
    share = found.judged.sum() / load.sum()
    assert abs(share - 1 / 3) < 4 * np.sqrt(2 / 9 / load.sum())  # four standard deviations of a binomial share
    assert found.num_planned + found.num_judged == pytest.approx(load.sum() / 4, abs=1)
    assert np.array_equal(hold_out(load).judged, found.judged)
    assert "one window of counts tells noise from load, not whether the load lasts" in found.words


@pytest.mark.parametrize("value", [2.0**53, 1e300, 0.4, 0.0])
def test_numbers_that_are_no_counts_can_be_divided(value):
    found = hold_out(np.full((1, 2, 2), value))
    assert found.planned.shape == (1, 2, 2)
    assert np.isfinite(found.judged).all()


def routed(tokens: int) -> np.ndarray:
    return np.argsort(np.random.default_rng(0).random((tokens, 3, 6)), axis=2)[:, :, :2].astype(np.uint16)


def counted(routing: np.ndarray) -> list[list[int]]:
    return [[int((routing[:, layer] == expert).sum()) for expert in range(6)] for layer in range(3)]


@pytest.mark.parametrize("tokens", [24, 25, 100, 241])
def test_tokens_are_divided_in_order(tokens):
    routing = routed(tokens)
    found = hold_out(np.array([counted(routing)]), routing)
    assert found.unit == "tokens"
    assert found.num_planned + found.num_judged == tokens
    assert found.num_planned == pytest.approx(tokens * 2 / 3, abs=1)
    assert found.planned[0].tolist() == counted(routing[: found.num_planned])
    assert found.compared.shape == (8, 3, 6)
    assert found.compared.any(axis=(1, 2)).all()
    assert found.compared.sum(axis=0).tolist() == found.judged[0].tolist()
    assert found.judged.sum(axis=0).tolist() == counted(routing[found.num_planned :])


@pytest.mark.parametrize("seed", range(4))
def test_a_request_is_on_one_side(seed):
    lengths = np.random.default_rng(seed).integers(1, 40, 24 + 10 * seed)
    lengths[0] = 400 * (seed % 2) + 1  # one of them longer than a third
    start = np.concatenate([[0], np.cumsum(lengths)])
    routing = routed(int(start[-1]))
    found = hold_out(np.array([counted(routing)]), routing, start)
    assert found.unit == "requests"
    assert found.num_planned + found.num_judged == len(lengths)
    edge = int(start[found.num_planned])
    assert found.planned[0].tolist() == counted(routing[:edge])
    assert found.judged.sum(axis=0).tolist() == counted(routing[edge:])
    assert found.words == f"planned on the first {found.num_planned} requests, judged on the last {found.num_judged}"


def test_few_requests_are_divided_by_tokens_and_few_tokens_by_counts():
    routing = routed(60)
    load = np.array([counted(routing)])
    assert hold_out(load, routing, np.array([0, 20, 60])).unit == "tokens"
    assert hold_out(load, routing[:20]).unit == "assignments"
    assert hold_out(load[:, :2], routing).unit == "assignments"  # routing of other layers


def test_a_load_has_three_axes():
    with pytest.raises(
        ConstraintError, match=r"`load` is an array of shape \(2, 3\): it must be \(windows, layers, exp"
    ):
        hold_out(np.ones((2, 3)))
