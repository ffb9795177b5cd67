"""The first message of every collective operator: a header that all ranks can read whatever they disagree on.

Sizes that differ between ranks are the classic way to hang an all-to-all, or to read one rank's rows with another
rank's shape. So counts travel in a message whose size depends on the world alone; it starts with a header that names
the operator, its sizes, and whether this rank refused its arguments. Every rank reads every header, finds the same
disagreement and raises the same error, before any row has moved. It costs no collective of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from evenmoe.errors import EvenmoeError, RankDisagreementError

if TYPE_CHECKING:
    import torch

    from evenmoe.transport.contract import Transport

_TEXT = 40  # int64 words for the message of a rank that refused: 320 bytes of UTF-8
_FIELDS = 24  # int64 words for sizes that must agree
_HEADER = 3 + _FIELDS + _TEXT  # operator, status, number of fields, fields, text
_MESSAGE_WORDS = 4096  # counts sent to all ranks together: 32 KiB, a latency-bound message on any link

_COMBINE = (
    "hidden size of `expert_out`",
    "dtype of `expert_out`",
    "top-k of `expert_ids`",
    "`num_experts`",
    "`shared_expert_num`",
    "`shared_expert_rank_num`",
    "`comm_quant_mode`",
    "tokens per rank times ranks (`global_bs`)",
    "`zero_expert_num`",
    "`copy_expert_num`",
    "`const_expert_num`",
    "presence of `x_active_mask`",
    "tensor-parallel world size",
    "digest of `elastic_info`",
)

#: What must be equal on all ranks, by operator; the position of a name is its word in the header.
OPERATORS: dict[str, tuple[str, ...]] = {
    "dispatch": (
        "hidden size of `x`",
        "dtype of `x`",
        "top-k of `expert_ids`",
        "`num_experts`",
        "`shared_expert_num`",
        "`shared_expert_rank_num`",
        "`quant_mode`",
        "tokens per rank times ranks (`global_bs`)",
        "`zero_expert_num`",
        "`copy_expert_num`",
        "`const_expert_num`",
        "presence of `scales`",
        "presence of `x_active_mask`",
        "tensor-parallel world size",
        "digest of `elastic_info`",
    ),
    "combine": _COMBINE,
    "tensor-parallel step of dispatch": (
        "hidden size of `x`",
        "dtype of the rows",
        "tokens per rank times ranks (`global_bs`)",
        "expert parallel rank",
    ),
    # The peers come first in combine, and would be done before a difference shows among the others: so all sizes here.
    "tensor-parallel step of combine": (*_COMBINE, "expert parallel rank"),
    "ExpertParallel.dispatch": (
        "hidden size of `x`",
        "dtype of `x`",
        "top-k of `topk_ids`",
        "logical experts",
        "`num_slots`",
        "`rule`",
        "digest of the EPLB table",
    ),
    "ExpertParallel.combine": ("hidden size of `expert_out`", "dtype of `expert_out`", "step of the dispatch"),
}
_NAMES = tuple(OPERATORS)
DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "float8_e4m3fn", "float8_e5m2")


def exchange_counts(
    transport: Transport,
    operator: str,
    sizes: Mapping[str, int],
    counts: torch.Tensor,
    choices: Mapping[str, Sequence[str]] | None = None,
) -> torch.Tensor:
    """Exchange `counts` between ranks that agree on `sizes`; raise the same error on every rank if they do not.

    Args:
        operator: a key of `OPERATORS`.
        sizes: {name: value} for every name of that operator.
        counts: int64 (W, n); row d goes to rank d.
        choices: {name: words} for names whose values are positions in a list of words, for the error.

    Returns:
        int64 (W, n), row s from rank s.

    Raises:
        RankDisagreementError: ranks called different operators or with different sizes, or a rank refused its call.
    """
    assert tuple(sizes) == OPERATORS[operator], (operator, tuple(sizes))
    fitting = _fitting(transport)
    message = _message(transport, counts)
    header = message[:, :_HEADER]
    header[:, 0] = _NAMES.index(operator)
    header[:, 2] = len(sizes)
    header[:, 3 : 3 + len(sizes)] = counts.new_tensor(list(sizes.values()))
    message[:, _HEADER : _HEADER + min(counts.shape[1], fitting)] = counts[:, :fitting]
    received = transport.exchange_counts(message)
    _check_headers(received[:, :_HEADER].cpu().numpy(), choices or {})
    first = received[:, _HEADER : _HEADER + min(counts.shape[1], fitting)]
    if counts.shape[1] <= fitting:
        return first
    import torch

    return torch.cat([first, transport.exchange_counts(counts[:, fitting:].contiguous())], dim=1)


def refuse(transport: Transport, operator: str, error: EvenmoeError, device: torch.device | str = "cpu") -> None:
    """Tell the other ranks that this one refused its arguments, in place of the counts they wait for.

    They raise a RankDisagreementError that carries this rank's message, instead of waiting. The ranks' headers are
    compared here too, but the caller's own error is the one to raise, so a disagreement is not.
    """
    import torch

    message = _message(transport, torch.zeros((transport.world_size, 0), dtype=torch.int64, device=device))
    text = str(error).encode()[: 8 * _TEXT].ljust(8 * _TEXT, b"\0")
    header = np.zeros(_HEADER, np.int64)
    header[0], header[1] = _NAMES.index(operator), error.status
    header[3 + _FIELDS :] = np.frombuffer(text, np.int64)
    message[:, :_HEADER] = torch.from_numpy(header)
    transport.exchange_counts(message)


def dtype_code(dtype: torch.dtype) -> int:
    """A small number for a dtype, the same on all ranks."""
    name = str(dtype).removeprefix("torch.")
    return DTYPES.index(name) if name in DTYPES else len(DTYPES)


def digest(values: Iterable[int]) -> int:
    """A number that differs, but for one chance in 2^32, where the values differ."""
    return zlib.crc32(np.fromiter(values, np.int64).tobytes())


def _fitting(transport: Transport) -> int:
    """Counts per destination that fit into the message; a function of the world alone, so ranks never differ in it."""
    return max(64, _MESSAGE_WORDS // transport.world_size)


def _message(transport: Transport, counts: torch.Tensor) -> torch.Tensor:
    return counts.new_zeros((transport.world_size, _HEADER + _fitting(transport)))


def _check_headers(headers: np.ndarray, choices: Mapping[str, Sequence[str]]) -> None:
    ranks = range(len(headers))
    for rank in ranks:
        if headers[rank, 1]:
            text = headers[rank, 3 + _FIELDS :].tobytes().rstrip(b"\0").decode(errors="replace")
            raise RankDisagreementError(
                f"the call of {_NAMES[headers[rank, 0]]} on rank {rank}",
                f"refused there ({text})",
                "must be accepted on every rank",
                f"correct the arguments of rank {rank}",
            )
    operators = {rank: _NAMES[headers[rank, 0]] for rank in ranks}
    if len(set(operators.values())) > 1:
        raise RankDisagreementError(
            "the operator",
            _by_value(operators),
            "must be the same on every rank of a group",
            "call the collective operators in the same order on all ranks",
        )
    names = OPERATORS[operators[ranks[0]]]
    for word, name in enumerate(names):
        values = {rank: _readable(name, int(headers[rank, 3 + word]), choices) for rank in ranks}
        if len(set(values.values())) > 1:
            raise RankDisagreementError(
                name.replace("`", ""),
                _by_value(values),
                "must be equal on every rank of a group",
                "pass the same on all ranks",
            )


def _readable(name: str, value: int, choices: Mapping[str, Sequence[str]]) -> str:
    if name in choices:
        return choices[name][value]
    if name.startswith("dtype"):
        return DTYPES[value] if value < len(DTYPES) else "another dtype"
    if name.startswith("presence"):
        return "given" if value else "absent"
    return str(value)


def _by_value(values: Mapping[int, str]) -> str:
    """`64 on ranks 0, 1, 3 and 32 on rank 2`, the most common value first."""
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    common_first = sorted(ranks.items(), key=lambda item: (-len(item[1]), item[1]))
    return " and ".join(
        f"{value} on rank{'s' if len(where) > 1 else ''} {', '.join(map(str, where))}" for value, where in common_first
    )
