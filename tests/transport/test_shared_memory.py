"""Processes that read each other's rows where they lie: what a slow reader sees, what is left over, and who chooses."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import evenmoe as em
from evenmoe.errors import ConstraintError, LostRankError, RankDisagreementError
from evenmoe.transport import shared_memory
from evenmoe.transport.process_group import RemappedTransport
from evenmoe.transport.world import Rank
from tests.processes import TRANSPORTS, Processes, run_once
from tests.transport import soak

SIZE = 4
TABLE = em.Placement([list(range(8))], SIZE).eplb_table(0)
ONLY_LARGE = shared_memory._IN_PLACE


def views(rank: Rank, least: int, members: list[int] | None, seed: int) -> list[str]:
    """Rows of every size and dtype, shown where they lie or from a window, read late; what is wrong."""
    shared_memory._IN_PLACE = least
    problems = []
    group = rank.ep
    if members is not None:
        if rank.index not in members:
            return []
        group = RemappedTransport(rank.ep, members)
    random = np.random.default_rng(seed)
    for number in range(40):
        counts, width = random.integers(0, 9, (group.world_size, 2)), int(random.choice([0, 1, 3, 200]))
        dtype = [torch.float64, torch.bfloat16, torch.int8][number % 3]
        lags, lent = random.random(group.world_size) < 0.1, random.random(group.world_size) < 0.5
        me = group.rank
        shape, like = (int(counts[me, 0]), width), torch.zeros(0, dtype=dtype)
        kept = group.new_rows(shape, like) if lent[me] else None
        rows = torch.empty(shape, dtype=dtype) if kept is None else kept
        rows.fill_(10 * me + number % 7)
        lengths = [int(counts[me, 1]) + d for d in range(group.world_size)]
        message = np.repeat(np.arange(group.world_size, dtype=np.uint8) + 10 * me, lengths).astype(np.uint8)
        found = group.exchange_views(rows, message, lengths)
        if lags[me]:
            time.sleep(0.01)
        for source in range(group.world_size):
            theirs, message = found.rows_of(source, rows), found.message_of(source)
            if theirs.shape != (counts[source, 0], width) or not (theirs == 10 * source + number % 7).all():
                problems.append(f"{number}: rows of {source} on {me} are {theirs}")
            if len(message) != counts[source, 1] + me or not (message == 10 * source + me).all():
                problems.append(f"{number}: message of {source} on {me} is {message}")
        group.end_reading()
        rows.fill_(99)  # a slower rank must not see this
    shared_memory._IN_PLACE = ONLY_LARGE
    return problems


@pytest.mark.parametrize("least", [0, ONLY_LARGE])
@pytest.mark.parametrize("members", [None, [2, 0, 3]])
def test_rows_and_messages_are_seen_as_they_were_shown(processes, least, members):
    assert processes.run((SIZE, 1), views, least, members, 3, transport="shared_memory") == [[]] * SIZE


def zero_behind(rank: Rank) -> list[str]:
    """Rows that a rank gets are zeros behind those that it fills, whatever it wrote there before."""
    wrong = []
    for number, filled in enumerate([0, 5, 2, 8, 1]):
        like = torch.empty(0, dtype=torch.bfloat16)
        rows = rank.ep.new_rows((8, 70_001), like, filled=filled)
        assert rows is not None
        if rows[filled:].any():
            wrong.append(f"{number}: {filled} rows")
        rows.fill_(3)
        views = rank.ep.exchange_views(rows, np.zeros(0, np.uint8), [0] * SIZE)
        wrong += [f"{number}: rows of {s}" for s in range(SIZE) if not (views.rows_of(s, rows) == 3).all()]
        rank.ep.end_reading()
        del rows, views
    return wrong


def test_rows_that_are_not_filled_are_zeros(processes):
    assert processes.run((SIZE, 1), zero_behind, transport="shared_memory") == [[]] * SIZE


def test_rows_that_find_no_room_lie_elsewhere(processes):
    assert processes.run((SIZE, 1), too_large, transport="shared_memory") == [True] * SIZE


def too_large(rank: Rank) -> bool:
    return rank.ep.new_rows((1 << 30, 1 << 30), torch.empty(0, dtype=torch.int8)) is None


def overlapping(rank: Rank) -> bool:
    """Groups that overlap: a window must not be filled anew while a rank of the last group still reads it."""
    right = True
    for number in range(30):
        for members in ([0, 1], [0, 2], [0, 3], [0, 2], [1, 2, 3]):
            if rank.index in members:
                if rank.index == 1 and len(members) == 2:
                    time.sleep(0.002)
                counts = torch.full((SIZE, 3), 100 * rank.index + number)
                found = rank.ep.exchange_counts(counts, members)[members, 0].tolist()
                right &= found == [100 * member + number for member in members]
    return right


def test_groups_that_overlap(processes):
    assert processes.run((SIZE, 1), overlapping, transport="shared_memory") == [True] * SIZE


def large_step(rank: Rank) -> tuple[bool, bool]:
    """Whether rows of some megabytes lie where the others can read them, and come back right."""
    layer = em.ExpertParallel(rank.ep, TABLE, num_slots=8)
    x = torch.full((64, 4096), rank.index + 1.0)
    ids = torch.stack([torch.arange(64) % 8, (torch.arange(64) + 3) % 8], dim=1)
    sent = layer.dispatch(x, ids, torch.full((64, 2), 0.5))
    out = sent.rows
    out.mul_(2.0)
    y = layer.combine(sent, out)
    arena = getattr(rank.ep, "_arena", None)
    lies_there = arena is not None and arena.offset_of(out) >= 0
    out.fill_(float("nan"))  # at once, while slower ranks may still read
    return lies_there, bool((y == 2 * x).all())


def test_large_rows_are_read_where_they_lie(processes):
    for _ in range(5):
        found = processes.run((SIZE, 1), large_step, transport="shared_memory")
        assert found == [(True, True)] * SIZE


def test_a_short_soak():
    results, problems = soak.run(steps=600, worlds=150)
    assert not problems, (problems, results)


@pytest.fixture
def mortal_processes():
    """Processes of one test alone, since one of them will not survive it."""
    pool = Processes(SIZE, [(SIZE, 1)], timeout_s=60.0)
    yield pool
    pool.stop()


def die_midway(rank: Rank) -> tuple[str, tuple[int, ...], float]:
    large_step(rank)
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        large_step(rank)
    except LostRankError as error:
        return str(error), error.ranks, time.monotonic() - begin
    return "", (), 0.0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_rank_is_named_and_leaves_nothing(mortal_processes, transport):
    before = soak.segments()
    results = mortal_processes.run((SIZE, 1), die_midway, patience_s=40.0, transport=transport)
    assert results.pop(1) is None
    for text, ranks, seconds in results:
        assert " lost rank 1 of group " in text
        assert "which ended: its process is gone (" in text
        assert ranks == (1,)
        assert seconds < 20.0  # of the 60 that an exchange may take
    assert soak.segments() == before
    mortal_processes.stop()
    assert soak.segments() == before


def interrupted_in_place(rank: Rank) -> str:
    """Rank 0 is interrupted while the others read its rows, and writes to them: they must not take what they read."""
    rows = rank.ep.new_rows((1 << 19,), torch.zeros(0, dtype=torch.int8))
    assert rows is not None
    rows.fill_(rank.index)
    rank.ep.exchange_views(rows, np.zeros(0, np.uint8), [0] * SIZE)
    if rank.index == 0:
        rank.ep.break_off("was ended by KeyboardInterrupt")
        return "broken off"
    time.sleep(0.2)
    try:
        rank.ep.end_reading()
    except LostRankError as error:
        return f"{error.ranks} {error}"
    return "taken"


def test_rows_of_a_rank_that_has_stopped_are_not_taken(mortal_processes):
    first, *others = mortal_processes.run((SIZE, 1), interrupted_in_place, transport="shared_memory")
    assert first == "broken off"
    for index, text in enumerate(others, 1):
        assert text.startswith(f"(0,) rank {index} lost rank 0 of group "), text
        assert "which was ended by KeyboardInterrupt (it was waited for in shared memory)" in text


def sleep_while_others_wait(rank: Rank) -> tuple[str, tuple[int, ...]]:
    rank.ep.exchange_counts(torch.zeros((SIZE, 1), dtype=torch.int64))  # so that all begin to wait together
    if rank.index == 2:
        time.sleep(4.0)
        return "", ()
    try:
        rank.ep.exchange_counts(torch.zeros((SIZE, 1), dtype=torch.int64))
    except LostRankError as error:
        return str(error), error.ranks
    return "no error", ()


def test_a_rank_that_does_not_call_is_named_at_the_time_out():
    pool = Processes(SIZE, [(SIZE, 1)], timeout_s=1.0)
    try:
        results = pool.run((SIZE, 1), sleep_while_others_wait, transport="shared_memory")
    finally:
        pool.stop()
    assert results.pop(2) == ("", ())
    for text, ranks in results:
        assert text.endswith("which did not call (no post in shared memory in time)")
        assert ranks == (2,)


# Who chooses ------------------------------------------------------------------------------------------------------


def describe(index: int, place: str) -> dict[str, Any]:
    dist.init_process_group("gloo", store=dist.FileStore(place, 2), rank=index, world_size=2)
    table, group = em.Placement([[0, 1]], 2).eplb_table(0), dist.group.WORLD
    found: dict[str, Any] = {}
    for transport in ("auto", "shared_memory", "process_group"):
        layer = em.ExpertParallel(group, table, num_slots=2, transport=transport)
        rows = layer.dispatch(torch.ones(1, 1), torch.tensor([[1]]), torch.ones(1, 1))
        found[transport] = (layer.describe(), layer.combine(rows, 3 * rows.rows).item())
    wrong = {"unknown": "gloo", "another": "process_group"}
    world = em.process_world(2)
    for name, transport in wrong.items():
        try:
            em.ExpertParallel(world.ep, table, num_slots=2, transport=transport)
        except ConstraintError as error:
            found[name] = str(error)
    try:
        em.process_world(2, transport=("auto", "process_group")[index])
    except RankDisagreementError as error:
        found["differ"] = str(error)
    return found


LAYER = "layer 0: 2 logical experts in 2 slots of 2 ranks, rule 'rank', exchange by "


def test_the_transport_is_chosen_told_and_refused(tmp_path):
    for found in run_once(2, describe, str(tmp_path / "store")):
        assert found["auto"] == (LAYER + "shared memory of one host", 3.0)
        assert found["shared_memory"] == (LAYER + "shared memory of one host", 3.0)
        assert found["process_group"] == (LAYER + "torch.distributed (gloo), as was asked for", 3.0)
        assert found["unknown"] == (
            "`transport` is 'gloo': it must be one of 'auto', 'shared_memory', 'process_group'; "
            "leave it at 'auto' if any will do."
        )
        assert found["another"] == (
            "`transport` is 'process_group' for a group that has been opened: it must be what it is, 'shared_memory'; "
            'leave it at "auto", or choose where the group is opened.'
        )
        assert found["differ"] == (
            "`transport` is auto on rank 0 and process_group on rank 1: it must be equal on every rank of a group; "
            "pass the same on all ranks."
        )


def without_memory(index: int, place: str) -> tuple[str, str]:
    from evenmoe.transport import segment

    if index == 1:
        segment._obstacle = lambda: "this needs Linux"
    store = dist.FileStore(place, 2)
    dist.init_process_group("gloo", store=store, rank=index, world_size=2)
    kind = em.process_world(2).ep.description
    try:
        em.process_world(2, transport="shared_memory")
    except ConstraintError as error:
        return kind, str(error)
    return kind, ""


def test_where_memory_cannot_be_shared_auto_is_torch_distributed(tmp_path):
    reason = "since this needs Linux on rank 1"
    for kind, error in run_once(2, without_memory, str(tmp_path / "store")):
        assert kind == f"torch.distributed (gloo), {reason}"
        assert error == (
            f"`transport` is 'shared_memory': it cannot be had here, {reason}; use 'auto' or 'process_group'."
        )
