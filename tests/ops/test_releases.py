"""What dispatch and combine give under the limits of each release (§2.14, §2.16)."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import evenmoe as em
from evenmoe.errors import RankDisagreementError
from tests.worlds import assert_same_bits, outputs_of

HIDDEN = 1024
IDS = torch.tensor([[0, 3], [2, 1]], dtype=torch.int32)
WEIGHTS = torch.tensor([[0.25, 0.75], [0.5, -2.0]])


def chain(rank, *, gates=True, **keywords):
    """Dispatch and combine on one of two ranks of two experts each; expert e multiplies by e + 1."""
    x = torch.arange(2.0 * HIDDEN).reshape(2, HIDDEN).to(torch.bfloat16) + 10 * rank.index
    weights = WEIGHTS + rank.index
    d = em.dispatch(x, IDS, ep=rank.ep, num_experts=4, expert_scales=weights if gates else None, **keywords)
    split = int(d.expert_token_nums[0])
    rows = d.expand_x * (2 * rank.index + 1)
    rows[split:] = d.expand_x[split:] * (2 * rank.index + 2)
    y = em.combine(rows, IDS, d, weights, ep=rank.ep, expand_scales=d.expand_scales, **keywords)
    return d, y


def test_each_row_has_its_weight_since_2026():
    """Rank 0 holds experts 0 and 1, which token 0 with k 0 and token 1 with k 1 of both ranks ask for."""
    with em.local_world(2) as world:
        for limits in ("atlas-a3", "atlas-a3-2026", "relaxed", "unlimited"):
            first, second = world.run(partial(dispatch_alone, gates=True, limits=limits))
            assert first.expand_scales.tolist() == [0.25, 1.25, -2.0, -1.0, 0.0, 0.0, 0.0, 0.0], limits
            assert second.expand_scales.tolist() == [0.5, 1.5, 0.75, 1.75, 0.0, 0.0, 0.0, 0.0], limits
        for gates, limits in ((True, "atlas-a3-2025"), (False, "atlas-a3")):
            for d in world.run(partial(dispatch_alone, gates=gates, limits=limits)):
                assert not d.expand_scales.any()


def dispatch_alone(rank, *, gates, limits):
    x, given = torch.ones(2, HIDDEN, dtype=torch.bfloat16), WEIGHTS + rank.index if gates else None
    return em.dispatch(x, IDS, ep=rank.ep, num_experts=4, expert_scales=given, limits=limits)


def test_ranks_that_differ_in_giving_weights_raise():
    def step(rank):
        with pytest.raises(RankDisagreementError, match="presence of expert_scales` is "):
            dispatch_alone(rank, gates=rank.index == 0, limits="relaxed")
        return dispatch_alone(rank, gates=rank.index == 0, limits="atlas-a3-2025").ep_recv_counts.tolist()

    with em.local_world(2) as world:
        assert world.run(step) == [[1, 2, 3, 4]] * 2


@pytest.mark.parametrize("algorithm", ["fullmesh_v1", "fullmesh_v2", "hierarchy"])
def test_the_algorithm_changes_no_value(algorithm):
    with em.local_world(2) as world:
        usual = world.run(chain)
        other = world.run(lambda rank: chain(rank, comm_alg=algorithm))
    for (d, y), (theirs, z) in zip(usual, other, strict=True):
        more = 2 * 4 * 2 * 2 // 8 if algorithm == "hierarchy" else 0  # 2·G·K·ep / 8
        assert len(theirs.ep_recv_counts) == len(d.ep_recv_counts) + more
        for name, tensor in outputs_of(d).items():
            same = outputs_of(theirs)[name]
            assert_same_bits(same[: len(tensor)], tensor, name)
            assert not same[len(tensor) :].any()
        assert_same_bits(z, y, "y")


def test_a_world_of_sixteen_under_hierarchys_own_bounds():
    def step(rank):
        x = torch.full((1, 32), float(rank.index), dtype=torch.bfloat16)
        ids = torch.tensor([[(rank.index + 1) % 16]], dtype=torch.int32)
        keywords = {"comm_alg": "hierarchy", "limits": "atlas-a3-2026", "ep": rank.ep, "num_experts": 16}
        d = em.dispatch(x, ids, expert_scales=torch.full((1, 1), 0.5), **keywords)
        y = em.combine(d.expand_x, ids, d, torch.full((1, 1), 0.5), expand_scales=d.expand_scales, **keywords)
        return d.expand_x[0, 0].item(), y[0, 0].item()

    with em.local_world(16) as world:
        assert world.run(step) == [((i - 1) % 16, i / 2) for i in range(16)]
