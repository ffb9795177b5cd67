"""The fault campaign: worlds of 2 to 8 ranks that are killed, interrupted, and fail in the midst of calls.

    python -m tests.transport.fault_campaign                   # everything, about a quarter of an hour on two cores
    python -m tests.transport.fault_campaign --only kill --kill 20
    python -m tests.transport.fault_campaign --repeat exception:17 --seed 1    # one world again, all of it told

Every value of every call on every rank, before a fault and after it, is compared with what it must be. The table says
for each kind of fault and operator what was tried and what came of it; the exit status is 1 if a promise was broken:

- an ordinary exception of one rank: its own error there, a RankDisagreementError that names it on the others; the next
  right call gives right values;
- ranks that skip, repeat or reorder calls: the same RankDisagreementError everywhere, then as above;
- KeyboardInterrupt, SystemExit, Ctrl-C, a process that is killed or stopped: a LostRankError whose `ranks` are the lost
  ones on the others, and at once at every later call;
- never a wrong value, a wait beyond the time-out, a process that aborts, or a wrong name; nothing stays in /dev/shm.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import torch

import evenmoe as em
from evenmoe.transport import shared_memory
from tests.transport.campaign_batches import Member
from tests.transport.campaign_episodes import Episode, Outcome
from tests.transport.campaign_plans import ALONE, Maker, Plan, make_plan
from tests.transport.campaign_verdict import Verdict, judge
from tests.transport.campaign_worlds import World
from tests.transport.soak import segments

#: {kind: (how many by default, how many in one world)}; what ends a world has one to itself.
NUMBERS = {
    "exception": (160, 10),
    "last-exception": (40, 1),
    "argument": (60, 10),
    "order": (100, 10),
    "kill": (200, 1),
    "interrupt": (100, 1),
    "stop": (4, 1),
    "local-exception": (160, 10),
    "local-last-exception": (30, 1),
    "local-argument": (60, 10),
    "local-order": (60, 10),
    "shared-exception": (160, 10),
    "shared-last-exception": (40, 1),
    "shared-argument": (60, 10),
    "shared-order": (60, 10),
    "shared-kill": (100, 1),
    "shared-interrupt": (60, 1),
    "shared-stop": (4, 1),
}
SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "stop": signal.SIGSTOP}
STOP_TIMEOUT_S = 2.0  # of the worlds in which a process is stopped, which is noticed at the time-out alone
COLUMNS = ("tried", "late", "own error", "named", "settled", "wrong values", "hangs", "aborts", "wrong names")


@dataclass
class Tally:
    """What came of the campaign so far."""

    rows: dict[tuple[str, str], list[Verdict]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)  # right calls before faults, by variant
    missed: int = 0
    slow: list[str] = field(default_factory=list)  # signals that some rank noticed later than a second after
    broken: list[str] = field(default_factory=list)

    def add(self, plan: Plan, episode: Episode, verdict: Verdict, told: str) -> None:
        fault = f"{plan.kind}, {episode.kind}" if episode.kind != "free" else plan.kind
        if verdict.missed:
            self.missed += 1
        else:
            self.rows.setdefault((fault, verdict.operator), []).append(verdict)
        if verdict.seconds > 1.0:
            self.slow.append(f"  {plan}: {verdict.operator}, {verdict.seconds:.2f} s")
        if verdict.broken:
            head = f"{plan} episode {episode.number}: rank {episode.guilty}, {fault} {episode.what}"
            self.broken.append("\n  ".join([head, *verdict.broken, told]))

    def table(self) -> str:
        lines = [("fault", "operator", *COLUMNS)]
        for (fault, operator), verdicts in sorted(self.rows.items()):
            lines.append((fault, operator, *_cells(verdicts)))
        lines.append(("all", "", *_cells([v for verdicts in self.rows.values() for v in verdicts])))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join(text.rstrip() for text in texts)

    def summary(self) -> str:
        lines = [f"{sum(self.calls.values())} right calls before faults:"]
        lines += [f"  {count} of {variant}" for variant, count in sorted(self.calls.items())]
        lines.append(f"{self.missed} faults were due only after their call was over")
        for kind in (prefix + kind for prefix in ("", "shared-") for kind in SIGNALS):
            verdicts = [v for (fault, _), verdicts in self.rows.items() if fault == kind for v in verdicts]
            seconds = [v.seconds for v in verdicts if v.seconds >= 0]
            if seconds:
                told = f"median {statistics.median(seconds):.3f}, longest {max(seconds):.3f} s"
                lines.append(f"{kind}: until the last rank noticed, {told}")
        lines += ["noticed later than a second after the signal:", *self.slow] if self.slow else []
        lines.append(f"{len(self.broken)} episodes broke a promise")
        return "\n".join(lines)


def _cells(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    def of(name: str) -> int:
        return sum(int(getattr(verdict, name)) for verdict in verdicts)

    return (
        str(len(verdicts)),
        str(of("late")),
        f"{of('own')}/{of('own_due')}",
        f"{of('named')}/{of('named_due')}",
        f"{of('settled')}/{len(verdicts)}",
        *(str(of(name)) for name in ("wrong_values", "hangs", "aborts", "wrong_names")),
    )


def perform(plan: Plan, timeout_s: float, tally: Tally, prepare: Callable[[], object], tell: bool = False) -> None:
    """Open the plan's world and perform its episodes; a world in which a promise broke is opened anew for the rest."""
    if plan.harm == "stop":
        timeout_s = STOP_TIMEOUT_S
    left = list(plan.episodes)

    def begin() -> None:
        if plan.number % 2:  # small rows are lent in place, too, as only large ones are else
            shared_memory._IN_PLACE = 0
        prepare()

    while left:
        world = World(plan.size, plan.tp_size, plan.threads, plan.store, timeout_s, begin, plan.transport)
        try:
            whole = True
            while left and whole:
                episode = left.pop(0)
                verdict, answers = _perform_one(plan, episode, world, timeout_s)
                told = "" if whole and not verdict.broken and not tell else _tell(answers, world)
                tally.add(plan, episode, verdict, told)
                if tell:
                    print(f"{plan} episode {episode}\n{told}\n{verdict}")
                for outcome in (outcome for outcomes in answers for outcome in outcomes or ()):
                    if outcome.section == "before":
                        tally.calls[outcome.variant] += outcome.result == "right"
                    elif episode.kind == "free" and outcome.section == "fault":
                        tally.calls["steps that a signal ended"] += outcome.call
                whole = not verdict.broken
        finally:
            world.close()


def _perform_one(
    plan: Plan, episode: Episode, world: World, timeout_s: float
) -> tuple[Verdict, list[list[Outcome] | None]]:
    world.ask(episode)
    harmed_at, operator = 0.0, ""
    if plan.harm:
        harmed_at, operator = _harm(plan, episode, world)
    # Three waits are the most that a broken promise makes of one episode, before the ranks are called hung.
    answers = world.answers(3 * timeout_s + 3.0)
    exits = [
        world.exit_status(rank) if outcomes is None or plan.threads else None for rank, outcomes in enumerate(answers)
    ]
    verdict = judge(plan, episode, answers, exits, timeout_s, harmed_at)
    if plan.harm in ("kill", "stop"):
        verdict.operator = operator
    return verdict, answers


def _harm(plan: Plan, episode: Episode, world: World) -> tuple[float, str]:
    """Send the signal at a random moment of a warm world; when, and the operator that it hit."""
    random = Random(f"{plan} {episode.number}")
    begin = time.monotonic()
    while world.calls() < 12 and time.monotonic() < begin + 30.0:
        time.sleep(0.002)
    time.sleep(random.random() * 0.03)
    number = SIGNALS[plan.harm]
    harmed_at = time.monotonic()
    world.send_signal(episode.guilty, number)
    if plan.also_killed >= 0:
        world.send_signal(plan.also_killed, number)
    if plan.harm == "kill":
        world.exit_status(episode.guilty)
    return harmed_at, world.position(episode.guilty)


def _tell(answers: Sequence[Sequence[Outcome] | None], world: World) -> str:
    """What every rank saw, in a line each, and what its process wrote."""
    lines = []
    for rank, outcomes in enumerate(answers):
        seen = "nothing" if outcomes is None else "; ".join(_short(o) for o in outcomes if o.section != "before")
        lines.append(f"  saw on {rank}: {seen}")
    words = world.last_words()
    return "\n".join([*lines, *(f"  | {line}" for line in words.splitlines()[-12:])])


def _short(outcome: Outcome) -> str:
    text = f"[{outcome.section} {outcome.call}] {outcome.operator} {outcome.result} {outcome.error}"
    return f"{text.strip()} {outcome.ranks or ''} {outcome.where} {outcome.seconds:.2f} s"


def plans(numbers: dict[str, int], seed: int, sizes: Sequence[int]) -> Iterator[Plan]:
    for kind, count in numbers.items():
        in_one = NUMBERS[kind][1]
        for number in range(-(-count // in_one)):
            yield make_plan(kind, number, seed, min(in_one, count - number * in_one), count, sizes)


def warm_up() -> None:
    """Load the compiled kernels once, for all the processes that are forked from this one."""
    torch.set_num_threads(1)
    maker = Maker(Random(0), 1, 1)
    from tests.transport.campaign_batches import LAYERS, Running

    def steps(rank: em.transport.world.Rank) -> None:
        member = Member(rank, 1)
        for batch in [*(replace(maker.layer(i), tokens=(3,)) for i in range(len(LAYERS))), maker.chain()]:
            running = Running(member, batch)
            for verb, _ in ALONE:
                problem = running.check(verb, running.call(verb, running.arguments(verb)))
                assert not problem, problem

    with em.local_world(ep_size=1) as world:
        world.run(steps)


def run_campaign(
    campaign: Sequence[Plan],
    timeout_s: float,
    prepare: Callable[[], object] = lambda: None,
    tell: bool = False,
    progress: Callable[[str], object] = lambda text: None,
) -> Tally:
    """Perform the plans, one world after the other.

    Args:
        prepare: called in every process before its world opens, to plant a bug.
    """
    warm_up()
    tally = Tally()
    begin = time.monotonic()
    for position, plan in enumerate(campaign):
        perform(plan, timeout_s, tally, prepare, tell)
        progress(f"{position + 1}/{len(campaign)} {plan} {time.monotonic() - begin:.0f} s, {len(tally.broken)} broken")
    return tally


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, (count, _) in NUMBERS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, metavar="N", help=f"episodes, {count} if not given")
    parser.add_argument("--only", nargs="+", choices=NUMBERS, help="these kinds alone")
    parser.add_argument("--repeat", metavar="KIND:NUMBER", help="one world of the same numbers and seed, told in full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8], help="ranks of worlds")
    parser.add_argument("--timeout", type=float, default=8.0, help="seconds, of the worlds")
    parser.add_argument("--details", type=int, default=20, help="broken promises to print in full")
    parser.add_argument("--quiet", action="store_true", help="no line for each world")
    options = parser.parse_args(words)
    numbers = {kind: getattr(options, kind.replace("-", "_")) for kind in options.only or NUMBERS}
    campaign = list(plans(numbers, options.seed, options.sizes))
    if options.repeat:
        campaign = [plan for plan in campaign if f"{plan.kind}:{plan.number}" == options.repeat]
    tell, before = bool(options.repeat), segments()
    progress: Callable[[str], object] = print if not options.quiet else lambda text: None
    tally = run_campaign(campaign, options.timeout, tell=tell, progress=progress)
    left = [str(path) for path in segments() if path not in before]
    print("\n\n".join(["", *tally.broken[: options.details], tally.table(), tally.summary()]))
    print(f"left in /dev/shm: {', '.join(left) or 'nothing'}")
    return 1 if tally.broken or left else 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)
