"""What `ExpertParallel` raises for, in which words, and that an error on one rank reaches the others at once.

The worlds have four ranks whose exchanges would wait a minute for a rank that stays away; a call that hangs would end
in a LostRankError, so that every RankDisagreementError below came in time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import evenmoe as em
from evenmoe.errors import ConstraintError, EvenmoeError, LostRankError, RankDisagreementError, UnsupportedTypeError
from evenmoe.placement import Placement
from evenmoe.rules import RULES
from evenmoe.transport.world import Rank
from tests.runtime.layers import RULES as RANK_RULES

WRONG_RANK = 2
PLACEMENT = Placement([[0, 1, 0, 2, 3, 1, 4, 0]], 4)


def make(rank: Rank, placement: Placement = PLACEMENT, rule: str = "occurrence") -> em.ExpertParallel:
    return em.ExpertParallel(rank.ep, placement.eplb_table(0), num_slots=8, rule=rule)


def arguments(**other: Any) -> dict[str, torch.Tensor]:
    return {
        "x": torch.arange(6.0).reshape(3, 2),
        "topk_ids": torch.tensor([[0, 1], [4, 2], [3, -1]]),
        "topk_weights": torch.full((3, 2), 0.5),
        **other,
    }


def told(call: Callable[[], object]) -> tuple[type, str, int]:
    """Class, text and status of the error that a call ends in."""
    try:
        call()
    except EvenmoeError as error:
        return type(error), str(error), error.status
    return type(None), "", 0


def still_right(ep: em.ExpertParallel) -> bool:
    """After an error the ranks are in step: a right call gives 0.5·x per entry."""
    dispatched = ep.dispatch(**arguments())
    y = ep.combine(dispatched, dispatched.rows)
    return y.tolist() == [[0.0, 1.0], [2.0, 3.0], [2.0, 2.5]]


DISPATCH = {
    "a list for x": (
        lambda: arguments(x=[[0.0, 1.0]] * 3),
        UnsupportedTypeError,
        "`x` is a list: it must be a torch.Tensor; use torch.tensor.",
    ),
    "an array for ids": (
        lambda: arguments(topk_ids=np.zeros((3, 2), int)),
        UnsupportedTypeError,
        "`topk_ids` is a ndarray: it must be a torch.Tensor; use torch.tensor.",
    ),
    "x of one axis": (
        lambda: arguments(x=torch.ones(3)),
        ConstraintError,
        "`x` is of shape (3,): it must be (tokens, hidden); flatten the batch.",
    ),
    "x of three axes": (
        lambda: arguments(x=torch.ones(1, 3, 2)),
        ConstraintError,
        "`x` is of shape (1, 3, 2): it must be (tokens, hidden); flatten the batch.",
    ),
    "ids of one axis": (
        lambda: arguments(topk_ids=torch.zeros(3, dtype=torch.int64)),
        ConstraintError,
        "`topk_ids` is of shape (3,): it must be (tokens, k) with the 3 tokens of x; pass the router's indices.",
    ),
    "ids of other tokens": (
        lambda: arguments(topk_ids=torch.zeros((4, 2), dtype=torch.int64)),
        ConstraintError,
        "`topk_ids` is of shape (4, 2): it must be (tokens, k) with the 3 tokens of x; pass the router's indices.",
    ),
    "no k": (
        lambda: arguments(topk_ids=torch.zeros((3, 0), dtype=torch.int64), topk_weights=torch.ones(3, 0)),
        ConstraintError,
        "`topk_ids` is of shape (3, 0): it must be (tokens, k) with the 3 tokens of x; pass the router's indices.",
    ),
    "weights of another k": (
        lambda: arguments(topk_weights=torch.ones(3, 1)),
        ConstraintError,
        "`topk_weights` is of shape (3, 1): it must have the shape of topk_ids, (3, 2); pass one weight per index.",
    ),
    "ids of 16 bits": (
        lambda: arguments(topk_ids=torch.zeros((3, 2), dtype=torch.int16)),
        UnsupportedTypeError,
        "`topk_ids` is torch.int16: it must be int32 or int64; convert it.",
    ),
    "ids of fractions": (
        lambda: arguments(topk_ids=torch.zeros(3, 2)),
        UnsupportedTypeError,
        "`topk_ids` is torch.float32: it must be int32 or int64; convert it.",
    ),
    "whole x": (
        lambda: arguments(x=torch.ones((3, 2), dtype=torch.int8)),
        UnsupportedTypeError,
        "`x` is torch.int8: it must be a float dtype; convert it.",
    ),
    "complex weights": (
        lambda: arguments(topk_weights=torch.ones((3, 2), dtype=torch.complex64)),
        UnsupportedTypeError,
        "`topk_weights` is torch.complex64: it must be a float dtype; convert it.",
    ),
    "an id below": (
        lambda: arguments(topk_ids=torch.tensor([[0, 1], [2, -1], [3, -2]])),
        ConstraintError,
        "`topk_ids` is -2 for token 2, k 1: it must be a logical expert, 0 to 4, or -1 for none; "
        "route to the experts of the table.",
    ),
    "an id beyond": (
        lambda: arguments(topk_ids=torch.tensor([[0, 1], [5, 7], [3, 4]])),
        ConstraintError,
        "`topk_ids` is 5 for token 1, k 0: it must be a logical expert, 0 to 4, or -1 for none; "
        "route to the experts of the table.",
    ),
}


def wrong_dispatch(rank: Rank, name: str, rule: str) -> tuple:
    ep = make(rank, rule=rule)
    given = DISPATCH[name][0]() if rank.index == WRONG_RANK else arguments()
    return told(lambda: ep.dispatch(**given)), still_right(ep)


COMBINE = {
    "an array": (
        lambda rows: rows.numpy(),
        UnsupportedTypeError,
        "`expert_out` is a ndarray: it must be a torch.Tensor; use torch.tensor.",
    ),
    "a row too few": (
        lambda rows: rows[1:],
        ConstraintError,
        "`expert_out` is of shape ({less}, 2): it must have one row for each of the {rows} dispatched rows; "
        "apply each slot's expert to its num_tokens_per_expert rows and keep their order.",
    ),
    "three axes": (
        lambda rows: rows[None],
        ConstraintError,
        "`expert_out` is of shape (1, {rows}, 2): it must have one row for each of the {rows} dispatched rows; "
        "apply each slot's expert to its num_tokens_per_expert rows and keep their order.",
    ),
    "whole numbers": (
        lambda rows: rows.to(torch.int32),
        UnsupportedTypeError,
        "`expert_out` is torch.int32: it must be a float dtype; convert it.",
    ),
}


def wrong_combine(rank: Rank, name: str, rule: str) -> tuple:
    ep = make(rank, rule=rule)
    rows = ep.dispatch(**arguments())
    out = COMBINE[name][0](rows.rows) if rank.index == WRONG_RANK else rows.rows
    return told(lambda: ep.combine(rows, out)), still_right(ep), len(rows.rows)


def unlike(rank: Rank, name: str) -> tuple:
    call = UNLIKE[name][0](rank, rank.index == WRONG_RANK)
    return told(call), still_right(make(rank))


def unlike_dispatch(wrong: dict[str, Any]) -> Callable:
    def prepare(rank: Rank, other: bool) -> Callable[[], object]:
        ep = make(rank)
        return lambda: ep.dispatch(**arguments(**(wrong if other else {})))

    return prepare


def unlike_object(**wrong: Any) -> Callable:
    def prepare(rank: Rank, other: bool) -> Callable[[], object]:
        ep = make(rank, **(wrong if other else {}))
        return lambda: ep.dispatch(**arguments())

    return prepare


def unlike_combine(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    def prepare(rank: Rank, other: bool) -> Callable[[], object]:
        ep = make(rank)
        dispatched = ep.dispatch(**arguments())
        out = change(dispatched.rows) if other else dispatched.rows
        return lambda: ep.combine(dispatched, out)

    return prepare


def older_step(rank: Rank, other: bool) -> Callable[[], object]:
    ep = make(rank)
    first, second = ep.dispatch(**arguments()), ep.dispatch(**arguments())
    return lambda: ep.combine(first if other else second, second.rows)


def out_of_order(rank: Rank, other: bool) -> Callable[[], object]:
    ep = make(rank)
    dispatched = ep.dispatch(**arguments())
    return (lambda: ep.dispatch(**arguments())) if other else (lambda: ep.combine(dispatched, dispatched.rows))


def more_slots(rank: Rank, other: bool) -> Callable[[], object]:
    ep = em.ExpertParallel(rank.ep, PLACEMENT.eplb_table(0), num_slots=12 if other else 8)
    return lambda: ep.dispatch(**arguments())


def unlike_layer(rank: Rank, other: bool) -> Callable[[], object]:
    """Two layers of the same table, in another order on one rank."""
    first, second = make(rank), make(rank)
    return lambda: (second if other else first).dispatch(**arguments())


SAME = "it must be the same on every rank of a group; call the collective operators in the same order on all ranks."
EQUAL = "it must be equal on every rank of a group; pass the same on all ranks."
UNLIKE = {
    "hidden size of x": (
        unlike_dispatch({"x": torch.ones(3, 5)}),
        f"`hidden size of x` is 2 on ranks 0, 1, 3 and 5 on rank 2: {EQUAL}",
    ),
    "dtype of x": (
        unlike_dispatch({"x": torch.ones((3, 2), dtype=torch.float64)}),
        f"`dtype of x` is float32 on ranks 0, 1, 3 and float64 on rank 2: {EQUAL}",
    ),
    "top-k": (
        unlike_dispatch({"topk_ids": torch.zeros((3, 1), dtype=torch.int64), "topk_weights": torch.ones(3, 1)}),
        f"`top-k of topk_ids` is 2 on ranks 0, 1, 3 and 1 on rank 2: {EQUAL}",
    ),
    "logical experts": (
        unlike_object(placement=Placement([[0, 1, 0, 2, 3, 1, 5, 4]], 4)),
        f"`logical experts` is 5 on ranks 0, 1, 3 and 6 on rank 2: {EQUAL}",
    ),
    "slots": (more_slots, f"`num_slots` is 8 on ranks 0, 1, 3 and 12 on rank 2: {EQUAL}"),
    "rule": (unlike_object(rule="token"), None),
    "batch and another rule": (unlike_object(rule="batch"), None),
    "tables": (unlike_object(placement=Placement([[0, 1, 0, 2, 1, 3, 4, 0]], 4)), None),
    "order of the replicas": (
        unlike_object(placement=Placement(PLACEMENT.slot_to_expert, 4, replica_index=[[1, 0, 0, 0, 0, 1, 0, 2]])),
        None,
    ),
    "hidden size of expert_out": (
        unlike_combine(lambda rows: rows[:, :1]),
        f"`hidden size of expert_out` is 2 on ranks 0, 1, 3 and 1 on rank 2: {EQUAL}",
    ),
    "dtype of expert_out": (
        unlike_combine(lambda rows: rows.bfloat16()),
        f"`dtype of expert_out` is float32 on ranks 0, 1, 3 and bfloat16 on rank 2: {EQUAL}",
    ),
    "step": (
        older_step,
        "`the call` is ExpertParallel.combine of dispatch N of layer N on ranks 0, 1, 3 and ExpertParallel.combine of "
        f"dispatch N of layer N on rank 2: {SAME}",
    ),
    "layer": (
        unlike_layer,
        f"`the call` is ExpertParallel.dispatch of layer N on ranks 0, 1, 3 and ExpertParallel.dispatch of layer N on "
        f"rank 2: {SAME}",
    ),
    "order of the calls": (
        out_of_order,
        "`the operator` is ExpertParallel.combine of dispatch N of layer N on ranks 0, 1, 3 and "
        f"ExpertParallel.dispatch of layer N on rank 2: {SAME}",
    ),
}
STARTS = {
    "rule": "`rule` is occurrence on ranks 0, 1, 3 and token on rank 2: ",
    "batch and another rule": "`rule` is occurrence on ranks 0, 1, 3 and batch on rank 2: ",
    "tables": "`digest of the EPLB table` is ",
    "order of the replicas": "`digest of the EPLB table` is ",
}


@pytest.fixture(params=["threads", "processes"])
def run(request):
    """`run(job, *arguments)`: a job on four ranks."""
    if request.param == "processes":
        pool = request.getfixturevalue("processes")
        yield lambda job, *arguments: pool.run((4, 1), job, *arguments)
    else:
        with em.local_world(4, timeout_s=60.0) as world:
            yield lambda job, *arguments: world.run(lambda rank: job(rank, *arguments))


def check_error(outcomes: list, operator: str, kind: type, text: str) -> None:
    status = {ConstraintError: 561002, UnsupportedTypeError: 161002}[kind]
    for rank, (cls, message, code) in enumerate(outcomes):
        if rank == WRONG_RANK:
            assert (cls, message, code) == (kind, text, status)
        else:
            # The text of the rank that refused travels in 320 bytes.
            assert (cls, code) == (RankDisagreementError, 561002)
            assert message == (
                f"`the call of ExpertParallel.{operator} on rank {WRONG_RANK}` is refused there ({text[:320]}): it "
                f"must be accepted on every rank; correct the arguments of rank {WRONG_RANK}."
            )


@pytest.mark.parametrize("name", DISPATCH)
def test_wrong_arguments_of_dispatch(run, name):
    _, kind, text = DISPATCH[name]
    for rule in ("occurrence", "batch"):
        outcomes, after = zip(*run(wrong_dispatch, name, rule), strict=True)
        check_error(outcomes, "dispatch", kind, text)
        assert all(after)


@pytest.mark.parametrize("name", COMBINE)
def test_wrong_arguments_of_combine(run, name):
    _, kind, text = COMBINE[name]
    outcomes, after, rows = zip(*run(wrong_combine, name, "rank"), strict=True)
    check_error(outcomes, "combine", kind, text.format(rows=rows[WRONG_RANK], less=rows[WRONG_RANK] - 1))
    assert all(after)


@pytest.mark.parametrize("name", UNLIKE)
def test_ranks_that_differ(run, name):
    outcomes, after = zip(*run(unlike, name), strict=True)
    assert len(set(outcomes)) == 1  # the same error on every rank
    cls, message, status = outcomes[0]
    assert (cls, status) == (RankDisagreementError, 561002)
    if name in STARTS:
        assert message.startswith(STARTS[name])
        assert "on ranks 0, 1, 3 and " in message
        assert message.endswith(f" on rank 2: {EQUAL}")
    else:
        # Dispatches and layers are numbered by group, and the group has served other tests.
        assert re.sub(r"(dispatch|layer) [0-9]+", r"\1 N", message) == UNLIKE[name][1]
    assert all(after)


def test_padding_of_tables_may_differ():
    """Only what the table means must be equal."""

    def step(rank):
        table = PLACEMENT.eplb_table(0)
        table[torch.arange(table.shape[1]) > table[:, :1]] = 100 + rank.index
        return still_right(em.ExpertParallel(rank.ep, table, num_slots=8, rule="batch"))

    with em.local_world(4) as world:
        assert all(world.run(step))


def table(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


CONSTRUCTION = {
    "no slot": (
        lambda ep: em.ExpertParallel(ep, table([1, 0]), num_slots=0),
        "`num_slots` is 0: it must be a multiple of the 2 ranks; use 2, the nearest that is.",
    ),
    "slots that do not divide": (
        lambda ep: em.ExpertParallel(ep, table([1, 0]), num_slots=5),
        "`num_slots` is 5: it must be a multiple of the 2 ranks; use 4, the nearest that is.",
    ),
    "an unknown rule": (
        lambda ep: em.ExpertParallel(ep, table([1, 0]), num_slots=2, rule="best"),
        f"`rule` is 'best': it must be one of {', '.join(RULES)}, or py:module:attribute; choose one of them.",
    ),
    "a rule for plans only": (
        lambda ep: em.ExpertParallel(ep, table([1, 0]), num_slots=2, rule="even"),
        "`rule` is 'even': it must be one by which a rank can choose, and this one only states what a plan assumes; "
        "use the occurrence rule, whose shares are even.",
    ),
    "a rule by its number": (
        lambda ep: em.ExpertParallel(ep, table([1, 0]), num_slots=2, rule=0),
        "`rule` is 0, of type int: it must be an object of a subclass of evenmoe.rules.rule.Rule; pass one, or its "
        "name.",
    ),
    "a table of 64 bits": (
        lambda ep: em.ExpertParallel(ep, table([1, 0]).long(), num_slots=2),
        "`eplb_table` is torch.int64 of shape (1, 2): it must be torch.int32 (experts, 1 + the most replicas); "
        "use Placement.eplb_table(layer).",
    ),
    "a table of one axis": (
        lambda ep: em.ExpertParallel(ep, table([1, 0])[0], num_slots=2),
        "`eplb_table` is torch.int32 of shape (2,): it must be torch.int32 (experts, 1 + the most replicas); "
        "use Placement.eplb_table(layer).",
    ),
    "a table without slots": (
        lambda ep: em.ExpertParallel(ep, table([1], [1]), num_slots=2),
        "`eplb_table` is torch.int32 of shape (2, 1): it must be torch.int32 (experts, 1 + the most replicas); "
        "use Placement.eplb_table(layer).",
    ),
    "a table without experts": (
        lambda ep: em.ExpertParallel(ep, table([1, 0])[:0], num_slots=2),
        "`eplb_table` is torch.int32 of shape (0, 2): it must be torch.int32 (experts, 1 + the most replicas); "
        "use Placement.eplb_table(layer).",
    ),
    "an array": (
        lambda ep: em.ExpertParallel(ep, np.array([[1, 0]], np.int32), num_slots=2),
        "`eplb_table` is a ndarray: it must be a torch.Tensor; use torch.tensor.",
    ),
    "no replica": (
        lambda ep: em.ExpertParallel(ep, table([1, 0], [0, 1]), num_slots=2),
        "`eplb_table` is 0 in row 1, column 0: it must count 1 to 1 replicas of each expert, since it has 2 columns; "
        "give every logical expert a slot, or the table more columns.",
    ),
    "more replicas than columns": (
        lambda ep: em.ExpertParallel(ep, table([1, 0, 0], [3, 1, 2]), num_slots=4),
        "`eplb_table` is 3 in row 1, column 0: it must count 1 to 2 replicas of each expert, since it has 3 columns; "
        "give every logical expert a slot, or the table more columns.",
    ),
    "a slot below zero": (
        lambda ep: em.ExpertParallel(ep, table([1, 0, -1], [2, 1, -1]), num_slots=4),
        "`eplb_table` is -1 in row 1, column 2: it must hold slot ids, 0 or more, in the counted columns; "
        "build it with Placement.eplb_table.",
    ),
    "a slot too many": (
        lambda ep: em.ExpertParallel(ep, table([1, 0, 9], [2, 1, 4]), num_slots=4),
        "`eplb_table` is 4 in row 1: it must hold slot ids below num_slots, 4; "
        "pass the number of slots over all ranks.",
    ),
    "a slot for two experts": (
        lambda ep: em.ExpertParallel(ep, table([1, 3, 0], [2, 1, 3], [2, 0, 2]), num_slots=4),
        "`eplb_table` is 3 in row 0 and row 1: it must name each slot once, since a slot holds one expert; "
        "use the slot ids of a Placement.",
    ),
    "a slot twice for one expert": (
        lambda ep: em.ExpertParallel(ep, table([1, 0, 0], [2, 1, 1]), num_slots=2),
        "`eplb_table` is 1 in row 1 and row 1: it must name each slot once, since a slot holds one expert; "
        "use the slot ids of a Placement.",
    ),
    "an empty slot by batch": (
        lambda ep: em.ExpertParallel(ep, table([1, 0], [1, 3]), num_slots=4, rule="batch"),
        "`eplb_table` is without slot 1: it must name all 4 slots for the batch rule, which splits over what every "
        "rank holds; give the slot an expert, or use the occurrence rule.",
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_construction(name):
    call, text = CONSTRUCTION[name]
    with em.local_world(2) as world:
        results = world.run(lambda rank: told(lambda: call(rank.ep)))
    for cls, message, _ in results:
        assert message == text
        assert cls is (UnsupportedTypeError if "be torch.int32" in text or "Tensor" in text else ConstraintError)


def test_a_rank_that_fails_alone_wakes_the_others():
    """A constructor exchanges nothing, so the others learn of its error when their dispatch finds that rank gone."""

    def step(rank):
        ep = make(rank, rule="no rule" if rank.index == 1 else "rank")
        ep.dispatch(**arguments())

    with (
        em.local_world(4, timeout_s=60.0) as world,
        pytest.raises(ConstraintError, match="`rule` is 'no rule'") as caught,
    ):
        world.run(step)
    assert caught.value.rank == 1  # the first failure, not a LostRankError of those who waited

    def alone(rank):
        if rank.index == 1:
            return None
        with pytest.raises(LostRankError, match="for rank 1, which ended its part of the run"):
            make(rank).dispatch(**arguments())
        return True

    with em.local_world(4, timeout_s=60.0) as world:
        assert world.run(alone) == [True, None, True, True]


@pytest.mark.parametrize("rule", RANK_RULES)
def test_the_table_may_be_written_to_again(rule):
    """Whoever made it may keep it up to date in place; the object goes on with what it was given."""

    def step(rank):
        table = PLACEMENT.eplb_table(0)
        ep = em.ExpertParallel(rank.ep, table, num_slots=8, rule=rule)
        table.fill_(77)
        return still_right(ep)

    with em.local_world(4) as world:
        assert all(world.run(step))


@pytest.mark.parametrize("rule", RANK_RULES)
def test_unchecked_values_still_refuse_shapes(rule):
    def step(rank):
        ep = em.ExpertParallel(rank.ep, PLACEMENT.eplb_table(0), num_slots=8, rule=rule, check_values=False)
        return told(lambda: ep.dispatch(**arguments(x=torch.ones(3)))), still_right(ep)

    with em.local_world(4) as world:
        for (cls, *_), after in world.run(step):
            assert cls is ConstraintError
            assert after
