"""What a trace is made of is checked when it is made, by the rules and in the words of its file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evenmoe.errors import ConstraintError
from evenmoe.traces import Trace, trace_arrays
from tests.traces.test_whole_trace import ERRORS, FIELDS, LOAD, ROUTING, made, same


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": 5}, "`name` is 5 of type int: it must be a text; say where the trace comes from."),
        (
            {"load": None},
            "`load` is an array of dtype object: it must hold integers; convert it with .astype(np.int64).",
        ),
        (
            {"load": LOAD / 2},
            "`load` is an array of dtype float64: it must hold integers; convert it with .astype(np.int64).",
        ),
        (
            {"routing": ROUTING[:, :1]},
            "`routing` is an array of shape (5, 1, 2): it must be (tokens, 2, k); record one row per token.",
        ),
        (
            {"routing": None},
            "`seq_start` is given without `routing`: it must split the tokens of `routing`; leave it out.",
        ),
        (
            {"seq_start": np.array([0, 8])},
            "`seq_start` is an array of shape (2,) from 0 to 8: it must be one row from 0 to the 7 tokens of "
            "`routing`; record the first token of every request and, last, the number of tokens.",
        ),
        (
            {"layer_ids": np.array([0, 0])},
            "`layer_ids` is [0, 0]: it must be distinct and not negative; use the model's own layer numbers, or leave "
            "it out.",
        ),
        (
            {"metadata": [("a", 1)]},
            "`metadata` is of type list: it must be an object; give names to its values.",
        ),
        (
            {"metadata": {"a": None}},
            "`metadata` is a mapping with 'a': None: it must hold texts and finite numbers under text keys; leave "
            "other values out, or write them as text.",
        ),
    ],
)
def test_nothing_wrong_is_made(change, text):
    with pytest.raises(ConstraintError) as caught:
        replace(made(), **change)
    assert str(caught.value) == text


@pytest.mark.parametrize("mistake", [name for name, (arrays, _) in ERRORS.items() if "metadata" not in arrays])
def test_what_a_file_may_not_hold_is_not_made_either(mistake):
    arrays, text = ERRORS[mistake]
    with pytest.raises(ConstraintError) as caught:
        Trace("wrong", **{"load": LOAD, **arrays})
    assert str(caught.value).endswith(text.partition(": it ")[2])


def test_what_is_made_has_the_documented_arrays():
    """Whatever integers are given; arrays that have the dtype already are not copied."""
    whole = made()
    lists = {name: getattr(whole, name).tolist() for name in FIELDS}
    same(Trace(whole.name, **lists, metadata=whole.metadata), whole)
    for name in FIELDS:
        assert getattr(replace(whole), name) is getattr(whole, name)
    one = Trace("one", [[1, 2]], load_by_rank=[[[1, 2]]])
    assert one.load_by_rank is not None
    assert (one.load.tolist(), one.load_by_rank.tolist()) == ([[[1, 2]]], [[[[1, 2]]]])
    assert Trace("none", [[1, 2]], routing=np.zeros((0, 1, 1), int), seq_start=[0]).seq_start is None


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 9])
def test_an_expert_twice_is_found_wherever_it_is(top_k, monkeypatch):
    """Against plain loops; in parts of few tokens."""
    monkeypatch.setattr(trace_arrays, "_AT_ONCE", 3 * 2 * top_k)
    random = np.random.default_rng(top_k)
    load = np.ones((1, 2, 60), int)
    found = 0
    for _ in range(40):
        routing = random.integers(0, 60, (7, 2, top_k))
        first = [
            (token, layer)
            for token in range(7)
            for layer in range(2)
            if len(set(routing[token, layer].tolist())) < top_k
        ]
        if not first:
            Trace("distinct", load, routing)
            continue
        found += 1
        with pytest.raises(ConstraintError, match=f"twice for token {first[0][0]}, layer {first[0][1]}: it must"):
            Trace("twice", load, routing)
    assert found > 0 or top_k == 1


def test_rows_of_several_lengths_are_no_array():
    with pytest.raises(
        ConstraintError, match=r"`load` is a list that is no array .*: it must hold integers, rows of one"
    ):
        Trace("ragged", [[1], [2, 3]])  # pyright: ignore[reportArgumentType]
