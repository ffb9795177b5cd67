"""The first message of every collective operator: a header that all ranks can read whatever they disagree on.

Sizes that differ between ranks are the classic way to hang an all-to-all, or to read one rank's rows with another
rank's shape. So counts travel in a message whose size depends on the world alone; it starts with a header that names
the exchange's number, the operator, the layer and the dispatch that it is about, its sizes, and whether this rank
failed. Every rank reads every header, finds the same disagreement and raises the same error, before any row has moved.
It costs no collective of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from evenmoe.contract import operators
from evenmoe.contract.operators import COMBINE, agreement
from evenmoe.errors import RankDisagreementError

if TYPE_CHECKING:
    import torch

TEXT = 40  # int64 words for the message of a rank that failed: 320 bytes of UTF-8
FIELDS = 24  # int64 words for what must agree
HEADER = 4 + FIELDS + TEXT  # number of the exchange, operator, status, number of fields; fields; text
FAILED = 1  # status of an error that has none of its own
UNKNOWN = -1  # a dispatch that combine was not told; it may be any

COMBINE_MODE = "`combine`"
RULE_CODE = "digest of the code and the settings of `rule`"
LAYER, DISPATCH = "layer", "dispatch"
#: What a rank says of gradients: it records none at all, it would where another rank needs them, or it needs them.
OFF, ON, NEEDED = range(3)
_GRADIENTS = "gradients of "
GRADIENTS_OF_X, GRADIENTS_OF_ROWS = f"{_GRADIENTS}`x`", f"{_GRADIENTS}`expert_out`"
GRADIENTS_OF_WEIGHTS, GRADIENTS_OF_SCALES = f"{_GRADIENTS}`topk_weights`", f"{_GRADIENTS}`expert_scales`"
_WHERE = (LAYER, DISPATCH)  # which call it is: told for every rank at once
Words = npt.NDArray[np.int64]

_COMBINE = (DISPATCH, *agreement(COMBINE))

#: What must be equal on all ranks, by operator; the position of a name is its word in the header.
OPERATORS: dict[str, tuple[str, ...]] = {
    "dispatch": (*agreement(operators.DISPATCH), GRADIENTS_OF_X),
    "combine": (*_COMBINE, GRADIENTS_OF_ROWS, GRADIENTS_OF_SCALES),
    # The first versions, which have no more to agree on and no gradients, but are other operators.
    "dispatch_v1": agreement(operators.DISPATCH),
    "combine_v1": _COMBINE,
    "tensor-parallel step of dispatch": (
        "hidden size of `x`",
        "dtype of the rows",
        "tokens per rank times ranks (`global_bs`)",
        "expert parallel rank",
    ),
    # The peers come first in combine, and would be done before a difference shows among the others: so all sizes here.
    "tensor-parallel step of combine": (*_COMBINE, "expert parallel rank"),
    "ExpertParallel.dispatch": (
        LAYER,
        "hidden size of `x`",
        "dtype of `x`",
        "top-k of `topk_ids`",
        "logical experts",
        "`num_slots`",
        "`rule`",
        RULE_CODE,
        COMBINE_MODE,
        "digest of the EPLB table",
        GRADIENTS_OF_X,
    ),
    "batch rule of ExpertParallel.dispatch": (LAYER,),
    "setup of dispatch": agreement(operators.DISPATCH_SETUP),
    "setup of combine": agreement(operators.COMBINE_SETUP),
    "ExpertParallel.combine": (
        LAYER,
        DISPATCH,
        "hidden size of `expert_out`",
        "dtype of `expert_out`",
        GRADIENTS_OF_ROWS,
        GRADIENTS_OF_WEIGHTS,
    ),
    "SharedBatch.combine": (
        LAYER,
        "hidden size of `expert_out`",
        "dtype of `expert_out`",
        "digest of the slots chosen",
    ),
    "backward of ExpertParallel.dispatch": (LAYER, DISPATCH),
    "backward of ExpertParallel.combine": (LAYER, DISPATCH),
    "backward of ExpertParallel.combine, for the weights": (LAYER, DISPATCH),
    "ExpertParallel.reduce_replica_gradients": (
        LAYER,
        "number of parameters",
        "digest of the parameters' shapes and dtypes",
    ),
    "rows of ExpertParallel.reduce_replica_gradients": (LAYER,),
    "ElasticBuffer.dispatch": (
        "hidden size of `x`",
        "dtype of `x`",
        "bytes of the scales of a row",
        "top-k of `topk_idx`",
        "`num_experts`",
        "`num_max_tokens_per_rank`",
        "presence of `topk_weights`",
    ),
    "ElasticBuffer.combine": (DISPATCH, "hidden size of `x`", "dtype of `x`", "presence of `topk_weights`"),
    "ElasticBuffer.barrier": (),
    "HcclBarrier": (),
    "ElasticBuffer.engram_write": ("entries of `storage`", "hidden size of `storage`", "dtype of `storage`"),
    "barrier": ("digest of `elastic_info`",),
}
_NAMES = tuple(OPERATORS)
DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "float8_e4m3fn", "float8_e5m2")


class Header:
    """What the calls of one kind say of themselves, made once for all of them.

    Args:
        operator: one of `OPERATORS`.
        sizes: {name: value} for every name of `OPERATORS[operator]`.
        choices: {name: {value: words}} for names whose values stand for words, for the error.

    Attributes:
        words: int64 (HEADER,), with 0 for the number of the exchange.
        dispatch_word: which of them is the dispatch that the call is about; 0 if it is about none.
    """

    def __init__(
        self, operator: str, sizes: Mapping[str, int], choices: Mapping[str, Mapping[int, str]] | None = None
    ) -> None:
        names = OPERATORS[operator]
        assert set(sizes) | {DISPATCH} == {*names, DISPATCH}, (operator, tuple(sizes))
        self.operator, self.choices = operator, choices or {}
        self.words = np.zeros(HEADER, np.int64)
        self.words[1:4] = _NAMES.index(operator), 0, len(names)
        self.words[4 : 4 + len(names)] = [sizes.get(name, UNKNOWN) for name in names]
        self.dispatch_word = 4 + names.index(DISPATCH) if DISPATCH in names else 0


def failed_header(number: int, operator: str, error: BaseException) -> Words:
    """The header of a rank whose call failed before the first exchange, in place of what the others wait for."""
    words = np.zeros(HEADER, np.int64)
    words[:4] = number, _NAMES.index(operator), getattr(error, "status", FAILED), 0
    words[4 + FIELDS :] = text_words(error, TEXT)
    return words


def text_words(error: BaseException, words: int) -> Words:
    """What an error says, cut to that many int64 words of UTF-8."""
    text = str(error) if hasattr(error, "status") else f"{type(error).__name__}: {error}".removesuffix(": ")
    return np.frombuffer(text.encode()[: 8 * words].ljust(8 * words, b"\0"), np.int64)


def text_of(words: Words) -> str:
    return words.tobytes().rstrip(b"\0").decode(errors="replace")


def check_headers(headers: Words, choices: Mapping[str, Mapping[int, str]]) -> None:
    """Compare the headers of all ranks, int64 (W, HEADER), whose numbers are equal.

    Raises:
        RankDisagreementError: a rank failed, or they differ in the call or in a size; the same on every rank.
    """
    for rank, words in enumerate(headers):
        if words[2]:
            raise failed_there(rank, _NAMES[words[1]], text_of(words[4 + FIELDS :]), invalid=words[2] != FAILED)
    operators = {rank: _NAMES[words[1]] for rank, words in enumerate(headers)}
    where = {rank: _where(words) for rank, words in enumerate(headers)}
    if len(set(operators.values())) > 1:
        raise _elsewhere("operator", where)
    names = OPERATORS[operators[0]]
    for word, name in enumerate(names):
        values = headers[:, 4 + word]
        if name == DISPATCH:
            values = values[values != UNKNOWN]
        if len(np.unique(values)) <= 1:
            continue
        if name.startswith(_GRADIENTS):
            _check_gradients(name, values)
            continue
        if name in _WHERE:
            raise _elsewhere("call", where)
        readable = {rank: _readable(name, int(value), choices) for rank, value in enumerate(values)}
        raise RankDisagreementError(
            name.replace("`", ""),
            by_value(readable),
            "must be equal on every rank of a group",
            "pass the same on all ranks",
        )


def needed(header: Header, headers: Words, gradients: str) -> bool:
    """Whether a rank needs those gradients, by the headers of all, int64 (W, HEADER), of one operator."""
    return bool((headers[:, 4 + OPERATORS[header.operator].index(gradients)] == NEEDED).any())


def _check_gradients(name: str, states: Words) -> None:
    """A rank that needs none takes part in the backward of the others, unless it records nothing.

    Raises:
        RankDisagreementError: gradients are needed on a rank, and not recorded on another.
    """
    if OFF in states and NEEDED in states:
        recorded = {rank: "not recorded" if state == OFF else "recorded" for rank, state in enumerate(states)}
        raise RankDisagreementError(
            name.replace("`", ""),
            by_value(recorded),
            "must be recorded on every rank of a group or on none, as all take part in the backward pass",
            "enable gradients on all ranks, or call under torch.no_grad() on all",
        )


def failed_there(rank: int, operator: str, text: str, invalid: bool) -> RankDisagreementError:
    """The error of the other ranks when one rank's call was invalid, or failed in the midst of it."""
    how, rule, fix = "failed", "succeed", f"mend what failed on rank {rank}, and repeat the call on all ranks"
    if invalid:
        how, rule, fix = "refused", "be accepted", f"correct the arguments of rank {rank}"
    return RankDisagreementError(
        f"the call of {operator} on rank {rank}", f"{how} there ({text})", f"must {rule} on every rank", fix
    )


def dtype_code(dtype: torch.dtype | str) -> int:
    """A small number for a dtype, the same on all ranks."""
    name = str(dtype).removeprefix("torch.")
    return DTYPES.index(name) if name in DTYPES else len(DTYPES)


def digest(values: Iterable[int]) -> int:
    """A number that differs, but for one chance in 2^32, where the values differ."""
    return zlib.crc32(np.fromiter(values, np.int64).tobytes())


def _where(words: Words) -> str:
    """What a rank was about to do: the operator, and which of its calls."""
    operator = _NAMES[words[1]]
    values = dict(zip(OPERATORS[operator], words[4:].tolist(), strict=False))
    parts = [operator]
    if values.get(DISPATCH, UNKNOWN) != UNKNOWN:
        parts.append(f"of dispatch {values[DISPATCH]}")
    if LAYER in values:
        parts.append(f"of layer {values[LAYER]}")
    return " ".join(parts)


def _elsewhere(what: str, where: Mapping[int, str]) -> RankDisagreementError:
    return RankDisagreementError(
        f"the {what}",
        by_value(where),
        "must be the same on every rank of a group",
        "call the collective operators in the same order on all ranks",
    )


def _readable(name: str, value: int, choices: Mapping[str, Mapping[int, str]]) -> str:
    if name in choices:
        return choices[name][value]
    if name.startswith("dtype"):
        return DTYPES[value] if value < len(DTYPES) else "another dtype"
    if name.startswith("presence"):
        return "given" if value else "absent"
    return str(value)


def by_value(values: Mapping[int, str]) -> str:
    """`64 on ranks 0, 1, 3 and 32 on rank 2`, the most common value first."""
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    common_first = sorted(ranks.items(), key=lambda item: (-len(item[1]), item[1]))
    return " and ".join(
        f"{value} on rank{'s' if len(where) > 1 else ''} {', '.join(map(str, where))}" for value, where in common_first
    )
