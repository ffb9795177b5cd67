"""`ExpertParallel` on random layers, over threads and over processes, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import evenmoe as em
from evenmoe.errors import EvenmoeError
from evenmoe.runtime import expert_parallel
from tests.runtime.layers import (
    FLOATS,
    RULES,
    Layer,
    Spec,
    expected_slots,
    expected_sums,
    in_process,
    one_rank,
    specs,
)
from tests.worlds import assert_same_bits


def in_threads(spec: Spec) -> list:
    layer = Layer(spec)
    with em.local_world(spec.ranks, timeout_s=60.0) as world:
        return world.run(lambda rank: one_rank(rank, layer))


def check(spec: Spec, results: list) -> None:
    layer = Layer(spec)
    sums = expected_sums(layer)
    for rule in RULES:
        mine = [result[rule] for result in results]
        placed = check_rows(layer, mine)
        if rule != "batch":
            assert placed == expected_slots(layer, rule), rule
        for rank, result in enumerate(mine):
            assert_same_bits(result["y"], sums[rank], f"{rule}, rank {rank}")  # hence the same under every rule
    check_evenness(layer, [result["occurrence"] for result in results])
    check_batch(layer, [result["batch"] for result in results])


def check_rows(layer: Layer, results: list) -> dict[tuple[int, int, int], int]:
    """Rows in the promised order, from where they say, every entry once; {(rank, token, k): slot}."""
    spec, placed = layer.spec, {}
    for rank, result in enumerate(results):
        rows, slots, counts = result["rows"], result["slots"].tolist(), result["counts"]
        assert counts.dtype == torch.int64
        assert counts.shape == (spec.per_rank,)
        assert rows.shape == (int(counts.sum()), spec.hidden)
        for name in ("source_rank", "source_token", "source_k"):
            assert result[name].dtype == torch.int32
            assert result[name].shape == (len(rows),)
        sources = [result[f"source_{name}"].tolist() for name in ("rank", "token", "k")]
        order = list(zip(slots, *sources, strict=True))
        assert order == sorted(set(order))
        assert all(slot // spec.per_rank == rank for slot in slots)
        sent = [layer.x[source][token] for _, source, token, _ in order]
        assert_same_bits(rows, torch.stack(sent) if sent else rows.new_zeros(rows.shape), f"rows of rank {rank}")
        for slot, source, token, k in order:
            assert int(layer.ids[source][token, k]) == layer.placement.slot_to_expert[0, slot]
            assert (source, token, k) not in placed
            placed[source, token, k] = slot
    wanted = {(rank, *entry) for rank, ids in enumerate(layer.ids) for entry in (ids >= 0).nonzero().tolist()}
    assert set(placed) == wanted
    return placed


def per_source(layer: Layer, results: list) -> np.ndarray:
    """(ranks, slots): rows that each source sent to each slot."""
    counts = np.zeros((layer.spec.ranks, layer.placement.num_slots), np.int64)
    for result in results:
        np.add.at(counts, (result["source_rank"].numpy(), result["slots"].numpy()), 1)
    return counts


def check_evenness(layer: Layer, results: list) -> None:
    """By occurrence the replicas of an expert get equally many rows of every source, but for one."""
    for counts in per_source(layer, results):
        for count, *slots in layer.table.tolist():
            share = counts[slots[:count]]
            assert share.max() - share.min() <= 1


def least_peak(layer: Layer) -> int:
    """The least peak of rank loads over all splits of the batch, by linear programming.

    Variables: tokens of each slot, and the peak. With whole tokens the answer is the next whole number: rows to slots
    to ranks is a flow, whole peaks make whole capacities, and such a flow is whole wherever there is a fractional one.
    """
    placement, ranks = layer.placement, layer.spec.ranks
    held = placement.slot_to_expert[0]
    tokens = np.bincount(torch.cat(layer.ids).flatten().numpy() + 1, minlength=layer.spec.experts + 1)[1:]
    of_expert = np.zeros((layer.spec.experts, placement.num_slots + 1))
    of_expert[held, np.arange(placement.num_slots)] = 1.0
    of_rank = np.zeros((ranks, placement.num_slots + 1))
    of_rank[np.arange(placement.num_slots) // layer.spec.per_rank, np.arange(placement.num_slots)] = 1.0
    of_rank[:, -1] = -1.0
    goal = np.zeros(placement.num_slots + 1)
    goal[-1] = 1.0
    answer = linprog(goal, of_rank, np.zeros(ranks), of_expert, tokens, method="highs")
    # Vertices are sums of tokens over numbers of ranks, 1 to 8: HiGHS' 1e-7 cannot lift one over a whole number.
    return int(np.ceil(answer.fun - 1e-6))


def check_batch(layer: Layer, results: list) -> None:
    """What the ranks really compute is the best split, and it is the one that `split_batch` tells."""
    rows = [len(result["rows"]) for result in results]
    assert max(rows) == least_peak(layer)
    tokens = np.bincount(torch.cat(layer.ids).flatten().numpy() + 1, minlength=layer.spec.experts + 1)[1:]
    quotas = em.split_batch(tokens, layer.placement.slot_to_expert[0], layer.spec.ranks)
    assert torch.cat([result["counts"] for result in results]).tolist() == quotas.tolist()


@settings(max_examples=100, deadline=None)
@given(specs())
def test_threads(spec):
    check(spec, in_threads(spec))


@settings(max_examples=25, deadline=None)
@given(specs(ranks=4))
def test_processes(processes, spec):
    check(spec, processes.run((4, 1), in_process, spec))


AWKWARD = {
    "one rank": Spec(ranks=1, per_rank=4, experts=2, most_tokens=7),
    "no token anywhere": Spec(ranks=3, most_tokens=0),
    "nothing to compute": Spec(ranks=3, absent=1.0, most_tokens=9),
    "one hot expert on every rank": Spec(ranks=8, per_rank=1, experts=1, top_k=1, most_tokens=9),
    "one hot expert, one host": Spec(ranks=4, per_rank=1, experts=4, top_k=1, hot=True, most_tokens=9),
    "the same expert five times": Spec(ranks=3, per_rank=2, experts=2, top_k=5, repeats=True, most_tokens=9),
    "K = 1 in float64": Spec(ranks=5, per_rank=3, experts=7, top_k=1, x_dtype=3, out_dtype=3, weight_dtype=3),
    "one column": Spec(ranks=3, hidden=1, out_hidden=1, x_dtype=0, out_dtype=1),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_layers(name):
    check(AWKWARD[name], in_threads(AWKWARD[name]))


@pytest.mark.parametrize("dtype", range(len(FLOATS)))
def test_one_rounding(dtype):
    """1 + u + u: rounded after every addition it stays 1 (ties to even), rounded once it is 1 + 2u."""
    u = torch.finfo(FLOATS[dtype]).eps / 2
    out = torch.tensor([[1.0], [u], [u]], dtype=FLOATS[dtype])

    def step(rank):
        ep = em.ExpertParallel(rank.ep, em.Placement([[0, 1, 2]], 1).eplb_table(0), num_slots=3)
        dispatched = ep.dispatch(torch.ones(1, 1), torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
        return ep.combine(dispatched, out)

    with em.local_world(1) as world:
        y = world.run(step)[0]
    # The sum itself is float32 or float64, where rows of that dtype keep the steps' roundings.
    assert y.dtype == FLOATS[dtype]
    assert y.item() == (1 + 2 * u if dtype < 2 else 1.0)


def test_one_object_serves_many_steps():
    """Other tokens, other sizes and dtypes in every step, each rank with its own."""
    layers = [Layer(Spec(seed=s, ranks=3, per_rank=2, experts=4, most_tokens=4, x_dtype=s % 4)) for s in range(5)]
    table = layers[0].table

    def steps(rank):
        results = []
        ep = em.ExpertParallel(rank.ep, table, num_slots=6, rule="batch")
        for layer in layers:
            i = rank.index
            dispatched = ep.dispatch(layer.x[i], layer.ids[i], layer.weights[i])
            results.append(ep.combine(dispatched, dispatched.rows.float()))
        return results

    with em.local_world(3) as world:
        for rank, results in enumerate(world.run(steps)):
            for layer, y in zip(layers, results, strict=True):
                x, weights = layer.x[rank].float(), layer.weights[rank].float()
                total = torch.zeros_like(x)
                for k in range(2):
                    total = total + x * weights[:, k : k + 1]
                assert_same_bits(y, total, f"rank {rank}")


@pytest.mark.parametrize("rule", ["rank", "token", "occurrence"])
def test_slots_that_hold_nothing(rule):
    """Slots that the table does not name: slot 0 and slot 3 of four stay empty."""
    table = torch.tensor([[1, 2], [1, 1]], dtype=torch.int32)

    def step(rank):
        ep = em.ExpertParallel(rank.ep, table, num_slots=4, rule=rule)
        dispatched = ep.dispatch(torch.ones(2, 1), torch.tensor([[0, 1], [1, -1]]), torch.ones(2, 2))
        return dispatched.num_tokens_per_expert.tolist(), ep.combine(dispatched, 2 * dispatched.rows).tolist()

    with em.local_world(2) as world:
        results = world.run(step)
    assert results == [([0, 4], [[4.0], [2.0]]), ([2, 0], [[4.0], [2.0]])]


@pytest.mark.parametrize("free", [torch.no_grad, torch.inference_mode])
def test_tensors_with_gradients_are_taken_where_none_are_recorded(free):
    weights = torch.ones(1, 1, requires_grad=True)

    def step(rank):
        ep = em.ExpertParallel(rank.ep, em.Placement([[0]], 1).eplb_table(0), num_slots=1)
        with free():
            dispatched = ep.dispatch(torch.ones(1, 1, requires_grad=True), torch.tensor([[0]]), weights)
            return ep.combine(dispatched, dispatched.rows * weights)

    with em.local_world(1) as world:
        y = world.run(step)[0]
    assert y.item() == 1.0
    assert not y.requires_grad


@settings(max_examples=40, deadline=None)
@given(specs(), st.data())
def test_rows_need_not_be_contiguous(spec, data):
    """Strided inputs, and an expert_out that is a view, give the same."""
    layer = Layer(spec)
    rule = data.draw(st.sampled_from(RULES))

    def step(rank, place):
        i = rank.index
        ep = em.ExpertParallel(rank.ep, layer.table, num_slots=layer.placement.num_slots, rule=rule)
        dispatched = ep.dispatch(place(layer.x[i]), place(layer.ids[i]), place(layer.weights[i]))
        return ep.combine(dispatched, place(dispatched.rows))

    def spread(tensor):
        return torch.stack([tensor.T, tensor.T], dim=2)[:, :, 1].T

    with em.local_world(spec.ranks) as world:
        plain = world.run(lambda rank: step(rank, lambda tensor: tensor))
        views = world.run(lambda rank: step(rank, spread))
    for rank, (one, other) in enumerate(zip(plain, views, strict=True)):
        assert_same_bits(one, other, f"rank {rank}")


WRONG = {
    "sparse": ("x", lambda x: x.to_sparse()),
    "on meta": ("x", lambda x: x.to("meta")),
    "a list": ("x", lambda x: x.tolist()),
    "an id beyond": ("topk_ids", lambda ids: ids + 1),
    "ids of 16 bits": ("topk_ids", lambda ids: ids.short()),
    "weights of another k": ("topk_weights", lambda weights: weights[:, :1]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_layer_knows_of_earlier_calls_lets_nothing_wrong_pass(name):
    """Right calls and wrong ones of the same shapes in turn: the plan of a shape is kept, no check is skipped."""
    argument, change = WRONG[name]
    right = {
        "x": torch.ones(2, 3),
        "topk_ids": torch.tensor([[0, 1], [1, 0]]),
        "topk_weights": torch.full((2, 2), 0.5),
    }
    with em.local_world(1) as world:
        layer = em.ExpertParallel(world.ranks[0].ep, torch.tensor([[1, 0], [1, 1]], dtype=torch.int32), num_slots=2)
        for _ in range(2):
            rows = layer.dispatch(**right)
            assert torch.equal(layer.combine(rows, rows.rows), right["x"])
            with pytest.raises(EvenmoeError) as caught:
                layer.dispatch(**right | {argument: change(right[argument])})
            assert caught.value.argument == argument


def test_a_layer_keeps_plans_of_a_bounded_number_of_shapes(monkeypatch):
    monkeypatch.setattr(expert_parallel, "_KEPT", 3)
    with em.local_world(1) as world:
        layer = em.ExpertParallel(world.ranks[0].ep, torch.tensor([[1, 0]], dtype=torch.int32), num_slots=1)
        for tokens in (1, 2, 3, 4, 5, 1, 0):
            rows = layer.dispatch(
                torch.ones(tokens, 2), torch.zeros((tokens, 1), dtype=torch.int64), torch.ones(tokens, 1)
            )
            assert layer.combine(rows, rows.rows).sum() == 2 * tokens
            assert len(layer._plans) <= 3
