"""The first versions in the reference: by hand, and against the second version where both do the same (§2.17, §3.8)."""

from __future__ import annotations

import pytest
import torch

from evenmoe.reference.dispatch import dispatch
from evenmoe.reference.first_version import combine_v1, dispatch_v1


def test_a_world_by_hand():
    """Two ranks hold the shared expert, two more one expert each; 3 tokens each, every one of them for one expert.

    A row is 10 · source + token. Rank 2 begins with ⌊3·3/2⌋ − ⌊2·3/2⌋ = 1 token for rank 0, and rank 3 with
    ⌊4·3/2⌋ − ⌊3·3/2⌋ = 2.
    """
    x = [torch.tensor([[10.0 * rank + token] for token in range(3)]) for rank in range(4)]
    ids = [torch.tensor([[0], [1], [0]]), torch.tensor([[1], [1], [1]]), torch.tensor([[0], [0], [1]])]
    ids.append(torch.tensor([[1], [0], [0]]))
    got = dispatch_v1(x, ids, num_experts=2, shared_expert_rank_num=2)
    rows = [[0, 1, 2, 20, 30, 31], [10, 11, 12, 21, 22, 32], [0, 2, 20, 21, 31, 32], [1, 10, 11, 12, 22, 30]]
    assert [d.expand_x.flatten().tolist()[: len(r)] for d, r in zip(got, rows, strict=True)] == rows
    assert [len(d.expand_x) for d in got] == [6, 6, 12, 12]
    # A shared rank's own 3 tokens stand under both shared ranks: 1 and 2 on rank 0, 2 and 1 on rank 1.
    assert [d.ep_recv_counts.tolist() for d in got] == [[1, 3, 4, 6], [2, 3, 5, 6], [2, 2, 4, 6], [1, 4, 5, 6]]
    assert [d.expand_idx.tolist() for d in got] == [[0, 0, 1], [0, 1, 2], [0, 1, 0], [0, 0, 1]]
    assert [d.expert_token_nums.tolist() for d in got] == [[6]] * 4
    outs = [d.expand_x * factor for d, factor in zip(got, (1.0, 1.0, 2.0, 3.0), strict=True)]
    back = combine_v1(outs, ids, got, [torch.full((3, 1), 0.5)] * 4, num_experts=2, shared_expert_rank_num=2)
    # Half of twice or three times the token, and the token itself from the shared expert.
    factors = [[2, 2.5, 2], [2.5, 2.5, 2.5], [2, 2, 2.5], [2.5, 2, 2]]
    for y, values, factor in zip(back, x, factors, strict=True):
        assert y.flatten().tolist() == [a * b for a, b in zip(values.flatten().tolist(), factor, strict=True)]


@pytest.mark.parametrize("tp", [0, 2])
@pytest.mark.parametrize("quant_mode", [0, 2])
def test_without_a_shared_expert_the_rows_are_those_of_the_second_version(tp, quant_mode):
    generator = torch.Generator().manual_seed(7)
    ranks, experts, each = 3 * max(tp, 1), 3 if tp else 6, 4
    x = [torch.randn((each, 5), generator=generator) for _ in range(ranks)]
    ids = [torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(each)]) for _ in range(ranks)]
    scales = torch.rand((experts, 5), generator=generator) if quant_mode else None
    keywords = {"num_experts": experts, "tp_world_size": tp, "quant_mode": quant_mode, "scales": scales}
    for first, second in zip(dispatch_v1(x, ids, **keywords), dispatch(x, ids, **keywords), strict=True):
        assert second is not None
        for name in ("expand_x", "dynamic_scales", "expert_token_nums", "ep_recv_counts", "tp_recv_counts"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        assert not first.expand_scales.any()


@pytest.mark.parametrize(("ep", "shared", "tokens"), [(4, 1, 3), (4, 2, 1), (6, 3, 2), (8, 4, 7), (6, 2, 5)])
def test_each_token_is_once_at_the_shared_expert_and_each_of_its_ranks_has_as_many(ep, shared, tokens):
    x = [torch.tensor([[100.0 * rank + token] for token in range(tokens)]) for rank in range(ep)]
    ids = [torch.zeros((tokens, 1), dtype=torch.int32)] * ep
    got = dispatch_v1(x, ids, num_experts=ep - shared, shared_expert_rank_num=shared)
    rows = [d.expand_x.flatten().tolist() for d in got[:shared]]
    assert [len(r) for r in rows] == [tokens * ep // shared] * shared
    assert sorted(row for r in rows for row in r) == sorted(row for t in x for row in t.flatten().tolist())
    for rank, mine in enumerate(rows):
        assert mine[:tokens] == x[rank].flatten().tolist()
