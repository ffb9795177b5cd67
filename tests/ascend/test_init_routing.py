"""`npu_moe_init_routing` and its second version, against loops over assignments, rows and experts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenmoe.ascend.status import NpuCallError
from evenmoe.ascend.torch_npu import npu_moe_init_routing, npu_moe_init_routing_v2

F32 = np.float32
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def by_loops_first(x, row_idx, expert_idx, active_num):
    """The definition, with lists: sorted by (expert, place in the batch)."""
    tokens, top_k = expert_idx.shape
    pairs = sorted(range(tokens * top_k), key=lambda i: (int(expert_idx.flatten()[i]), i))
    places, rows = [0] * len(pairs), []
    for place, i in enumerate(pairs):
        number = int(row_idx.flatten()[i])
        places[number] = place
        if place < min(tokens, active_num) * top_k:
            rows.append(x[number % tokens].tolist())
    return rows, places, [int(expert_idx.flatten()[i]) for i in pairs]


def by_loops(x, expert_idx, given):
    """The definition of the second version, one row after the other, in float32 of NumPy."""
    (tokens, top_k), width = expert_idx.shape, x.shape[1]
    first, last = given["active_expert_range"] or (0, given["expert_num"])
    capacity = given["expert_capacity"] if given["drop_pad_mode"] else 0
    number = given["expert_num"] * capacity if capacity else tokens * top_k
    if not capacity and given["active_num"] > 0:
        number = min(number, given["active_num"])
    quantized = given["quant_mode"] != -1
    rows = [[0] * width for _ in range(number)]
    scales, places, counts = [F32(0)] * number, [-1] * (tokens * top_k), dict.fromkeys(range(first, last), 0)
    seen = 0
    for expert in range(first, last):
        for assignment, chosen in enumerate(expert_idx.flatten().tolist()):
            if chosen != expert:
                continue
            row = expert * capacity + counts[expert] if capacity else seen
            kept = not capacity or counts[expert] < capacity
            counts[expert] += 1
            seen += 1
            if not kept:
                continue
            places[row if given["row_idx_type"] else assignment] = assignment if given["row_idx_type"] else row
            if row < number:
                token = assignment // top_k
                rows[row], scales[row] = one_row(x[token], token, expert - first, given)
    shaped = np.array(rows).reshape((given["expert_num"], capacity, width) if capacity else (number, width))
    present = [[expert, count] for expert, count in counts.items() if count]
    pairs = present + [[0, 0]] * (given["expert_num"] - len(present))
    counted = [list(np.cumsum(list(counts.values()))), list(counts.values()), pairs][given["expert_tokens_num_type"]]
    counted = np.array(counted, np.int64) if given["expert_tokens_num_flag"] else np.zeros_like(counted)
    return shaped, np.array(places), counted, np.array(scales, F32), np.int8 if quantized else None


def one_row(x, token, expert, given):
    scale, offset = given["scale"], given["offset"]
    if given["quant_mode"] == -1:
        return x.tolist(), F32(0) if scale is None else F32(scale[token])
    if x.dtype == torch.int8:
        return [0] * len(x), F32(0)
    values = [F32(value) for value in x.tolist()]
    if given["quant_mode"] == 0:
        values = [F32(F32(value * F32(scale[0])) + F32(offset[0])) for value in values]
        return [max(-128, min(127, half_to_even(value))) for value in values], F32(0)
    if scale is not None:
        smooth = scale[0 if len(scale) == 1 else expert]
        values = [F32(value * F32(factor)) for value, factor in zip(values, smooth.tolist(), strict=True)]
    largest = max((abs(value) for value in values), default=F32(0))
    divisor = F32(largest / F32(127))
    return [half_to_even(F32(value / divisor)) if divisor else 0 for value in values], divisor


def half_to_even(value):
    return round(float(value))  # as Python rounds


@st.composite
def batches(draw):
    tokens, top_k, width = draw(st.integers(0, 5)), draw(st.integers(0, 4)), draw(st.integers(0, 5))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from((*DTYPES, torch.int8)))
    x = (torch.randn((tokens, width), generator=numbers) * draw(st.sampled_from((0, 1, 100)))).to(dtype)
    experts = draw(st.integers(1, 6))
    low = draw(st.integers(0, experts - 1))
    active = draw(st.sampled_from(([], [low, draw(st.integers(low + 1, experts))])))
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=numbers).int()
    return x, ids, experts, active, numbers


@given(batches(), st.data())
def test_second_version(batch, data):
    x, ids, experts, active, numbers = batch
    tokens, width, count = len(x), x.shape[1], (active[1] - active[0] if active else experts)
    pad = tokens > 0 and data.draw(st.booleans())
    mode = data.draw(st.sampled_from((-1, 0, 1)))
    if pad:
        active, count, ids = [], experts, ids.clamp(0, experts - 1)
    shapes = {-1: [None, (tokens,)], 0: [(1,)], 1: [None, (count, width), (1, width)]}[mode]
    shape = data.draw(st.sampled_from(shapes))
    given = {
        "scale": None if shape is None else torch.randn(shape, generator=numbers) * 3,
        "offset": torch.randn(1, generator=numbers) if mode == 0 else None,
        "active_num": data.draw(st.integers(-1, tokens * ids.shape[1] + 1)),
        "expert_capacity": data.draw(st.integers(1, tokens)) if pad else -1,
        "expert_num": experts,
        "drop_pad_mode": int(pad),
        "expert_tokens_num_type": 1 if pad else data.draw(st.integers(0, 2)),
        "expert_tokens_num_flag": data.draw(st.booleans()),
        "quant_mode": mode,
        "active_expert_range": active,
        "row_idx_type": 0 if pad else data.draw(st.integers(0, 1)),
    }
    rows, places, counted, scales = npu_moe_init_routing_v2(x, ids, **given)
    wanted_rows, wanted_places, wanted_counts, wanted_scales, dtype = by_loops(x, ids, given)
    assert rows.dtype == (x.dtype if dtype is None else torch.int8)
    assert (places.dtype, counted.dtype, scales.dtype) == (torch.int32, torch.int64, torch.float32)
    np.testing.assert_array_equal(rows.to(torch.float64), wanted_rows)
    np.testing.assert_array_equal(places, wanted_places)
    np.testing.assert_array_equal(counted, wanted_counts)
    np.testing.assert_array_equal(scales, wanted_scales)


@given(batches(), st.integers(0, 6), st.booleans())
def test_first_version(batch, active_num, shuffled):
    x, ids, _, _, numbers = batch
    x, (tokens, top_k) = x.to(torch.float32), ids.shape
    row_idx = torch.arange(tokens * top_k, dtype=torch.int32).view(top_k, tokens).T
    if shuffled:
        row_idx = torch.randperm(tokens * top_k, generator=numbers).int().view(tokens, top_k)
    rows, places, experts = npu_moe_init_routing(x, row_idx, ids, active_num)
    wanted_rows, wanted_places, wanted_experts = by_loops_first(x, row_idx, ids, active_num)
    assert rows.dtype == x.dtype
    assert rows.tolist() == wanted_rows
    assert rows.shape == (min(tokens, active_num) * top_k, x.shape[1])
    assert (places.tolist(), experts.tolist()) == (wanted_places, wanted_experts)
    assert places.dtype == experts.dtype == torch.int32


def test_by_hand():
    x = torch.tensor([[1.0, -2.0], [0.5, 0.25], [0.0, 0.0]])
    ids = torch.tensor([[1, 0], [1, 2], [1, 1]]).int()
    rows, places, counts, scales = npu_moe_init_routing_v2(
        x, ids, expert_num=3, expert_capacity=2, drop_pad_mode=1, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        quant_mode=1,
    )  # fmt: skip
    assert rows.tolist() == [
        [[64, -127], [0, 0]],
        [[64, -127], [127, 64]],
        [[127, 64], [0, 0]],
    ]  # 63.5 and 63.5 to even
    assert places.tolist() == [2, 0, 3, 4, -1, -1]
    assert counts.tolist() == [1, 4, 1]
    third = torch.tensor(2.0) / 127, torch.tensor(0.5) / 127
    assert scales.tolist() == [third[0], 0, third[0], third[1], third[1], 0]


X, IDS = torch.ones(2, 3), torch.zeros((2, 2), dtype=torch.int32)
PAD = {"drop_pad_mode": 1, "expert_capacity": 1}
WRONG = {
    "x of one dimension": ({"x": torch.ones(3)}, 561002, "`x` is "),
    "x of float64": ({"x": torch.ones((2, 3), dtype=torch.float64)}, 161002, "`x` is "),
    "ids of int64": ({"expert_idx": IDS.long()}, 161002, "`expert_idx` is "),
    "more tokens": ({"x": torch.ones(3, 3)}, 561002, "`expert_idx` is of 2 tokens: it must have the 3 tokens of `x`; "),
    "a list": ({"x": [[1.0]]}, 161002, "`x` is a list: it must be a torch.Tensor; use torch.tensor."),
    "no experts": ({"expert_num": -1}, 561002, "`expert_num` is -1: it must be at least 1; pass the number of all "),
    "an end": (
        {"active_expert_range": [1]},
        561002,
        "`active_expert_range` is [1]: it must have two numbers or none; ",
    ),
    "a range": (
        {"active_expert_range": [2, 9]},
        561002,
        "`active_expert_range` is [2, 9]: it must be 0 <= first < las",
    ),
    "pairs": ({"expert_num": 6000, "expert_tokens_num_type": 2}, 561002, "`active_expert_range` is [0, 6000]: it must"),
    "a kind": (
        {"expert_tokens_num_type": 3},
        561002,
        "`expert_tokens_num_type` is 3: it must be 0, 1 or 2; use one of",
    ),
    "a mode": ({"quant_mode": 2}, 561002, "`quant_mode` is 2: it must be -1, 0 or 1; use one of them."),
    "an index": ({"row_idx_type": 2}, 561002, "`row_idx_type` is 2: it must be 0 or 1; use one of them."),
    "padding": ({"drop_pad_mode": 2}, 561002, "`drop_pad_mode` is 2: it must be 0 or 1; use one of them."),
    "active": ({"active_num": -2}, 561002, "`active_num` is -2: it must be at least -1; pass -1 for all rows."),
    "no scale": ({"quant_mode": 0}, 161001, "`scale` is None: it must be given with quant_mode 0; pass float32 of "),
    "scale": (
        {"scale": torch.ones(3)},
        561002,
        "`scale` is of shape (3,): it must have the shape (2,) with quant_mode",
    ),
    "scales": (
        {"scale": torch.ones(3), "quant_mode": 1},
        561002,
        "`scale` is of shape (3,): it must have the shape (4, 3) or (1, 3) with quant_mode 1; pass it in this shape.",
    ),
    "offset": (
        {"offset": torch.ones(1)},
        561002,
        "`offset` is given: it must be None with quant_mode -1; leave it out",
    ),
    "x_dtype": ({"x_dtype": 1}, 561002, "`x_dtype` is 1: it must be None on Atlas A3; leave it out."),
    "capacity": (
        {**PAD, "expert_capacity": 3},
        561002,
        "`expert_capacity` is 3: it must be 1 to 2, the number of toke",
    ),
    "pad index": ({**PAD, "row_idx_type": 1}, 561002, "`row_idx_type` is 1: it must be 0 with drop_pad_mode 1; leave "),
    "pad range": (
        {**PAD, "active_expert_range": [0, 3]},
        561002,
        "`active_expert_range` is [0, 3]: it must be [0, 4] w",
    ),
    "pad sums": (
        {**PAD, "expert_tokens_num_flag": True},
        561002,
        "`expert_tokens_num_type` is 0: it must be 1 with dr",
    ),
    "pad ids": (
        {**PAD, "expert_idx": IDS + 4},
        561002,
        "`expert_idx` is [4]: it must hold experts 0 to 3 with drop_pad_mode 1; pass the number of all experts as "
        "expert_num.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_of_the_second_version(case):
    changed, status, said = WRONG[case]
    given = {"x": X, "expert_idx": IDS, "expert_num": 4} | changed
    with pytest.raises(NpuCallError) as caught:
        npu_moe_init_routing_v2(given.pop("x"), given.pop("expert_idx"), **given)
    assert str(caught.value).startswith(said)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("row_idx", "active_num", "said"),
    [
        (IDS[:1], 2, "`row_idx` is of shape (1, 2): it must have the shape of `expert_idx`, (2, 2); number every"),
        (
            IDS + 4,
            2,
            "`row_idx` is [4]: it must hold numbers 0 to 3; pass torch.arange(N * K).view(K, N).T, as npu_moe_",
        ),
        (IDS - 1, 2, "`row_idx` is [-1]: it must hold numbers 0 to 3; "),
        (IDS, -1, "`active_num` is -1: it must be at least 0; pass the number of tokens for all."),
        (IDS, 1.5, "`active_num` is 1.5: it must be an integer; pass an int."),
        (IDS.long(), 2, "`row_idx` is "),
    ],
)
def test_errors_of_the_first_version(row_idx, active_num, said):
    with pytest.raises(NpuCallError) as caught:
        npu_moe_init_routing(X, row_idx, IDS, active_num)
    assert str(caught.value).startswith(said)


def test_rounding_is_half_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, 300.0, -300.0]])
    one, none = torch.ones(1), torch.zeros(1)
    rows = npu_moe_init_routing_v2(x, IDS[:1, :1], expert_num=1, scale=one, offset=none, quant_mode=0)[0]
    assert rows.tolist() == [[0, 2, 2, 0, 127, -128]]
    assert math.isclose(half_to_even(2.5), 2)
