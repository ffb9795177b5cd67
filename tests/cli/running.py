"""Running the command in this process, on worlds small enough for a test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from evenmoe.cli import main

#: The demo's own sizes, shrunk: the published demo's world keeps its ranks, the trace's world its experts.
SMALL = {
    "PAGE_TOKENS": 3,
    "PAGE_HIDDEN": 64,
    "PAGE_INNER": 32,
    "TRACE_TOKENS": 16,
    "TRACE_HIDDEN": 32,
    "TRACE_INNER": 16,
}


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    def run(*arguments: Any) -> Done:
        monkeypatch.setattr(sys, "argv", ["evenmoe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return Done(int(caught.value.code or 0), captured.out, captured.err)

    return run
