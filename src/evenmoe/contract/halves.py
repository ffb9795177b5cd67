"""What setup and teardown of dispatch and of combine check alike (specification §14.2), one function for each rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from evenmoe.contract.calls import with_integers
from evenmoe.contract.half_calls import HalfCall
from evenmoe.contract.layout import Layout, make_layout
from evenmoe.contract.tensor_spec import Spec, TensorSpec, check_given, check_shape, join_or
from evenmoe.errors import EvenmoeError, MissingArgumentError, UnsupportedTypeError, require

_GROUP_NAME_ENDS = 128
_REMOTE_MEMORY_ACCESS = 2
_MOST_TOKENS, _MOST_TOP_K = 512, 16
_INTEGERS = (
    "ep_world_size",
    "ep_rank_id",
    "moe_expert_num",
    "expert_shard_type",
    "shared_expert_num",
    "shared_expert_rank_num",
    "global_bs",
    "comm_type",
)
#: Of a message on the way, in the order of the formulas: columns that a row is rounded up to.
_BLOCK = 512


class HalfSizes(NamedTuple):
    """Bs, H and K of a call."""

    tokens: int
    hidden: int
    top_k: int


def check_outputs_given(outputs: dict[str, Spec]) -> None:
    for name, spec in outputs.items():
        check_given(name, spec, "pass a tensor for this output")


def check_group(call: HalfCall[TensorSpec], too_long: type[EvenmoeError] = UnsupportedTypeError) -> None:
    name = call.group_ep
    if not isinstance(name, str) or not name:
        raise MissingArgumentError("group_ep", repr(name), "must be a name", "pass the name of the EP group")
    if len(name) >= _GROUP_NAME_ENDS:
        value, rule = f"{len(name)} characters long", "must have at most 127 characters"
        raise too_long("group_ep", value, rule, "use a shorter group name")


def whole_numbers(call: HalfCall[TensorSpec], *more: str) -> HalfCall[TensorSpec]:
    """The same call, NumPy's whole numbers as Python's."""
    return with_integers(call, (*_INTEGERS, *more))  # pyright: ignore[reportArgumentType]


def check_ranks(call: HalfCall[TensorSpec], ranks: tuple[int, ...] = (), experts: tuple[int, ...] = ()) -> None:
    """The group's size, this rank in it, and the physical experts; exactly these numbers where they are given."""
    ep, rank, number = call.ep_world_size, call.ep_rank_id, call.moe_expert_num
    low, high, most = (2, 384, 512) if call.of_the_chip else (1, None, None)
    if call.of_the_chip and ranks:
        require(ep in ranks, "ep_world_size", ep, f"must be {join_or(ranks)}", "use a group of so many ranks")
    fits = ep >= low and (high is None or ep <= high)
    rule = f"must be {low} to {high}" if high else f"must be at least {low}"
    require(fits, "ep_world_size", ep, rule, "use another group")
    fix = "use the rank within the EP group, counted from 0"
    require(0 <= rank < ep, "ep_rank_id", rank, f"must be 0 to {ep - 1}", fix)
    if call.of_the_chip and experts:
        require(number in experts, "moe_expert_num", number, f"must be {join_or(experts)}", "use so many experts")
    fits = number >= 1 and (most is None or number <= most)
    rule = f"must be 1 to {most}" if most else "must be at least 1"
    require(fits, "moe_expert_num", number, rule, "use another number of experts")


def check_attributes(call: HalfCall[TensorSpec]) -> None:
    """What stands for itself: shard type, shared experts, tokens of all ranks, and how rows travel."""
    shard, given, ep = call.expert_shard_type, call.global_bs, call.ep_world_size
    shared, ranks = call.shared_expert_num, call.shared_expert_rank_num
    require(shard == 0, "expert_shard_type", shard, "must be 0, shared experts on the first ranks", "use 0")
    require(0 <= shared <= 4, "shared_expert_num", shared, "must be 0 to 4", "use fewer shared experts")
    rule = f"must be 0 to {ep // 2}, half of the ranks"
    require(0 <= ranks <= ep // 2, "shared_expert_rank_num", ranks, rule, "use fewer ranks for shared experts")
    require(given >= 0, "global_bs", given, "must be 0 or more", "pass 0 where all ranks have as many tokens")
    kind, rule = call.comm_type, "must be 2, remote memory access, which alone is published"
    require(kind == _REMOTE_MEMORY_ACCESS, "comm_type", kind, rule, "pass comm_type=2")
    require(call.comm_alg in (None, ""), "comm_alg", repr(call.comm_alg), "must be empty, it is reserved", 'pass ""')
    value = f"{ranks} with shared_expert_num {shared}"
    rule = "must be 0, or a positive multiple of shared_expert_num"
    require(ranks == 0 or (shared > 0 and ranks % shared == 0), "shared_expert_rank_num", value, rule, "use 0")
    moe_ranks, experts = ep - ranks, call.moe_expert_num
    rule = f"must divide evenly by the {moe_ranks} ranks that hold MoE experts"
    require(experts % moe_ranks == 0, "moe_expert_num", experts, rule, f"use a multiple of {moe_ranks}")


def check_sizes(call: HalfCall[TensorSpec], sizes: HalfSizes, argument: str) -> None:
    """H, Bs, K and the tokens of all ranks; `argument` is the tensor that has H columns."""
    tokens, hidden, top_k = sizes
    if call.of_the_chip:
        value, rule = f"of width {hidden}", "must have 1024 to 8192 columns"
        require(1024 <= hidden <= 8192, argument, value, rule, "use another hidden size")
        value, rule = f"of {tokens} tokens", f"must have 1 to {_MOST_TOKENS} tokens"
        require(1 <= tokens <= _MOST_TOKENS, "expert_ids", value, rule, "divide the batch")
    most = min(_MOST_TOP_K, call.moe_expert_num)
    value, rule = f"of {top_k} columns", f"must have 1 to {most} columns"
    require(1 <= top_k <= most, "expert_ids", value, rule, "use another number of experts per token")
    given, ep = call.global_bs, call.ep_world_size
    rule = f"must be 0, or a multiple of ep_world_size {ep} that is {tokens * ep} to {_MOST_TOKENS * ep}"
    fits = given == 0 or (tokens * ep <= given <= _MOST_TOKENS * ep and given % ep == 0)
    require(fits, "global_bs", given, rule, "pass ep_world_size times the tokens of the fullest rank")


def layout_of(call: HalfCall[TensorSpec], sizes: HalfSizes) -> Layout:
    """The layout of a call whose attributes and sizes have been checked.

    Raises:
        ConstraintError: so few tokens that the counts of the ranks' experts do not fit into their 128 numbers a row.
    """
    layout = make_layout(
        ep=call.ep_world_size,
        rank=call.ep_rank_id,
        num_experts=call.moe_expert_num,
        num_tokens=sizes.tokens,
        hidden=sizes.hidden,
        top_k=sizes.top_k,
        shared_experts=call.shared_expert_num if call.shared_expert_rank_num else 0,
        shared_ranks=call.shared_expert_rank_num,
        global_bs=call.global_bs,
    )
    counts, room = layout.ep * layout.local_experts, 128 * layout.capacity
    value = f"of {sizes.tokens} tokens and {sizes.top_k} columns"
    rule = f"must make room for {counts} counts in {room} numbers of assist_info_for_combine"
    require(counts <= room, "expert_ids", value, rule, "use more tokens or fewer experts per rank")
    return layout


def check_mask(call: HalfCall[TensorSpec], mask: Spec, tokens: int) -> None:
    check_shape("x_active_mask", mask, (tokens,), "one entry per token")


# How large the tensors between the halves are ----------------------------------------------------------------------


def message_columns(hidden: int, quant_mode: int) -> int:
    """Columns of `y`: a token, and behind it the scale of a quantized one.

    >>> message_columns(7168, 0), message_columns(7168, 2)
    (7168, 7680)
    """
    return aligned(hidden, 256) if quant_mode == 0 else aligned(aligned(hidden, 32) + 4, _BLOCK)


def quantized_columns(hidden: int) -> int:
    """Columns of `quant_expand_x`: a token and a scale for eight of its elements.

    >>> quantized_columns(4096)
    6144
    """
    return aligned(aligned(hidden, 32) + aligned(hidden, 8) // 8 * 4, _BLOCK)


def setup_commands(call: HalfCall[TensorSpec], layout: Layout) -> int:
    """Length of the `comm_cmd_info` of dispatch: 16 numbers for each row, and for each of the ranks' experts."""
    rows = layout.num_tokens * (layout.top_k + call.shared_expert_num)
    return 16 * (rows + layout.ep * layout.local_experts)


def dispatch_sizes(tokens: int, hidden: int, top_k: int, numbers: Mapping[str, int]) -> tuple[int, int, int, int]:
    """Columns of `y`, and lengths of `expand_idx`, assist info and `comm_cmd_info`, as C programs ask for them.

    >>> numbers = {"ep_world_size": 2, "ep_rank_id": 0, "moe_expert_num": 4, "shared_expert_num": 0}
    >>> dispatch_sizes(3, 1024, 2, numbers | {"shared_expert_rank_num": 0, "quant_mode": 0, "global_bs": 0})
    (1024, 6, 1536, 160)

    Raises:
        ConstraintError: numbers that make no layout.
    """
    ep, rank, experts = numbers["ep_world_size"], numbers["ep_rank_id"], numbers["moe_expert_num"]
    shared, ranks = numbers["shared_expert_num"], numbers["shared_expert_rank_num"]
    require(0 <= ranks < ep, "shared_expert_rank_num", ranks, f"must be 0 to {ep - 1}", "use another number")
    require(rank >= 0, "ep_rank_id", rank, "must not be negative", "use the rank within the EP group")
    require(ranks == 0 or shared > 0, "shared_expert_num", shared, "must be positive with ranks for them", "use 1")
    on_shared = rank < ranks
    local = 1 if on_shared else experts // (ep - ranks)
    most = numbers["global_bs"] or tokens * ep
    rows = tokens * ep * shared // ranks if on_shared else most * min(local, top_k)
    commands = 16 * (tokens * (top_k + shared) + ep * local)
    return message_columns(hidden, numbers["quant_mode"]), tokens * top_k, 128 * rows, commands


def combine_sizes(rows: int, hidden: int, ep: int) -> tuple[int, int]:
    """Columns of `quant_expand_x`, and the length of `comm_cmd_info`, likewise.

    >>> combine_sizes(96, 4096, 2)
    (6144, 1568)
    """
    return quantized_columns(hidden), 16 * (rows + ep)


def aligned(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
