"""Which ranks of this process have begun which collective, so that a wait can name the rank that it waits for."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass


@dataclass(frozen=True)
class Membership:
    """One rank's part in a group: the group's `name`, its `rank`, and the `members` that can be seen from here."""

    name: str
    rank: int
    members: tuple[int, ...]


_lock = threading.Lock()
_turns: defaultdict[tuple[str, int], threading.Lock] = defaultdict(threading.Lock)  # (group, rank) -> its calls' turn
_begun: dict[str, Counter[int]] = {}  # group -> rank -> collectives begun
_running: dict[tuple[str, int], Sequence[Membership]] = {}  # (group, rank) -> all groups of the call that runs there


@contextmanager
def taking_part(groups: Sequence[Membership]) -> Iterator[None]:
    """A collective over these groups runs in the block.

    A rank's calls on one group take turns, whatever streams they come from: its transport counts one exchange at a
    time. Streams that order them differently on different ranks make the ranks disagree, which is an error on each.
    """
    with _lock:
        turn = _turns[groups[0].name, groups[0].rank] if groups else nullcontext()
    with turn:
        yield from _counted(groups)


def _counted(groups: Sequence[Membership]) -> Iterator[None]:
    with _lock:
        for group in groups:
            _begun.setdefault(group.name, Counter())[group.rank] += 1
            _running[group.name, group.rank] = groups
    try:
        yield
    finally:
        with _lock:
            for group in groups:
                _running.pop((group.name, group.rank), None)
                begun = _begun.get(group.name, Counter())
                if len({begun[member] for member in group.members}) == 1:
                    _begun.pop(group.name, None)  # equal counts tell no more than no counts


def late_ranks(groups: Sequence[Membership]) -> dict[str, list[int]]:
    """The ranks that a running collective waits for, by group: those that have begun fewer collectives than it.

    Where all members of its groups have begun, the wait may be theirs for a member of another group (a tensor-parallel
    peer waits in its own expert-parallel group), so the search goes on from there.

    >>> ep, tp = Membership("ep", 0, (0, 1)), Membership("tp", 0, (0, 1))
    >>> with taking_part([ep, tp]), taking_part([Membership("ep", 1, (0, 1))]):
    ...     late_ranks([ep, tp])
    {'tp': [1]}
    """
    late: dict[str, list[int]] = {}
    seen: set[tuple[str, int]] = set()
    waiting = list(groups)
    with _lock:
        while waiting:
            group = waiting.pop()
            if (group.name, group.rank) in seen:
                continue
            seen.add((group.name, group.rank))
            begun = _begun.get(group.name, Counter())
            behind = [member for member in group.members if begun[member] < begun[group.rank]]
            if behind:
                late[group.name] = behind
            for member in group.members:
                waiting.extend(_running.get((group.name, member), ()))
    return late
