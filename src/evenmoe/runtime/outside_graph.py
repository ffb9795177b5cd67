"""Collectives under torch.compile: a graph ends before them, with a reason, and another begins behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

_Method = TypeVar("_Method", bound=Callable[..., Any])


def outside_graph(method: _Method) -> _Method:
    """A method that torch.compile calls as it is, since other ranks wait for what it does.

    As `torch.compiler.disable` makes it, but without loading the compiler, which takes longer than to load torch.

    >>> outside_graph(print)("as ever")
    as ever
    """

    @wraps(method)
    def called(*arguments: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*arguments, **keywords)
        return method(*arguments, **keywords)

    marked: Any = called  # by the marks of `torch.compiler.disable`
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "evenmoe: it exchanges rows with other ranks"
    return marked
