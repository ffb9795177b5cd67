"""Backend "hccl", the names of its groups, and the barrier, over processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ascend.emulated.ranks import RANKS
from tests.patience import HANG_S

ROOT = Path(__file__).resolve().parents[3]
BARRIER_ERRORS = {
    "wrong size": "NpuCallError: `group` is '",
    "no group": "NpuCallError: `group` is 'no group' (rank 0): it must name an open group that this rank belongs to; ",
    "too many": "NpuCallError: `elastic_info` is 4 ranks at 1: it must leave 1 to 3 ranks; pass what dispatch of the ",
    "disagree": "NpuCallError: `digest of elastic_info` is ",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.ascend.emulated.ranks", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def test_groups_of_the_backend(seen):
    for rank in seen:
        assert rank["available"] == [True, True, "gloo"]
        assert rank["names"] == [True, True]
        assert rank["mesh"]
        assert rank["sum"] == 6
        assert rank["negative"] == (
            "ConstraintError: `rankid` is -1: it must be at least 0; pass torch.distributed.get_rank()."
        )
        assert rank["destroyed"] == (
            "ConstraintError: `group` is destroyed: it must be open; ask for its name before destroy_process_group."
        )
        assert rank["left"] is False


def test_ranks_that_meet_at_the_barrier(seen):
    for number, rank in enumerate(seen):
        assert rank["barrier"] is rank["not scaled down"] is rank["after it"] is True
        if number != 1:
            assert rank["elastic"] is rank["pair"] is True


@pytest.mark.parametrize("case", BARRIER_ERRORS)
def test_errors_of_the_barrier(seen, case):
    for rank in seen:
        assert rank[case].startswith(BARRIER_ERRORS[case])


def test_what_one_rank_gets_wrong_is_told_to_all(seen):
    own = "NpuCallError: `time_out` is int64 (1,): it must be int32; convert it to int32."
    assert seen[1]["time_out"] == own
    for rank in (seen[0], seen[2]):
        assert "rank 1" in rank["time_out"]
        assert "`time_out` is int64 (1,)" in rank["time_out"]
    assert seen[2]["lost"] == (
        "NpuCallError: `elastic_info` is tables [0, 1, 2] and [0, 1]: it must be each other's inverse and keep rank 2, "
        "which calls; pass what dispatch of the same group is given."
    )


def test_repeated_experts(seen):
    for number, rank in enumerate(seen):
        assert rank["checked"] == (
            "NpuCallError: `expert_ids` is [4, 4] for token 0: it must not name one physical expert twice in a token; "
            "use slot ids that are unique over the whole EPLB table."
        )
        assert float(rank["repeated"]) == 0.75 * (number + 1)
        assert rank["out of range"].startswith("NpuCallError: `expert_ids` is 6 for token 0, k 1: it must be 0 to 5; ")
        own = (
            "`expert_ids` is such that 6 rows come here: it must bring at most 3 rows; let no expert occur twice in a "
        )
        own += "token."
        assert own in rank["no room"]
        assert (rank["no room"] == f"NpuCallError: {own}") == (number == 2)
