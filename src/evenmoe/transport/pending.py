"""Exchanges that go on while their rank does something else, and what waits for their results (specification §14).

Each is made in a thread of its own, one after the other, in the order in which they were begun: so the exchanges of all
ranks pair up as if the ranks had waited for each. What a rank does with its group meanwhile comes behind them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from evenmoe.errors import ConstraintError

#: Setups of one rank that may wait for their teardowns: more are a program that forgets them, and keeps all rows.
MOST = 64


class _Background(threading.Thread):
    """A thread of an exchange, which waits for no other than the one before."""


class Pending:
    """One exchange under way.

    Args:
        work: makes the exchange; what it returns or raises, `result` returns or raises.
        before: the exchange that must be done first, or None.
    """

    def __init__(self, work: Callable[[], object], before: Pending | None) -> None:
        self._work, self._before = work, before
        self._value: object = None
        self._error: BaseException | None = None
        self._done = threading.Event()
        _Background(target=self._run, name="exchange under way", daemon=True).start()

    def wait(self) -> None:
        """Until the exchange is done, or has failed."""
        self._done.wait()

    def result(self) -> object:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        if self._before is not None:
            self._before.wait()
        self._before = None
        try:
            self._value = self._work()
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            self._error = error
        finally:
            self._done.set()


@dataclass(frozen=True)
class _Setup:
    """What a setup left for its teardown: of which operator it is, what it was called with, and its exchange."""

    operator: str
    about: object
    pending: Pending


class Setups:
    """The setups of one rank of a group that wait for their teardowns; any order of the teardowns will do."""

    def __init__(self) -> None:
        self._last: Pending | None = None
        self._begun = 0
        self._waiting: dict[int, _Setup] = {}
        self._lock = threading.Lock()

    def begin(self, operator: str, about: object, work: Callable[[], object]) -> int:
        """Begin an exchange; the number by which `find` finds it.

        Raises:
            ConstraintError: too many setups wait for their teardowns.
        """
        with self._lock:
            if len(self._waiting) >= MOST:
                rule = f"must leave at most {MOST} setups of a group without their teardowns"
                fix = "call the teardown of every setup"
                raise ConstraintError(f"{operator}_setup", f"called with {MOST} setups pending", rule, fix)
            self._begun += 1
            self._last = Pending(work, self._last)
            self._waiting[self._begun] = _Setup(operator, about, self._last)
            return self._begun

    def tell(self, work: Callable[[], object]) -> None:
        """Let the other ranks know of a setup that failed, in its turn; nobody waits for it here."""
        with self._lock:
            self._last = Pending(work, self._last)

    def find(self, operator: str, number: int) -> tuple[object, Pending]:
        """What a setup was called with, and its exchange.

        Raises:
            ConstraintError: no such setup waits for its teardown.
        """
        with self._lock:
            found = self._waiting.get(number)
            if found is None or found.operator != operator:
                waiting = sorted(n for n, setup in self._waiting.items() if setup.operator == operator)
                value = f"of no setup of {operator} that is pending here (pending are {waiting or 'none'})"
                rule, fix = "must come from a setup of this rank and group that was not torn down", "pass what it gave"
                raise ConstraintError("comm_cmd_info", value, rule, fix)
            return found.about, found.pending

    def drop(self, number: int) -> None:
        """The teardown of a setup has it; no other may."""
        with self._lock:
            self._waiting.pop(number, None)

    def wait(self) -> None:
        """Until all exchanges that were begun are done; none of them waits for itself."""
        last = self._last
        if last is not None and not isinstance(threading.current_thread(), _Background):
            last.wait()

    def end(self) -> None:
        """Forget what waits.

        Raises:
            ConstraintError: something did.
        """
        with self._lock:
            left = [setup.operator for setup in self._waiting.values()]
            self._waiting.clear()
        if left:
            value = f"left of {len(left)} setups of {' and '.join(sorted(set(left)))}"
            rule, fix = "must be given to the teardown of its setup", "call the teardown of every setup"
            raise ConstraintError("comm_cmd_info", value, rule, fix)
