"""`Placement`: what it refuses and how it says so, that it is a value, and the tables that it makes."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from evenmoe.errors import ConstraintError
from evenmoe.placement import Placement, default_placement
from tests.placements import placements

ERRORS = {
    "no array of two axes": (
        lambda: Placement([0, 1], 1),
        "`slot_to_expert` is an array of shape (2,): it must be (layers, slots), neither zero; pass one row per layer.",
    ),
    "no layer": (
        lambda: Placement(np.zeros((0, 4), int), 2),
        "`slot_to_expert` is an array of shape (0, 4): it must be (layers, slots), neither zero; "
        "pass one row per layer.",
    ),
    "no slot": (
        lambda: Placement([[]], 1),
        "`slot_to_expert` is an array of shape (1, 0): it must be (layers, slots), neither zero; "
        "pass one row per layer.",
    ),
    "fractions": (
        lambda: Placement([[0.0, 1.0]], 1),
        "`slot_to_expert` is of dtype float64: it must hold integers; convert it with .astype(np.int32).",
    ),
    "truth values": (
        lambda: Placement([[True, False]], 1),
        "`slot_to_expert` is of dtype bool: it must hold integers; convert it with .astype(np.int32).",
    ),
    "ranks that do not divide": (
        lambda: Placement([[0, 1, 2, 3, 4, 5]], 4),
        "`num_ranks` is 4: it must divide the 6 slots evenly; "
        "use one of [1, 2, 3, 6], or a number of slots that divides.",
    ),
    "no rank": (
        lambda: Placement([[0]], 0),
        "`num_ranks` is 0: it must divide the 1 slots evenly; use one of [1], or a number of slots that divides.",
    ),
    "an expert below zero": (
        lambda: Placement([[0, 1], [1, -1]], 1),
        "`slot_to_expert` is -1 in layer 1, slot 1: it must be a logical expert, 0 to 1; "
        "give every slot an expert of the model.",
    ),
    "an expert too many": (
        lambda: Placement([[0, 2, 1]], 1, num_experts=2),
        "`slot_to_expert` is 2 in layer 0, slot 1: it must be a logical expert, 0 to 1; "
        "give every slot an expert of the model.",
    ),
    "an expert without a slot": (
        lambda: Placement([[0, 1, 2], [0, 2, 2]], 3),
        "`slot_to_expert` is without expert 1 in layer 1: it must give every logical expert a slot; "
        "a token routed to that expert would have nowhere to go: add a slot for it.",
    ),
    "more experts than slots": (
        lambda: Placement([[0, 1]], 2, num_experts=3),
        "`slot_to_expert` is without expert 2 in layer 0: it must give every logical expert a slot; "
        "a token routed to that expert would have nowhere to go: add a slot for it.",
    ),
    "an expert beyond 32 bits": (
        lambda: Placement([[0, 1 << 40]], 2),
        "`slot_to_expert` is without expert 1 in layer 0: it must give every logical expert a slot; "
        "a token routed to that expert would have nowhere to go: add a slot for it.",
    ),
    "replica_index of another shape": (
        lambda: Placement([[0, 0, 1]], 1, replica_index=[[0, 1]]),
        "`replica_index` is an array of shape (1, 2): it must have the shape of slot_to_expert, (1, 3); "
        "pass one position per slot, or None.",
    ),
    "replica_index of fractions": (
        lambda: Placement([[0, 0]], 1, replica_index=[[0.0, 1.0]]),
        "`replica_index` is of dtype float64: it must hold integers; convert it with .astype(np.int32).",
    ),
    "a gap": (
        lambda: Placement([[0, 0, 1]], 1, replica_index=[[0, 2, 0]]),
        "`replica_index` is [0, 2, 0] in layer 0: it must number the slots of each expert 0, 1, … without gaps; "
        "pass None for ascending slots.",
    ),
    "a position twice": (
        lambda: Placement([[0, 1, 0], [0, 1, 0]], 3, replica_index=[[1, 0, 0], [1, 0, 1]]),
        "`replica_index` is [1, 0, 1] in layer 1: it must number the slots of each expert 0, 1, … without gaps; "
        "pass None for ascending slots.",
    ),
    "a position below zero": (
        lambda: Placement([[0, 0, 1]], 1, replica_index=[[-1, 0, 0]]),
        "`replica_index` is [-1, 0, 0] in layer 0: it must number the slots of each expert 0, 1, … without gaps; "
        "pass None for ascending slots.",
    ),
    "a position far beyond": (
        lambda: Placement([[0, 0, 1]], 1, replica_index=[[0, 1 << 62, 0]]),
        f"`replica_index` is [0, {1 << 62}, 0] in layer 0: it must number the slots of each expert 0, 1, … "
        "without gaps; pass None for ascending slots.",
    ),
    # The row as a whole has the positions {0, 0, 1, 1, 2} that it should have, but expert 0 has {0, 2}.
    "positions of one expert lent to another": (
        lambda: Placement([[0, 0, 1, 1, 1]], 1, replica_index=[[0, 2, 0, 1, 1]]),
        "`replica_index` is [0, 2, 0, 1, 1] in layer 0: it must number the slots of each expert 0, 1, … without "
        "gaps; pass None for ascending slots.",
    ),
}


@pytest.mark.parametrize("mistake", ERRORS)
def test_wrong_arguments(mistake):
    call, text = ERRORS[mistake]
    with pytest.raises(ConstraintError) as caught:
        call()
    assert str(caught.value) == text


def test_it_is_immutable():
    given_slots = np.array([[0, 1, 0, 2]])
    placement = Placement(given_slots, 2)
    given_slots[0, 0] = 2
    assert placement.slot_to_expert.tolist() == [[0, 1, 0, 2]]
    for name in ("slot_to_expert", "num_ranks", "num_experts", "replica_index", "num_replicas", "num_layers", "more"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(placement, name, 1)
    for name in ("slot_to_expert", "num_ranks"):
        with pytest.raises(AttributeError, match="immutable"):
            delattr(placement, name)
    for array in (placement.slot_to_expert, placement.replica_index, placement.num_replicas):
        assert array.dtype == np.int32
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1


def test_the_table_is_the_callers_own():
    placement = Placement([[0, 1, 0, 2]], 2)
    placement.eplb_table(0)[0, 0] = 77
    assert placement.eplb_table(0).tolist() == [[2, 0, 2], [1, 1, 0], [1, 3, 0]]


def test_equality_and_hash():
    base = Placement([[0, 1, 0, 2]], 2)
    same = Placement(np.array([[0, 1, 0, 2]], np.int16), 2, num_experts=3, replica_index=[[0, 0, 1, 0]])
    assert base == same
    assert hash(base) == hash(same)
    others = [
        Placement([[0, 1, 0, 2]], 4),
        Placement([[0, 1, 2, 0]], 2),
        Placement([[0, 1, 0, 2]], 2, replica_index=[[1, 0, 0, 0]]),
        Placement([[0, 1, 0, 2]] * 2, 2),
        Placement([[0, 1, 1, 2]], 2),
    ]
    assert len({base, same, *others}) == 1 + len(others)
    for other in others:
        assert base != other
    assert base != "Placement"
    assert base != base.slot_to_expert.tolist()
    assert Placement([[0, 1]], 1, num_experts=2) == Placement([[0, 1]], 1)


def test_repr_and_sizes():
    placement = Placement([[0, 1, 0, 2, 1, 3]] * 5, 3)
    assert repr(placement) == "Placement(layers=5, experts=4, slots=6, ranks=3)"
    assert (placement.num_layers, placement.num_experts, placement.num_slots) == (5, 4, 6)
    assert (placement.num_ranks, placement.slots_per_rank) == (3, 2)


@settings(max_examples=60, deadline=None)
@given(placements())
def test_copies_are_equal_and_checked_anew(placement):
    for copied in (pickle.loads(pickle.dumps(placement)), copy.deepcopy(placement), copy.copy(placement)):
        assert copied == placement
        assert hash(copied) == hash(placement)
        assert copied.num_replicas.tolist() == placement.num_replicas.tolist()
        assert not copied.slot_to_expert.flags.writeable


def plain_rows(placement: Placement, layer: int) -> list[list[int]]:
    """[count, slots in the order of replica_index] of every expert, slot by slot."""
    rows = []
    for expert in range(placement.num_experts):
        found = {}
        for slot in range(placement.num_slots):
            if placement.slot_to_expert[layer, slot] == expert:
                found[int(placement.replica_index[layer, slot])] = slot
        rows.append([len(found)] + [found[position] for position in range(len(found))])
    return rows


@settings(max_examples=150, deadline=None)
@given(placements())
def test_tables(placement):
    most = max(len(row) for layer in range(placement.num_layers) for row in plain_rows(placement, layer))
    for layer in range(placement.num_layers):
        table = placement.eplb_table(layer)
        assert table.dtype == torch.int32
        assert table.is_contiguous()
        assert table.shape == (placement.num_experts, most)  # the same F for all layers
        expected = [row + [0] * (most - len(row)) for row in plain_rows(placement, layer)]
        assert table.tolist() == expected
        assert placement.num_replicas[layer].tolist() == [row[0] for row in expected]


@settings(max_examples=60, deadline=None)
@given(placements())
def test_without_replica_index_slots_ascend(placement):
    ascending = Placement(placement.slot_to_expert, placement.num_ranks)
    for layer in range(placement.num_layers):
        for count, *slots in plain_rows(ascending, layer):
            assert slots == sorted(slots)
            assert len(slots) == count


@pytest.mark.parametrize(("layers", "experts", "ranks"), [(1, 1, 1), (3, 6, 2), (2, 8, 8)])
def test_default_placement(layers, experts, ranks):
    placement = default_placement(layers, experts, ranks)
    assert placement.slot_to_expert.tolist() == [list(range(experts))] * layers
    assert placement.num_ranks == ranks
    assert placement.eplb_table(layers - 1).tolist() == [[1, expert] for expert in range(experts)]


def test_default_placement_with_more_slots_begins_anew():
    placement = default_placement(2, 3, 2, num_slots=8)
    assert placement.slot_to_expert.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]] * 2


def test_default_placement_needs_ranks_that_divide():
    with pytest.raises(ConstraintError, match=r"^`num_ranks` is 3: it must divide the 4 slots evenly"):
        default_placement(1, 4, 3)


def test_arrays_of_the_caller_stay_the_callers():
    slots, order = np.array([[0, 1, 0]], np.int32), np.array([[1, 0, 0]], np.int64)
    placement = Placement(slots, num_ranks=1, replica_index=order)
    slots[:], order[:] = 9, 9
    assert (placement.slot_to_expert.tolist(), placement.replica_index.tolist()) == ([[0, 1, 0]], [[1, 0, 0]])
