"""The specification's own numbers through the real operators: §2.15, and the demo of the original page (§7)."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

import evenmoe as em
from evenmoe.transport.world import Rank

# §2.15: ep 4, rank 0 shared, 6 experts, two tokens per rank, labelled 10·rank + token.
SIZES = {"num_experts": 6, "shared_expert_num": 1, "shared_expert_rank_num": 1}
IDS = [[[0, 3], [5, 0]], [[1, 2], [0, 4]], [[3, 5], [3, 1]], [[2, 0], [4, 5]]]
WHOLE = [
    (
        [0, 1, 10, 11, 20, 21, 30, 31],
        [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2), (2, 0, 2), (2, 1, 2), (3, 0, 2), (3, 1, 2)],
        [2, 4, 6, 8],
        [8],
    ),
    (
        [0, 1, 11, 30, 10, 21],
        [(0, 0, 0), (0, 1, 1), (1, 1, 0), (3, 0, 1), (1, 0, 0), (2, 1, 1)],
        [2, 3, 3, 4, 4, 5, 6, 6],
        [4, 2],
    ),
    (
        [10, 30, 0, 20, 21],
        [(1, 0, 1), (3, 0, 0), (0, 0, 1), (2, 0, 0), (2, 1, 0)],
        [0, 1, 1, 2, 3, 3, 5, 5],
        [2, 3],
    ),
    (
        [11, 31, 1, 20, 31],
        [(1, 1, 1), (3, 1, 0), (0, 1, 0), (2, 0, 1), (3, 1, 1)],
        [0, 1, 1, 2, 3, 3, 4, 5],
        [2, 3],
    ),
]
# The same with the mask [[T, F], [F, F]] on rank 2.
MASKED = [
    ([0, 1, 10, 11, 20, 30, 31], [2, 4, 5, 7], [7]),
    ([0, 1, 11, 30, 10], [2, 3, 3, 4, 4, 5, 5, 5], [4, 1]),
    ([10, 30, 0, 20], [0, 1, 1, 2, 3, 3, 4, 4], [2, 2]),
    ([11, 31, 1, 31], [0, 1, 1, 2, 3, 3, 3, 4], [2, 2]),
]


def labelled(rank: int, num_tokens: int) -> torch.Tensor:
    return torch.tensor([[10.0 * rank + token] for token in range(num_tokens)], dtype=torch.bfloat16)


def dispatch_labels(rank: Rank, ids: list, sizes: dict, **keywords: object) -> em.Dispatched:
    i = rank.index
    tensor = torch.tensor(ids[i], dtype=torch.int32)
    return em.dispatch(labelled(i, len(ids[i])), tensor, ep=rank.ep, **sizes, **keywords)


@pytest.mark.parametrize("nums_type", [0, 1])
def test_the_worked_example(nums_type):
    with em.local_world(4) as world:
        results = world.run(lambda rank: dispatch_labels(rank, IDS, SIZES, expert_token_nums_type=nums_type))
    for d, (rows, assist, recv, nums) in zip(results, WHOLE, strict=True):
        n = len(rows)
        assert d.expand_x[:n, 0].tolist() == rows
        assert not d.expand_x[n:].any()
        assert d.assist_info_for_combine[: 3 * n].reshape(-1, 3).tolist() == [list(info) for info in assist]
        assert not d.assist_info_for_combine[3 * n :].any()
        assert d.ep_recv_counts.tolist() == recv
        assert d.expert_token_nums.tolist() == (nums if nums_type else list(accumulate(nums)))


def test_the_worked_example_with_a_mask():
    masks = [torch.ones(2, 2, dtype=torch.bool) for _ in range(4)]
    masks[2] = torch.tensor([[True, False], [False, False]])
    with em.local_world(4) as world:
        results = world.run(lambda rank: dispatch_labels(rank, IDS, SIZES, x_active_mask=masks[rank.index]))
    for d, (rows, recv, nums) in zip(results, MASKED, strict=True):
        assert d.expand_x[: len(rows), 0].tolist() == rows
        assert not d.expand_x[len(rows) :].any()
        assert (d.ep_recv_counts.tolist(), d.expert_token_nums.tolist()) == (recv, nums)


def test_two_shared_experts():
    """ep 8, R 2: each shared rank serves the sources of its parity."""
    ids = [[[s % 4, (s + 1) % 4]] for s in range(8)]
    sizes = {"num_experts": 4, "shared_expert_num": 2, "shared_expert_rank_num": 4}
    with em.local_world(8) as world:
        results = world.run(lambda rank: dispatch_labels(rank, ids, sizes))
    for shared_rank in range(4):
        assist = results[shared_rank].assist_info_for_combine[:12].reshape(-1, 3).tolist()
        sources = [s for s in range(8) if s % 2 == shared_rank % 2]
        assert assist == [[s, 0, 2 + shared_rank // 2] for s in sources]
    assist = results[4].assist_info_for_combine[:12].reshape(-1, 3).tolist()
    assert assist == [
        [0, 0, 0],
        [3, 0, 1],
        [4, 0, 0],
        [7, 0, 1],
    ]
    assert results[4].ep_recv_counts.tolist() == [1, 1, 1, 2, 3, 3, 3, 4]


# §7: 16 devices, ep 8 × tp 2, at the demo's real size; its "ones" are bf16 bit patterns 0x0001, u = 2⁻¹³³.
BS, H, K = 8, 7168, 3
U_BITS, ONE_BITS = 0x0001, 0x3F80


def filled(bits: int, *shape: int) -> torch.Tensor:
    return torch.full(shape, bits, dtype=torch.int16).view(torch.bfloat16)


def bits_of(tensor: torch.Tensor) -> set[int]:
    return set(tensor.view(torch.int16).flatten().tolist())


def demo(rank: Rank, bits: int, tp: int) -> tuple:
    table = torch.tensor([[1, expert] for expert in range(8)], dtype=torch.int32)
    ids, _ = em.update_expert(torch.tensor([[0, 1, 2]] * BS, dtype=torch.int32), table, rank.ep.rank, 8)
    sizes = {"ep": rank.ep, "tp": rank.tp if tp == 2 else None, "num_experts": 8, "shared_expert_num": 0}
    sizes |= {"global_bs": 64, "limits": "atlas-a3"}
    d = em.dispatch(filled(bits, BS, H), ids, **sizes)
    normed = em.combine_add_rms_norm(
        d.expand_x,
        ids,
        d,
        torch.full((BS, K), 0.1),
        filled(bits, BS, 1, H),
        filled(bits, BS, 1, H),
        shared_expert_x=filled(bits, BS, 1, H),
        group_list_type=1,
        norm_eps=1e-6,
        **sizes,
    )
    return ids, d, normed


@pytest.mark.parametrize(
    ("bits", "want_x", "want_rstd", "want_y"),
    [(U_BITS, 0x0003, 999.99994, 0x0000), (ONE_BITS, 0x4026, 0.38461536, 0x3F80)],  # 0x4026 is 2.59375
    ids=["as published", "true ones"],
)
def test_the_demo(bits, want_x, want_rstd, want_y):
    with em.local_world(8, 2) as world:
        results = world.run(lambda rank: demo(rank, bits, tp=2))
    for index, (ids, d, (y, rstd, x)) in enumerate(results):
        rank = index // 2
        assert ids.tolist() == [[0, 1, 2]] * BS
        assert (d.expand_x.shape, d.assist_info_for_combine.shape) == ((128, H), (8192,))
        assert not d.dynamic_scales.any()
        assert not d.expand_scales.any()
        assist = [n for source in range(8) for token in range(BS) for n in (source, token, rank)] if rank < K else []
        assert d.assist_info_for_combine[: len(assist)].tolist() == assist
        assert not d.assist_info_for_combine[len(assist) :].any()
        assert bits_of(d.expand_x) == ({bits} if rank < K else {0})
        assert d.ep_recv_counts.tolist() == ([8, 16, 24, 32, 40, 48, 56, 64] * 2 if rank < K else [0] * 16)
        assert d.tp_recv_counts.tolist() == ([64, 64] if rank < K else [0, 0])
        assert d.expert_token_nums.tolist() == ([128] if rank < K else [0])
        assert (y.shape, rstd.shape, x.shape) == ((BS, 1, H), (BS, 1, 1), (BS, 1, H))
        assert (bits_of(x), bits_of(y)) == ({want_x}, {want_y})
        assert set(rstd.flatten().tolist()) == {torch.tensor(want_rstd).item()}


@pytest.mark.parametrize(("bits", "want_x", "want_y"), [(U_BITS, 0x0002, 0x0000), (ONE_BITS, 0x4013, 0x3F80)])
def test_the_demo_without_tp(bits, want_x, want_y):
    """0.3 + 1 + 1 = 2.3: 2u as published, 2.296875 with true ones."""
    with em.local_world(8) as world:
        results = world.run(lambda rank: demo(rank, bits, tp=0))
    for _, d, (y, _, x) in results:
        assert (bits_of(x), bits_of(y)) == ({want_x}, {want_y})
        assert (len(d.expand_x), len(d.tp_recv_counts)) == (64, 0)
