"""A small fault campaign over threads and processes, and that a runtime which breaks a promise is found out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import evenmoe as em
from evenmoe.errors import LostRankError, RankDisagreementError
from evenmoe.transport.process_group import ProcessGroupTransport
from evenmoe.transport.world import LocalTransport
from tests.transport.campaign_plans import Plan
from tests.transport.fault_campaign import Tally, plans, run_campaign

SEED = 8
SMALL = {
    "local-exception": 12,
    "local-last-exception": 2,
    "local-argument": 12,
    "local-order": 12,
    "exception": 10,
    "last-exception": 2,
    "argument": 10,
    "order": 10,
    "kill": 2,
    "interrupt": 2,
    "shared-exception": 20,
    "shared-last-exception": 4,
    "shared-argument": 10,
    "shared-order": 10,
    "shared-kill": 2,
    "shared-interrupt": 2,
}
Exchange = Callable[..., torch.Tensor]
Views = Callable[..., Any]
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


def shown_copies(found: Any, rows: torch.Tensor) -> list[torch.Tensor]:
    """What each rank shows, in memory that nobody writes to again."""
    return [found.rows_of(source, rows) for source in range(len(found.rows))]


def with_rows(found: Any, rows: list[torch.Tensor]) -> Any:
    """The same views with other rows."""
    return replace(found, rows=np.array([theirs.data_ptr() for theirs in rows]), held=rows)


def stale_rows() -> None:
    """An exchange of floats gives what the last one of its shape gave."""

    def last_of_its_shape(exchange: Exchange) -> Exchange:
        kept: dict[Any, torch.Tensor] = {}

        def exchange_rows(self: Any, rows: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            received = exchange(self, rows, *arguments, **keywords)
            key = (self.name, self.rank, tuple(received.shape))
            before, kept[key] = kept.get(key, received), received.clone()
            return before if rows.is_floating_point() else received

        return exchange_rows

    def views_of_the_first(exchange: Views) -> Views:
        kept: dict[Any, Any] = {}

        def exchange_views(self: Any, rows: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            found = exchange(self, rows, *arguments, **keywords)
            shapes = (tuple(rows.shape[1:]), *found.counts.tolist())
            copies = shown_copies(found, rows)
            before, kept[self.name, self.rank, shapes] = kept.get((self.name, self.rank, shapes), copies), copies
            return with_rows(found, before) if rows.is_floating_point() else found

        return exchange_views

    _change_exchanges(last_of_its_shape, views_of_the_first)


def own_rows() -> None:
    """The last row of floats that an exchange gives is this rank's own."""

    def with_own_row(exchange: Exchange) -> Exchange:
        def exchange_rows(self: Any, rows: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            received = exchange(self, rows, *arguments, **keywords)
            if rows.is_floating_point():
                received[-1:] = rows[-1:]
            return received

        return exchange_rows

    def own_views(exchange: Views) -> Views:
        def exchange_views(self: Any, rows: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            found = exchange(self, rows, *arguments, **keywords)
            theirs = shown_copies(found, rows)
            for other in theirs:
                if rows.is_floating_point() and len(rows):
                    other[-1:] = rows[-1:]
            return with_rows(found, theirs)

        return exchange_views

    _change_exchanges(with_own_row, own_views)


def _change_exchanges(change: Callable[[Exchange], Exchange], change_views: Callable[[Views], Views]) -> None:
    for transport in (LocalTransport, ProcessGroupTransport):
        setattr(transport, "exchange_rows", change(transport.exchange_rows))  # noqa: B010
        setattr(transport, "exchange_views", change_views(transport.exchange_views))  # noqa: B010


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


def losses_of_another_kind() -> None:
    """A lost rank gives a RuntimeError without a name."""

    def replaced(error: Exception) -> None:
        if isinstance(error, LostRankError):
            raise RuntimeError("something is lost") from error

    _on_errors_of_dispatch(replaced, spared=())


def _total(tally: Tally, column: str) -> int:
    return sum(int(getattr(verdict, column)) for row in tally.rows.values() for verdict in row)


def _tried(tally: Tally) -> int:
    return sum(map(len, tally.rows.values()))


@pytest.mark.parametrize(
    ("plant", "kind", "count", "shows"),
    [
        (stale_rows, "local-exception", 1, lambda tally: len(tally.broken)),
        (stale_rows, "exception", 1, lambda tally: len(tally.broken)),
        (stale_rows, "shared-exception", 1, lambda tally: len(tally.broken)),
        (own_rows, "local-exception", 4, lambda tally: _total(tally, "wrong_values")),
        (own_rows, "exception", 4, lambda tally: _total(tally, "wrong_values")),
        (own_rows, "shared-exception", 4, lambda tally: _total(tally, "wrong_values")),
        (other_errors, "local-exception", 10, lambda tally: _total(tally, "own_due") - _total(tally, "own")),
        (aborts, "argument", 2, lambda tally: _total(tally, "aborts")),
        (hangs, "argument", 1, lambda tally: _total(tally, "hangs")),
        (wrong_names, "kill", 1, lambda tally: _total(tally, "wrong_names")),
        (wrong_names, "shared-kill", 1, lambda tally: _total(tally, "wrong_names")),
        (no_names, "local-order", 2, lambda tally: _total(tally, "named_due") - _total(tally, "named")),
        (losses_of_another_kind, "local-last-exception", 2, lambda tally: _tried(tally) - _total(tally, "settled")),
    ],
)
def test_a_broken_runtime_is_found_out(plant, kind, count, shows):
    timeout_s = 0.5 if plant in (hangs, own_rows) else TIMEOUT_S
    tally = run_campaign(list(small(kind, count)), timeout_s, prepare=plant)
    assert tally.broken
    assert shows(tally) > 0, tally.table()
