"""A rule compiled, many layers in one call, against the same rule called, and layers one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.engines.modulo import RULE as MODULO
from evenmoe.placement import Placement
from evenmoe.rules import RULES
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.slot_choice import CalledRule, CompiledRule, Scratch, SlotChoice, StepLayers, StepResult
from evenmoe.simulator.step_kernels import add_ranks

COMPILED = [*(RULES.get(name) for name in RULES if RULES.get(name).kernel is not None), MODULO]
# "even" cannot be called: no rank alone can choose by it.
CALLABLE = [rule for rule in COMPILED if rule.name != "even"]


@st.composite
def batches(draw):
    """A cluster, a placement, and the experts (L, G, B, K) that tokens go to."""
    near, nodes, layers = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    cluster, width = Cluster(near * nodes, nodes, draw(st.integers(1, 5))), draw(st.integers(1, 3))
    slots = width * cluster.num_ranks
    experts = draw(st.integers(1, slots))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = [
        rng.permutation(np.r_[np.arange(experts), rng.integers(0, experts, slots - experts)]) for _ in range(layers)
    ]
    shape = layers, cluster.num_ranks, cluster.tokens_per_rank
    ids = rng.permuted(np.broadcast_to(np.arange(experts), (*shape, experts)), axis=3)
    top_k = draw(st.integers(1, experts))
    return cluster, Placement(np.array(rows), cluster.num_ranks), np.ascontiguousarray(ids[..., :top_k], np.uint16)


def counts_of(experts, placement, cluster):
    counts = np.zeros((placement.num_layers, placement.num_experts, cluster.num_ranks), cluster.count_type)
    for layer, rank, token, k in np.ndindex(experts.shape):
        counts[layer, experts[layer, rank, token, k], rank] += 1
    return counts


def run(choice: SlotChoice, placement, cluster, counts, experts, parts) -> StepResult:
    found = StepResult(placement.num_layers, cluster.num_ranks, tile=3)
    top_k = 0 if experts is None else experts.shape[3]
    for part in parts:
        scratch = Scratch(
            np.full((placement.num_slots, cluster.num_ranks), -1, cluster.count_type),
            np.full((cluster.num_ranks, cluster.tokens_per_rank, top_k), -1, np.int32),
        )
        totals = np.empty(counts[part].shape[:2], np.int64)
        add_ranks(counts[part], totals)
        np.testing.assert_array_equal(totals, counts[part].sum(axis=2))
        chosen = None if experts is None else experts[part]
        choice.run(StepLayers(part.start, (3, 7), counts[part], totals, chosen), scratch, found)
    return found


def assert_same(one: StepResult, other: StepResult) -> None:
    for name in ("tokens", "busy", "padded", "sent", "received"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@settings(deadline=None, max_examples=40)
@given(batches(), st.sampled_from(CALLABLE))
def test_a_compiled_rule_does_what_the_called_one_does(batch, rule):
    cluster, placement, experts = batch
    counts, whole = counts_of(experts, placement, cluster), [slice(0, placement.num_layers)]
    compiled, called = CompiledRule(rule, placement, cluster), CalledRule(rule, placement, cluster)
    assert_same(
        run(compiled, placement, cluster, counts, experts, whole),
        run(called, placement, cluster, counts, experts, whole),
    )
    if rule.name != "token":  # which draws the rows where only counts are known, each in its own way
        assert_same(
            run(compiled, placement, cluster, counts, None, whole), run(called, placement, cluster, counts, None, whole)
        )


@pytest.mark.parametrize("rule", COMPILED, ids=lambda rule: rule.name)
@settings(deadline=None, max_examples=20)
@given(batch=batches())
def test_it_does_not_matter_which_layers_run_together(rule, batch):
    cluster, placement, experts = batch
    counts, layers = counts_of(experts, placement, cluster), placement.num_layers
    together, alone = [slice(0, layers)], [slice(layer, layer + 1) for layer in range(layers)]
    choice = CompiledRule(rule, placement, cluster)
    for known in (experts, None):
        assert_same(
            run(choice, placement, cluster, counts, known, together),
            run(choice, placement, cluster, counts, known, alone),
        )
