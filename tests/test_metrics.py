"""The numbers that the program shows, against loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.errors import ConstraintError
from evenmoe.metrics import as_load, count_copies, even_rank_loads, peak_over_mean, peak_to_average
from evenmoe.placement import Placement
from tests.placements import placements, random_placement

# A rank's load is a sum of at most 5 quotients (see `placements`), each rounded once, and the sums of both sides are
# rounded at most 4 times more: relative to numbers of one sign, 2 · 5 · 2⁻⁵³ < 2e-15. The peak over the mean divides
# by one more sum of at most 8 of them and rounds the quotient: 3e-15 in all.
RELATIVE = 3e-15


def plain_rank_loads(load, placement: Placement, layer: int) -> list[float]:
    ranks = [0.0] * placement.num_ranks
    for slot in range(placement.num_slots):
        expert = placement.slot_to_expert[layer, slot]
        replicas = sum(1 for other in placement.slot_to_expert[layer] if other == expert)
        ranks[slot // (placement.num_slots // placement.num_ranks)] += load[expert] / replicas
    return ranks


@st.composite
def loads_and_placements(draw):
    placement = draw(placements())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    windows = draw(st.sampled_from([None, 1, 3]))
    shape = (placement.num_layers, placement.num_experts)
    load = rng.integers(0, draw(st.sampled_from([1, 2, 1000])), shape if windows is None else (windows, *shape))
    if draw(st.booleans()):
        load[..., 0] = 10**6  # one hot expert
    return load, placement


@settings(max_examples=150, deadline=None)
@given(loads_and_placements())
def test_rank_loads_and_peak_to_average(case):
    load, placement = case
    loads, par = even_rank_loads(load, placement), peak_to_average(load, placement)
    assert loads.shape == (*load.shape[:-1], placement.num_ranks)
    assert par.shape == load.shape[:-1]
    assert loads.dtype == par.dtype == np.float64
    for index in np.ndindex(*load.shape[:-1]):
        expected = plain_rank_loads(load[index], placement, index[-1])
        assert loads[index].tolist() == pytest.approx(expected, rel=RELATIVE, abs=0)
        mean = sum(expected) / len(expected)
        assert par[index] == pytest.approx(max(expected) / mean if mean else 1.0, rel=RELATIVE, abs=0)
        assert 1.0 - RELATIVE <= par[index] <= placement.num_ranks * (1 + RELATIVE)


def test_a_layer_without_load_is_perfect():
    placement = Placement([[0, 1]] * 2, 2)
    assert peak_to_average([[0, 0], [3, 1]], placement).tolist() == [1.0, 1.5]
    assert peak_to_average([[[0, 0], [0, 0]]], placement).tolist() == [[1.0, 1.0]]
    assert peak_over_mean(np.zeros((2, 3))).tolist() == [1.0, 1.0]


def test_windows_are_not_summed():
    """Two opposite windows are each as bad as can be, though their sum is perfect."""
    placement = Placement([[0, 1]], 2)
    windows = np.array([[[8, 0]], [[0, 8]]])
    assert peak_to_average(windows, placement).tolist() == [[2.0], [2.0]]
    assert peak_to_average(windows.sum(axis=0), placement).tolist() == [1.0]


def plain_copies(previous: Placement, placement: Placement) -> list[int]:
    copies = []
    for layer in range(placement.num_layers):
        before = {
            (slot // previous.slots_per_rank, int(expert)) for slot, expert in enumerate(previous.slot_to_expert[layer])
        }
        after = [
            (slot // placement.slots_per_rank, int(expert))
            for slot, expert in enumerate(placement.slot_to_expert[layer])
        ]
        copies.append(sum(1 for held in after if held not in before))
    return copies


@settings(max_examples=150, deadline=None)
@given(placements(), st.integers(0, 2**32), st.booleans())
def test_count_copies(previous, seed, near):
    rng = np.random.default_rng(seed)
    placement = random_placement(
        rng, previous.num_layers, previous.num_experts, previous.num_ranks, previous.slots_per_rank
    )
    if near:  # only swap two slots of every layer
        slots = previous.slot_to_expert.copy()
        first, second = rng.integers(0, previous.num_slots, 2)
        slots[:, [first, second]] = slots[:, [second, first]]
        placement = Placement(slots, previous.num_ranks)
    copies = count_copies(previous, placement)
    assert copies.dtype == np.int64
    assert copies.tolist() == plain_copies(previous, placement)
    assert count_copies(placement, placement).tolist() == [0] * placement.num_layers


def test_count_copies_ignores_slots_within_a_rank():
    assert count_copies(Placement([[0, 1, 2, 3]], 2), Placement([[1, 0, 3, 2]], 2)).tolist() == [0]
    assert count_copies(Placement([[0, 1, 2, 3]], 2), Placement([[2, 3, 0, 1]], 2)).tolist() == [4]


LOAD_ERRORS = {
    "one axis": (
        [1, 2],
        "`load` is an array of shape (2,): it must be (layers, experts) or (windows, layers, experts), no axis empty; "
        "pass tokens per expert, one row per layer.",
    ),
    "four axes": (
        np.ones((1, 1, 1, 1)),
        "`load` is an array of shape (1, 1, 1, 1): it must be (layers, experts) or (windows, layers, experts), no "
        "axis empty; pass tokens per expert, one row per layer.",
    ),
    "no window": (
        np.ones((0, 2, 3)),
        "`load` is an array of shape (0, 2, 3): it must be (layers, experts) or (windows, layers, experts), no axis "
        "empty; pass tokens per expert, one row per layer.",
    ),
    "below zero": (
        [[1, 2], [3, -4]],
        "`load` is -4.0 at (1, 1): it must hold token counts, finite and not negative; "
        "check how the load was recorded.",
    ),
    "not a number": (
        [[[1, float("nan")]]],
        "`load` is nan at (0, 0, 1): it must hold token counts, finite and not negative; "
        "check how the load was recorded.",
    ),
    "infinite": (
        [[float("inf"), 1]],
        "`load` is inf at (0, 0): it must hold token counts, finite and not negative; check how the load was recorded.",
    ),
}


@pytest.mark.parametrize("mistake", LOAD_ERRORS)
def test_loads_that_are_refused(mistake):
    load, text = LOAD_ERRORS[mistake]
    with pytest.raises(ConstraintError) as caught:
        as_load(load)
    assert str(caught.value) == text
    with pytest.raises(ConstraintError):
        peak_to_average(load, Placement([[0, 1]], 1))


def test_a_load_is_named():
    with pytest.raises(ConstraintError, match=r"^`window` is -1.0 at \(0, 0\)"):
        as_load([[-1]], "window")
    assert as_load([[1, 2]]).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("load", [[[1, 2]], [[1, 2, 3]], np.ones((4, 2, 2))])
def test_a_load_of_another_model(load):
    with pytest.raises(ConstraintError) as caught:
        even_rank_loads(load, Placement([[0, 1, 2]] * 2, 3))
    assert str(caught.value) == (
        f"`load` is an array of shape {np.shape(load)}: it must end in the placement's layers and experts, (2, 3); "
        "pass the load of the same model."
    )


@pytest.mark.parametrize(
    ("other", "name", "theirs", "ours"),
    [
        (Placement([[0, 1, 0, 1]] * 2, 2), "num_layers", 2, 1),
        (Placement([[0, 1, 2, 0]], 2), "num_experts", 3, 2),
    ],
)
def test_copies_between_unlike_placements(other, name, theirs, ours):
    with pytest.raises(ConstraintError) as caught:
        count_copies(Placement([[0, 1, 0, 1]], 2), other)
    assert str(caught.value) == (
        f"`placement` is one with {name} {theirs}: it must have the {name} of the previous placement, {ours}; "
        "compare placements of one model."
    )
