"""Episodes of the fault campaign: what every rank of a world calls around one fault, and what it saw."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from evenmoe.errors import LostRankError, RankDisagreementError
from tests.transport.campaign_batches import Batch, Member, Running
from tests.transport.campaign_faults import (
    EXCEPTIONS,
    WRONG_ARGUMENTS,
    Injection,
    comes_from_the_package,
    injected,
    make_wrong,
)

Order = tuple[tuple[str, int], ...]  # (verb, position of the batch), in the order of the calls
INJECTED = ("operation", "line", "exchange")
INTERRUPTED_ELSEWHERE = 130  # exit status of a process that Ctrl-C hit outside every call


@dataclass(frozen=True)
class Step:
    batches: tuple[Batch, ...]
    order: Order

    def with_seed(self, seed: int) -> Step:
        """The same calls with other numbers."""
        return replace(self, batches=tuple(replace(b, seed=seed + i) for i, b in enumerate(self.batches)))


@dataclass(frozen=True)
class Episode:
    """One fault and the calls around it.

    Attributes:
        kind: "operation", "line", "exchange", "argument", "skip", "repeat", "reorder", or "free": steps for ever, until
            an error ends them, while somebody outside does the harm.
        guilty: world index of the rank that gets the fault.
        before: a step without fault. step: the one that it hits. after: what everybody calls then.
        call: position in the order of `step`, for faults inside a call. fraction: how far into the call, 0 to 1.
        what: name of the exception or of the wrong argument; for skip, repeat and reorder what the guilty rank does.
        guilty_order: the guilty rank's calls of `step`, for skip, repeat and reorder.
        deadly: the group cannot be used afterwards.
    """

    number: int
    kind: str
    guilty: int
    before: tuple[Step, ...]
    step: Step
    after: tuple[Step, Step]
    call: int = 0
    fraction: float = 0.0
    what: str = ""
    guilty_order: Order = ()
    deadly: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one call gave on one rank.

    Attributes:
        section: "before", "fault", "after", "after, again" or "at last".
        call: its number within the section. operator: as the table names it. variant: of the batch.
        result: "right", "wrong" or "raised"; detail: what is wrong, or the error's text.
        error: name of the error's class. family: "disagreement", "lost" or "other". ranks: of a LostRankError.
        own: it is the very error that was injected here, or what this rank's wrong argument must give.
        where: of an injection that was due in this call. elsewhere: Ctrl-C came outside evenmoe.
        seconds: that the call took. ended: time.monotonic() at its end, the same clock in all processes.
    """

    section: str
    call: int
    operator: str
    variant: str
    result: str
    seconds: float
    ended: float
    detail: str = ""
    error: str = ""
    family: str = ""
    ranks: tuple[int, ...] = ()
    own: bool = False
    where: str = ""
    elsewhere: bool = False


Note = Callable[[str, bool], None]  # (operator, whether it is being called now)
Fault = Injection | str | None  # what happens in a call: an injected exception, a wrong argument's name, or nothing


class Performer:
    """One rank that performs episodes; `note` hears of every call, so that a killed rank's last one is known."""

    def __init__(self, member: Member, note: Note) -> None:
        self.member, self._note = member, note

    def perform(self, episode: Episode) -> list[Outcome]:
        if episode.kind == "free":
            return self._perform_until_an_error(episode)
        guilty = episode.guilty == self.member.rank.index
        outcomes: list[Outcome] = []
        fault: Fault = None
        for step in episode.before:
            counting = Injection(episode.kind) if guilty and episode.kind in INJECTED else None
            outcomes += self._run(step, "before", episode.call, counting)
            if counting is not None:
                error = EXCEPTIONS[episode.what](f"injected in episode {episode.number}")
                fault = Injection(episode.kind, int(episode.fraction * counting.events), error)
        if any(outcome.result != "right" for outcome in outcomes):
            return outcomes
        if guilty and episode.kind == "argument":
            fault = episode.what
        step = episode.step
        if guilty and episode.guilty_order:
            step = replace(step, order=episode.guilty_order)
        outcomes += self._run(step, "fault", episode.call, fault)
        return outcomes + self._go_on(episode)

    def _go_on(self, episode: Episode) -> list[Outcome]:
        first, last = episode.after
        outcomes = self._run(first, "after")
        # A rank that failed after its last exchange, or that has called less or more than the others, is found out at
        # the next call, which all then make anew.
        # With tensor parallelism those of a whole group would call once more than their peers of a closed one.
        peers_are_closed = episode.deadly and self.member.tp_size == 2
        if outcomes[0].family == "disagreement" and not peers_are_closed:
            outcomes += self._run(first, "after, again")
        return outcomes + self._run(last, "at last")

    def _perform_until_an_error(self, episode: Episode) -> list[Outcome]:
        steps = itertools.cycle(episode.before)
        right = 0
        for seed in itertools.count(episode.number * 1_000_000, 10):
            outcomes = self._run(next(steps).with_seed(seed), "fault")
            if outcomes[-1].result == "right":
                right += len(outcomes)
                continue
            if outcomes[-1].elsewhere and self.member.rank.index == episode.guilty:
                os._exit(INTERRUPTED_ELSEWHERE)
            # Of the calls before it only their number is kept.
            return [replace(outcomes[-1], call=right + len(outcomes) - 1), *self._go_on(episode)]
        raise AssertionError("itertools.count ends")

    def _run(self, step: Step, section: str, call_of_fault: int = -1, fault: Fault = None) -> list[Outcome]:
        """The calls of a step, until one of them is not right."""
        outcomes: list[Outcome] = []
        running: dict[int, Running] = {}
        for call, (verb, position) in enumerate(step.order):
            if position not in running:
                running[position] = Running(self.member, step.batches[position])
            here = fault if call == call_of_fault else None
            outcomes.append(self._call(section, call, verb, running[position], here))
            if outcomes[-1].result != "right":
                break
        return outcomes

    def _call(self, section: str, call: int, verb: str, running: Running, fault: Fault) -> Outcome:
        batch, injection = running.batch, fault if isinstance(fault, Injection) else None
        operator, begin = batch.operator(verb, self.member.tp_size), time.monotonic()

        def outcome(result: str, **rest: Any) -> Outcome:
            end = time.monotonic()
            where = "" if injection is None else injection.where
            return Outcome(section, call, operator, batch.variant(), result, end - begin, end, where=where, **rest)

        try:
            arguments = running.arguments(verb)
            if isinstance(fault, str):
                assert WRONG_ARGUMENTS[fault][0] == verb, (fault, verb)
                arguments = make_wrong(fault, batch.kind, arguments)
            begin = time.monotonic()
            self._note(operator, True)
            if injection is None:
                result = running.call(verb, arguments)
            else:
                with injected(injection, [self.member.rank.ep, self.member.rank.tp]):
                    result = running.call(verb, arguments)
            self._note(operator, False)
            if isinstance(fault, str):
                return outcome("wrong", detail=f"{fault} was accepted")
            problem = running.check(verb, result)
            return outcome("wrong" if problem else "right", detail=problem)
        except BaseException as error:  # whatever a call raises is what the campaign is about
            family = {RankDisagreementError: "disagreement", LostRankError: "lost"}.get(type(error), "other")
            own = injection is not None and error is injection.error
            return outcome(
                "raised",
                detail=str(error),
                error=type(error).__name__,
                family=family,
                ranks=tuple(getattr(error, "ranks", ())),
                own=own or (isinstance(fault, str) and family == "other"),
                elsewhere=isinstance(error, KeyboardInterrupt) and not comes_from_the_package(error.__traceback__),
            )
