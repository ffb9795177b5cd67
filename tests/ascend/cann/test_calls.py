"""What C programs get back: statuses, messages, values, and that nothing ends the process or hangs it."""

from __future__ import annotations

import pytest

from .conftest import Run, statuses

OK = (0, "")
WRONG_CALLS = {  # label in programs/wrong_calls.cpp -> (status, argument that the message names)
    "before init": (100001, "aclInit"),
    "group before init": (15, "aclInit"),
    "init twice": (100002, "aclInit"),
    "malloc without context": (107002, "context"),
    "stream without context": (107002, "context"),
    "device 16": (107001, "deviceId"),
    "device -1": (107001, "deviceId"),
    "malloc null": (100000, "devPtr"),
    "malloc 0": (100000, "size"),
    "malloc too much": (207001, "size"),
    "copy beyond destMax": (100000, "count"),
    "copy beyond allocation": (107000, "dst"),
    "copy from freed or foreign": (107000, "src"),
    "copy with the wrong kind": (107000, "dst"),
    "copy null": (100000, "dst"),
    "copy kind 9": (100000, "kind"),
    "set beyond allocation": (107000, "devPtr"),
    "free twice": (107000, "devPtr"),
    "free inside host memory": (107000, "devPtr"),
    "context as stream": (107003, "stream"),
    "stack address as stream": (107003, "stream"),
    "timeout -2": (100000, "timeout"),
    "stream destroyed": (107003, "stream"),
    "stream destroyed twice": (107003, "stream"),
    "context foreign": (107000, "context"),
    "context null": (107000, "context"),
    "group without devices": (2, "devices"),
    "group without comms": (2, "comms"),
    "group with one device twice": (1, "devices"),
    "group of 0": (1, "devices"),
    "group of 4 billion": (1, "ndev"),
    "group with device 99": (1, "devices"),
    "name null": (2, "commName"),
    "name of a destroyed comm": (1, "comm"),
    "comm null": (2, "comm"),
    # aclCreateTensor has no status: 1 stands for a null tensor.
    "tensor dims negative": (1, "viewDims"),
    "tensor strides negative": (1, "stride"),
    "tensor offset negative": (1, "offset"),
    "tensor dims null": (1, "viewDims"),
    "tensor dims many": (1, "viewDimsNum"),
    "destroy tensor null": (161001, "tensor"),
    "destroy tensor twice": (161002, "tensor"),
    "ids destroyed": (161002, "expertIds"),
    "ids foreign": (161002, "expertIds"),
    "ids at null": (161001, "expertIds"),
    "ids on the host": (161002, "expertIds"),
    "ids in 12 bytes": (161002, "expertIds"),
    "ids unaligned": (161002, "expertIds"),
    "ids NZ": (561002, "expertIds"),
    "ids of strings": (161002, "expertIds"),
    "ids huge": (561002, "expertIds"),
    "ids 2^40 rows": (561002, "expertIds"),
    "out overlaps": (561002, "balancedExpertIds"),
    "ids null": (161001, "expertIds"),
    "out null": (161001, "balancedExpertIds"),
    "ids of floats": (161002, "expertIds"),
    "ids 513 rows": (561002, "expertIds"),
    "world of 1": (561002, "worldSize"),
    "rank 2 of 2": (561002, "localRankId"),
    "rank least": (561002, "localRankId"),
    "mode 1 of the old operator": (561002, "balanceMode"),
    "size null": (161001, "workspaceSize"),
    "executor null": (161001, "executor"),
    "mask null": (161001, "balancedActiveMask"),
    "scales without threshold": (561002, "pruningThresholdOptional"),
    "dispatch x null": (161001, "x"),
    "dispatch out null": (161001, "expandXOut"),
    "dispatch x of ints": (161002, "x"),
    "dispatch group null": (161001, "groupEp"),
    "dispatch group of 128": (161001, "groupEp"),  # §2.13: dispatch alone calls this 161001
    "dispatch group unknown": (561002, "groupEp"),
    "dispatch quantMode 7": (561002, "quantMode"),
    "dispatch scales without quant": (561002, "scalesOptional"),
    "dispatch out too short": (561002, "expandXOut"),
    "combine group of 128": (161002, "groupEp"),
    "combine out null": (161001, "xOut"),
    "combine reserved given": (561002, "activationScaleOptional"),
    "norm gamma null": (161001, "gamma"),
    "second executor null": (161001, "executor"),
    "second executor foreign": (561000, "executor"),
    "second workspace null": (161001, "workspace"),
    "second workspace small": (161002, "workspaceSize"),
    "second workspace smaller than said": (161002, "workspace"),
    "second workspace on the host": (161002, "workspace"),
    "second stream destroyed": (161002, "stream"),
    "second twice": (561000, "executor"),
    "repeatable too late": (561000, "executor"),
    "repeatable null": (561103, "executor"),
    "destroy executor null": (561103, "executor"),
    "move before repeatable": (561000, "executor"),
    "move index 2 of 2": (161002, "index"),
    "move null tensor": (561103, "tensor"),
    "move another shape": (561002, "tensor"),
    "move to the host": (161002, "addr"),
    "destroy executor twice": (561000, "executor"),
    "third time": (561000, "executor"),
    "second on another device": (161002, "stream"),
}
ACCEPTED = {
    *("second at last", "synchronized", "repeatable", "first time", "second time", "destroy executor"),
    *("synchronized again", "finalize", "combine without tpSendCounts"),
}


@pytest.fixture(scope="module")
def wrong_calls(run_program: Run) -> dict[str, tuple[int, str]]:
    return statuses(run_program("wrong_calls"))


def test_every_wrong_call_gets_its_status_and_a_message_that_names_the_argument(wrong_calls) -> None:
    got = dict(wrong_calls)
    named = {
        label: (status, message.split("`")[1] if "`" in message else message)
        for label, (status, message) in got.items()
        if label not in ACCEPTED
    }
    another = named.pop("second of another operator")
    assert named == WRONG_CALLS
    assert another[0] == 561000
    assert "aclnnMoeEPLBUpdateExpertGetWorkspaceSize" in another[1]
    assert {label: got[label] for label in ACCEPTED} == dict.fromkeys(ACCEPTED, OK)


def test_messages_use_the_c_names_throughout(wrong_calls) -> None:
    _, message = wrong_calls["scales without threshold"]
    assert (
        message
        == "`pruningThresholdOptional` is None: it must be given with expertScalesOptional; pass both or neither."
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_24000_random_first_stages_are_accepted_or_fail_with_a_documented_status(run_program: Run, seed: int) -> None:
    done = run_program("fuzz", "12000", str(seed))
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    table = dict(line.split("\t") for line in done.stdout.splitlines())
    assert table.pop("without message") == "0"
    assert set(table) == {"0", "161001", "161002", "561002"}, table
    assert sum(map(int, table.values())) == 12000
    assert min(map(int, table.values())) > 500, "every outcome is reached"


def test_strided_tensors_are_read_and_written_where_they_lie(run_program: Run) -> None:
    got = statuses(run_program("strided"))
    # ids (0,2) (1,1) (2,0); experts 0 and 2 have one replica, 10 and 13; of expert 1's two, rank 3 of 4 takes 12.
    assert list(map(int, got["balanced"][1].split())) == [-1, -1, 10, 13, -1, 12, 12, -1, 13, 10, -1, -1]
    assert got["wrong elements of rank 0"] == OK
    assert got["wrong elements of rank 1"] == OK


@pytest.fixture(scope="module")
def versions(run_program: Run) -> dict[str, tuple[int, str]]:
    return statuses(run_program("versions"))


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("V3 tokens", "4"),  # of both ranks
        ("V3 rows", "3c00"),  # 1 in fp16
        ("V3 out", "4100"),  # 0.5 · (1 + 1 + 0 + 1 + 2) = 2.5 in fp16
        ("V4 out", "4080"),  # 0.5 · (2 + 2 + 0 + 2 + 2) = 4 in bf16
        ("norm x", "4100"),  # 4 + 4 = 8 in bf16
        ("norm y", "4040"),  # 8 / 8 · 3 in bf16
        ("norm rstd", "0.125000"),
    ],
)
def test_every_later_version_runs_to_its_end(versions, label: str, value: str) -> None:
    # The status says whether all elements are equal.
    assert [versions[f"{label} of rank {rank}"] for rank in (0, 1)] == [(0, value)] * 2


def test_update_expert_by_token_with_int64_ids_and_an_active_mask(versions) -> None:
    assert versions["updated"] == (0, "7 9 1 0")


def test_what_only_the_run_can_see_is_said_in_c_names(versions) -> None:
    status, message = versions["wrong value"]
    assert status == 361001
    assert "`expertIds` is 9 for token 0, k 1: it must be 0 to 1;" in message
    assert versions["peer of it"][0] == 361001
    status, message = versions["ended group"]
    assert status == 361001
    assert "`groupEp` is 'evenmoe_hccl_" in message
    assert message.endswith("; make the group with HcclCommInitAll, and pass the name that HcclGetCommName returns.")


def test_messages_do_not_advise_what_c_cannot_do(wrong_calls) -> None:
    messages = [message for _, message in wrong_calls.values()]
    assert not [message for message in messages if "limits=" in message or "local_world" in message]
    assert wrong_calls["ids 513 rows"][1].endswith("; use 1 to 512 tokens per call and rank.")
    assert "HcclCommInitAll" in wrong_calls["dispatch group unknown"][1]


PARTS = (
    *("in_turn", "missing_rank", "destroyed_context", "closed_group", "freed_memory", "moved_tensors"),
    *("finalize_while_waiting", "exit_while_waiting"),
)


@pytest.fixture(scope="module")
def lifetimes(run_program: Run) -> dict[str, dict[str, tuple[int, str]]]:
    """{part: {label: (status, message)}}; aclFinalize and aclInit lie between the parts."""
    done = run_program("lifetimes", *PARTS)
    parts, labels = {}, {}
    for label, answer in statuses_in_order(done):
        labels[label] = answer
        if label.endswith(" done"):
            parts[label.removesuffix(" done")], labels = labels, {}
    return parts


def statuses_in_order(done) -> list[tuple[str, tuple[int, str]]]:
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return [(label, (int(status), message)) for label, status, message in rows]


def test_every_part_comes_to_its_end_and_the_process_exits_with_work_queued(lifetimes) -> None:
    assert tuple(lifetimes) == PARTS


def test_one_host_thread_launches_on_all_ranks_and_then_waits(lifetimes) -> None:
    assert lifetimes["in_turn"]["rank 0"] == lifetimes["in_turn"]["rank 1"] == OK


def test_a_rank_that_never_calls_is_named_by_the_timeout_and_may_still_come(lifetimes) -> None:
    part = lifetimes["missing_rank"]
    for label in ("alone", "looked"):
        status, message = part[label]
        assert status == 507046
        assert "aclnnMoeDistributeDispatchV2 as rank 0" in message
        assert "waits for rank 1 of group" in message
    assert part["waited"][0] >= 300
    assert part["rank 0"] == part["rank 1"] == OK


def test_a_context_destroyed_with_work_queued_drops_it_and_leaves_the_others_with_a_timeout(lifetimes) -> None:
    part = lifetimes["destroyed_context"]
    assert part["destroyed"] == OK
    assert part["its stream"][0] == 107003
    assert part["its context"][0] == 107000
    assert part["its thread"][0] == 107002
    assert part["first call of rank 1"] == OK  # rank 0 had begun its part
    assert part["second call of rank 1"][0] == 507046
    assert "waits for rank 0 of group" in part["second call of rank 1"][1]
    assert part["queued copy"][0] == 0, "the memory is as it was"


def test_a_group_closed_by_a_peer_fails_the_wait_once(lifetimes) -> None:
    status, message = lifetimes["closed_group"]["peer closed"]
    assert status == 361001
    assert "rank 1, which closed its transport" in message
    assert lifetimes["closed_group"]["reported once"] == OK


def test_memory_freed_under_a_call_lasts_until_the_call_is_done(lifetimes) -> None:
    assert lifetimes["freed_memory"]["rank 0"] == lifetimes["freed_memory"]["rank 1"] == OK


def test_a_repeatable_executor_runs_on_other_memory(lifetimes) -> None:
    assert lifetimes["moved_tensors"]["moved"] == (0, "1 0 1 1")
    assert lifetimes["moved_tensors"]["destroy"] == OK


@pytest.fixture(scope="module")
def contexts(run_program: Run) -> dict[str, tuple[int, str]]:
    return statuses(run_program("contexts"))


@pytest.mark.parametrize(
    ("label", "status", "text"),
    [
        ("buffer of rank 0", 0, "419430400"),
        ("chain", 0, ""),
        ("y of rank 0", 0, ""),
        ("y of rank 1", 0, ""),
        ("no such rank", 1, "`remoteRank` is 2: it must be 0 to 1, a rank of the group"),
        ("null address", 2, "`addr` is a null pointer"),
        ("null size", 2, "`size` is a null pointer"),
        ("no such group", 6, "`group` is 'nobody': it must be the name of a group of which device 0 is a member"),
        ("null name", 2, "`group` is a null pointer"),
        ("small buffer", 561002, "`cclBufferSize` is 1048676, so 100 without the states: it must be at least 36864"),
        ("null context", 161001, "`context` is None: it must be given"),
        (
            "zeros",
            361001,
            "aclnnMoeDistributeDispatchV5 as rank 0 of the group of its context failed: `context` is 0 wh",
        ),
        (
            "waiting",
            507046,
            "stream 0 of device 1 was not done within 0.2 s, with 1 of its 4 calls outstanding: aclnnMoeDist",
        ),
        ("destroyed after its calls", 0, ""),
        ("done", 0, ""),
    ],
)
def test_contexts(contexts, label: str, status: int, text: str) -> None:
    found = contexts[label]
    assert found[0] == status, found
    assert found[1].startswith(text)
