"""Properties of whole worlds, on random ones: §2.5 as a formula, §11.5, and a dense MoE in float64."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.reference.combine import combine
from evenmoe.reference.dispatch import dispatch

HIDDEN = 3


@dataclass
class Case:
    """One random world; `active[d][τ][k]` says which assignments take part, `tp` is 0, 1 or 2."""

    tp: int
    ep: int
    shared_experts: int
    shared_ranks: int
    num_experts: int
    num_virtual: int
    ids: list[torch.Tensor]
    masks: list[torch.Tensor] | None
    active: list[np.ndarray]
    max_bs: int
    generator: np.random.Generator

    @property
    def lists(self) -> int:
        return self.ep * max(self.tp, 1)

    @property
    def local_experts(self) -> int:
        return self.num_experts // (self.ep - self.shared_ranks)

    @property
    def world(self) -> dict:
        return {
            "num_experts": self.num_experts,
            "tp_world_size": self.tp,
            "x_active_mask": self.masks,
            "shared_expert_num": self.shared_experts,
            "shared_expert_rank_num": self.shared_ranks,
            "global_bs": self.max_bs * self.ep,
            "zero_expert_num": self.num_virtual,
        }


def draw_ids(generator: np.random.Generator, num_tokens: int, top_k: int, num_ids: int, hot: bool) -> torch.Tensor:
    """Distinct ids within a token; when hot, every token also wants expert 0."""
    rows = [generator.permutation(num_ids)[:top_k] for _ in range(num_tokens)]
    for row in rows:
        if hot and 0 not in row:
            row[generator.integers(top_k)] = 0
    return torch.tensor(np.array(rows).reshape(num_tokens, top_k), dtype=torch.int32)


@st.composite
def cases(draw) -> Case:
    tp = draw(st.sampled_from([0, 0, 1, 2]))
    shared_experts = draw(st.integers(0, 2))
    shared_ranks = shared_experts * draw(st.integers(1, 2))
    moe_ranks = draw(st.integers(1, 3))
    num_experts = moe_ranks * (1 if tp == 2 else draw(st.integers(1, 3)))
    num_virtual = draw(st.sampled_from([0, 0, 2]))
    top_k = draw(st.integers(1, min(4, num_experts + num_virtual)))
    ep = shared_ranks + moe_ranks
    kind = draw(st.sampled_from(["none", "tokens", "assignments"]))
    max_bs = draw(st.integers(0, 4))
    equal = kind != "none" or draw(st.booleans())  # a mask needs equal Bs on all ranks
    sizes = [max_bs if equal else draw(st.integers(0, max_bs)) for _ in range(ep * max(tp, 1))]
    hot = draw(st.booleans())
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = [draw_ids(generator, n, top_k, num_experts + num_virtual, hot) for n in sizes]
    masks, active = None, [np.ones((n, top_k), dtype=bool) for n in sizes]
    if kind == "tokens":
        masks = [torch.from_numpy(generator.random(n) < 0.7) for n in sizes]
        active = [np.repeat(np.arange(len(mask))[:, None] < int(mask.sum()), top_k, axis=1) for mask in masks]
    if kind == "assignments":
        active = [generator.random((n, top_k)) < 0.6 for n in sizes]
        masks = [torch.from_numpy(entries) for entries in active]
    return Case(tp, ep, shared_experts, shared_ranks, num_experts, num_virtual, ids, masks, active, max_bs, generator)


def assist_by_formula(case: Case, rank: int, tp_rank: int) -> list[list[tuple[int, int, int]]]:
    """The assist info of EP rank `rank`, one list per (local expert, source), written as the formula of §2.5."""
    at = lambda source: source * max(case.tp, 1) + tp_rank  # noqa: E731
    if rank < case.shared_ranks:
        group = case.shared_ranks // case.shared_experts
        return [
            [
                (s, token, case.ids[at(s)].shape[1] + rank // group)
                for token in range(len(case.ids[at(s)]))
                if case.active[at(s)][token].any() and s % group == rank % group
            ]
            for s in range(case.ep)
        ]
    local = case.local_experts
    return [
        [
            (s, token, k)
            for token, row in enumerate(case.ids[at(s)].tolist())
            for k, expert in enumerate(row)
            if expert == (rank - case.shared_ranks) * local + j and case.active[at(s)][token, k]
        ]
        for j in range(local)
        for s in range(case.ep)
    ]


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 1))
def test_dispatch_is_the_formula(case, nums_type):
    x = [torch.from_numpy(case.generator.standard_normal((len(ids), HIDDEN))).bfloat16() for ids in case.ids]
    results = dispatch(x, case.ids, expert_token_nums_type=nums_type, **case.world)
    copies = max(case.tp, 1)
    for d, result in enumerate(results):
        rank, tp_rank = divmod(d, copies)
        own = assist_by_formula(case, rank, tp_rank)
        parts = [(tp_rank, own)]
        if case.tp == 2:
            parts.append((1 - tp_rank, assist_by_formula(case, rank, 1 - tp_rank)))
        rows = [x[s * copies + t][token].tolist() for t, pairs in parts for pair in pairs for s, token, _ in pair]
        assert result.expand_x[: len(rows)].tolist() == rows
        assert not result.expand_x[len(rows) :].any()
        flat = [number for pair in own for info in pair for number in info]
        assert result.assist_info_for_combine[: len(flat)].tolist() == flat
        assert not result.assist_info_for_combine[len(flat) :].any()
        assert result.ep_recv_counts.tolist() == [
            int(count) for _, pairs in parts for count in np.cumsum([len(pair) for pair in pairs])
        ]
        nums = np.add.reduceat([len(pair) for pair in own], range(0, len(own), case.ep))
        if case.tp == 2:
            nums = nums + sum(len(pair) for pair in parts[1][1])
        assert result.expert_token_nums.tolist() == (nums if nums_type == 1 else np.cumsum(nums)).tolist()
        if case.tp == 2:
            totals = {t: sum(len(pair) for pair in pairs) for t, pairs in parts}
            assert result.tp_recv_counts.tolist() == [totals[0], totals[1]]


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_entry_arrives_exactly_once(case):
    """§11.5: per TP rank, assist info names the active, non-virtual assignments and one row per shared expert."""
    copies = max(case.tp, 1)
    results = dispatch([torch.zeros((len(ids), 1)) for ids in case.ids], case.ids, **case.world)
    for tp_rank in range(copies):
        seen: Counter = Counter()
        for result in results[tp_rank::copies]:
            num_local = len(result.expert_token_nums)
            n = int(result.ep_recv_counts[case.ep * num_local - 1])
            assert case.tp == 2 or n == int(result.expert_token_nums.sum())
            seen.update(tuple(info) for info in result.assist_info_for_combine[: 3 * n].reshape(-1, 3).tolist())
        expected: Counter = Counter()
        for s in range(case.ep):
            ids, active = case.ids[s * copies + tp_rank].numpy(), case.active[s * copies + tp_rank]
            expected.update((s, int(t), int(k)) for t, k in np.argwhere(active & (ids < case.num_experts)))
            expected.update(
                (s, int(t), ids.shape[1] + e)
                for t in np.flatnonzero(active.any(axis=1))
                for e in range(case.shared_experts)
            )
        assert seen == expected


@settings(max_examples=60, deadline=None)
@given(cases())
def test_combine_undoes_dispatch(case):
    """§11.5: with experts that do nothing, and weights that sum to 1 over what is sent, tokens come back unchanged
    (plus once per shared expert; times 2 with TP: both peers hold every row). Small integers, dyadic weights: exact."""
    x = [torch.from_numpy(case.generator.integers(-8, 9, (len(ids), HIDDEN))).bfloat16() for ids in case.ids]
    dispatched = dispatch(x, case.ids, **case.world)
    weights, shares = [], []
    for ids, active in zip(case.ids, case.active, strict=True):
        scale = torch.zeros(ids.shape)
        sent = torch.from_numpy(active) & (ids < case.num_experts)
        for token in range(len(ids)):
            slots = sent[token].nonzero().flatten().tolist()
            rest = 1.0
            for k in slots[:-1]:
                rest /= 2
                scale[token, k] = rest
            for k in slots[-1:]:
                scale[token, k] = rest
        scale[~sent] = 99.0  # must not count
        weights.append(scale)
        shares.append(sent.any(dim=1).float() + case.shared_experts * torch.from_numpy(active.any(axis=1)).float())
    results = combine([d.expand_x for d in dispatched], case.ids, dispatched, weights, **case.world)
    for token, share, result in zip(x, shares, results, strict=True):
        assert torch.equal(result.float(), token.float() * share[:, None] * (2 if case.tp == 2 else 1))


U = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # unit roundoff


def dense(case: Case, x, weights, expert_maps, shared_maps):
    """Σ_k w_k·f_k(x) + Σ_e g_e(x) in float64, and Σ of the absolute terms; no ranks anywhere."""
    values, sizes = [], []
    for ids, active, tokens, scale in zip(case.ids, case.active, x, weights, strict=True):
        value, size = np.zeros(tokens.shape), np.zeros(tokens.shape)
        for token, row in enumerate(tokens.double().numpy()):
            terms = [
                float(scale[token, k]) * (expert_maps[expert] @ row)
                for k, expert in enumerate(ids[token].tolist())
                if active[token, k] and expert < case.num_experts
            ]
            if active[token].any():
                terms.extend(matrix @ row for matrix in shared_maps)
            for term in terms:
                value[token] += term
                size[token] += np.abs(term)
        values.append(value)
        sizes.append(size)
    return values, sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_a_dense_moe_gives_the_same(case, dtype):
    """Every expert is a matrix, applied in float64 to the rows that its rank holds, the result rounded to the dtype.

    With TP each peer applies its own part of the matrix; the parts sum up to the expert.
    Bound on |combine − dense|, u the dtype's unit roundoff, v = 2⁻²⁴, S = Σ|terms| (with TP: Σ over both peers' parts):
    a row carries one rounding, or with TP two and its fp32 sum's: at most (1+u)²(1+v) − 1; a product and at most
    K+Sn ≤ 6 additions of fp32: (1+v)⁷ − 1; the final rounding: u. In all ((1+u)³(1+v)⁸ − 1)·S, and float64's own errors
    are 2⁻⁵⁰·S at most. Rows are multiples of 2⁻¹², so they never are fp16 subnormals, but a weighted sum rounded to
    fp16 may be one: 2⁻²⁵.
    """
    copies = max(case.tp, 1)

    def matrices(count: int) -> list[list[np.ndarray]]:
        parts = [
            case.generator.integers(-64, 65, (2 if case.tp == 2 else 1, HIDDEN, HIDDEN)) / 64.0 for _ in range(count)
        ]
        return [list(part) for part in parts]

    experts, shared = matrices(case.num_experts), matrices(case.shared_experts)
    x = [torch.from_numpy(case.generator.integers(-64, 65, (len(ids), HIDDEN)) / 64.0).to(dtype) for ids in case.ids]
    weights = [torch.from_numpy(case.generator.random(ids.shape).astype(np.float32)) for ids in case.ids]
    dispatched = dispatch(x, case.ids, **case.world)
    outputs = []
    for d, result in enumerate(dispatched):
        rank, tp_rank = divmod(d, copies)
        rows = result.expand_x.double().numpy().copy()
        if rank < case.shared_ranks:
            hosted = [shared[rank // (case.shared_ranks // case.shared_experts)]]
        else:
            first = (rank - case.shared_ranks) * case.local_experts
            hosted = experts[first : first + case.local_experts]
        start = 0
        for matrix, count in zip(hosted, result.expert_token_nums.tolist(), strict=True):
            part = matrix[tp_rank if case.tp == 2 else 0]
            rows[start : start + count] = rows[start : start + count] @ part.T
            start += count
        outputs.append(torch.from_numpy(rows).to(dtype))
    results = combine(outputs, case.ids, dispatched, weights, **case.world)
    values, _ = dense(case, x, weights, [sum(m) for m in experts], [sum(m) for m in shared])
    sizes = [
        sum(size)
        for size in zip(
            *(
                dense(case, x, weights, [m[t] for m in experts], [m[t] for m in shared])[1]
                for t in range(len(experts[0]))
            ),
            strict=True,
        )
    ]
    u, v = U[dtype], 2.0**-24
    for value, size, result in zip(values, sizes, results, strict=True):
        bound = ((1 + u) ** 3 * (1 + v) ** 8 - 1 + 2.0**-50) * size + (2.0**-25 if dtype == torch.float16 else 0.0)
        assert (np.abs(result.double().numpy() - value) <= bound).all()
