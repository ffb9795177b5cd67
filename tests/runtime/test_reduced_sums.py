"""`combine="reduced"`: one row for each (token, rank) returns, within a derived bound of the exact sum."""

from __future__ import annotations

import pytest
import torch

import evenmoe as em
from evenmoe.errors import ConstraintError, RankDisagreementError
from evenmoe.transport.world import Rank
from tests.processes import TRANSPORTS

RANKS, EXPERTS, SLOTS = 4, 8, 12
#: Half the distance of two neighbors over the smaller one, by the bits of the significand: 8, 11, 24 and 53.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def table() -> torch.Tensor:
    """Of 8 experts, the first four twice."""
    return em.Placement([[slot % EXPERTS for slot in range(SLOTS)]], RANKS).eplb_table(0)


def batch(rank: int, num_tokens: int, top_k: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(10 * rank + num_tokens)
    x = torch.randn((num_tokens, 24), generator=random).to(dtype)
    ids = torch.rand((num_tokens, EXPERTS), generator=random).topk(top_k, dim=1).indices
    ids[torch.rand(ids.shape, generator=random) < 0.1] = -1
    return (
        x,
        ids,
        torch.rand(ids.shape, generator=random).to(torch.float64 if dtype == torch.float64 else torch.float32),
    )


def outcome(rank: Rank, num_tokens: int, top_k: int, dtype: torch.dtype) -> str:
    """What is wrong with the reduced sums of experts that multiply by 1 to 8.

    With u the unit roundoff of the rows and v that of the sums, a partial sum has K products and sums, each off by v of
    all that is added, and is then rounded, u; W sums of these, v each; and the last rounding, u. So it is within
    ((1 + v)^(K + 1) (1 + u) (1 + v)^W (1 + u) - 1) of the sum of magnitudes S. For all u, v, K and W here that is below
    (2 u + u^2 + 1.01 (K + 1 + W) v) S. Weights are rounded to float32 on their way, another 2^-24.
    """
    x, ids, weights = batch(rank.index, num_tokens, top_k, dtype)
    found = {}
    for combine in ("exact", "reduced"):
        layer = em.ExpertParallel(rank.ep, table(), num_slots=SLOTS, combine=combine)
        assert ("reduced sums" in layer.describe()) == (combine == "reduced")
        sent = layer.dispatch(x, ids, weights)
        slot = torch.repeat_interleave(sent.num_tokens_per_expert) + rank.index * (SLOTS // RANKS)
        found[combine] = layer.combine(sent, (sent.rows * (slot % EXPERTS + 1)[:, None]).to(dtype))
    factors = torch.where(ids < 0, 0, ids + 1)
    terms = weights[..., None].double() * (x[:, None] * factors[..., None]).to(dtype).double()
    u, v = UNIT[dtype], UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
    bound = (2 * u + u * u + 1.01 * (top_k + 1 + RANKS) * v + 2.0**-24) * terms.abs().sum(dim=1)
    if found["reduced"].dtype != dtype or found["reduced"].shape != x.shape:
        return f"{found['reduced'].dtype} {tuple(found['reduced'].shape)}"
    off = (found["reduced"].double() - terms.sum(dim=1)).abs()
    # float16 has no unit roundoff below its least normal number, where two neighbors are 2^-24 apart.
    least = 2.0**-24 if dtype == torch.float16 else 0.0
    if (off > bound + 3 * least).any():
        return f"off by {float((off / bound.clamp(min=1e-300)).max())} of the bound"
    if top_k == 1 and not torch.equal(found["reduced"], found["exact"]) and dtype == torch.float64:
        return "one product is another"
    return ""


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_sums_are_within_the_bound(dtype, top_k):
    with em.local_world(ep_size=RANKS) as world:
        for num_tokens in (0, 1, 5, 40):
            assert world.run(lambda rank, n=num_tokens: outcome(rank, n, top_k, dtype)) == [""] * RANKS


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_processes_too(processes, transport):
    found = processes.run((RANKS, 1), outcome, 21, 3, torch.bfloat16, transport=transport)
    assert found == [""] * RANKS


def whole_numbers(rank: Rank) -> bool:
    """Small whole numbers are added up exactly in any order, and one rank's sum is the exact one."""
    equal = []
    for rows in (torch.bfloat16, torch.float64):
        random = torch.Generator().manual_seed(rank.index)
        x = torch.randint(-3, 4, (rank.index + 3, 5), generator=random).to(rows)
        ids = torch.rand((len(x), EXPERTS), generator=random).topk(3, dim=1).indices
        weights, found = torch.randint(1, 4, ids.shape, generator=random).float(), []
        for combine in ("exact", "reduced"):
            layer = em.ExpertParallel(rank.ep, table(), num_slots=SLOTS, combine=combine)
            sent = layer.dispatch(x, ids, weights)
            found.append(layer.combine(sent, sent.rows * 2))
        equal.append(torch.equal(*found))
    return all(equal)


def test_whole_numbers_are_exact():
    with em.local_world(ep_size=RANKS) as world:
        assert world.run(whole_numbers) == [True] * RANKS


def gradients(rank: Rank, combine: str) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(rank.index)
    x = torch.randn((6, 4), generator=random, dtype=torch.float64).requires_grad_()
    ids = torch.rand((6, EXPERTS), generator=random).topk(3, dim=1).indices
    weights = torch.rand(ids.shape, generator=random).requires_grad_()
    layer = em.ExpertParallel(rank.ep, table(), num_slots=SLOTS, combine=combine)
    sent = layer.dispatch(x, ids, weights)
    layer.combine(sent, sent.rows**2).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    return [x.grad, weights.grad]


def test_gradients_are_those_of_the_exact_sum():
    with em.local_world(ep_size=RANKS) as world:
        exact, reduced = (world.run(lambda rank, c=combine: gradients(rank, c)) for combine in ("exact", "reduced"))
    for one, other in zip(exact, reduced, strict=True):
        for theirs, ours in zip(one, other, strict=True):
            assert torch.equal(theirs, ours)


def test_ranks_that_differ_hear_of_it():
    def step(rank: Rank) -> None:
        sums = "exact" if rank.index == 2 else "reduced"
        layer = em.ExpertParallel(rank.ep, table(), num_slots=SLOTS, combine=sums)
        with pytest.raises(RankDisagreementError, match="`combine` is reduced on ranks 0, 1, 3 and exact on rank 2"):
            layer.dispatch(*batch(rank.index, 3, 2, torch.float32))

    with em.local_world(ep_size=RANKS, timeout_s=20.0) as world:
        world.run(step)


def test_other_words_are_an_error():
    with em.local_world(ep_size=1) as world:
        ep = world.ranks[0].ep
        with pytest.raises(ConstraintError, match="`combine` is 'mean': it must be 'exact' or 'reduced'"):
            em.ExpertParallel(ep, em.Placement([[0, 1]], 1).eplb_table(0), num_slots=2, combine="mean")
