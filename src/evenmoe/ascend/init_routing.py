"""`npu_moe_init_routing` and its second version: the rows of a batch sorted by expert, on one rank.

Specification §17. Shapes: N tokens, H hidden, K experts per token, E experts, C capacity of each, R rows that come out.
What the chip leaves unwritten is zero, or −1 in `expanded_row_idx`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TypeVar

import torch

from evenmoe.ascend.status import NpuCallError
from evenmoe.contract.tensor_spec import check_dims, check_dtype
from evenmoe.errors import ConstraintError, EvenmoeError, MissingArgumentError, as_integer, require
from evenmoe.ops.operator import check_devices, check_tensors, spec_of

Tensor = torch.Tensor
_Result = TypeVar("_Result")
_FLOATS = ("float16", "bfloat16", "float32")
_UNQUANTIZED, _STATIC, _DYNAMIC = -1, 0, 1
_CUMULATIVE, _COUNTS, _PAIRS = 0, 1, 2
_MOST_EXPERTS, _MOST_EXPERTS_IN_PAIRS = 10240, 5120  # of the tiling


def _raising_as_the_chip(function: Callable[..., _Result]) -> Callable[..., _Result]:
    @wraps(function)
    def call(*args: object, **kwargs: object) -> _Result:
        try:
            return function(*args, **kwargs)
        except NpuCallError:
            raise
        except EvenmoeError as error:
            raise NpuCallError.of(error) from error

    return call


@_raising_as_the_chip
def npu_moe_init_routing(x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int) -> tuple[Tensor, ...]:
    """Sort token–expert assignments by expert, and gather the tokens' rows in that order.

    Args:
        x: float16, bfloat16 or float32 (N, H).
        row_idx: int32 (N, K), numbers 0…N·K−1 by which the assignments are called; number i belongs to token i % N.
        expert_idx: int32 (N, K).
        active_num: the rows of at most so many times K assignments are gathered, 0 or more.

    Returns:
        expanded_x: (min(N, active_num)·K, H), dtype of x.
        expanded_row_idx: int32 (N·K,), the place of each number in the order.
        expanded_expert_idx: int32 (N·K,), the experts, ascending.

    Raises:
        NpuCallError: what the chip does not take, and numbers out of range.

    >>> x = torch.tensor([[1.0], [2.0]])
    >>> row_idx, expert_idx = torch.tensor([[0, 2], [1, 3]]).int(), torch.tensor([[5, 1], [1, 4]]).int()
    >>> rows, places, experts = npu_moe_init_routing(x, row_idx, expert_idx, active_num=2)
    >>> rows.flatten().tolist(), places.tolist(), experts.tolist()
    ([1.0, 2.0, 2.0, 1.0], [3, 1, 0, 2], [1, 1, 4, 5])
    """
    _check_inputs(x, expert_idx, _FLOATS, row_idx=row_idx)
    require(
        row_idx.shape == expert_idx.shape,
        "row_idx",
        f"of shape {tuple(row_idx.shape)}",
        f"must have the shape of `expert_idx`, {tuple(expert_idx.shape)}",
        "number every assignment",
    )
    active_num = as_integer("active_num", active_num)
    require(active_num >= 0, "active_num", active_num, "must be at least 0", "pass the number of tokens for all")
    (tokens, top_k), numbers = expert_idx.shape, row_idx.flatten().long()
    require(
        not len(numbers) or bool((numbers >= 0).all() and (numbers < len(numbers)).all()),
        "row_idx",
        numbers[(numbers < 0) | (numbers >= len(numbers))][:1].tolist(),
        f"must hold numbers 0 to {len(numbers) - 1}",
        "pass torch.arange(N * K).view(K, N).T, as npu_moe_gating_top_k_softmax returns it",
    )
    experts, order = expert_idx.flatten().sort(stable=True)
    ordered = numbers[order]
    places = torch.zeros_like(expert_idx).flatten()
    places[ordered] = torch.arange(len(ordered), dtype=torch.int32, device=places.device)
    rows = ordered[: min(tokens, active_num) * top_k] % max(tokens, 1)
    return x[rows], places, experts


@_raising_as_the_chip
def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort token–expert assignments by expert, gather the rows of those in a range, and quantize them.

    Args:
        x: float16, bfloat16, float32 or int8 (N, H).
        expert_idx: int32 (N, K); what is not in the range is left out, and with drop_pad_mode 1 an error.
        scale: float32; (N,) gathered beside the rows without quantization, (1,) with quant_mode 0, (last − first, H) or
            (1, H) with quant_mode 1, where it may be left out.
        offset: float32 (1,), only with quant_mode 0.
        active_num: most rows, −1 or 0 for all; without effect with drop_pad_mode 1.
        expert_capacity: C, 1…N, with drop_pad_mode 1.
        expert_num: E, 1…10240.
        drop_pad_mode: 0 for rows one after the other; 1 for C rows of each expert, of which the first assignments are
            kept and the others dropped.
        expert_tokens_num_type: 0 for prefix sums, 1 for counts, 2 for pairs (expert, count) of experts with tokens.
        expert_tokens_num_flag: whether they are counted.
        quant_mode: −1 for none, 0 for x·scale + offset, 1 for int8 by the largest value of each row.
        active_expert_range: [first, last), [] for all experts.
        row_idx_type: 0 for the row of each assignment, 1 for the assignment of each row.
        x_dtype: only None on this chip.

    Returns:
        expanded_x: (R, H), or (E, C, H) with drop_pad_mode 1; dtype of x, or int8. R is N·K or active_num, if less.
        expanded_row_idx: int32 (N·K,), −1 where there is none.
        expert_token_cumsum_or_count: int64 (last − first,), or (E, 2) for pairs.
        expanded_scale: float32 (R,) or (E·C,), the rows' scales.

    Raises:
        NpuCallError: what the chip does not take, and experts out of range.

    >>> x, experts = torch.tensor([[1.0], [2.0]]), torch.tensor([[2, 0], [0, 1]]).int()
    >>> rows, places, counts, _ = npu_moe_init_routing_v2(
    ...     x, experts, expert_num=3, expert_tokens_num_type=1, expert_tokens_num_flag=True)
    >>> rows.flatten().tolist(), places.tolist(), counts.tolist()
    ([1.0, 2.0, 2.0, 1.0], [3, 0, 1, 2], [2, 1, 1])
    """
    if x_dtype is not None:
        raise ConstraintError("x_dtype", x_dtype, "must be None on Atlas A3", "leave it out")
    _check_inputs(x, expert_idx, (*_FLOATS, "int8"), scale=scale, offset=offset)
    (tokens, top_k), width = expert_idx.shape, x.shape[1]
    first, last = _check_experts(expert_num, active_expert_range, expert_tokens_num_type)
    _one_of("drop_pad_mode", drop_pad_mode, (0, 1))
    _one_of("row_idx_type", row_idx_type, (0, 1))
    _one_of("quant_mode", quant_mode, (_UNQUANTIZED, _STATIC, _DYNAMIC))
    _check_scales(quant_mode, scale, offset, tokens, last - first, width)
    capacity = 0
    if drop_pad_mode:
        capacity = as_integer("expert_capacity", expert_capacity)
        _check_capacity(capacity, tokens, (first, last), expert_num, row_idx_type)
        if expert_tokens_num_flag and expert_tokens_num_type != _COUNTS:
            value, rule = expert_tokens_num_type, "must be 1 with drop_pad_mode 1"
            raise ConstraintError("expert_tokens_num_type", value, rule, "count tokens, or set drop_pad_mode to 0")
    else:
        active_num = as_integer("active_num", active_num)
        require(active_num >= -1, "active_num", active_num, "must be at least -1", "pass -1 for all rows")
    ids = expert_idx.flatten().long()
    active = (ids >= first) & (ids < last)
    if capacity and not active.all():
        value, rule = ids[~active][:1].tolist(), f"must hold experts 0 to {expert_num - 1} with drop_pad_mode 1"
        raise ConstraintError("expert_idx", value, rule, "pass the number of all experts as expert_num")
    order = torch.where(active, ids, expert_num).sort(stable=True).indices[: int(active.sum())]
    counts = torch.bincount(ids[order] - first, minlength=last - first)
    if capacity:
        number = len(counts) * capacity
        starts = (counts.cumsum(0) - counts)[ids[order]]
        rank = torch.arange(len(order), device=ids.device) - starts
        order, place = order[rank < capacity], (ids[order] * capacity + rank)[rank < capacity]
    else:
        number = min(active_num, len(ids)) if active_num > 0 else len(ids)
        place = torch.arange(len(order), device=ids.device)
    places = torch.full((len(ids),), -1, dtype=torch.int32, device=ids.device)
    if row_idx_type:
        places[: len(order)] = order.int()
    else:
        places[order] = place.int()
    order, place = order[place < number], place[place < number]
    rows, scales = _gathered(x, order // max(top_k, 1), ids[order] - first, quant_mode, scale, offset)
    expanded = rows.new_zeros((number, width)).index_copy_(0, place, rows)
    expanded_scale = scales.new_zeros(number).index_copy_(0, place, scales)
    shaped = expanded.view(expert_num, capacity, width) if capacity else expanded
    return (
        shaped,
        places,
        _counted(counts, expert_num, first, expert_tokens_num_type, expert_tokens_num_flag),
        (expanded_scale),
    )


def _gathered(
    x: Tensor, tokens: Tensor, experts: Tensor, quant_mode: int, scale: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rows (R, H) and scales (R,) of these tokens for these experts of the range."""
    rows, nothing = x[tokens], torch.zeros(len(tokens), device=x.device)
    if quant_mode == _UNQUANTIZED:
        return rows, nothing if scale is None else scale[tokens]
    if x.dtype == torch.int8:  # for which the chip quantizes nothing
        return torch.zeros_like(rows), nothing
    rows = rows.float()
    if quant_mode == _STATIC:
        assert scale is not None
        assert offset is not None
        return (rows * scale + offset).round().clamp(-128, 127).to(torch.int8), nothing
    if scale is not None:
        rows = rows * (scale if len(scale) == 1 else scale[experts])
    scales = rows.abs().amax(dim=1) / 127 if rows.shape[1] else nothing
    # A row of zeros gives 0/0, which becomes the integer 0.
    return (rows / scales[:, None]).nan_to_num(0.0).round().to(torch.int8), scales


def _counted(counts: Tensor, num_experts: int, first: int, kind: int, wanted: bool) -> Tensor:
    if kind == _PAIRS:
        pairs = counts.new_zeros((num_experts, 2))
        if wanted:
            present = counts.nonzero().flatten()
            pairs[: len(present)] = torch.stack([present + first, counts[present]], dim=1)
        return pairs
    if not wanted:
        return torch.zeros_like(counts)
    return counts.cumsum(0) if kind == _CUMULATIVE else counts


def _check_inputs(x: Tensor, expert_idx: Tensor, dtypes: tuple[str, ...], **others: Tensor | None) -> None:
    given = {"x": x, "expert_idx": expert_idx} | {name: other for name, other in others.items() if other is not None}
    check_tensors(**given)
    check_devices(given)
    for name, tensor in given.items():
        taken = dtypes if name == "x" else ("int32",) if name in ("expert_idx", "row_idx") else ("float32",)
        check_dtype(name, spec_of(tensor), taken)
    check_dims("x", spec_of(x), (2,), "(tokens, hidden)")
    check_dims("expert_idx", spec_of(expert_idx), (2,), "(tokens, top_k)")
    if len(x) != len(expert_idx):
        value, rule = f"of {len(expert_idx)} tokens", f"must have the {len(x)} tokens of `x`"
        raise ConstraintError("expert_idx", value, rule, "pass one row for each token")


def _check_experts(expert_num: int, active_range: Sequence[int], kind: int) -> tuple[int, int]:
    expert_num = as_integer("expert_num", expert_num)
    require(expert_num > 0, "expert_num", expert_num, "must be at least 1", "pass the number of all experts")
    _one_of("expert_tokens_num_type", kind, (_CUMULATIVE, _COUNTS, _PAIRS))
    if len(active_range) not in (0, 2):
        value, rule = list(active_range), "must have two numbers or none"
        raise ConstraintError("active_expert_range", value, rule, "pass [first, last], last not included")
    first, last = (as_integer("active_expert_range", end) for end in active_range or (0, expert_num))
    most = _MOST_EXPERTS_IN_PAIRS if kind == _PAIRS else _MOST_EXPERTS
    if not 0 <= first < last <= min(expert_num, most):
        rule = f"must be 0 <= first < last <= {min(expert_num, most)}"
        raise ConstraintError("active_expert_range", [first, last], rule, "pass [first, last], last not included")
    return first, last


def _check_capacity(
    capacity: int, tokens: int, active_range: tuple[int, int], expert_num: int, row_idx_type: int
) -> None:
    fix = "pass at most the number of tokens"
    require(0 < capacity <= tokens, "expert_capacity", capacity, f"must be 1 to {tokens}, the number of tokens", fix)
    rule, fix = "must be 0 with drop_pad_mode 1", "leave it out"
    require(row_idx_type == 0, "row_idx_type", row_idx_type, rule, fix)
    rule = f"must be [0, {expert_num}] with drop_pad_mode 1"
    require(active_range == (0, expert_num), "active_expert_range", list(active_range), rule, fix)


def _check_scales(
    quant_mode: int, scale: Tensor | None, offset: Tensor | None, tokens: int, experts: int, width: int
) -> None:
    if quant_mode == _STATIC:
        for name, tensor in (("scale", scale), ("offset", offset)):
            if tensor is None:
                raise MissingArgumentError(name, None, "must be given with quant_mode 0", "pass float32 of shape (1,)")
            _check_shape(name, tensor, ((1,),), quant_mode)
    elif scale is not None:
        shapes = ((tokens,),) if quant_mode == _UNQUANTIZED else ((experts, width), (1, width))
        _check_shape("scale", scale, shapes, quant_mode)
    if quant_mode != _STATIC and offset is not None:
        raise ConstraintError("offset", "given", f"must be None with quant_mode {quant_mode}", "leave it out")


def _check_shape(name: str, tensor: Tensor, shapes: tuple[tuple[int, ...], ...], quant_mode: int) -> None:
    if tuple(tensor.shape) not in shapes:
        rule = f"must have the shape {' or '.join(map(str, shapes))} with quant_mode {quant_mode}"
        raise ConstraintError(name, f"of shape {tuple(tensor.shape)}", rule, "pass it in this shape")


def _one_of(name: str, value: int, values: tuple[int, ...]) -> None:
    if as_integer(name, value) not in values:
        listed = ", ".join(map(str, values[:-1])) + f" or {values[-1]}"
        raise ConstraintError(name, value, f"must be {listed}", "use one of them")
