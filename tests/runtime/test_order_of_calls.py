"""Ranks that combine in another order, skip a layer or call one once more: one error on all ranks, then right values.

Threads and gloo processes run the same scenarios; the odd rank is the second of two. The expert of layer n multiplies
by n, and every token's weights add up to one, so that any mixture of layers or dispatches shows in the values.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

import evenmoe as em
from evenmoe.errors import ConstraintError, RankDisagreementError, UnsupportedTypeError
from evenmoe.placement import Placement
from evenmoe.transport.world import Rank

ODD = 1
IDS = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3]])
HALF = torch.full((4, 2), 0.5)


@pytest.fixture(params=["threads", "processes"])
def run(request: pytest.FixtureRequest) -> Any:
    """`run(job, *arguments)`: a job on four ranks, of which the even ones do as rank 0 and the odd ones as rank 1."""
    if request.param == "processes":
        pool = request.getfixturevalue("processes")
        yield lambda job, *arguments: [_raised(result) for result in pool.run((4, 1), job, *arguments)]
    else:
        with em.local_world(4, timeout_s=20.0) as world:
            yield lambda job, *arguments: world.run(lambda rank: job(rank, *arguments))


def _raised(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result


def layers(rank: Rank, count: int, rule: str = "rank", tables: str = "equal") -> list[em.ExpertParallel]:
    """Layers whose tables are equal, or the same experts in other slots."""
    slots = [[0, 1, 2, 3], [3, 2, 1, 0]]
    made = []
    for number in range(count):
        placement = Placement([slots[number % 2 if tables == "other" else 0]], 4)
        made.append(em.ExpertParallel(rank.ep, placement.eplb_table(0), num_slots=4, rule=rule))
    return made


def dispatch(layer: em.ExpertParallel, value: float) -> Any:
    return layer.dispatch(torch.full((4, 3), value), IDS, HALF)


def told(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except (RankDisagreementError, ConstraintError) as error:
        return type(error).__name__, str(error)
    return "no error", ""


def combine_two(rank: Rank, rule: str, tables: str) -> tuple[tuple[str, str], list[list[float]]]:
    """A was dispatched with ones and B with hundreds; the odd rank combines B first, and all combine again."""
    a, b = layers(rank, 2, rule, tables)
    sent = [(a, dispatch(a, 1.0)), (b, dispatch(b, 100.0))]
    order = sent[::-1] if rank.index == ODD else sent
    error = told(lambda: [layer.combine(rows, rows.rows) for layer, rows in order])
    return error, [layer.combine(rows, rows.rows).unique().tolist() for layer, rows in sent]


@pytest.mark.parametrize("tables", ["equal", "other"])
@pytest.mark.parametrize("rule", ["rank", "batch"])
def test_one_rank_combines_in_another_order(run, rule, tables):
    found = run(combine_two, rule, tables)
    texts = {text for (_, text), _ in found}
    assert [kind for (kind, _), _ in found] == ["RankDisagreementError"] * 4
    assert len(texts) == 1
    text = texts.pop()
    assert text.startswith("`the call` is ExpertParallel.combine of dispatch ")
    assert " on ranks 0, 2, 3 and ExpertParallel.combine of dispatch " in text
    assert " on rank 1: it must be the same on every rank of a group" in text
    assert [values for _, values in found] == [[[1.0], [100.0]]] * 4


def two_micro_batches(rank: Rank, rule: str) -> list[list[float]]:
    """Two dispatches of one layer in flight, combined last first on all ranks, and the first of them once more."""
    (layer,) = layers(rank, 1, rule)
    first, second = dispatch(layer, 1.0), dispatch(layer, 100.0)
    return [layer.combine(rows, rows.rows).unique().tolist() for rows in (second, first, first)]


@pytest.mark.parametrize("rule", ["rank", "occurrence", "batch"])
def test_micro_batches_are_combined_in_any_common_order(run, rule):
    assert run(two_micro_batches, rule) == [[[100.0], [1.0], [1.0]]] * 4


def skip_or_repeat(rank: Rank, how: str) -> tuple[list[tuple[str, str]], list[float]]:
    """Four layers in a row, layer n times n; the odd rank leaves the first out or calls it twice, up to an error."""
    all_layers = layers(rank, 4)

    def step(numbers: list[int]) -> float:
        value = 1.0
        for number in numbers:
            rows = dispatch(all_layers[number], value)
            value = all_layers[number].combine(rows, (number + 1) * rows.rows).unique().item()
        return value

    odd = {"skips": [1, 2, 3], "repeats": [0, 0, 1, 2, 3], "swaps": [1, 0, 2, 3]}[how]
    errors = [told(lambda: step(odd if rank.index == ODD else [0, 1, 2, 3]))]
    return errors, [step([0, 1, 2, 3]), step([0, 1, 2, 3])]


@pytest.mark.parametrize("how", ["skips", "repeats", "swaps"])
def test_one_rank_skips_or_repeats_a_layer(run, how):
    found = run(skip_or_repeat, how)
    for errors, values in found:
        ((kind, text),) = errors
        assert kind == "RankDisagreementError"
        assert text.startswith("`the call` is ExpertParallel.dispatch of layer ")
        assert " on rank 1: it must be the same on every rank" in text
        assert values == [24.0, 24.0]  # 1 · 2 · 3 · 4
    assert len({errors[0][1] for errors, _ in found}) == 1


def numbered_by_hand(rank: Rank) -> tuple[str, str]:
    placement = Placement([[0, 1, 2, 3]], 4)
    layer = em.ExpertParallel(rank.ep, placement.eplb_table(0), num_slots=4, layer=7 if rank.index == ODD else 5)
    return told(lambda: dispatch(layer, 1.0))


def test_layers_can_be_numbered(run):
    assert set(run(numbered_by_hand)) == {
        (
            "RankDisagreementError",
            "`the call` is ExpertParallel.dispatch of layer 5 on ranks 0, 2, 3 and ExpertParallel.dispatch of layer 7 "
            "on rank 1: it must be the same on every rank of a group; call the collective operators in the same order "
            "on all ranks.",
        )
    }


def test_numbers_of_layers_are_checked():
    with em.local_world(1) as world:
        for layer in (-1, 1.5, True, "0"):
            with pytest.raises(ConstraintError) as caught:
                em.ExpertParallel(world.ranks[0].ep, Placement([[0]], 1).eplb_table(0), num_slots=1, layer=layer)
            assert str(caught.value) == (
                f"`layer` is {layer!r}: it must be a whole number from 0; pass the layer's index."
            )


def weights_refilled(rank: Rank) -> list[float]:
    """The router's buffer is used again before combine."""
    (layer,) = layers(rank, 1)
    weights = HALF.clone()
    rows = layer.dispatch(torch.ones(4, 3), IDS, weights)
    weights.fill_(5.0)
    return layer.combine(rows, rows.rows).unique().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_taken_when_they_are_passed(run, dtype):
    assert run(weights_refilled) == [[1.0]] * 4


def another_layers_rows(rank: Rank) -> tuple[str, str]:
    first, second = layers(rank, 2)
    rows = dispatch(first, 1.0)
    return told(lambda: second.combine(rows, rows.rows))


def test_rows_of_another_layer_are_refused(run):
    for kind, text in run(another_layers_rows):
        assert kind == "ConstraintError"
        assert text.startswith("`dispatched` is of layer ")
        assert "combine with the layer that dispatched" in text


def tampered(rank: Rank) -> tuple[str, str]:
    """One rank says that rows of another rank's tokens are its own: counts that come home are those sent out."""
    (layer,) = layers(rank, 1)
    rows = dispatch(layer, 1.0)
    if rank.index == ODD:
        rows.source_rank.fill_(ODD)
    return told(lambda: layer.combine(rows, rows.rows))


def test_counts_that_come_home_are_compared_with_those_sent(run):
    found = run(tampered)
    assert all(kind in {"ConstraintError", "RankDisagreementError"} for kind, _ in found)
    assert any(text.startswith("`dispatched` is such that [") for _, text in found)


def copied(rank: Rank) -> tuple[list[float], bool, str]:
    """A deep copy is a layer of its own, on the same group."""
    (layer,) = layers(rank, 1)
    copy = deepcopy({"layer": layer})["layer"]
    rows = dispatch(copy, 3.0)
    y = copy.combine(rows, rows.rows).unique().tolist()
    mixed = told(lambda: layer.combine(rows, rows.rows))[1]
    return y, copy.layer == layer.layer, mixed


def test_layers_can_be_copied(run):
    for y, same_number, mixed in run(copied):
        assert (y, same_number) == ([3.0], False)
        assert mixed.startswith("`dispatched` is of layer ")


PLACES = {
    "a sparse x": lambda: {"x": torch.ones(4, 3).to_sparse()},
    "meta ids": lambda: {"topk_ids": IDS.to("meta")},
    "meta weights": lambda: {"topk_weights": HALF.to("meta")},
    "a meta x": lambda: {"x": torch.ones(4, 3, device="meta")},
}
TEXTS = {
    "a sparse x": "`x` is a sparse_coo tensor: it must be a dense tensor; call to_dense().",
    "meta ids": "`topk_ids` is on the device meta: it must hold values; pass a tensor on the device of the others.",
    "meta weights": (
        "`topk_weights` is on the device meta: it must hold values; pass a tensor on the device of the others."
    ),
    "a meta x": "`x` is on the device meta: it must hold values; pass a tensor on the device of the others.",
}


def misplaced(rank: Rank, name: str, rule: str) -> tuple[tuple[str, str], list[float]]:
    (layer,) = layers(rank, 1, rule)
    given = {"x": torch.ones(4, 3), "topk_ids": IDS, "topk_weights": HALF}
    given |= PLACES[name]() if rank.index == ODD else {}
    error = ("no error", "")
    try:
        layer.dispatch(**given)
    except (RankDisagreementError, UnsupportedTypeError) as caught:
        error = (type(caught).__name__, str(caught))
    rows = dispatch(layer, 2.0)
    return error, layer.combine(rows, rows.rows).unique().tolist()


@pytest.mark.parametrize("rule", ["rank", "batch"])
@pytest.mark.parametrize("name", PLACES)
def test_tensors_without_values_here_are_refused_on_all_ranks(run, name, rule):
    found = run(misplaced, name, rule)
    for index, (error, values) in enumerate(found):
        assert values == [2.0]
        if index == ODD:
            assert error == ("UnsupportedTypeError", TEXTS[name])
        else:
            assert error[0] == "RankDisagreementError"
            assert f"on rank {ODD}` is refused there ({TEXTS[name]})" in error[1]


def misplaced_scales(rank: Rank, place: str) -> tuple[str, str]:
    """The operators too: gate weights without values on one rank."""
    ids = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    d = em.dispatch(torch.ones(2, 3), ids, ep=rank.ep, num_experts=4)
    scales = torch.full((2, 2), 0.5)
    if rank.index == ODD:
        scales = scales.to("meta") if place == "meta" else scales.to_sparse()
    try:
        em.combine(d.expand_x, ids, d, scales, ep=rank.ep)
    except (RankDisagreementError, UnsupportedTypeError) as error:
        return type(error).__name__, str(error)
    return "no error", ""


@pytest.mark.parametrize("place", ["meta", "sparse"])
def test_operators_refuse_tensors_without_values_here(run, place):
    for index, (kind, text) in enumerate(run(misplaced_scales, place)):
        assert kind == ("UnsupportedTypeError" if index == ODD else "RankDisagreementError")
        assert "`expert_scales` is " in text
