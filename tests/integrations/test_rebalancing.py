"""What the plug-ins hand to vLLM and SGLang: maps that they can use, from whatever they ask with."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.errors import ConstraintError
from evenmoe.integrations import sglang, vllm
from evenmoe.integrations.rebalancing import Rebalancing
from tests.integrations.engine_stubs import HookRegistry, HookType, module, modules

SIZES = st.integers(1, 4).flatmap(
    lambda ranks: st.tuples(st.just(ranks), st.integers(1, 4), st.integers(1, 3), st.integers(1, ranks * 4))
)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(0, 2**32 - 1), st.sampled_from(["none", "good", "torn", "short", "negative", "lacking"]))
def test_every_answer_holds_every_expert(sizes, seed, before):
    ranks, per_rank, layers, experts = sizes
    slots, random = ranks * per_rank, np.random.default_rng(seed)
    experts = min(experts, slots)
    tokens = random.integers(0, 50, (layers, experts)) * random.integers(0, 2)
    in_use = np.stack([random.permutation(np.arange(slots) % experts) for _ in range(layers)])
    if before == "short":
        in_use = in_use[:, :-1]
    if before == "negative":
        in_use[0, 0] = -1
    if before == "lacking":
        in_use[:] = 0
    found = Rebalancing().next_map(tokens, slots, ranks, in_use=None if before == "none" else in_use)
    assert (found.shape, found.dtype) == ((layers, slots), np.int64)
    for layer in found:
        assert sorted(set(layer.tolist())) == list(range(experts))
    if before == "good" and not tokens.any():
        assert (found == in_use).all()


def test_a_plan_starts_from_the_map_in_use():
    random = np.random.default_rng(0)
    tokens = random.lognormal(0, 0.8, (4, 64)) * 1000
    first = Rebalancing().next_map(tokens, 72, 8)
    drifted = tokens * random.lognormal(0, 0.2, tokens.shape)
    anew, kept = (Rebalancing().next_map(drifted, 72, 8, in_use=used) for used in (None, first))
    before = em.Placement(first, num_ranks=8)
    copies = [int(em.count_copies(before, em.Placement(new, num_ranks=8)).sum()) for new in (anew, kept)]
    assert copies[1] < copies[0] / 2
    bounded = Rebalancing(max_copies=2).next_map(drifted, 72, 8, in_use=first)
    assert em.count_copies(before, em.Placement(bounded, num_ranks=8)).max() <= 2


def test_groups_stay_inside_nodes_and_torn_ones_are_put_together():
    tokens = np.random.default_rng(1).integers(1, 99, (2, 16))
    torn = np.stack([np.random.default_rng(2).permutation(16) for _ in range(2)])
    found = Rebalancing().next_map(tokens, 16, 4, num_nodes=2, num_groups=4, in_use=torn)
    for layer in found.reshape(2, 2, 8):
        assert not {expert // 4 for expert in layer[0]} & {expert // 4 for expert in layer[1]}
    # 3 groups cannot stay inside 2 nodes: vLLM and SGLang plan without them then, and so does this.
    assert Rebalancing().next_map(tokens, 16, 4, num_nodes=2, num_groups=3).shape == (2, 16)


def test_what_cannot_be_planned_is_an_error():
    with pytest.raises(ConstraintError, match="num_slots"):
        Rebalancing().next_map(np.ones((1, 8)), 7, 2)
    with pytest.raises(ConstraintError, match="num_slots"):
        Rebalancing().next_map(np.ones((1, 8)), 7, 2, in_use=np.zeros((1, 7), int))


# vLLM -------------------------------------------------------------------------------------------------------------


def of_vllm():
    """`vllm.distributed.eplb.policy` as far as the plug-in looks."""
    base = type("AbstractEplbPolicy", (), {})
    return module("policy", AbstractEplbPolicy=base, EPLB_POLICIES={"default": type("DefaultEplbPolicy", (base,), {})})


def test_vllm_gets_a_policy_under_the_only_name_that_it_has(caplog):
    policies = of_vllm()
    held = policies.EPLB_POLICIES  # vLLM's own modules have imported the dict, not the module
    with modules(vllm__distributed__eplb__policy=policies), caplog.at_level(logging.INFO):
        vllm.register()
        first = held["default"]
        vllm.register()
        assert held["default"] is first  # plug-ins are loaded more than once
        assert issubclass(first, policies.AbstractEplbPolicy)
        assert [record.message for record in caplog.records] == [
            "evenmoe plans vLLM's expert placements: Rebalancing(max_copies=None)"
        ]
        weight = torch.tensor([[9, 1, 1, 1]], dtype=torch.int32)
        found = first.rebalance_experts(weight, 6, 1, 1, 2, torch.tensor([[0, 1, 2, 3, 1, 2]]))
        assert (found.dtype, found.device.type, found.shape) == (torch.int64, "cpu", (1, 6))
        assert sorted(found[0].unique().tolist()) == [0, 1, 2, 3]
        assert first.rebalance_experts(weight * 0, 6, 1, 1, 2, found).equal(found)  # the trial run
        vllm.register(Rebalancing(max_copies=3))
        assert held["default"].rebalancing.max_copies == 3


def test_without_vllm_there_is_an_error_of_its_name():
    with pytest.raises(ImportError, match="vllm"):
        vllm.register()


# SGLang -----------------------------------------------------------------------------------------------------------


def test_sglang_gets_an_algorithm_by_name_and_keeps_the_others():
    registry, asked = HookRegistry(), []

    def own_rebalance(**given):
        asked.append(given["algorithm"])
        return "theirs"

    location = SimpleNamespace(physical_to_logical_map_cpu=torch.tensor([[0, 1, 2, 3, 1, 2]]))
    places = module("expert_location", get_global_expert_location_metadata=lambda: location)
    hooks = module("hook_registry", HookRegistry=registry, HookType=HookType)
    with modules(sglang__srt__plugins__hook_registry=hooks, sglang__srt__eplb__expert_location=places):
        sglang.register()
        sglang.register()
        path = "sglang.srt.eplb.eplb_algorithms."
        choose = registry.wrapped(path + "compute_algorithm", lambda raw_algorithm, num_groups, num_nodes: "deepseek")
        rebalance = registry.wrapped(path + "rebalance_experts", own_rebalance)
        given = {
            "tokens_per_expert": torch.tensor([[[9, 1, 1, 1]], [[7, 3, 1, 1]]]),
            "num_physical_experts": 6,
            "num_local_physical_experts": 3,
            "num_groups": None,
            "num_nodes": 1,
        }
        theirs = choose(raw_algorithm="auto", num_groups=None, num_nodes=1)
        assert (rebalance(**given, algorithm=theirs), asked) == ("theirs", ["deepseek"])
        name = choose(raw_algorithm="evenmoe", num_groups=None, num_nodes=1)
        for found in (rebalance(**given, algorithm=name), rebalance(*given.values(), name)):
            slots, of_expert, count = found
            assert {tensor.dtype for tensor in found} == {torch.int64}
            assert count.sum(dim=1).tolist() == [6]
            for expert, number in enumerate(count[0].tolist()):
                own = of_expert[0, expert].tolist()
                assert own == [s for s in range(6) if slots[0, s] == expert] + [-1] * (len(own) - number)
        location = None
        assert rebalance(**given, algorithm=name)[0].shape == (1, 6)
    assert asked == ["deepseek"]


def test_without_sglang_there_is_an_error_of_its_name():
    with pytest.raises(ImportError, match="sglang"):
        sglang.register()
