"""A small fault campaign over threads and gloo processes, and that a runtime which breaks a promise is found out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import evenmoe as em
from evenmoe.errors import LostRankError, RankDisagreementError
from evenmoe.transport.local import LocalTransport
from evenmoe.transport.process_group import ProcessGroupTransport
from tests.transport.campaign_plans import Plan
from tests.transport.fault_campaign import Tally, plans, run_campaign

SEED = 8
SMALL = {
    "local-exception": 20,
    "local-last-exception": 3,
    "local-argument": 20,
    "local-order": 20,
    "exception": 20,
    "last-exception": 2,
    "argument": 10,
    "order": 20,
    "kill": 3,
    "interrupt": 3,
}
TIMEOUT_S = 20.0  # no right call comes near it, however busy the machine


def small(kind: str, count: int, size: int = 3) -> Iterator[Plan]:
    return plans({kind: count}, SEED, [size])


@pytest.mark.parametrize("kind", SMALL)
def test_promises_are_kept(kind):
    tally = run_campaign(list(small(kind, SMALL[kind])), TIMEOUT_S)
    assert not tally.broken, "\n".join(tally.broken)
    verdicts = [verdict for row in tally.rows.values() for verdict in row]
    assert len(verdicts) + tally.missed == SMALL[kind]
    assert len(verdicts) > SMALL[kind] // 2  # faults that come after the end of their call show nothing


# -- runtimes that break a promise, each put in place in the processes of a world -------------------------------------


def stale_rows() -> None:
    """An exchange of floats gives what the last one of its shape gave."""
    for transport in (LocalTransport, ProcessGroupTransport):
        kept: dict[Any, Any] = {}
        setattr(transport, "exchange_rows", _giving_the_last(transport.exchange_rows, kept))  # noqa: B010


def _giving_the_last(exchange: Callable[..., Any], kept: dict[Any, Any]) -> Callable[..., Any]:
    def exchange_rows(self: Any, rows: Any, *arguments: Any, **keywords: Any) -> Any:
        received = exchange(self, rows, *arguments, **keywords)
        if not rows.is_floating_point():
            return received
        key = (self.rank, tuple(received.shape))
        before, kept[key] = kept.get(key, received), received.clone()
        return before

    return exchange_rows


def other_errors() -> None:
    """A rank's error is not its own."""

    def replaced(error: Exception) -> None:
        raise RuntimeError("something failed") from error

    _on_errors_of_dispatch(replaced, spared=(RankDisagreementError, LostRankError))


def aborts() -> None:
    _on_errors_of_dispatch(lambda error: os.abort(), spared=())


def hangs() -> None:
    _on_errors_of_dispatch(lambda error: time.sleep(1000.0), spared=())


def _on_errors_of_dispatch(act: Callable[[Exception], object], spared: tuple[type[Exception], ...]) -> None:
    original = em.ExpertParallel.dispatch

    def dispatch(self: Any, *arguments: Any, **keywords: Any) -> Any:
        try:
            return original(self, *arguments, **keywords)
        except spared:
            raise
        except Exception as error:
            act(error)
            raise

    setattr(em.ExpertParallel, "dispatch", dispatch)  # noqa: B010


def wrong_names() -> None:
    original = LostRankError.__init__

    def init(self: LostRankError, message: str, ranks: tuple[int, ...] = ()) -> None:
        original(self, message, tuple(rank + 1 for rank in ranks) or (7,))

    setattr(LostRankError, "__init__", init)  # noqa: B010


def no_names() -> None:
    setattr(RankDisagreementError, "__str__", lambda self: "the ranks disagree")  # noqa: B010


def errors_are_forgotten() -> None:
    """After an error of a dispatch one of the ranks makes the next one alone."""
    _on_errors_of_dispatch(lambda error: None, spared=())
    original = em.ExpertParallel.dispatch

    def dispatch(self: Any, *arguments: Any, **keywords: Any) -> Any:
        try:
            return original(self, *arguments, **keywords)
        except RankDisagreementError:
            return original(self, *arguments, **keywords)

    setattr(em.ExpertParallel, "dispatch", dispatch)  # noqa: B010


def _total(tally: Tally, column: str) -> int:
    return sum(int(getattr(verdict, column)) for row in tally.rows.values() for verdict in row)


def _tried(tally: Tally) -> int:
    return sum(map(len, tally.rows.values()))


@pytest.mark.parametrize(
    ("plant", "kind", "shows"),
    [
        (stale_rows, "local-exception", lambda tally: _total(tally, "wrong_values")),
        (stale_rows, "exception", lambda tally: _total(tally, "wrong_values")),
        (other_errors, "local-argument", lambda tally: _total(tally, "own_due") - _total(tally, "own")),
        (aborts, "argument", lambda tally: _total(tally, "aborts")),
        (hangs, "argument", lambda tally: _total(tally, "hangs")),
        (wrong_names, "kill", lambda tally: _total(tally, "wrong_names")),
        (no_names, "local-order", lambda tally: _total(tally, "named_due") - _total(tally, "named")),
        (errors_are_forgotten, "local-order", lambda tally: _tried(tally) - _total(tally, "settled")),
    ],
)
def test_a_broken_runtime_is_found_out(plant, kind, shows):
    timeout_s = 0.5 if plant in (hangs, errors_are_forgotten) else TIMEOUT_S
    count = 1 if kind == "kill" else 4
    tally = run_campaign(list(small(kind, count)), timeout_s, prepare=plant)
    assert tally.broken
    assert shows(tally) > 0, tally.table()
