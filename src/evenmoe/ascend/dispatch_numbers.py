"""Which dispatch an operator's assist info came from, where only the operator's own tensors are handed on.

Ascend's dispatch has no output that tells one call from another. So the number of the call is remembered for the tensor
that combine needs of it, for as long as that lives and nobody else writes to it. A copy, or the same memory behind
another tensor (as in C++), is not known; then only the operator's own values are compared between the ranks.
"""

from __future__ import annotations

import threading

import torch
from torch.utils.weak import WeakIdKeyDictionary

_numbers = WeakIdKeyDictionary()  # assist info -> (its version, number)
_lock = threading.Lock()


def remember(assist_info: torch.Tensor | None, number: torch.Tensor) -> None:
    """Keep `number`, the last output of `torch.ops.evenmoe.dispatch`, for what its assist info was written to."""
    assert assist_info is not None, "the first stage refuses null outputs"
    with _lock:
        _numbers[assist_info] = _version(assist_info), number


def number_of(assist_info: object) -> torch.Tensor | None:
    """Return the number of the dispatch that wrote `assist_info`, None if it is not known."""
    if not isinstance(assist_info, torch.Tensor):
        return None
    with _lock:
        known = _numbers.get(assist_info)
    return known[1] if known is not None and known[0] == _version(assist_info) else None


def _version(tensor: torch.Tensor) -> int:
    """How often it was written to; tensors made in inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version
