"""Handles: numbers that stand for objects, never addresses, so that a stale or foreign one is found out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

from evenmoe.ascend.cann.refusals import null, refusal

Thing = TypeVar("Thing")

# No address of a 64-bit process has these upper bits, so a handle that is taken for a pointer faults at once.
_BASE = 0x5E00_0000_0000_0000
_STEP = 16


class Handles(Generic[Thing]):
    """The live objects of one kind.

    A handle is never given out twice. `_BASE` + kind · 2^48 + number · 16 tells which kind it once was.

    >>> streams: Handles[str] = Handles(1, "a stream", "aclrtCreateStream", 107003, 107003)
    >>> handle = streams.add("a")
    >>> streams.get("stream", handle)
    'a'

    Args:
        kind: a number of its own for each kind.
        noun: what one of them is called, with its article.
        maker: the function that makes them.
        code, null_code: statuses for a handle that is none, and for a null one.
        ended: what has happened to one that is no more.
    """

    def __init__(self, kind: int, noun: str, maker: str, code: int, null_code: int, ended: str = "destroyed") -> None:
        self._noun, self._maker, self._code, self._null_code, self._ended = noun, maker, code, null_code, ended
        self._first = _BASE + (kind << 48)
        self._issued = 0
        self._live: dict[int, Thing] = {}
        self._lock = threading.Lock()

    def add(self, thing: Thing) -> int:
        """A new handle for `thing`."""
        with self._lock:
            self._issued += 1
            handle = self._first + self._issued * _STEP
            self._live[handle] = thing
            return handle

    def get(self, argument: str, handle: int) -> Thing:
        """What `handle` stands for.

        Raises:
            AclError: a null handle, one that was destroyed, or none of these.
        """
        thing = self._live.get(handle)
        if thing is None:
            raise self._refuse(argument, handle)
        return thing

    def replace(self, handle: int, thing: Thing) -> None:
        """Let a live handle stand for another object."""
        with self._lock:
            if handle in self._live:
                self._live[handle] = thing

    def pop(self, argument: str, handle: int) -> Thing:
        """As `get`, and the handle ends."""
        with self._lock:
            thing = self._live.pop(handle, None)
        if thing is None:
            raise self._refuse(argument, handle)
        return thing

    def handles(self) -> list[int]:
        """The live handles."""
        return list(self._live)

    def values(self) -> Iterator[Thing]:
        """All of them, as they are now."""
        return iter(list(self._live.values()))

    def clear(self) -> None:
        """End all of them."""
        with self._lock:
            self._live.clear()

    def _refuse(self, argument: str, handle: int) -> Exception:
        if handle == 0:
            return null(self._null_code, argument)
        number, odd = divmod(handle - self._first, _STEP)
        known = odd == 0 and 0 < number <= self._issued
        bare = self._noun.split(" ", 1)[1]
        value = f"{handle:#x}, " + (f"{self._noun} that was {self._ended}" if known else f"no {bare}")
        return refusal(self._code, argument, value, f"must be a live {bare}", f"pass one of {self._maker}")
