"""What the fault campaign holds against the runtime: the promises, and which of them an episode broke."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tests.transport.campaign_episodes import INTERRUPTED_ELSEWHERE, Episode, Outcome
from tests.transport.campaign_plans import Plan

SLACK_S = 2.0  # a busy machine may take this long to wake a process whose wait is over


@dataclass
class Verdict:
    """Counts of one episode, and its broken promises in words.

    Attributes:
        operator: which the fault hit. missed: the call was over before the fault was due.
        late: the other ranks had what they needed for this call, and met the fault at the next.
        own, own_due: whether the guilty rank's error was its own; whether there had to be one.
        named, named_due: errors of other ranks that name the guilty one; all their errors that must.
        settled: the ranks are in step afterwards, or the group is closed on all of them.
        seconds: from a signal to the error of the last rank that noticed; −1 if not measured.
    """

    operator: str = "-"
    missed: bool = False
    late: bool = False
    own: int = 0
    own_due: int = 0
    named: int = 0
    named_due: int = 0
    wrong_names: int = 0
    settled: bool = True
    wrong_values: int = 0
    hangs: int = 0
    aborts: int = 0
    seconds: float = -1.0
    broken: list[str] = field(default_factory=list)

    def breaks(self, rank: int, promise: str) -> None:
        self.broken.append(f"rank {rank}: {promise}")


Answers = list[list[Outcome] | None]


def judge(
    plan: Plan, episode: Episode, answers: Answers, exits: list[int | None], timeout_s: float, harmed_at: float = 0.0
) -> Verdict:
    """Hold what the ranks saw against the promises.

    Args:
        exits: exit status of a rank's process, None while it runs.
        harmed_at: time.monotonic() of the signal of a "free" episode.
    """
    verdict = Verdict()
    dead = {episode.guilty} | ({plan.also_killed} if plan.also_killed >= 0 else set()) if plan.harm else set()
    for rank, outcomes in enumerate(answers):
        _look_for_the_worst(verdict, plan, rank, outcomes, exits[rank], timeout_s, silent_ok=rank in dead)
    reports = {rank: outcomes for rank, outcomes in enumerate(answers) if outcomes}
    if plan.harm:
        _judge_harm(verdict, plan, episode, reports, exits, dead, timeout_s, harmed_at)
    elif episode.deadly:
        _judge_closed(verdict, plan, episode, reports, timeout_s)
    elif episode.guilty_order:
        _judge_order(verdict, plan, episode, reports)
    else:
        _judge_one_error(verdict, plan, episode, reports)
    verdict.settled = verdict.settled and not (verdict.hangs or verdict.aborts)
    return verdict


def _look_for_the_worst(
    verdict: Verdict,
    plan: Plan,
    rank: int,
    outcomes: list[Outcome] | None,
    status: int | None,
    timeout_s: float,
    silent_ok: bool,
) -> None:
    if outcomes is None:
        if silent_ok:
            return
        verdict.named_due += 1  # it should have had an error that names the guilty rank
        if status is None:
            verdict.hangs += 1
            verdict.breaks(rank, "hangs past the time-out")
        else:
            verdict.aborts += 1
            verdict.breaks(rank, f"its process ended with status {status}")
        return
    for outcome in outcomes:
        if outcome.result == "wrong":
            verdict.wrong_values += 1
            verdict.breaks(rank, f"wrong value from {outcome.operator} ({outcome.section}): {outcome.detail}")
        if outcome.seconds > timeout_s + SLACK_S:
            verdict.hangs += 1
            verdict.breaks(rank, f"{outcome.operator} took {outcome.seconds:.1f} s")
        if outcome.section == "before" and outcome.result != "right":
            verdict.settled = False
            verdict.breaks(rank, f"before the fault: {outcome.error} {outcome.detail}")


def _judge_one_error(verdict: Verdict, plan: Plan, episode: Episode, reports: dict[int, list[Outcome]]) -> None:
    """An error of one rank within one call: its own there, a RankDisagreementError on the others, then in step."""
    hit = [o for o in reports.get(episode.guilty, []) if o.section == "fault" and o.call == episode.call]
    if not hit:
        verdict.settled = False
        return
    verdict.operator = hit[0].operator
    if not (hit[0].where or episode.kind == "argument"):
        verdict.missed = True
    else:
        _take_own_error(verdict, episode, hit[0])
    others = {rank: outcomes for rank, outcomes in reports.items() if rank != episode.guilty}
    at_call = [o for outcomes in others.values() for o in outcomes if o.section == "fault" and o.call == episode.call]
    verdict.late = len(at_call) == plan.size - 1 and all(o.result == "right" for o in at_call)
    for rank, outcomes in others.items():
        errors = [o for o in outcomes if o.result == "raised" and o.section != "before"]
        due = not verdict.missed and not (verdict.late and episode.call == len(episode.step.order) - 1)
        if not due and not verdict.late and not errors:
            continue
        verdict.named_due += due
        if due and (not errors or errors[0].section != "fault"):
            verdict.breaks(rank, "has no error, and others have one")
        elif due:
            _take_name(verdict, plan, episode, rank, errors[0], "disagreement")
        for error in errors[due:]:
            verdict.settled = False
            verdict.breaks(rank, f"one more error ({error.section}): {error.error}: {error.detail}")
    _take_steps_after(verdict, reports)


def _judge_order(verdict: Verdict, plan: Plan, episode: Episode, reports: dict[int, list[Outcome]]) -> None:
    """Ranks in different places: one RankDisagreementError, the same on every rank, then in step."""
    texts = set()
    for rank, outcomes in reports.items():
        errors = [o for o in outcomes if o.result == "raised" and o.section != "before"]
        verdict.named_due += 1
        if not errors:
            if all(o.result == "right" for o in outcomes):
                verdict.breaks(rank, f"no error, though rank {episode.guilty} {episode.what}")
            continue
        verdict.operator = errors[0].operator
        _take_name(verdict, plan, episode, rank, errors[0], "disagreement")
        texts.add(errors[0].detail)
        for error in errors[1:]:
            verdict.settled = False
            verdict.breaks(rank, f"one more error ({error.section}): {error.error}: {error.detail}")
    if len(texts) > 1:
        verdict.breaks(episode.guilty, f"the ranks' errors differ: {sorted(texts)}")
    _take_steps_after(verdict, reports)


def _judge_closed(
    verdict: Verdict, plan: Plan, episode: Episode, reports: dict[int, list[Outcome]], timeout_s: float
) -> None:
    """An exception that ends programs: its own on the rank, LostRankError on the others, and for good."""
    hit = [o for o in reports.get(episode.guilty, []) if o.section == "fault" and o.call == episode.call]
    if not hit:
        verdict.settled = False
        return
    verdict.operator = hit[0].operator
    if not hit[0].where:
        verdict.missed = True
        _take_steps_after(verdict, reports)
        return
    _take_own_error(verdict, episode, hit[0])
    if _is_open(reports):
        _judge_at_the_edge(verdict, plan, episode, reports, hit[0])
        return
    for rank, outcomes in reports.items():
        if rank == episode.guilty:
            later = [o for o in outcomes if o.section in ("after", "at last")]
            _take_closed(verdict, plan, rank, later, {episode.guilty}, timeout_s)
        else:
            _take_loss(verdict, plan, episode, rank, outcomes, {episode.guilty}, timeout_s)


def _is_open(reports: dict[int, list[Outcome]]) -> bool:
    return not any(outcome.family == "lost" for outcomes in reports.values() for outcome in outcomes)


def _judge_at_the_edge(
    verdict: Verdict, plan: Plan, episode: Episode, reports: dict[int, list[Outcome]], hit: Outcome
) -> None:
    """An interrupt before a call's first exchange or after its last one: the call was not made, or it is over.

    Then nothing need be closed: the ranks are in different places, as if one had skipped a call, and in step after it.
    """
    others = {rank: outcomes for rank, outcomes in reports.items() if rank != episode.guilty}
    verdict.late = True
    for rank, outcomes in others.items():
        errors = [o for o in outcomes if o.result == "raised" and o.section != "before"]
        for error in errors[:1]:
            verdict.named_due += 1
            _take_name(verdict, plan, episode, rank, error, "disagreement")
            met = [o for o in reports[episode.guilty] if o.section == "after" and o.family == "disagreement"]
            if error.section == "fault" and error.call <= hit.call and not met:
                verdict.breaks(rank, f"is not closed after {hit.error} in the midst of a call: {error.detail}")
        for error in errors[1:]:
            verdict.settled = False
            verdict.breaks(rank, f"one more error ({error.section}): {error.error}: {error.detail}")
    _take_steps_after(verdict, reports)


def _judge_harm(
    verdict: Verdict,
    plan: Plan,
    episode: Episode,
    reports: dict[int, list[Outcome]],
    exits: list[int | None],
    dead: set[int],
    timeout_s: float,
    harmed_at: float,
) -> None:
    """A process that is killed, stopped or interrupted while steps run."""
    noticed = []
    hit = next(iter(reports.get(episode.guilty, ())), None)
    if plan.harm == "interrupt" and hit is not None and hit.error == "KeyboardInterrupt" and _is_open(reports):
        verdict.operator, verdict.own_due, verdict.own = hit.operator, 1, 1
        _judge_at_the_edge(verdict, plan, episode, reports, hit)
        return
    for rank, outcomes in reports.items():
        if rank in dead:
            if plan.harm != "interrupt":
                verdict.breaks(rank, "goes on after its end")
                continue
            verdict.operator = outcomes[0].operator
            verdict.own_due, verdict.own = 1, int(outcomes[0].error == "KeyboardInterrupt")
            if not verdict.own:
                verdict.breaks(rank, f"{outcomes[0].error} instead of KeyboardInterrupt: {outcomes[0].detail}")
            later = [o for o in outcomes if o.section in ("after", "at last")]
            _take_closed(verdict, plan, rank, later, dead, timeout_s)
            continue
        noticed.append(outcomes[0].ended - harmed_at)
        _take_loss(verdict, plan, episode, rank, outcomes, dead, timeout_s)
    if plan.harm == "interrupt" and episode.guilty not in reports:
        if exits[episode.guilty] == INTERRUPTED_ELSEWHERE:
            verdict.operator = "between calls"
        else:
            verdict.breaks(episode.guilty, f"ended with status {exits[episode.guilty]} after Ctrl-C")
    verdict.seconds = max(noticed, default=-1.0)


def _take_own_error(verdict: Verdict, episode: Episode, hit: Outcome) -> None:
    verdict.own_due, verdict.own = 1, int(hit.own)
    if not hit.own and hit.result != "wrong":
        verdict.breaks(
            episode.guilty,
            f"its own error is lost ({episode.what} {hit.where}): {hit.error or hit.result}: {hit.detail}",
        )


def _take_name(verdict: Verdict, plan: Plan, episode: Episode, rank: int, error: Outcome, family: str) -> None:
    if error.family != family:
        wanted = "RankDisagreementError" if family == "disagreement" else "LostRankError"
        verdict.breaks(rank, f"{error.error}, not a {wanted}: {error.detail}")
    named = {int(number) for number in re.findall(r"\bon rank (\d+)\b", error.detail)} | set(error.ranks)
    # The two groups of a world with tensor parallelism number their ranks each for itself, and a rank that fails since
    # its peer's other group failed names the peer.
    if episode.guilty in named or (plan.tp_size == 2 and named):
        verdict.named += 1
    elif named:
        verdict.wrong_names += 1
        verdict.breaks(rank, f"names {sorted(named)}, not {episode.guilty}: {error.detail}")
    else:
        verdict.breaks(rank, f"names no rank: {error.detail}")


def _take_loss(
    verdict: Verdict,
    plan: Plan,
    episode: Episode,
    rank: int,
    outcomes: list[Outcome],
    dead: set[int],
    timeout_s: float,
) -> None:
    errors = [o for o in outcomes if o.result == "raised" and o.section != "before"]
    verdict.named_due += 1
    if not errors:
        verdict.settled = False
        verdict.breaks(rank, "no error, though a rank is lost")
        return
    first = errors[0]
    if plan.harm in ("kill", "stop"):
        verdict.operator = first.operator
    if plan.tp_size == 2 and (first.family == "disagreement" or first.ranks):
        # Whose expert-parallel group is whole hears of the loss from its peer.
        verdict.named += 1
    elif first.family != "lost":
        verdict.breaks(rank, f"{first.error}, not a LostRankError: {first.detail}")
    elif not first.ranks:
        verdict.breaks(rank, f"names no rank: {first.detail}")
    elif plan.tp_size == 1 and not set(first.ranks) <= dead:
        verdict.wrong_names += 1
        verdict.breaks(rank, f"names {first.ranks}, not {sorted(dead)}: {first.detail}")
    else:
        verdict.named += 1
    _take_closed(verdict, plan, rank, errors[1:], dead, timeout_s, first.ranks)


def _take_closed(
    verdict: Verdict,
    plan: Plan,
    rank: int,
    later: list[Outcome],
    dead: set[int],
    timeout_s: float,
    ranks: tuple[int, ...] = (),
) -> None:
    """Every later call raises a LostRankError at once, with the same ranks.

    With tensor parallelism a group may be whole, and its ranks wait for each other in it until the time-out.
    """
    ranks = ranks or tuple(sorted(dead))
    for outcome in later:
        closed = outcome.family == "lost" and outcome.ranks == ranks
        if not (closed or (plan.tp_size == 2 and outcome.family in ("lost", "disagreement"))):
            verdict.settled = False
            problem = f"{outcome.error or outcome.result} {outcome.ranks} {outcome.detail}"
            verdict.breaks(rank, f"a later call is not closed for {ranks}: {problem}")
        elif plan.tp_size == 1 and outcome.seconds > timeout_s / 2:
            verdict.settled = False
            verdict.breaks(rank, f"a later call took {outcome.seconds:.1f} s to say that the group is closed")


def _take_steps_after(verdict: Verdict, reports: dict[int, list[Outcome]]) -> None:
    """The last attempt at the next step, and the step behind it, give right values on every rank."""
    for rank, outcomes in reports.items():
        again = any(o.section == "after, again" for o in outcomes)
        last = [o for o in outcomes if o.section == ("after, again" if again else "after")]
        last += [o for o in outcomes if o.section == "at last"]
        if not last or any(o.result != "right" for o in last):
            verdict.settled = False
            first = next((o for o in last if o.result != "right"), None)
            verdict.breaks(
                rank, f"out of step: {'stopped early' if first is None else first.error + ': ' + first.detail}"
            )
