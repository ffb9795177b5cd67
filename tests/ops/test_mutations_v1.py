"""Bugs planted into the first versions of dispatch and combine, one at a time: the checks of theirs must go red."""

from __future__ import annotations

from functools import cache

import pytest

from tests.mutations import fails, mutated
from tests.ops import test_dispatch_v1 as first_version
from tests.ops.test_mutations import OPS, Bug, bug
from tests.worlds import Case, Spec

WORLDS = [
    # 2 of 6 ranks for the shared expert: 5 tokens are divided into 2 and 3, or 3 and 2.
    Spec(seed=1, shared_ranks=2, moe_ranks=4, experts_per_rank=2, top_k=3, max_bs=5, hidden=8, dtype="float32"),
    Spec(
        seed=2,
        shared_ranks=1,
        moe_ranks=2,
        experts_per_rank=2,
        top_k=2,
        max_bs=4,
        hidden=8,
        quant_mode=2,
        smooth=True,
        nums_type=0,
    ),
    Spec(seed=3, tp=2, moe_ranks=3, top_k=2, max_bs=4, hidden=8, dtype="float16", sizes="unequal"),
]


@cache
def expected(spec: Spec) -> list:
    return first_version.run_reference(Case(spec))


def worlds() -> None:
    for spec in WORLDS:
        first_version.assert_equal(first_version.run_in_threads(spec), expected(spec))


def misuse() -> None:
    """Rows that are no dispatch's."""
    for changes, text in (
        ({"expand_idx": lambda t: t.flip(0)}, "it must be [0-9]+, the position"),
        ({"ep_send_counts": lambda t: t[[-1, *range(1, len(t))]]}, "it must be running sums"),
        ({"expert_ids": lambda t: (t + 1) % 4}, "rows are due here, while .* came, or of others"),
    ):
        first_version.test_what_is_not_dispatchs_is_an_error(changes, text, check_values=False)


def room() -> None:
    first_version.test_more_rows_for_the_shared_expert_than_there_is_room_for_are_an_error()


DISPATCH, COMBINE = OPS + "dispatch_v1", OPS + "combine_v1"
BUGS = {
    "an index over all experts": bug(
        worlds, DISPATCH, "(len(first), device=expert_ids.device) - first", "(len(first), device=expert_ids.device)"
    ),
    "an index in the order of the rows": bug(
        worlds, DISPATCH, "expand_idx[moe.token * layout.top_k + moe.k]", "expand_idx[: len(position)]"
    ),
    "every rank divides its tokens alike": bug(
        worlds, DISPATCH, "(rank + layout.rank) * tokens // ranks - before", "rank * tokens // ranks"
    ),
    "the first token of a part in the one before": bug(worlds, DISPATCH, "right=True", "right=False"),
    "shared ranks divide theirs, too": bug(
        worlds,
        DISPATCH,
        "    if layout.is_shared:\n        return torch.full_like",
        "    if False:\n        return torch.full_like",
    ),
    "a place among all tokens": bug(worlds, DISPATCH, "token - starts[destination]", "token"),
    "own tokens stand as one's own": bug(
        worlds, DISPATCH, "if not layout.is_shared:\n        return counts", "if True:\n        return counts"
    ),
    "expert 0 smoothed as the shared one": bug(worlds, DISPATCH, "moe.expert + 1", "moe.expert"),
    "no room is looked for": bug(room, OPS + "exchange", "if rows <= layout.capacity:", "if True:"),
    "own rows go to shared rank 0": bug(worlds, COMBINE, "counts[:, layout.rank] = mine", "counts[:, 0] = mine"),
    "rows return by expert": bug(
        worlds, COMBINE, ".repeat(layout.local_experts)", ".repeat_interleave(layout.local_experts)"
    ),
    "every rank's rows come first": bug(worlds, COMBINE, "starts = first[:, None] +", "starts = 0 * first[:, None] +"),
    "ranks counted without shared ones": bug(
        worlds, COMBINE, "rank = layout.shared_ranks + torch.div", "rank = torch.div"
    ),
    "the first row of an expert for all": bug(
        worlds, COMBINE, "+ expand_idx.view(ids.shape)", "+ 0 * expand_idx.view(ids.shape)"
    ),
    "one shared rank for all tokens": bug(worlds, COMBINE, "starts[destination, 0] + place", "starts[0, 0] + place"),
    "a peer's rows are not added": bug(
        worlds, COMBINE, "rows = add_peer_rows(rows, beside, plan, call)", "add_peer_rows(rows, beside, plan, call)"
    ),
    "any index is taken": bug(misuse, COMBINE, "if not torch.equal(call.expand_idx, expand_idx):", "if False:"),
    "any counts are taken": bug(misuse, COMBINE, "if bool((counts < 0).any()):", "if False:"),
    "any rows are taken": bug(misuse, COMBINE, "if not torch.equal(returned, routing.counts):", "if False:"),
}


@pytest.mark.parametrize("check", [worlds, misuse, room])
def test_the_checks_pass_without_a_bug(check):
    check()


@pytest.mark.parametrize("name", BUGS)
def test_the_bug_is_found(name):
    planted: Bug = BUGS[name]
    with mutated(planted.module, planted.changes):
        assert fails(planted.check), f"no check noticed: {name}"
