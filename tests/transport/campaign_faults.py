"""Faults inside a call: an exception at a chosen operation, line or exchange; arguments that cannot be right."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

import evenmoe as em

PACKAGE = str(Path(em.__file__).parent)
# A RuntimeError out of torch.distributed is what the death of a rank looks like, so none is raised in there.
_BACKEND = str(Path(torch.__file__).parent / "distributed")

EXCEPTIONS: dict[str, type[BaseException]] = {
    kind.__name__: kind
    for kind in (MemoryError, RuntimeError, ValueError, KeyError, OSError, KeyboardInterrupt, SystemExit)
}
ORDINARY = tuple(name for name, kind in EXCEPTIONS.items() if issubclass(kind, Exception))
DEADLY = tuple(name for name, kind in EXCEPTIONS.items() if not issubclass(kind, Exception))


@dataclass
class Injection:
    """Counts the events of one kind in a call, and raises `error` at event number `at` (from 0; None to count only).

    After it, `events` is how many there were and `where` the place at which it was raised, "" if it was not.
    """

    kind: str
    at: int | None = None
    error: BaseException | None = None
    events: int = 0
    where: str = ""
    _due: bool = field(default=True, repr=False)

    def happens(self, where: str) -> None:
        self.events += 1
        if self._due and self.error is not None and self.events - 1 == self.at:
            self._due, self.where = False, where
            raise self.error


@contextmanager
def injected(injection: Injection, transports: list[Any]) -> Iterator[None]:
    """Watch this thread while one call runs: "operation" (of torch or NumPy), "line" (of evenmoe), or "exchange"."""
    if injection.kind == "operation":
        before = sys.getprofile()
        sys.setprofile(_operations(injection))
        try:
            yield
        finally:
            sys.setprofile(before)
    elif injection.kind == "line":
        before = sys.gettrace()
        sys.settrace(_lines(injection))
        try:
            yield
        finally:
            sys.settrace(before)
    else:
        assert injection.kind == "exchange", injection
        with _wrapped_exchanges(injection, transports):
            yield


def _operations(injection: Injection) -> Callable[[FrameType, str, Any], None]:
    def profile(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and _computes(called) and not frame.f_code.co_filename.startswith(_BACKEND):
            name = getattr(called, "__name__", "?")
            injection.happens(f"{name} in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")

    return profile


def _computes(called: Any) -> bool:
    owner = getattr(called, "__self__", None)
    origin = getattr(called, "__module__", None) or getattr(type(owner), "__module__", "")
    return isinstance(owner, torch.Tensor) or str(origin).startswith(("torch", "numpy"))


def _lines(injection: Injection) -> Callable[[FrameType, str, Any], Any]:
    def trace_lines(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and not _enters_or_leaves(frame):
            injection.happens(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return trace_lines

    def trace_calls(frame: FrameType, event: str, _: Any) -> Any:
        return trace_lines if frame.f_code.co_filename.startswith(PACKAGE) else None

    return trace_calls


def _enters_or_leaves(frame: FrameType) -> bool:
    """Whether the line is a `with`: an error there, before the block is left, would keep its lock for ever.

    No program can mend that, and no thread but the main one is ever interrupted there.
    """
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


@contextmanager
def _wrapped_exchanges(injection: Injection, transports: list[Any]) -> Iterator[None]:
    """Every exchange of the transports has two events: before it, and after it."""
    wrapped = []
    for transport in transports:
        for name in [name for name in dir(transport) if name.startswith("exchange")]:
            wrapped.append((transport, name))
            setattr(transport, name, _with_events(injection, getattr(transport, name), name))
    try:
        yield
    finally:
        for transport, name in wrapped:
            delattr(transport, name)


def _with_events(injection: Injection, exchange: Callable[..., Any], name: str) -> Callable[..., Any]:
    def exchange_with_events(*arguments: Any, **keywords: Any) -> Any:
        injection.happens(f"before {name}")
        result = exchange(*arguments, **keywords)
        injection.happens(f"after {name}")
        return result

    return exchange_with_events


def comes_from_the_package(traceback: TracebackType | None) -> bool:
    """Whether an exception went through code of evenmoe."""
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename.startswith(PACKAGE):
            return True
        traceback = traceback.tb_next
    return False


# -- arguments that cannot be right -----------------------------------------------------------------------------------

Change = Callable[[torch.Tensor], Any]

#: {name: (verb, argument of ExpertParallel or None, argument of the operators or None, what it becomes)}.
WRONG_ARGUMENTS: dict[str, tuple[str, str | None, str | None, Change]] = {
    "sparse x": ("dispatch", "x", "x", lambda x: x.to_sparse()),
    "x on meta": ("dispatch", "x", "x", lambda x: x.to("meta")),
    "whole numbers as x": ("dispatch", "x", "x", lambda x: x.long()),
    "x of three dimensions": ("dispatch", "x", "x", lambda x: x[None]),
    "no x": ("dispatch", "x", "x", lambda x: None),
    "ids on meta": ("dispatch", "topk_ids", "expert_ids", lambda ids: ids.to("meta")),
    "ids as floats": ("dispatch", "topk_ids", "expert_ids", lambda ids: ids.float()),
    "ids out of range": ("dispatch", "topk_ids", "expert_ids", lambda ids: ids + 1000),
    "ids of a token less": ("dispatch", "topk_ids", "expert_ids", lambda ids: ids[1:]),
    "sparse ids": ("dispatch", "topk_ids", "expert_ids", lambda ids: ids.to_sparse()),
    "weights on meta": ("dispatch", "topk_weights", None, lambda weights: weights.to("meta")),
    "sparse weights": ("dispatch", "topk_weights", None, lambda weights: weights.to_sparse()),
    "a list as weights": ("dispatch", "topk_weights", None, lambda weights: weights.tolist()),
    "sparse expert_out": ("combine", "expert_out", "expert_out", lambda rows: rows.to_sparse()),
    "expert_out on meta": ("combine", "expert_out", "expert_out", lambda rows: rows.to("meta")),
    "whole numbers as expert_out": ("combine", "expert_out", "expert_out", lambda rows: rows.long()),
    "expert_out of three dimensions": ("combine", "expert_out", "expert_out", lambda rows: rows[None]),
    "no expert_out": ("combine", "expert_out", "expert_out", lambda rows: None),
    "expert_scales on meta": ("combine", None, "expert_scales", lambda weights: weights.to("meta")),
    "sparse expert_scales": ("combine", None, "expert_scales", lambda weights: weights.to_sparse()),
    "expert_ids of combine on meta": ("combine", None, "expert_ids", lambda ids: ids.to("meta")),
}


def wrong_arguments(kind: str) -> list[str]:
    """The names of WRONG_ARGUMENTS that a batch of this kind can be given."""
    position = 1 if kind == "layer" else 2
    return [name for name, entry in WRONG_ARGUMENTS.items() if entry[position] is not None]


def make_wrong(name: str, kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` with the one that `name` says made wrong."""
    _, of_layer, of_operator, change = WRONG_ARGUMENTS[name]
    argument = of_layer if kind == "layer" else of_operator
    assert argument is not None, (name, kind)
    return arguments | {argument: change(arguments[argument])}
