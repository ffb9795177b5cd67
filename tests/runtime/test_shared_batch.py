"""Batches that all ranks hold: the slots and the bits of `ExpertParallel`, which each has a part of the batch for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import evenmoe as em
from evenmoe.errors import ConstraintError, RankDisagreementError, UnsupportedTypeError
from evenmoe.runtime.shared_batch import SharedBatch
from evenmoe.transport.world import Rank
from tests.processes import TRANSPORTS

RANKS, EXPERTS, SLOTS, TOP_K = 4, 8, 12, 3


def table(slots: int) -> torch.Tensor:
    """Of 8 experts, the first ones twice where there are 12 slots."""
    return em.Placement([[slot % EXPERTS for slot in range(slots)]], RANKS).eplb_table(0)


def batch(num_tokens: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some assignments are not computed, and one expert is twice as likely as all others."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn((num_tokens, 16), generator=random).to(dtype)
    scores = torch.rand((num_tokens, EXPERTS), generator=random)
    scores[:, 0] += 0.5
    ids = scores.topk(TOP_K, dim=1).indices if num_tokens else torch.zeros((0, TOP_K), dtype=torch.int64)
    ids[torch.rand(ids.shape, generator=random) < 0.1] = -1
    return x, ids, torch.rand(ids.shape, generator=random)


def experts(rows: torch.Tensor, per_slot: torch.Tensor, rank: int) -> torch.Tensor:
    """What the experts of a rank make of their rows: different for every slot, and of another width."""
    slot = torch.repeat_interleave(per_slot) + rank * len(per_slot)
    return torch.cat([rows * (slot[:, None] + 1), rows], dim=1).to(rows.dtype)


def both_ways(rank: Rank, slots: int, rule: str) -> list[str]:
    """What differs between a whole batch on all ranks, and its parts."""
    layer = em.ExpertParallel(rank.ep, table(slots), num_slots=slots, rule=rule)
    shared_batch, differing = SharedBatch(layer), []
    for number, num_tokens in enumerate([0, 1, 3, 4, 5, 17, 64]):
        dtype = [torch.float32, torch.bfloat16, torch.float64][number % 3]
        x, ids, weights = batch(num_tokens, number, dtype)
        shared = shared_batch.select(x, ids, weights)
        y = shared_batch.combine(shared, experts(shared.rows, shared.num_tokens_per_expert, rank.index))
        size = max(1, -(-num_tokens // RANKS))
        own = slice(size * rank.index, size * (rank.index + 1))
        sent = layer.dispatch(x[own], ids[own], weights[own])
        part = layer.combine(sent, experts(sent.rows, sent.num_tokens_per_expert, rank.index))
        if not torch.equal(y[own], part):
            differing.append(f"{num_tokens}: sums")
        if not torch.equal(sent.num_tokens_per_expert, shared.num_tokens_per_expert):
            differing.append(f"{num_tokens}: loads")
    return differing


@pytest.mark.parametrize("rule", ["rank", "token", "occurrence", "batch"])
@pytest.mark.parametrize("slots", [EXPERTS, SLOTS])
def test_a_whole_batch_gives_the_bits_of_its_parts(rule, slots):
    with em.local_world(ep_size=RANKS) as world:
        assert world.run(lambda rank: both_ways(rank, slots, rule)) == [[]] * RANKS


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_processes_too(processes, transport):
    assert processes.run((RANKS, 1), both_ways, SLOTS, "batch", transport=transport) == [[]] * RANKS


def failing(rank: Rank, wrong: str) -> str:
    """Rank 1 makes a mistake; what each rank hears, and that the next call is right."""
    shared_batch = SharedBatch(em.ExpertParallel(rank.ep, table(SLOTS), num_slots=SLOTS))
    x, ids, weights = batch(5, 0, torch.float32)
    mistaken = rank.index == 1
    if mistaken and wrong == "batch":
        ids = ids.flip(0)
    if mistaken and wrong == "id":
        ids[2, 1] = EXPERTS
    said = ""
    try:
        shared = shared_batch.select(x, ids, weights)
        out = shared.rows
        if mistaken and wrong == "rows":
            out = torch.zeros((len(out) + 1, 16))
        if mistaken and wrong == "integers":
            out = out.int()
        if mistaken and wrong == "width":
            out = out[:, :3]
        shared_batch.combine(shared, out)
    except (ConstraintError, RankDisagreementError, UnsupportedTypeError) as error:
        said = f"{type(error).__name__}: {error}"
    shared = shared_batch.select(*batch(5, 0, torch.float32))
    assert shared_batch.combine(shared, shared.rows).shape == (5, 16)
    return said


HEARD = "the call of SharedBatch.combine on rank 1 is refused there"
OTHER_SLOTS, OTHER_WIDTH = (
    "digest of the slots chosen is ",
    "hidden size of expert_out is 16 on ranks 0, 2, 3 and 3 on rank 1",
)
MISTAKES = {
    "batch": (OTHER_SLOTS, OTHER_SLOTS),
    "id": ("topk_ids is 8 for token 2, k 1: it must be a logical expert, 0 to 7", HEARD),
    "rows": ("must have one row for each of the", HEARD),
    "integers": ("expert_out is torch.int32: it must be a float dtype", HEARD),
    "width": (OTHER_WIDTH, OTHER_WIDTH),
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_mistake_on_one_rank_is_told_to_all(wrong):
    own, others = MISTAKES[wrong]
    with em.local_world(ep_size=RANKS, timeout_s=20.0) as world:
        said = world.run(lambda rank: failing(rank, wrong))
    for rank, text in enumerate(said):
        assert (own if rank == 1 else others) in text.replace("`", ""), text


def test_memory_of_the_caller_is_its_own():
    """Weights and rows may be written to between the two calls."""

    def step(rank: Rank) -> bool:
        shared_batch = SharedBatch(em.ExpertParallel(rank.ep, table(SLOTS), num_slots=SLOTS))
        x, ids, weights = batch(9, 1, torch.float32)
        found = []
        for spoil in (False, True):
            given = x.clone(), ids.clone(), weights.clone()
            shared = shared_batch.select(*given)
            out = shared.rows.clone()
            if spoil:
                for tensor in given:
                    tensor.zero_()
            found.append(shared_batch.combine(shared, out))
        return torch.equal(*found)

    with em.local_world(ep_size=RANKS) as world:
        assert world.run(step) == [True] * RANKS


def test_load_is_that_of_numpy():
    """The rows of each slot are those that the rule's slots say, counted without any exchange."""

    def step(rank: Rank) -> list[int]:
        shared_batch = SharedBatch(em.ExpertParallel(rank.ep, table(EXPERTS), num_slots=EXPERTS))
        return shared_batch.select(*batch(33, 2, torch.float32)).num_tokens_per_expert.tolist()

    with em.local_world(ep_size=RANKS) as world:
        found = [count for counts in world.run(step) for count in counts]
    ids = batch(33, 2, torch.float32)[1]
    assert found == np.bincount(ids[ids >= 0].numpy(), minlength=EXPERTS).tolist()
