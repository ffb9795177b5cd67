"""Events and the smaller calls around them, from C++."""

from __future__ import annotations

from .conftest import Run, statuses

ANSWERS = {  # label in programs/events.cpp -> status, or the number that it stands for
    "never recorded": 0,
    "time of no record": 107006,
    "bytes less": 64,
    "gigabytes of all": 64,
    "copied behind the event": 0,
    "complete": 0,
    "time": 0,
    "stream": 0,
    "reset": 0,
    "destroyed": 107000,
    "time -2": 100000,
    "fill beyond": 107000,
    "free null": 100000,
    "numbers": 3,
    "array destroyed": 161002,
    "array null": 1,
    "empty array": 0,
    "half": 0,
    "config": 1,
    "config null": 2,
    "root info": 1,
    "root info null": 2,
    "table": 10,
    "words": 0,
}


def test_every_call_does_what_its_header_says(run_program: Run) -> None:
    got = statuses(run_program("events"))
    assert {label: status for label, (status, _) in got.items()} == ANSWERS
    assert got["config"][1] == "`config` is not initialized: call HcclCommConfigInit first."
    assert got["root info"][1] == (
        "`rootInfo` is empty: it must be what HcclGetRootInfo wrote; send it from the root to all ranks, all of its "
        "bytes."
    )
    assert got["words"][1] == "timeout"
