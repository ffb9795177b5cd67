"""The dense model in float64, and that its bound on bfloat16 chains is both rigorous and close.

A chain is made here in many ways: every product exact, as two numbers of 8 bits give in float32, the sums in orders
from the friendliest to the worst, one rounding to bfloat16 wherever a chain stores a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.reference.dense import Experts, dense_add_rms_norm, dense_moe, make_experts

BF16, FP32 = 2.0**-8, 2.0**-24
KINDS = ("normal", "ones", "cancelling", "magnitudes", "positive", "one column")


def one_by_one(products: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(products.shape[:-1])
    for i in range(products.shape[-1]):
        total = total + products[..., i]
    return total


def by_size(products: torch.Tensor, descending: bool) -> torch.Tensor:
    order = products.abs().argsort(dim=-1, descending=descending)
    return one_by_one(products.gather(-1, order))


def in_pairs(products: torch.Tensor) -> torch.Tensor:
    while products.shape[-1] > 1:
        products = torch.nn.functional.pad(products, (0, products.shape[-1] % 2))
        products = products[..., ::2] + products[..., 1::2]
    return products.sum(-1)


def signs_apart(products: torch.Tensor) -> torch.Tensor:
    """All that is positive, then all that is negative: the largest intermediate sum there can be."""
    return one_by_one(products.sort(dim=-1, descending=True).values)


ORDERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ascending": one_by_one,
    "descending": lambda products: one_by_one(products.flip(-1)),
    "largest first": lambda products: by_size(products, True),
    "smallest first": lambda products: by_size(products, False),
    "in pairs": in_pairs,
    "signs apart": signs_apart,
}
LIBRARY = ("bfloat16 matmul", "float32 matmul")


def matmul(rows: torch.Tensor, weights: torch.Tensor, order: str) -> torch.Tensor:
    """rows (T, n) · weights (m, n)ᵀ, bfloat16 in and out."""
    if order == "bfloat16 matmul":
        return rows @ weights.T
    if order == "float32 matmul":
        return (rows.float() @ weights.float().T).bfloat16()
    return ORDERS[order](rows.float()[:, None] * weights.float()).bfloat16()


def chain(
    x: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor, experts: Experts, shards: int, order: str
) -> torch.Tensor:
    """Float32 (T, H): what combine has summed before its last rounding."""
    inner, total = experts.up.shape[1], torch.zeros(x.shape)
    for token, row in enumerate(x):
        for k, expert in enumerate(ids[token].tolist()):
            parts = []
            for part in range(shards):
                mine = slice(part * inner // shards, (part + 1) * inner // shards)
                h = torch.relu(matmul(row[None], experts.up[expert, mine], order))
                parts.append(matmul(h, experts.down[expert][:, mine], order)[0])
            y = parts[0] if shards == 1 else sum(part.float() for part in parts).bfloat16()
            total[token] = total[token] + scales[token, k] * y.float()
    return total


def values(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(shape, generator=generator)
    if kind == "ones":
        normal = torch.where(normal > 0, 1.0, -1.0)
    elif kind == "cancelling":  # neighbours that differ in the last of 8 bits, with opposite signs
        base = normal[..., : (shape[-1] + 1) // 2].repeat_interleave(2, dim=-1)[..., : shape[-1]]
        normal = base * torch.tensor([1.0, -1.0 - 2.0**-7]).repeat(shape[-1])[: shape[-1]]
    elif kind == "magnitudes":  # far from the ends of float32, so that nothing overflows or underflows
        normal = normal * torch.exp2(torch.randint(-12, 13, shape, generator=generator))
    elif kind == "positive":
        normal = normal.abs()
    elif kind == "one column":
        normal = normal * (torch.arange(shape[-1]) == 0)
    return normal.bfloat16()


def case(
    seed: int, tokens: int, hidden: int, inner: int, num_experts: int, top_k: int, x_kind: str, weight_kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Experts]:
    generator = torch.Generator().manual_seed(seed)
    x = values(x_kind, (tokens, hidden), generator)
    up = values(weight_kind, (num_experts, inner, hidden), generator)
    down = values(weight_kind, (num_experts, hidden, inner), generator)
    if weight_kind == "cancelling":
        up = up.abs()  # so that x's own cancellation is not undone
    ids = torch.rand((tokens, num_experts), generator=generator).argsort(dim=1)[:, :top_k]
    scales = torch.randn((tokens, top_k), generator=generator)
    return x, ids, scales, Experts(up, down)


def plain_loop(x: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor, experts: Experts, shards: int) -> tuple:
    """Sums, sums of magnitudes, and the docstring's bound, in Python's own floats."""
    tokens, hidden = x.shape
    inner = experts.up.shape[1]
    sums, sizes, bounds = (np.zeros((tokens, hidden)) for _ in range(3))
    for token in range(tokens):
        row = x[token].tolist()
        for k, expert in enumerate(ids[token].tolist()):
            up, down, scale = experts.up[expert].tolist(), experts.down[expert].tolist(), float(scales[token, k])
            h, dh = [0.0] * inner, [0.0] * inner
            for f in range(inner):
                h[f] = max(0.0, sum(up[f][i] * row[i] for i in range(hidden)))
                dh[f] = BF16 * h[f] + 1.01 * hidden * FP32 * sum(abs(up[f][i] * row[i]) for i in range(hidden))
            for i in range(hidden):
                y, dy = 0.0, 0.0
                for part in range(shards):
                    mine = range(part * inner // shards, (part + 1) * inner // shards)
                    p = sum(down[i][f] * h[f] for f in mine)
                    spread = sum(abs(down[i][f]) * dh[f] for f in mine)
                    summing = 1.01 * inner * FP32 * sum(abs(down[i][f]) * (h[f] + dh[f]) for f in mine)
                    y += p
                    dy += spread + summing + BF16 * (abs(p) + spread)
                if shards > 1:
                    dy += BF16 * (abs(y) + dy)
                sums[token, i] += scale * y
                sizes[token, i] += abs(scale) * sum(
                    abs(down[i][f]) * sum(abs(up[f][j] * row[j]) for j in range(hidden)) for f in range(inner)
                )
                bounds[token, i] += abs(scale) * dy + 2 * (ids.shape[1] + 3) * FP32 * abs(scale) * (abs(y) + dy)
    return sums, sizes, bounds


@st.composite
def cases(draw, sizes=(1, 3, 16, 33)):
    num_experts = draw(st.integers(1, 4))
    return case(
        draw(st.integers(0, 2**32)),
        draw(st.integers(0, 3)),
        draw(st.sampled_from(sizes)),
        draw(st.sampled_from([1, 2, 7, 24])),
        num_experts,
        draw(st.integers(1, num_experts)),
        draw(st.sampled_from(KINDS)),
        draw(st.sampled_from(KINDS)),
    )


@settings(max_examples=40, deadline=None)
@given(cases(sizes=(1, 3, 9)), st.integers(1, 2))
def test_it_is_the_triple_loop(given_case, shards):
    """float64 sums of at most 9, 24 and 4 terms in any order: within 2 · 40 · 2⁻⁵³ < 1e-14 of the sum of magnitudes.

    The bound is a sum of positive terms, so it agrees relative to itself.
    """
    x, ids, scales, experts = given_case
    total, bound = dense_moe(x, ids, scales, experts, shards)
    sums, sizes, bounds = plain_loop(x, ids, scales, experts, shards)
    assert total.dtype == bound.dtype == torch.float64
    assert total.shape == bound.shape == x.shape
    assert (np.abs(total.numpy() - sums) <= 1e-12 * sizes).all()
    assert (np.abs(bound.numpy() - bounds) <= 1e-9 * bounds).all()


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([1, 2, 3]), st.sampled_from([*ORDERS, *LIBRARY]))
def test_no_chain_leaves_the_bound(given_case, shards, order):
    x, ids, scales, experts = given_case
    total, bound = dense_moe(x, ids, scales, experts, shards)
    difference = (chain(x, ids, scales, experts, shards, order).double() - total).abs()
    assert bool((difference <= bound).all()), float((difference / bound).nan_to_num().max())


@pytest.mark.parametrize(
    ("x_kind", "weight_kind"),
    [pair for pair in product(KINDS, KINDS) if pair != ("ones", "ones")],  # small whole numbers are exact
)
def test_the_bound_is_close(x_kind, weight_kind):
    """Some value of a modest sample uses more than a tenth of what it may: a bound ten times as wide is no good."""
    most = 0.0
    for shards, order in ((1, "ascending"), (2, "largest first"), (1, "bfloat16 matmul")):
        x, ids, scales, experts = case(7, 4, 32, 16, 3, 2, x_kind, weight_kind)
        total, bound = dense_moe(x, ids, scales, experts, shards)
        difference = (chain(x, ids, scales, experts, shards, order).double() - total).abs()
        assert bool((difference <= bound).all())
        most = max(most, float((difference / bound).nan_to_num().max()))
    assert most > 0.1


def layer(seed: int, hidden: int = 64, inner: int = 32) -> tuple:
    """As the demo makes them: normal tokens and weights, softmax scales."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((6, hidden), generator=generator).bfloat16()
    ids = torch.rand((6, 8), generator=generator).argsort(dim=1)[:, :3]
    scales = torch.softmax(torch.randn((6, 3), generator=generator), dim=1)
    return x, ids, scales, make_experts(8, hidden, inner, seed)


def another_expert(x, ids, scales, experts):
    """The last choice of every token goes to an expert that the token did not choose."""
    free = [min(set(range(8)) - set(row)) for row in ids.tolist()]
    return x, torch.cat([ids[:, :2], torch.tensor(free)[:, None]], dim=1), scales, experts


def a_choice_less(x, ids, scales, experts):
    return x, ids[:, :2], scales[:, :2], experts


def rows_of_8_bits(x, ids, scales, experts):
    return x.to(torch.float8_e4m3fn).bfloat16(), ids, scales, experts


def scales_of_8_bits(x, ids, scales, experts):
    return x, ids, scales.to(torch.float8_e4m3fn).float(), experts


def weights_exchanged(x, ids, scales, experts):
    return x, ids, scales[:, [1, 0, 2]], experts


PLANTED = (another_expert, a_choice_less, rows_of_8_bits, scales_of_8_bits, weights_exchanged)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("error", PLANTED)
def test_an_error_leaves_the_bound(error, shards):
    """In most tokens (a small scale may hide one), and in some by far."""
    for seed in range(3):
        right = layer(seed)
        total, bound = dense_moe(*right, shards=shards)
        assert bool(((chain(*right, shards, "float32 matmul").double() - total).abs() <= bound).all())
        wrong = chain(*error(*right), shards, "float32 matmul").double()
        shares = ((wrong - total).abs() / bound).max(dim=1).values
        assert shares.median() > 1.0, shares
        assert shares.max() > 2.0, shares


@pytest.mark.parametrize(("hidden", "inner", "shards"), [(1024, 256, 1), (2048, 512, 2)])
def test_real_widths(hidden, inner, shards):
    x, ids, scales, experts = layer(0, hidden, inner)
    total, bound = dense_moe(x, ids, scales, experts, shards)
    difference = (chain(x, ids, scales, experts, shards, "bfloat16 matmul").double() - total).abs()
    assert bool((difference <= bound).all())
    assert float((difference / bound).max()) > 0.05
    lost = chain(*a_choice_less(x, ids, scales, experts), shards, "bfloat16 matmul").double()
    assert bool((((lost - total).abs() / bound).max(dim=1).values > 1.0).all())


def norm_chain(total: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, eps: float, mean: Callable) -> tuple:
    """x and y of the chain after a float32 total: one sum, one root, two roundings to bfloat16."""
    x = total + residual.float()
    rstd = 1.0 / torch.sqrt(mean(x * x) / x.shape[1] + eps)[:, None]
    return x.bfloat16(), ((x * rstd).bfloat16().float() * gamma.float()).bfloat16()


def plain_norm(total, bound, residual, gamma, eps) -> tuple[np.ndarray, ...]:
    """The docstring's formulas, value by value."""
    outputs = tuple(np.zeros(total.shape) for _ in range(4))
    x_out, x_bound, y_out, y_bound = outputs
    for token in range(len(total)):
        x = [float(a) + float(b) for a, b in zip(total[token], residual[token], strict=True)]
        delta = [float(d) + 4 * FP32 * (abs(value) + float(d)) for d, value in zip(bound[token], x, strict=True)]
        rstd = (sum(value * value for value in x) / len(x) + eps) ** -0.5
        norm_x, norm_delta = (sum(v * v for v in vector) ** 0.5 for vector in (x, delta))
        rho = norm_delta / (norm_x - norm_delta)
        for i, (value, d) in enumerate(zip(x, delta, strict=True)):
            moved = rstd * (d * (1 + rho) + abs(value) * rho)
            g = float(gamma[i])
            x_out[token, i], y_out[token, i] = value, value * rstd * g
            x_bound[token, i] = d + BF16 * (abs(value) + d)
            y_bound[token, i] = abs(g) * (moved + 1.01 * 2 * BF16 * (abs(value * rstd) + moved))
    return outputs


@settings(max_examples=100, deadline=None)
@given(
    cases(),
    st.sampled_from([*ORDERS, *LIBRARY]),
    st.sampled_from(["normal", "cancelling", "none", "large"]),
    st.sampled_from([1e-6, 0.3, 10.0]),
    st.integers(0, 2**32),
)
def test_the_norm_stays_within_its_bound(given_case, order, residual_kind, eps, seed):
    x, ids, scales, experts = given_case
    generator = torch.Generator().manual_seed(seed)
    total, bound = dense_moe(x, ids, scales, experts)
    residual = torch.randn(x.shape, generator=generator).bfloat16()
    if residual_kind == "cancelling":  # what is left of x is rounding and little more
        residual = (-total * (1 + 2.0**-5 * residual.double())).bfloat16()
    elif residual_kind != "normal":
        residual = residual * (0.0 if residual_kind == "none" else 1024.0)
    gamma = torch.randn(x.shape[1], generator=generator).bfloat16()
    dense_x, x_bound, dense_y, y_bound = dense_add_rms_norm(total, bound, residual, gamma, eps)
    mean = in_pairs if order == "in pairs" else lambda squares: squares.sum(dim=1)
    made_x, made_y = norm_chain(chain(x, ids, scales, experts, 1, order), residual, gamma, eps, mean)
    for made, dense, allowed in ((made_x, dense_x, x_bound), (made_y, dense_y, y_bound)):
        # Where rounding may turn a whole row around, y's bound is infinite, or 0 · ∞ where a value cannot move.
        assert bool(((made.double() - dense).abs() <= allowed.nan_to_num(nan=float("inf"))).all())


def test_the_norm_is_its_formula():
    x, ids, scales, experts = layer(3)
    total, bound = dense_moe(x, ids, scales, experts)
    generator = torch.Generator().manual_seed(1)
    residual, gamma = (torch.randn(shape, generator=generator).bfloat16() for shape in (x.shape, x.shape[1:]))
    for eps in (1e-6, 0.3):
        for ours, plain_one in zip(
            dense_add_rms_norm(total, bound, residual, gamma, eps),
            plain_norm(total, bound, residual, gamma, eps),
            strict=True,
        ):
            # float64 and the same formulas, at most 64 terms to a sum: far below 1e-10 where nothing cancels.
            assert ours.numpy() == pytest.approx(plain_one, rel=1e-10, abs=1e-14)


def test_the_norms_bound_is_close():
    """And an error of the layer below leaves it."""
    for seed in range(3):
        right = layer(seed)
        generator = torch.Generator().manual_seed(seed)
        residual, gamma = (torch.randn(n, generator=generator).bfloat16() for n in (right[0].shape, 64))
        dense = dense_add_rms_norm(*dense_moe(*right), residual, gamma, 1e-6)
        bounds, expected = dense[1::2], dense[::2]
        for error in (None, *PLANTED):
            total = chain(*(right if error is None else error(*right)), 1, "float32 matmul")
            made = norm_chain(total, residual, gamma, 1e-6, in_pairs)
            shares = [((m.double() - e).abs() / b) for m, e, b in zip(made, expected, bounds, strict=True)]
            for share in shares:
                largest = float(share.max())
                assert 0.1 < largest <= 1.0 if error is None else largest > 1.5, (error, largest)


@pytest.mark.parametrize(("num_experts", "hidden", "inner"), [(1, 1, 1), (3, 64, 16)])
def test_experts(num_experts, hidden, inner):
    experts = make_experts(num_experts, hidden, inner, seed=4)
    assert experts.up.shape == (num_experts, inner, hidden)
    assert experts.down.shape == (num_experts, hidden, inner)
    assert experts.up.dtype == experts.down.dtype == torch.bfloat16
    again, other = make_experts(num_experts, hidden, inner, seed=4), make_experts(num_experts, hidden, inner, seed=5)
    assert torch.equal(experts.up, again.up)
    assert torch.equal(experts.down, again.down)
    assert not torch.equal(experts.up, other.up)


def test_outputs_are_of_the_size_of_the_inputs():
    x, ids, _, experts = layer(0, 256, 128)
    total, _ = dense_moe(x, ids[:, :1], torch.ones(6, 1), experts)
    assert 0.4 < float(total.std() / x.double().std()) < 1.0  # relu halves the variance of what is passed on


def test_no_token_and_no_choice():
    x, _, _, experts = layer(0)
    for tokens, top_k in ((0, 3), (6, 0)):
        ids = torch.zeros((tokens, top_k), dtype=torch.int64)
        total, bound = dense_moe(x[:tokens], ids, torch.ones(tokens, top_k), experts)
        assert total.tolist() == bound.tolist() == torch.zeros(tokens, 64).tolist()
