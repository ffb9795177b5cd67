"""The fixed numeric definitions against exact rational arithmetic and hand-computed rows."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.reference.numerics import (
    quantize_token,
    reciprocal_sqrt,
    softmax_of_two,
    through_int8_transport,
    tp_sum,
    tree_sum,
)

U32 = Fraction(1, 2**24)  # unit roundoff of fp32

fp32 = st.floats(-(2.0**60), 2.0**60, width=32)


def round_to_fp32(value: Fraction) -> Fraction:
    """Round to nearest even in fp32, normal range, by definition: no floating point at all."""
    if value == 0:
        return value
    exponent = 0
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return round(value / unit) * unit  # Fraction rounds halves to even


def test_tree_sum_adds_the_upper_half_to_the_lower():
    a, b, c, d, e = (float(np.float32(v)) for v in (1e8, 3.3, -1e8, 7.7, 0.1))
    padded = [a, b, c, d, e, 0.0, 0.0, 0.0]

    def add(x: float, y: float) -> float:
        return float(round_to_fp32(Fraction(x) + Fraction(y)))

    four = [add(padded[i], padded[i + 4]) for i in range(4)]
    two = [add(four[0], four[2]), add(four[1], four[3])]
    assert float(tree_sum(torch.tensor(padded[:5]))) == add(*two)
    assert add(*two) != float(np.float32(a + b + c + d + e))  # the order shows in this example


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 9, 1000, 7168])
def test_tree_sum_of_integers_is_exact(n):
    assert float(tree_sum(torch.arange(n, dtype=torch.float32) % 100)) == sum(i % 100 for i in range(n))


@settings(deadline=None)  # a shared machine may stall any single example
@given(st.lists(fp32, max_size=40))
def test_tree_sum_stays_within_its_bound(values):
    """Every value passes through ⌈log2 n⌉ additions at most: |error| ≤ ((1+u)^depth − 1)·Σ|values| (Higham, 4.2)."""
    total = Fraction(float(tree_sum(torch.tensor(values, dtype=torch.float32))))
    depth = math.ceil(math.log2(len(values))) if values else 0
    bound = ((1 + U32) ** depth - 1) * sum(abs(Fraction(v)) for v in values)
    assert abs(total - sum(Fraction(v) for v in values)) <= bound


@settings(deadline=None)
@given(st.floats(-40, 40, width=32), st.floats(-40, 40, width=32))
def test_softmax_of_two(logit_1, logit_2):
    """p = e/(e1+e2). The fp32 difference δ, off by u·|δ| ≤ 80u, makes e off by 80u relative, its rounding by u more;
    the sum carries as much plus one u, the quotient one u: below 2·81u + 2u < 170u (exp(−80) is no subnormal)."""
    p1, p2 = (float(p) for p in softmax_of_two(torch.tensor(logit_1), torch.tensor(logit_2)))
    exact = 1.0 / (1.0 + math.exp(logit_2 - logit_1))
    assert p1 == pytest.approx(exact, abs=0.0, rel=170 * 2.0**-24)
    assert p1 + p2 == pytest.approx(1.0, abs=3 * 2.0**-24)
    assert (p1, p2) == tuple(float(p) for p in softmax_of_two(torch.tensor(logit_2), torch.tensor(logit_1)))[::-1]


def test_softmax_of_two_does_not_overflow():
    p1, p2 = softmax_of_two(torch.tensor(3.0e38), torch.tensor(-3.0e38))
    assert (float(p1), float(p2)) == (1.0, 0.0)


@settings(deadline=None)
@given(st.floats(2.0**-60, 2.0**60, width=32))
def test_reciprocal_sqrt_rounds_twice_and_correctly(value):
    """r = fp32(√v) iff (r − half a unit)² < v < (r + half a unit)², in exact arithmetic; then one rounded division."""
    exact = Fraction(value)
    root = Fraction(math.sqrt(value))
    unit = Fraction(2) ** (math.frexp(float(root))[1] - 24)
    root = round(root / unit) * unit
    assert (root - unit / 2) ** 2 < exact < (root + unit / 2) ** 2
    assert Fraction(float(reciprocal_sqrt(torch.tensor(value)))) == round_to_fp32(1 / root)


# --- quant_mode 2 (§2.8) ---


def test_quantize_by_hand():
    """max = 254, d = 1/2, every tie to the even neighbour; the scale is 1/d = 2."""
    q, scale = quantize_token(torch.tensor([254.0, -254.0, 1.0, 3.0, -3.0, 5.0, 0.0]), None)
    assert q.tolist() == [127, -127, 0, 2, -2, 2, 0]
    assert q.dtype == torch.int8
    assert float(scale) == 2.0


def test_quantize_multiplies_by_the_smoothing_factors_first():
    """v = (4, −127, 1): d = 1, so q = v."""
    q, scale = quantize_token(torch.tensor([8.0, -127.0, 0.25]).bfloat16(), torch.tensor([0.5, 1.0, 4.0]))
    assert (q.tolist(), float(scale)) == ([4, -127, 1], 1.0)


def test_the_scale_is_a_reciprocal_of_a_quotient():
    """For max = 11 the two roundings of 1/(127/11) show: 11/127 rounded once is another number."""
    _, scale = quantize_token(torch.tensor([11.0]), None)
    d = round_to_fp32(Fraction(127, 11))
    assert Fraction(float(scale)) == round_to_fp32(1 / d)
    assert Fraction(float(scale)) != round_to_fp32(Fraction(11, 127))


@pytest.mark.parametrize(("largest", "value", "level"), [(144, 72, 64), (152, 76, 63)])
def test_a_value_is_multiplied_by_the_rounded_factor(largest, value, level):
    """Half of the maximum is 63.5 in exact arithmetic. fp32(127/144)·72 is that tie, → 64, where 72/scale falls just
    below it; fp32(127/152)·76 falls just below, → 63, where 76·127/152 is the tie."""
    product = round_to_fp32(round_to_fp32(Fraction(127, largest)) * value)
    assert (product == Fraction(127, 2)) == (level == 64)
    q, _ = quantize_token(torch.tensor([largest, value]).bfloat16(), None)
    assert q.tolist() == [127, level]


@pytest.mark.parametrize("row", [[0.0, 0.0], [-0.0, 0.0], [1e-38, -1e-40]])
def test_a_row_without_a_finite_factor_is_zeros_with_scale_zero(row):
    """All zero: d = inf, 0·inf = NaN. max < 127/3.4e38: d = inf too, v·d = inf."""
    q, scale = quantize_token(torch.tensor(row), None)
    assert (q.tolist(), float(scale)) == ([0, 0], 0.0)


@settings(deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=20))
def test_quantize_stays_within_half_a_step(values):
    """|q·scale − v| ≤ scale·(1/2 + 127·4u): half a step for rint, and the roundings of d, v·d, 1/d and the product."""
    row = torch.tensor(values, dtype=torch.float16)
    q, scale = quantize_token(row, None)
    assert int(q.abs().max()) in (0, 127)
    step = float(scale)
    error = (q.double() * step - row.double()).abs().max()
    assert float(error) <= step * (0.5 + 127 * 4 * 2.0**-24)


# --- comm_quant_mode 2 (§3.5) ---


def test_transport_by_hand():
    """Blocks of 8: max 127 → scale 1 (ties to even); zeros; and a last block of 3 with max 254 → scale 2."""
    row = [127.0, 63.5, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5] + [0.0] * 8 + [254.0, -3.0, 5.0]
    received = [127.0, 64.0, 0.0, 2.0, 2.0, 0.0, -2.0, -126.0] + [0.0] * 8 + [254.0, -4.0, 4.0]
    assert through_int8_transport(torch.tensor(row, dtype=torch.float16)).tolist() == received


def test_the_sender_divides_by_the_unrounded_scale_and_the_receiver_multiplies_by_the_rounded_one():
    """bf16, max 3: s = 3/127 = 0.0236220…, sent as 97·2⁻¹² = 0.0236816…; 1/s = 42.33 → 42; 42·97·2⁻¹² = 0.99463 →
    bf16 255/256. Multiplied by the unrounded scale it would be 254/256. 3 itself: 127·97·2⁻¹² = 3.00757 → 3."""
    received = through_int8_transport(torch.tensor([3.0, 1.0], dtype=torch.bfloat16))
    assert received.tolist() == [3.0, 255 / 256]


def test_the_quotient_is_rounded_to_fp16_before_it_is_rounded_to_an_integer():
    """fp16, max 1: x = 504/1024 gives x/s = 62.5078; fp16 (spacing 1/32 there) makes it 62.5, hence 62, not 63.
    s is sent as 129·2⁻¹⁴; 62·129·2⁻¹⁴ = 1999.5·2⁻¹² → 2000·2⁻¹² (63 would give 2032·2⁻¹²)."""
    received = through_int8_transport(torch.tensor([1.0, 504 / 1024], dtype=torch.float16))
    assert received.tolist() == [1.0, 2000 / 4096]


def test_an_all_zero_row_arrives_as_zeros():
    assert through_int8_transport(torch.zeros(9, dtype=torch.bfloat16)).tolist() == [0.0] * 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_least_subnormals_stay_within_int8(dtype):
    least = torch.tensor([1, 3, -2], dtype=torch.int16).view(dtype)[:2]
    received = through_int8_transport(least)
    assert torch.isfinite(received).all()


@settings(deadline=None)
@given(st.lists(st.floats(-6e4, 6e4, width=16), min_size=1, max_size=20))
def test_transport_stays_within_a_step(values):
    """Per block, with s = max/127: rint ≤ s/2; the fp16 quotient ≤ 127·2⁻¹¹·s < s/16; the scale rounded to fp16 is
    off by 2⁻¹¹ relative (2⁻²⁵ absolute when subnormal) times |q| ≤ 127, < s/16 (127·2⁻²⁵); the result's own rounding
    2⁻¹¹·max < s/16 (or 2⁻²⁵). Together below 0.7·s + 128·2⁻²⁵."""
    row = torch.tensor(values, dtype=torch.float16)
    received = through_int8_transport(row)
    for start in range(0, len(values), 8):
        block = row[start : start + 8].double()
        error = (received[start : start + 8].double() - block).abs().max()
        assert float(error) <= 0.7 * float(block.abs().max()) / 127 + 128 * 2.0**-25


# --- TP sum (§3.3) ---


def test_tp_sum_in_bf16_rounds_to_even():
    own, peer = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16), torch.tensor([2**-8] * 2, dtype=torch.bfloat16)
    assert tp_sum(own, peer).tolist() == [1.0, 1.015625]


@settings(deadline=None)
@given(st.floats(width=16, allow_nan=False, allow_infinity=False), st.floats(width=16, allow_nan=False))
def test_tp_sum_in_fp16_is_the_exact_sum_rounded_once(own, peer):
    """fp64 holds the sum of two fp16 exactly (40 bits ≤ 53), so numpy rounds it to fp16 once."""
    with np.errstate(over="ignore"):
        once = np.float16(np.float64(own) + np.float64(peer))
    twice = tp_sum(torch.tensor([own], dtype=torch.float16), torch.tensor([peer], dtype=torch.float16))
    assert float(twice[0]) == float(once)
