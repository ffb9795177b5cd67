"""A demo that cannot fail shows nothing: with a bug planted in any part of the chain it says so and exits with 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import evenmoe as em
from evenmoe.cli import chain
from tests.traces.npz import at, npz


def other_replica(ids: torch.Tensor, mask: torch.Tensor, table: torch.Tensor) -> tuple:
    """The slot next to the right one, which another expert is in."""
    return (ids + 1) % table[:, 1:].max().add(1), mask


def one_other_replica(ids: torch.Tensor, mask: torch.Tensor, table: torch.Tensor) -> tuple:
    """Only the very first entry of a rank goes astray, to a slot that the token does not use yet."""
    free = set(range(int(table[:, 1:].max()) + 1)) - set(ids[0].tolist())
    ids = ids.clone()
    ids[0, 0] = min(free)
    return ids, mask


def wrong_update(change: Callable) -> Callable:
    right = em.update_expert
    return lambda ids, table, *others, **named: change(*right(ids, table, *others, **named), table)


def wrong_dispatch(change: Callable[[em.Dispatched], em.Dispatched]) -> Callable:
    right = em.dispatch
    return lambda *given, **named: change(right(*given, **named))


def rows_of_another_order(dispatched: em.Dispatched) -> em.Dispatched:
    rows = int(dispatched.expert_token_nums.sum())
    order = torch.cat([torch.arange(rows).flip(0), torch.arange(rows, len(dispatched.expand_x))])
    return replace(dispatched, expand_x=dispatched.expand_x[order])


def counts_of_another_order(dispatched: em.Dispatched) -> em.Dispatched:
    return replace(dispatched, expert_token_nums=dispatched.expert_token_nums.flip(0))


def one_row_less_exact(dispatched: em.Dispatched) -> em.Dispatched:
    """The first row as 8-bit floats would have it."""
    rows = dispatched.expand_x.clone()
    rows[0] = rows[0].to(torch.float8_e5m2).to(rows.dtype)
    return replace(dispatched, expand_x=rows)


def wrong_combine(**changes: Callable[[Any], Any]) -> Callable:
    """Arguments of combine_add_rms_norm, by name, replaced."""
    right = em.combine_add_rms_norm
    names = ("expert_out", "expert_ids", "dispatched", "expert_scales", "residual_x", "gamma")

    def call(*given: Any, **named: Any) -> Any:
        named |= dict(zip(names, given, strict=True))
        return right(**{name: changes.get(name, lambda value: value)(value) for name, value in named.items()})

    return call


def without_one(scales: torch.Tensor) -> torch.Tensor:
    scales = scales.clone()
    scales[0, 0] = 0.0
    return scales


def wrong_result(change: Callable) -> Callable:
    right = em.combine_add_rms_norm
    return lambda *given, **named: change(*right(*given, **named))


def with_nan(values: torch.Tensor) -> torch.Tensor:
    values = values.clone()
    values[0, 0, 0] = float("nan")
    return values


FAULTS = {
    "every replica is a neighbour": ("update_expert", lambda: wrong_update(other_replica)),
    "one entry goes astray": ("update_expert", lambda: wrong_update(one_other_replica)),
    "rows in another order": ("dispatch", lambda: wrong_dispatch(rows_of_another_order)),
    "experts in another order": ("dispatch", lambda: wrong_dispatch(counts_of_another_order)),
    "a row in 8 bits": ("dispatch", lambda: wrong_dispatch(one_row_less_exact)),
    "weights in another order": (
        "combine_add_rms_norm",
        lambda: wrong_combine(expert_scales=lambda scales: scales.flip(1)),
    ),
    "weights of the next token": (
        "combine_add_rms_norm",
        lambda: wrong_combine(expert_scales=lambda scales: scales.roll(1, 0)),
    ),
    "one weight is lost": ("combine_add_rms_norm", lambda: wrong_combine(expert_scales=without_one)),
    "the residual of the next token": (
        "combine_add_rms_norm",
        lambda: wrong_combine(residual_x=lambda residual: residual.roll(1, 0)),
    ),
    "no shared expert": ("combine_add_rms_norm", lambda: wrong_combine(shared_expert_x=lambda _: None)),
    "another gamma": ("combine_add_rms_norm", lambda: wrong_combine(gamma=lambda gamma: gamma.flip(0))),
    "NaN in y": ("combine_add_rms_norm", lambda: wrong_result(lambda y, rstd, x: (with_nan(y), rstd, x))),
    "NaN in x": ("combine_add_rms_norm", lambda: wrong_result(lambda y, rstd, x: (y, rstd, with_nan(x)))),
    "x and y exchanged": ("combine_add_rms_norm", lambda: wrong_result(lambda y, rstd, x: (x, rstd, y))),
}


@pytest.mark.parametrize("bug", FAULTS)
def test_a_bug_is_seen(small_demo, monkeypatch, bug):
    name, make = FAULTS[bug]
    monkeypatch.setattr(em, name, make())
    done = small_demo("--json")
    assert done.code == 1
    summary = json.loads(done.out)
    assert summary["within_rounding"] is False
    # In the trace's worlds too, where a rank has several experts.
    shares = [world["largest_difference_over_bound"] for world in summary["worlds"]]
    assert not any(share is not None and share <= 1.0 for share in shares[1:]), shares  # None is not a number


def test_tables_and_slots_that_do_not_fit(small_demo, monkeypatch):
    """The chain's tables are of another placement than the experts in its slots."""
    right = chain.with_placement

    def wrong(layer, placement, index):
        planned = right(layer, placement, index)
        return replace(planned, slot_to_expert=planned.slot_to_expert.flip(0))

    monkeypatch.setattr(chain, "with_placement", wrong)
    done = small_demo("--json")
    assert done.code == 1
    shares = [world["largest_difference_over_bound"] for world in json.loads(done.out)["worlds"]]
    assert [share <= 1.0 for share in shares] == [True, True, False]


def test_the_text_says_so(small_demo, monkeypatch):
    monkeypatch.setattr(em, "update_expert", wrong_update(other_replica))
    done = small_demo()
    assert done.code == 1
    assert done.out.splitlines()[-1] == "THE CHAIN IS WRONG"


def test_another_replica_of_the_same_expert_is_no_bug(small_demo, monkeypatch, tmp_path):
    """Rules choose who computes, never what comes out: the other replica of expert 0 gives the same values."""
    load = np.array([[[70, 10, 10, 10]]])
    path = at(tmp_path / "hot.npz", npz(load=load))
    right = em.update_expert
    before = json.loads(small_demo("--json", "--ranks", 2, "--trace", path).out)
    monkeypatch.setattr(
        em,
        "update_expert",
        lambda ids, table, rank, world, **named: right(ids, table, world - 1 - rank, world, **named),
    )
    after = json.loads(small_demo("--json", "--ranks", 2, "--trace", path).out)
    assert after["within_rounding"] is True
    for key in ("largest_difference", "largest_difference_over_bound"):
        assert after["worlds"][2][key] == before["worlds"][2][key]
