"""Every slot gets the bytes of its expert, whoever holds them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integrations.transformers.models import RANKS, on_ranks


def weights_of(expert: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(6).reshape(2, 3) + 7 * expert).to(dtype)


def all_arrive(rank: int, cases: list) -> list[str]:
    from evenmoe.integrations.transformers.weights import moved

    wrong = []
    for held, wanted in cases:
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8):
            mine = torch.stack([weights_of(expert, dtype) for expert in held[rank]])
            rows = moved(mine, np.array(held), np.array(wanted))
            expected = torch.stack([weights_of(expert, dtype) for expert in wanted[rank]])
            if not rows.view(torch.uint8).equal(expected.view(torch.uint8)):
                wrong.append(f"{held} to {wanted} in {dtype}")
    return wrong


def test_random_moves():
    rng, cases = np.random.default_rng(0), []
    for _ in range(40):
        experts = int(rng.integers(1, 9))
        slots = [int(rng.integers(-(-experts // RANKS), experts + 3)) for _ in range(2)]
        lists = []
        for per_rank in slots:
            every = np.concatenate([np.arange(experts), rng.integers(0, experts, RANKS * per_rank - experts)])
            lists.append(rng.permutation(every).reshape(RANKS, per_rank).tolist())
        cases.append(tuple(lists))
    assert on_ranks(all_arrive, cases) == [[]] * RANKS


@settings(deadline=None)
@given(st.data())
def test_no_expert_is_fetched_twice_and_sources_are_shared(data):
    from evenmoe.integrations.transformers.weights import _route

    ranks, experts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    row = st.lists(st.integers(0, experts - 1), min_size=experts, max_size=experts)
    wanted = np.array(data.draw(st.lists(row, min_size=ranks, max_size=ranks)))
    held = np.tile(np.arange(experts), (ranks, 1))  # everybody has everything: nothing moves
    assert not any(part for source in _route(held, wanted) for part in source)
    held[1:] = 0  # rank 0 alone has experts other than 0
    route = _route(held, wanted)
    assert all(source == [[]] * ranks for source in route[1:])
    for there in range(1, ranks):
        assert [expert for _, expert in route[0][there]] == sorted(set(wanted[there].tolist()) - {0})


def test_the_least_asked_holder_gives():
    from evenmoe.integrations.transformers.weights import _route

    held, wanted = np.array([[0, 1], [0, 1], [2, 3]]), np.array([[0, 1], [0, 1], [0, 1]])
    route = _route(held, wanted)
    assert [route[rank][2] for rank in range(3)] == [[(0, 0)], [(1, 1)], []]
