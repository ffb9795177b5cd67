"""What a wrong call says: argument, value, rule and fix, word for word; and what is taken without looking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import evenmoe as em
from evenmoe.errors import ConstraintError, EvenmoeError, MissingArgumentError, UnsupportedTypeError
from evenmoe.ops.update_expert import prepare
from evenmoe.transport.world import Rank

IDS = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
TABLE = torch.tensor([[1, 0, -9], [2, 1, 3], [1, 2, -9]], dtype=torch.int32)
Changes = dict[str, Any]


def with_entry(tensor: torch.Tensor, place: tuple[int, ...], value: int) -> torch.Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


def assert_refused(call: Callable[[], object], error: type[EvenmoeError], *parts: str) -> None:
    """The four parts of the message, in the words of the class."""
    argument, value, rule, fix = parts
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert (caught.value.argument, caught.value.value, caught.value.rule, caught.value.fix) == tuple(parts)
    assert str(caught.value) == f"`{argument}` is {value}: it {rule}; {fix}."


# update_expert ---------------------------------------------------------------------------------------------------

LOGICAL = ("must be a row of eplb_table, 0 to 2", "route to the model's logical experts, or pass the whole table")
COUNT = (
    "must count 1 to 2 replicas of each expert, since it has 3 columns",
    "give every logical expert a slot, or the table more columns",
)
SLOT = ("must hold slot ids, 0 or more, in the counted columns", "build it with Placement.eplb_table")
MODE = (
    'must be 0 or "rank", 1 or "token", or "occurrence"',
    'use evenmoe.ExpertParallel for a rule without a balance_mode, such as "batch"',
)
WRONG_TABLES = [
    (with_entry(TABLE, (1, 0), 0), ("0 in row 1, column 0", *COUNT)),
    (with_entry(TABLE, (2, 0), -1), ("-1 in row 2, column 0", *COUNT)),
    (with_entry(TABLE, (0, 0), 3), ("3 in row 0, column 0", *COUNT)),
    (with_entry(TABLE, (1, 2), -3), ("-3 in row 1, column 2", *SLOT)),
]


@pytest.mark.parametrize("mode", ["rank", "token"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("wrong", "place"), [(3, (1, 0)), (-1, (0, 1)), (2**31 - 1, (1, 1))])
def test_ids_without_a_row(mode, dtype, wrong, place):
    ids = with_entry(IDS, place, wrong).to(dtype)
    parts = ("expert_ids", f"{wrong} for token {place[0]}, k {place[1]}", *LOGICAL)
    assert_refused(lambda: em.update_expert(ids, TABLE, 0, 2, mode), ConstraintError, *parts)
    assert_refused(lambda: prepare(TABLE, 0, 2, mode)(ids), ConstraintError, *parts)


@pytest.mark.parametrize("mode", ["rank", "token", "occurrence"])
@pytest.mark.parametrize(("table", "parts"), WRONG_TABLES)
def test_tables_that_cannot_be_right(mode, table, parts):
    assert_refused(lambda: em.update_expert(IDS, table, 0, 2, mode), ConstraintError, "eplb_table", *parts)
    assert_refused(lambda: prepare(table, 0, 2, mode), ConstraintError, "eplb_table", *parts)


def test_the_occurrence_rule_refuses_ids_too():
    with pytest.raises(ConstraintError, match=r"`expert_ids` is 3 .*it must be a row of eplb_table, 0 to 2"):
        em.update_expert(with_entry(IDS, (1, 0), 3), TABLE, 0, 2, "occurrence")


@pytest.mark.parametrize("mode", ["rank", "token", "occurrence"])
def test_what_is_not_counted_may_be_anything(mode):
    """Columns behind the count, and rows that no token asks for when nobody looks."""
    want = em.update_expert(IDS, TABLE, 0, 2, mode)[0]
    assert torch.equal(em.update_expert(IDS, with_entry(TABLE, (0, 2), 77), 0, 2, mode)[0], want)
    unused = torch.cat([TABLE, torch.tensor([[1, -5, 0]], dtype=torch.int32)])
    assert torch.equal(em.update_expert(IDS, unused, 0, 2, mode, check_values=False)[0], want)
    with pytest.raises(ConstraintError):
        em.update_expert(IDS, unused, 0, 2, mode)


@pytest.mark.parametrize("mode", ["batch", 2, -1, None, [1], "Rank"])
def test_unknown_modes(mode):
    parts = ("balance_mode", repr(mode), *MODE)
    assert_refused(lambda: em.update_expert(IDS, TABLE, 0, 2, mode), ConstraintError, *parts)
    assert_refused(lambda: prepare(TABLE, 0, 2, mode), ConstraintError, *parts)


TENSOR = ("must be a torch.Tensor", "use torch.tensor")
INTEGER = ("must be an integer", "pass an int")


@pytest.mark.parametrize("name", ["expert_ids", "eplb_table", "expert_scales", "pruning_threshold", "active_mask"])
@pytest.mark.parametrize(
    ("value", "shown"), [([[1]], "a list"), ((1,), "a tuple"), (np.ones(2), "a ndarray"), (1.5, "a float")]
)
def test_update_expert_takes_tensors(name, value, shown):
    call = {"expert_ids": IDS, "eplb_table": TABLE, "local_rank_id": 0, "world_size": 2, name: value}
    assert_refused(lambda: em.update_expert(**call), UnsupportedTypeError, name, shown, *TENSOR)


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"expert_ids": None}, MissingArgumentError, ("expert_ids", "None", "must be given")),
        ({"eplb_table": None}, MissingArgumentError, ("eplb_table", "None", "must be given")),
        ({"local_rank_id": None}, ConstraintError, ("local_rank_id", "None", INTEGER[0])),
        ({"world_size": "2"}, ConstraintError, ("world_size", "'2'", INTEGER[0])),
        ({"world_size": 2.0}, ConstraintError, ("world_size", "2.0", INTEGER[0])),
        ({"check_values": None}, ConstraintError, ("check_values", "None", "must be True or False")),
        ({"expert_ids": IDS.float()}, UnsupportedTypeError, ("expert_ids", "float32 (2, 2)", "must be int32 or int64")),
        ({"eplb_table": TABLE.long()}, UnsupportedTypeError, ("eplb_table", "int64 (3, 3)", "must be int32")),
    ],
)
def test_update_expert_refuses(changes, error, parts):
    with pytest.raises(error) as caught:
        em.update_expert(**{"expert_ids": IDS, "eplb_table": TABLE, "local_rank_id": 0, "world_size": 2, **changes})
    assert (caught.value.argument, caught.value.value, caught.value.rule) == parts


@pytest.mark.parametrize(
    ("changes", "error", "argument"),
    [
        ({"eplb_table": None}, MissingArgumentError, "eplb_table"),
        ({"eplb_table": [[1, 0]]}, UnsupportedTypeError, "eplb_table"),
        ({"eplb_table": TABLE.long()}, UnsupportedTypeError, "eplb_table"),
        ({"eplb_table": TABLE[0]}, ConstraintError, "eplb_table"),
        ({"local_rank_id": 2}, ConstraintError, "local_rank_id"),
        ({"world_size": 0}, ConstraintError, "world_size"),
        ({"world_size": None}, ConstraintError, "world_size"),
    ],
)
@pytest.mark.parametrize("check_values", [True, False])
def test_prepare_refuses(changes, error, argument, check_values):
    call = {"eplb_table": TABLE, "local_rank_id": 0, "world_size": 2, "check_values": check_values, **changes}
    with pytest.raises(error) as caught:
        prepare(**call)
    assert caught.value.argument == argument


def test_numpy_integers_are_integers():
    want = em.update_expert(IDS, TABLE, 1, 2)[0]
    assert torch.equal(em.update_expert(IDS, TABLE, np.int64(1), np.int32(2))[0], want)


# dispatch and combine --------------------------------------------------------------------------------------------


@pytest.fixture
def rank():
    with em.local_world(1, timeout_s=60.0) as world:
        yield world.ranks[0]


def dispatched(rank: Rank, **changes: Any) -> em.Dispatched:
    call = {"x": torch.ones(2, 3), "expert_ids": IDS, "ep": rank.ep, "num_experts": 4, **changes}
    return em.dispatch(**call)


def combined(rank: Rank, **changes: Any) -> torch.Tensor:
    d = dispatched(rank)
    call = {"expert_out": d.expand_x, "expert_ids": IDS, "dispatched": d, "expert_scales": torch.ones(2, 2)}
    change = changes.pop("change", lambda d: {})
    return em.combine(**{**call, "ep": rank.ep, "num_experts": 4, **changes, **change(d)})


PHYSICAL = (
    "must be 0 to 3",
    "map logical to physical ids with update_expert, and pass the number of slots as num_experts",
)
TWICE = (
    "must not name one physical expert twice in a token",
    "use slot ids that are unique over the whole EPLB table",
)


@pytest.mark.parametrize("operator", [dispatched, combined])
@pytest.mark.parametrize(
    ("ids", "parts"),
    [
        ([[0, 1], [4, 2]], ("4 for token 1, k 0", *PHYSICAL)),
        ([[0, -1], [1, 2]], ("-1 for token 0, k 1", *PHYSICAL)),
        ([[0, 1], [2, 2]], ("[2, 2] for token 1", *TWICE)),
    ],
)
def test_physical_ids(rank, operator, ids, parts):
    ids = torch.tensor(ids, dtype=torch.int32)
    assert_refused(lambda: operator(rank, expert_ids=ids), ConstraintError, "expert_ids", *parts)


def test_padding_and_virtual_ids_may_repeat_but_not_leave_the_range(rank):
    """Ids 4 and 5 are virtual; token 1 is padding. An id out of range is refused even there."""
    ids = torch.tensor([[4, 4], [2, 2]], dtype=torch.int32)
    mask = torch.tensor([True, False])
    d = dispatched(rank, expert_ids=ids, zero_expert_num=2, x_active_mask=mask)
    assert int(d.ep_recv_counts[-1]) == 0
    wrong = torch.tensor([[4, 4], [2, 6]], dtype=torch.int32)
    with pytest.raises(ConstraintError, match="6 for token 1, k 1: it must be 0 to 5"):
        dispatched(rank, expert_ids=wrong, zero_expert_num=2, x_active_mask=mask)


def changed_assist(row: int, *values: int) -> Callable[[em.Dispatched], Changes]:
    def change(d: em.Dispatched) -> Changes:
        info = d.assist_info_for_combine.clone()
        info[3 * row : 3 * row + 3] = torch.tensor(values, dtype=torch.int32)
        return {"dispatched": replace(d, assist_info_for_combine=info)}

    return change


def changed_count(count: int) -> Callable[[em.Dispatched], Changes]:
    return lambda d: {"dispatched": replace(d, ep_recv_counts=with_entry(d.ep_recv_counts, (3,), count))}


ASSIST = ("must be (rank below 1, token below 2, k below 2)", "pass what dispatch returned, unchanged")
ROWS = ("must count 0 to 4 rows of this rank", "pass the ep_recv_counts that dispatch returned")
HOME = (
    "must be the ids that dispatch was called with, with the same mask",
    "pass the expert_ids, x_active_mask and assist_info_for_combine of one dispatch",
)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (changed_assist(1, 1, 0, 1), ("assist_info_for_combine", "[1, 0, 1] for row 1", *ASSIST)),
        (changed_assist(0, -1, 0, 0), ("assist_info_for_combine", "[-1, 0, 0] for row 0", *ASSIST)),
        (changed_assist(3, 0, 2, 1), ("assist_info_for_combine", "[0, 2, 1] for row 3", *ASSIST)),
        (changed_assist(3, 0, -2, 1), ("assist_info_for_combine", "[0, -2, 1] for row 3", *ASSIST)),
        (changed_assist(2, 0, 1, 2), ("assist_info_for_combine", "[0, 1, 2] for row 2", *ASSIST)),
        (changed_assist(2, 0, 1, -1), ("assist_info_for_combine", "[0, 1, -1] for row 2", *ASSIST)),
        (changed_count(5), ("ep_send_counts", "5 at 3", *ROWS)),
        (changed_count(-1), ("ep_send_counts", "-1 at 3", *ROWS)),
        (changed_count(3), ("expert_ids", "such that 4 rows are due here, while 3 came, not one for each", *HOME)),
        (
            changed_assist(1, 0, 0, 0),  # a place that another row has already
            ("expert_ids", "such that 4 rows are due here, while 4 came, not one for each", *HOME),
        ),
    ],
)
def test_what_does_not_belong_to_the_dispatch(rank, change, parts):
    assert_refused(lambda: combined(rank, change=change), ConstraintError, *parts)


def test_another_mask_than_in_dispatch(rank):
    with pytest.raises(ConstraintError, match="such that 2 rows are due here, while 4 came"):
        combined(rank, x_active_mask=torch.tensor([True, False]))


def test_values_are_not_looked_at_when_asked(rank):
    """A right call gives the same; a repeated id, which is refused otherwise, sends the token twice."""
    assert torch.equal(combined(rank, check_values=False), combined(rank))
    repeated = torch.tensor([[0, 1], [2, 2]], dtype=torch.int32)
    d = dispatched(rank, expert_ids=repeated, check_values=False)
    assert d.expert_token_nums.tolist() == [1, 1, 2, 0]


@pytest.mark.parametrize(
    ("operator", "name", "argument"),
    [
        (dispatched, "x", "x"),
        (dispatched, "expert_ids", "expert_ids"),
        (dispatched, "scales", "scales"),
        (dispatched, "x_active_mask", "x_active_mask"),
        (dispatched, "elastic_info", "elastic_info"),
        (combined, "expert_out", "expand_x"),
        (combined, "expert_scales", "expert_scales"),
        (combined, "shared_expert_x", "shared_expert_x"),
        (combined, "ori_x", "ori_x"),
    ],
)
@pytest.mark.parametrize(("value", "shown"), [([1.0], "a list"), (np.ones(2), "a ndarray"), ("x", "a str")])
def test_collectives_take_tensors(rank, operator, name, argument, value, shown):
    assert_refused(lambda: operator(rank, **{name: value}), UnsupportedTypeError, argument, shown, *TENSOR)


@pytest.mark.parametrize(
    ("operator", "changes", "error", "argument"),
    [
        (dispatched, {"x": None}, MissingArgumentError, "x"),
        (dispatched, {"expert_ids": None}, MissingArgumentError, "expert_ids"),
        (dispatched, {"ep": None}, MissingArgumentError, "ep"),
        (dispatched, {"ep": "group"}, UnsupportedTypeError, "ep"),
        (dispatched, {"tp": "group"}, UnsupportedTypeError, "tp"),
        (dispatched, {"num_experts": None}, MissingArgumentError, "num_experts"),
        (dispatched, {"num_experts": "4"}, ConstraintError, "moe_expert_num"),
        (dispatched, {"num_experts": 4.0}, ConstraintError, "moe_expert_num"),
        (dispatched, {"comm_alg": 5}, ConstraintError, "comm_alg"),
        (dispatched, {"limits": "moon"}, ConstraintError, "limits"),
        (dispatched, {"x": torch.ones(2, 3, dtype=torch.float64)}, UnsupportedTypeError, "x"),
        (dispatched, {"expert_ids": IDS.long()}, UnsupportedTypeError, "expert_ids"),
        (combined, {"dispatched": None}, MissingArgumentError, "assist_info_for_combine"),
        (combined, {"dispatched": (1, 2)}, MissingArgumentError, "assist_info_for_combine"),
        (combined, {"expert_out": None}, MissingArgumentError, "expand_x"),
        (combined, {"expert_scales": None}, MissingArgumentError, "expert_scales"),
        (combined, {"expert_scales": torch.ones(2, 2).half()}, UnsupportedTypeError, "expert_scales"),
        (combined, {"copy_expert_num": 1}, ConstraintError, "ori_x"),
    ],
)
def test_collectives_refuse(rank, operator, changes, error, argument):
    with pytest.raises(error) as caught:
        operator(rank, **changes)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("changes", "error", "argument"),
    [
        ({"residual_x": None}, MissingArgumentError, "residual_x"),
        ({"gamma": None}, MissingArgumentError, "gamma"),
        ({"gamma": [1.0]}, UnsupportedTypeError, "gamma"),
        ({"norm_eps": None}, ConstraintError, "norm_eps"),
    ],
)
def test_the_norm_refuses(rank, changes, error, argument):
    d = dispatched(rank)
    call = {"expert_out": d.expand_x, "expert_ids": IDS, "dispatched": d, "expert_scales": torch.ones(2, 2)}
    call |= {"residual_x": torch.ones(2, 1, 3), "gamma": torch.ones(3), "ep": rank.ep, **changes}
    with pytest.raises(error) as caught:
        em.combine_add_rms_norm(**call)
    assert caught.value.argument == argument


def test_the_number_of_experts_of_a_dispatch_made_by_hand(rank):
    """`Dispatched` may come from the seven tensors alone; then combine must be told."""
    unknown = lambda d: {"dispatched": replace(d, num_experts=0)}  # noqa: E731
    with pytest.raises(MissingArgumentError) as caught:
        combined(rank, num_experts=None, change=unknown)
    assert caught.value.argument == "num_experts"
    assert torch.equal(combined(rank, num_experts=np.int64(4), change=unknown), combined(rank, num_experts=None))


def test_groups_of_a_closed_world(rank):
    with em.local_world(1) as world:
        closed = world.ranks[0]
    with pytest.raises(ConstraintError) as caught:
        dispatched(closed)
    assert str(caught.value) == (
        f"`ep` is group {closed.ep.name!r}, which is closed: it must be open; make calls before the world is closed, "
        "or open another one."
    )
