"""Loads of every type and size: the right figures where they exist, a sentence where not; never inf, nan or a crash."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe import formats
from evenmoe.errors import ConstraintError, EvenmoeError
from evenmoe.metrics import even_rank_loads
from evenmoe.placement import Placement
from evenmoe.rules import RULES

LOAD = [[6.0, 1.0, 1.0, 4.0]]  # exact in bfloat16 and in float8
PLACEMENT = Placement([[0, 1, 2, 3]], 2)
PAR = 7 / 6  # ranks of 7 and 5 tokens
TENSOR = torch.tensor(LOAD)

TENSORS = {
    "bfloat16": TENSOR.bfloat16(),
    "float16": TENSOR.half(),
    "float8": TENSOR.to(torch.float8_e4m3fn),
    "int32": TENSOR.int(),
    "uint8": TENSOR.to(torch.uint8),
    "gradients": TENSOR.clone().requires_grad_(),
    "parameter": torch.nn.Parameter(TENSOR.clone()),
    "result": TENSOR.clone().requires_grad_() * 1.0,
    "sparse": TENSOR.to_sparse(),
    "transposed": TENSOR.T.contiguous().T,
}
NO_LOADS = {
    "complex": TENSOR + 1j,
    "complex array": np.array(LOAD) + 1j,
    "meta": TENSOR.to("meta"),
    "ragged": [[1, 2], [3]],
    "words": [["a", "b", "c", "d"]],
    "dates": np.array([["2020-01-01"] * 4], "datetime64[D]"),
    "objects": np.array([[1, 2, None, "x"]], object),
    "nothing": None,
    "infinite": [[1.0, np.inf, 1.0, 1.0]],
    "not a number": TENSOR * float("nan"),
    "negative": TENSOR.bfloat16() - 5,
}
CALLS = {
    "peak_to_average": lambda load: em.peak_to_average(load, PLACEMENT),
    "lower_bound": lambda load: em.lower_bound(load, num_ranks=2, num_slots=4),
    "plan": lambda load: em.plan(load, num_ranks=2, num_slots=4),
    "previous": lambda load: em.plan(load, num_ranks=2, num_slots=4, previous=PLACEMENT, max_copies=1),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_every_type(name, tmp_path):
    load = TENSORS[name]
    assert em.peak_to_average(load, PLACEMENT).tolist() == pytest.approx([PAR], rel=1e-15)
    assert (
        em.lower_bound(load, num_ranks=2, num_slots=4).tolist()
        == em.lower_bound(LOAD, num_ranks=2, num_slots=4).tolist()
    )
    for rule in RULES:
        for previous in (None, PLACEMENT):
            told = {"num_ranks": 2, "num_slots": 4, "rule": rule, "previous": previous}
            assert em.plan(load, **told) == em.plan(LOAD, **told)
    assert em.plan([load, load], num_ranks=2, num_slots=4) == em.plan(LOAD, num_ranks=2, num_slots=4)
    formats.write(tmp_path / "l.npz", load, format="evenmoe-trace")
    assert formats.read(tmp_path / "l.npz").load.tolist() == [LOAD]  # type: ignore[union-attr]
    if not load.is_sparse and name != "float8":
        torch.save({"logical_count": load}, tmp_path / "l.pt")
        assert formats.read(tmp_path / "l.pt").load.tolist() == [LOAD]  # type: ignore[union-attr]


def test_bfloat16_in_safetensors(tmp_path):
    from safetensors.torch import save_file

    save_file({"model": TENSOR.bfloat16()}, tmp_path / "l.safetensors")
    assert formats.read(tmp_path / "l.safetensors").load.tolist() == [LOAD]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NO_LOADS)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_load_is_refused_in_words(name, call):
    with pytest.raises(ConstraintError) as caught:
        CALLS[call](NO_LOADS[name])
    assert str(caught.value).startswith("`load` is ")
    with pytest.raises(ConstraintError, match="`value` is "):
        formats.write("nowhere/l.npz", NO_LOADS[name], format="evenmoe-trace")  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [TENSOR, TENSOR.bfloat16(), TENSOR.to("meta"), TENSOR + 1j, [[0.5]], [[1, 2], [3]]])
def test_a_batch_that_holds_no_whole_tokens_is_refused_in_words(tokens):
    with pytest.raises(EvenmoeError, match=r"`num_tokens` is .*it must hold integers"):
        em.split_batch(tokens, [[0, 1, 2, 3]], 2)


def test_a_batch_of_integer_tensors():
    sparse = torch.tensor([6, 1, 3]).to_sparse()
    assert em.split_batch(sparse, torch.tensor([0, 1, 0, 2]), 2).tolist() == [4, 1, 2, 3]


@pytest.mark.parametrize("tokens", [np.array([2**61, 2**61]), np.array([2**63 + 1, 1], np.uint64)])
def test_batches_whose_sums_would_wrap_are_refused(tokens):
    with pytest.raises(
        ConstraintError, match=r"`num_tokens` is an array of up to (2305843009213693952|9223372036854775809)"
    ):
        em.split_batch(tokens, [0, 1], 2)


# The ends of float64: a figure that is a ratio does not depend on the unit of the load.


@pytest.mark.parametrize("unit", [2.0**1021, 2.0**-1074, 2.0**-600, 2.0**600])
def test_ratios_at_the_ends_of_float64(unit):
    load = np.array(LOAD) * unit  # at most 6 · 2^1021 = 0.75 · 2^1024, the end of float64, and exact
    assert em.peak_to_average(load, PLACEMENT).tolist() == em.peak_to_average(LOAD, PLACEMENT).tolist()
    assert (
        em.lower_bound(load, num_ranks=2, num_slots=6).tolist()
        == em.lower_bound(LOAD, num_ranks=2, num_slots=6).tolist()
    )
    windows = np.stack([LOAD, [[1.0, 6.0, 4.0, 1.0]], [[2.0, 2.0, 1.0, 5.0]]])
    for rule in RULES:
        for previous in (None, PLACEMENT):
            told = {"num_ranks": 2, "num_slots": 4, "rule": rule, "previous": previous}
            assert em.plan(load, **told) == em.plan(LOAD, **told), (rule, previous)
            assert em.plan(windows * unit, **told) == em.plan(windows, **told), (rule, previous)
    told = {"num_ranks": 2, "num_slots": 4, "num_nodes": 2, "num_groups": 2}
    assert em.plan(load, **told) == em.plan(LOAD, **told)


def test_layers_and_windows_of_any_size_stand_beside_each_other():
    load = np.array(
        [[[6.0, 1.0, 1.0, 4.0], [1e308, 1e308, 1e308, 0.0]], [[5e-324, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]]]
    )
    both = Placement([[0, 1, 2, 3]] * 2, 2)
    assert em.peak_to_average(load, both).tolist() == [[pytest.approx(PAR), pytest.approx(4 / 3)], [2.0, 1.0]]


def test_more_tokens_on_a_rank_than_float64_holds_are_refused():
    with pytest.raises(ConstraintError, match="of more tokens on one rank than the largest float64"):
        even_rank_loads([[1e308, 1e308, 0.0, 0.0]], PLACEMENT)


# Windows in which a layer has no tokens say nothing about it.


def test_the_mean_over_windows_is_that_of_windows_with_tokens():
    from evenmoe.metrics import mean_over_windows

    load = np.array([[[6.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[4.0, 4.0], [3.0, 1.0]]])
    par = np.array([[1.5, 1.0], [1.0, 1.0], [1.0, 1.5]])
    assert mean_over_windows(par, load).tolist() == [1.25, 1.5]
    assert mean_over_windows(par[:2], load[:2]).tolist() == [1.5, 1.0]


@pytest.mark.parametrize(("options"), [{"max_copies": 2}, {"target_par": 1.0}, {}])
def test_windows_without_tokens_do_not_hide_an_uneven_layer(options):
    """Rank 0 has 8 of 10 tokens in the only window that was recorded: exchanging two experts makes it 5 and 5."""
    load = np.zeros((4, 1, 4))
    load[2] = [[4, 4, 1, 1]]
    placement = em.plan(load, num_ranks=2, num_slots=4, previous=PLACEMENT, **options)
    assert em.peak_to_average(load[2], placement).tolist() == [1.0]
    assert em.count_copies(PLACEMENT, placement).tolist() == [2]


@st.composite
def gappy(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Windows (T, 3, 6) with tokens in every layer, and the windows (T,) that are to be emptied, not all."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    windows = draw(st.integers(2, 7))
    empty = np.arange(windows) != draw(st.integers(0, windows - 1))
    empty &= np.array(draw(st.lists(st.booleans(), min_size=windows, max_size=windows)))
    return rng.integers(1, 50, (windows, 3, 6)).astype(np.float64), empty


@pytest.mark.parametrize("rule", ["even", "rank", "batch"])
@pytest.mark.parametrize("start", ["anew", "previous", "few copies", "groups"])
@given(drawn=gappy())
@settings(max_examples=8, deadline=None)
def test_empty_windows_change_no_plan(rule, start, drawn):
    load, empty = drawn
    told: dict = {"num_ranks": 2, "num_slots": 8, "rule": rule}
    if start in ("previous", "few copies"):
        told["previous"] = Placement([[0, 1, 2, 3, 4, 5, 0, 1]] * 3, 2, num_experts=6)
        told["max_copies"] = 2 if start == "few copies" else None
    if start == "groups":
        told.update(num_nodes=2, num_groups=2)
    holes = load.copy()
    holes[empty] = 0
    assert em.plan(holes, **told) == em.plan(load[~empty], **told)


@pytest.mark.parametrize("rule", ["even", "rank", "batch"])
@given(drawn=gappy())
@settings(max_examples=8, deadline=None)
def test_a_layer_is_planned_from_its_own_windows(rule, drawn):
    """Layer 1 has no tokens in some windows: it is planned on as if it stood alone, without them."""
    load, empty = drawn
    previous = Placement([[0, 1, 2, 3, 4, 5, 0, 1]] * 3, 2, num_experts=6)
    told: dict = {"num_ranks": 2, "num_slots": 8, "rule": rule, "max_copies": 2}
    holes = load.copy()
    holes[empty, 1] = 0
    found = em.plan(holes, previous=previous, **told).slot_to_expert
    only = Placement(previous.slot_to_expert[1:2], 2, num_experts=6)
    alone = em.plan(load[~empty][:, 1:2], previous=only, **told).slot_to_expert
    whole = em.plan(load, previous=previous, **told).slot_to_expert
    assert found[1].tolist() == alone[0].tolist()
    assert found[[0, 2]].tolist() == whole[[0, 2]].tolist()
