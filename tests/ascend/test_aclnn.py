"""The two-stage calls: argument order, statuses and messages of both stages, and the published demo's chain."""

from __future__ import annotations

import inspect
import threading

import numpy as np
import pytest
import torch

import evenmoe as em
from evenmoe.ascend import aclnn
from evenmoe.ascend.cann.build import c_names
from evenmoe.contract.operators import SIGNATURES
from tests.ascend.calls import FIRST_VERSIONS, HIDDEN, UNTOUCHED, Chain, pick, valid_calls
from tests.patience import HANG_S

# The C functions' arguments, without the two pointers behind (§1.2, §2.1, §3.1, §4), restated.
_EP_TP = (
    "groupEp epWorldSize epRankId moeExpertNum groupTp tpWorldSize tpRankId expertShardType sharedExpertNum "
    "sharedExpertRankNum"
)
_VIRTUAL = "zeroExpertNum copyExpertNum constExpertNum"
_CONSTANTS = "elasticInfoOptional oriXOptional constExpertAlpha1Optional constExpertAlpha2Optional constExpertVOptional"
_DISPATCH_OUT = (
    "expandXOut dynamicScalesOut assistInfoForCombineOut expertTokenNumsOut epRecvCountsOut tpRecvCountsOut "
    "expandScalesOut"
)
_DISPATCH = "x expertIds scalesOptional xActiveMaskOptional expertScalesOptional"
_DISPATCH_ATTRIBUTES = f"{_EP_TP} quantMode globalBs expertTokenNumsType commAlg"
_COMBINE = "expandX expertIds assistInfoForCombine epSendCounts expertScales"
_OPTIONAL = (
    "tpSendCountsOptional xActiveMaskOptional activationScaleOptional weightScaleOptional groupListOptional "
    "expandScalesOptional sharedExpertXOptional"
)
_COMBINE_ATTRIBUTES = f"{_EP_TP} globalBs outDtype commQuantMode groupListType commAlg"
_HALF_GROUP = "groupEp epWorldSize epRankId moeExpertNum expertShardType sharedExpertNum sharedExpertRankNum"
_OVER_CONTEXT = (
    "epWorldSize epRankId moeExpertNum cclBufferSize tpWorldSize tpRankId expertShardType sharedExpertNum "
    "sharedExpertRankNum"
)
C_ARGUMENTS = {
    "MoeDistributeDispatchSetup": f"x expertIds scalesOptional xActiveMaskOptional {_HALF_GROUP} quantMode globalBs "
    "commType commAlg y expandIdxOut commCmdInfoOut",
    "MoeDistributeDispatchTeardown": f"x y expertIds commCmdInfo {_HALF_GROUP} quantMode globalBs expertTokenNumsType "
    "commType commAlg expandXOut dynamicScalesOut assistInfoForCombineOut expertTokenNumsOut",
    "MoeDistributeCombineSetup": f"expandX expertIds assistInfoForCombine {_HALF_GROUP} globalBs commQuantMode "
    "commType commAlg quantExpandXOut commCmdInfoOut",
    "MoeDistributeCombineTeardown": "expandX quantExpandX expertIds expandIdx expertScales commCmdInfo "
    f"xActiveMaskOptional sharedExpertXOptional {_HALF_GROUP} globalBs commQuantMode commType commAlg xOut",
    "MoeEPLBUpdateExpert": "expertIds eplbTable localRankId worldSize balanceMode balancedExpertIds",
    "MoeUpdateExpert": "expertIds eplbTable expertScalesOptional pruningThresholdOptional activeMaskOptional "
    "localRankId worldSize balanceMode balancedExpertIds balancedActiveMask",
    "MoeDistributeDispatch": "x expertIds scales xActiveMask expertScales groupEp epWorldSize epRankId moeExpertNum "
    "groupTp tpWorldSize tpRankId expertShardType sharedExpertNum sharedExpertRankNum quantMode globalBs "
    "expertTokenNumsType expandX dynamicScales expandIdx expertTokenNums epRecvCounts tpRecvCounts expandScales",
    "MoeDistributeCombine": "expandX expertIds expandIdx epSendCounts expertScales tpSendCounts xActiveMask "
    "activationScale weightScale groupList expandScales groupEp epWorldSize epRankId moeExpertNum groupTp tpWorldSize "
    "tpRankId expertShardType sharedExpertNum sharedExpertRankNum globalBs outDtype commQuantMode groupListType xOut",
    "MoeDistributeDispatchV2": f"{_DISPATCH} {_DISPATCH_ATTRIBUTES} {_DISPATCH_OUT}",
    "MoeDistributeDispatchV3": f"{_DISPATCH} elasticInfoOptional {_DISPATCH_ATTRIBUTES} {_VIRTUAL} {_DISPATCH_OUT}",
    "MoeDistributeDispatchV4": f"{_DISPATCH} elasticInfoOptional performanceInfoOptional {_DISPATCH_ATTRIBUTES} "
    f"{_VIRTUAL} {_DISPATCH_OUT}",
    "MoeDistributeCombineV2": f"{_COMBINE} {_OPTIONAL} {_COMBINE_ATTRIBUTES} xOut",
    "MoeDistributeCombineV3": f"{_COMBINE} {_OPTIONAL} {_CONSTANTS} {_COMBINE_ATTRIBUTES} {_VIRTUAL} xOut",
    "MoeDistributeCombineV4": f"{_COMBINE} {_OPTIONAL} {_CONSTANTS} performanceInfoOptional {_COMBINE_ATTRIBUTES} "
    f"{_VIRTUAL} xOut",
    "MoeDistributeDispatchV5": f"context {_DISPATCH} elasticInfoOptional performanceInfoOptional {_OVER_CONTEXT} "
    f"quantMode globalBs expertTokenNumsType commAlg {_VIRTUAL} {_DISPATCH_OUT}",
    "MoeDistributeCombineV5": f"context {_COMBINE} {_OPTIONAL} {_CONSTANTS} performanceInfoOptional {_OVER_CONTEXT} "
    f"globalBs outDtype commQuantMode groupListType commAlg {_VIRTUAL} xOut",
    "MoeDistributeCombineAddRmsNorm": f"{_COMBINE} residualX gamma {_OPTIONAL} {_COMBINE_ATTRIBUTES} normEps "
    "yOut rstdOut xOut",
    "MoeDistributeCombineAddRmsNormV2": f"{_COMBINE} residualX gamma {_OPTIONAL} {_CONSTANTS} {_COMBINE_ATTRIBUTES} "
    f"normEps {_VIRTUAL} yOut rstdOut xOut",
}


def plain(name):
    """A name without case, underscores and the words that only say how it is passed."""
    name = name.replace("_", "").lower()
    for ending in ("optional", "out"):
        if name not in ("xout", "yout", "rstdout"):
            name = name.removesuffix(ending)
    return name


@pytest.mark.parametrize("operator", C_ARGUMENTS)
def test_arguments_are_in_the_order_of_the_c_functions(operator):
    first = inspect.signature(getattr(aclnn, f"aclnn{operator}GetWorkspaceSize"))
    assert [plain(name) for name in first.parameters] == [plain(name) for name in C_ARGUMENTS[operator].split()]
    second = inspect.signature(getattr(aclnn, f"aclnn{operator}"))
    assert list(second.parameters) == ["workspace", "workspace_size", "executor", "stream"]


def test_the_first_versions_c_names_have_no_endings():
    names = c_names("MoeDistributeCombine")
    assert (names["x_out"], names["x_active_mask"], names["tp_send_counts"]) == ("x", "xActiveMask", "tpSendCounts")


def test_every_version_is_there():
    found = {name for name in vars(aclnn) if name.startswith("aclnn")}
    assert found == {f"aclnn{operator}{stage}" for operator in C_ARGUMENTS for stage in ("", "GetWorkspaceSize")}
    assert set(SIGNATURES) == set(C_ARGUMENTS)


@pytest.fixture(scope="module")
def valid():
    with em.local_world(2) as world, em.local_world(8) as eight:
        yield valid_calls(world.ranks[0], eight.ranks[0])


def first_stage(operator, arguments):
    return getattr(aclnn, f"aclnn{operator}GetWorkspaceSize")(*arguments.values())


@pytest.mark.parametrize("operator", SIGNATURES)
def test_a_valid_call_gives_a_size_and_an_executor(operator, valid):
    status, size, executor = first_stage(operator, valid[operator])
    assert (status, size) == (0, 16 * 2**20), aclnn.aclGetRecentErrMsg()
    assert executor is not None


REQUIRED = {
    "MoeDistributeDispatchSetup": "x expert_ids y expand_idx comm_cmd_info group_ep",
    "MoeDistributeDispatchTeardown": "x y expert_ids comm_cmd_info expand_x dynamic_scales assist_info_for_combine "
    "expert_token_nums group_ep",
    "MoeDistributeCombineSetup": "expand_x expert_ids assist_info_for_combine quant_expand_x comm_cmd_info group_ep",
    "MoeDistributeCombineTeardown": "expand_x quant_expand_x expert_ids expand_idx expert_scales comm_cmd_info x_out "
    "group_ep",
    "MoeEPLBUpdateExpert": "expert_ids eplb_table balanced_expert_ids",
    "MoeUpdateExpert": "expert_ids eplb_table balanced_expert_ids balanced_active_mask",
    "MoeDistributeDispatch": "x expert_ids expand_x expand_idx expert_token_nums ep_recv_counts group_ep",
    "MoeDistributeCombine": "expand_x expert_ids expand_idx ep_send_counts expert_scales x_out group_ep",
    "MoeDistributeDispatchV2": "x expert_ids expand_x assist_info_for_combine expert_token_nums ep_recv_counts "
    "group_ep",
    "MoeDistributeCombineV2": "expand_x expert_ids assist_info_for_combine ep_send_counts expert_scales x_out group_ep",
    "MoeDistributeDispatchV5": "context x expert_ids expand_x assist_info_for_combine expert_token_nums "
    "ep_recv_counts expand_scales",
    "MoeDistributeCombineV5": "context expand_x expert_ids assist_info_for_combine ep_send_counts expert_scales x_out",
    "MoeDistributeCombineAddRmsNorm": "expand_x expert_ids assist_info_for_combine ep_send_counts expert_scales x_out "
    "group_ep residual_x gamma y_out rstd_out",
}


@pytest.mark.parametrize("operator", SIGNATURES)
def test_null_pointers(operator, valid):
    """161001 and the name of the argument for what must be given; the rest may be None (§1.7, §2.13, §3.6, §4)."""
    base = operator.removesuffix("V2").removesuffix("V3").removesuffix("V4")
    required = REQUIRED.get(operator) or next(
        names for key, names in REQUIRED.items() if key.removesuffix("V2") == base and key not in FIRST_VERSIONS
    )
    required = required.split()
    for name in required:
        assert first_stage(operator, valid[operator] | {name: None}) == (161001, 0, None)
        assert aclnn.aclGetRecentErrMsg().startswith(f"`{name}` is None: it must be")
        assert aclnn.aclGetRecentErrMsg() is None
    for name in SIGNATURES[operator].names("tensor", "output"):
        if name not in required:
            assert first_stage(operator, valid[operator] | {name: None})[0] == 0, name


@pytest.mark.parametrize("operator", SIGNATURES)
def test_a_wrong_dtype_is_161002_and_a_wrong_shape_561002(operator, valid):
    for name in SIGNATURES[operator].names("tensor", "output"):
        tensor = valid[operator][name]
        if tensor is None:
            continue
        wrong = torch.zeros(tensor.shape, dtype=torch.complex64)
        assert first_stage(operator, valid[operator] | {name: wrong}) == (161002, 0, None), name
        assert aclnn.aclGetRecentErrMsg().startswith(f"`{name}` is complex64"), name
        unseen = ("expert_scales",) if operator == "MoeDistributeDispatch" else ()
        if name in ("dynamic_scales", "expand_scales", "tp_send_counts", *unseen):
            continue  # not looked at without quantization, room or peers
        wrong = torch.zeros((1, 1, 1, 1, 1), dtype=tensor.dtype)
        assert first_stage(operator, valid[operator] | {name: wrong}) == (561002, 0, None), name
        assert f"`{name}` is" in aclnn.aclGetRecentErrMsg(), name


HALVES = [name for name in SIGNATURES if name.endswith(("Setup", "Teardown"))]


@pytest.mark.parametrize("operator", [name for name, s in SIGNATURES.items() if "group_tp" in s.arguments])
def test_group_names(operator, valid):
    too_long = 161001 if "Dispatch" in operator else 161002  # as in the source (§2.13, §3.6)
    for name in ("group_ep", "group_tp"):
        assert first_stage(operator, valid[operator] | {name: "g" * 128})[0] == too_long
        assert aclnn.aclGetRecentErrMsg() == (
            f"`{name}` is 128 characters long: it must have at most 127 characters; use a shorter group name."
        )
    assert first_stage(operator, valid[operator] | {"group_tp": "t" * 127})[0] == 0
    assert first_stage(operator, valid[operator] | {"group_tp": None})[0] == 0
    assert first_stage(operator, valid[operator] | {"group_tp": None, "tp_world_size": 2})[0] == 161001
    assert first_stage(operator, valid[operator] | {"group_ep": "nobody"})[0] == 561002
    assert aclnn.aclGetRecentErrMsg().startswith("`group_ep` is 'nobody' (rank 0): it must name an open group")
    if "comm_alg" in valid[operator]:
        assert first_stage(operator, valid[operator] | {"comm_alg": None})[0] == 0


@pytest.mark.parametrize("operator", HALVES)
def test_group_names_of_the_halves(operator, valid):
    too_long = 161001 if operator == "MoeDistributeDispatchTeardown" else 161002  # as in the source (§14.2)
    assert first_stage(operator, valid[operator] | {"group_ep": "g" * 128})[0] == too_long
    assert aclnn.aclGetRecentErrMsg().startswith("`group_ep` is 128 characters long")
    assert first_stage(operator, valid[operator] | {"group_ep": "nobody"})[0] == 561002
    assert aclnn.aclGetRecentErrMsg().startswith("`group_ep` is 'nobody' (rank 0): it must name an open group")
    assert first_stage(operator, valid[operator] | {"comm_alg": None})[0] == 0
    assert first_stage(operator, valid[operator] | {"comm_type": 0})[0] == 561002
    assert aclnn.aclGetRecentErrMsg().startswith("`comm_type` is 0: it must be 2")


def test_tensors_must_have_memory_and_outputs_must_not_overlap(valid):
    call = valid["MoeEPLBUpdateExpert"]
    for name in ("expert_ids", "balanced_expert_ids"):
        assert first_stage("MoeEPLBUpdateExpert", call | {name: call[name].to("meta")}) == (161002, 0, None)
        assert aclnn.aclGetRecentErrMsg().startswith(f"`{name}` is on the device meta")
    repeated = torch.zeros(2, dtype=torch.int32).expand(3, 2)
    assert first_stage("MoeEPLBUpdateExpert", call | {"expert_ids": repeated})[0] == 0
    assert first_stage("MoeEPLBUpdateExpert", call | {"balanced_expert_ids": repeated}) == (561002, 0, None)
    assert aclnn.aclGetRecentErrMsg().startswith("`balanced_expert_ids` is (3, 2) with strides (0, 1)")


def test_messages_do_not_advise_other_limits(valid):
    many = torch.zeros((513, 2), dtype=torch.int32)
    assert first_stage("MoeEPLBUpdateExpert", valid["MoeEPLBUpdateExpert"] | {"expert_ids": many})[0] == 561002
    assert aclnn.aclGetRecentErrMsg().endswith("; use 1 to 512 tokens per call and rank.")


@pytest.mark.parametrize("name", ["expert_ids", "balanced_expert_ids"])
def test_a_tensor_resized_between_the_stages_is_an_error(valid, name):
    call = valid["MoeEPLBUpdateExpert"] | {"balanced_expert_ids": torch.full((3, 2), UNTOUCHED, dtype=torch.int32)}
    call[name] = call[name].clone()
    _, stream = aclnn.aclrtCreateStream()
    _, size, executor = first_stage("MoeEPLBUpdateExpert", call)
    call[name].resize_(2, 2)
    assert aclnn.aclnnMoeEPLBUpdateExpert(bytearray(size), size, executor, stream) == 0
    assert aclnn.aclrtSynchronizeStream(stream) == 361001
    assert f"`{name}` is int32 (2, 2): it must stay as the first stage saw it" in aclnn.aclGetRecentErrMsg()
    assert (call["balanced_expert_ids"] == UNTOUCHED).all()
    aclnn.aclrtDestroyStream(stream)


def test_tensors_of_inference_mode_and_of_training_serve(valid):
    """The stream's own thread is in neither mode, and both kinds cannot be written in place there."""
    with torch.inference_mode():
        out = torch.full((3, 2), UNTOUCHED, dtype=torch.int32)
    _, stream = aclnn.aclrtCreateStream()
    call = valid["MoeEPLBUpdateExpert"]
    _, size, executor = first_stage("MoeEPLBUpdateExpert", call | {"balanced_expert_ids": out})
    assert aclnn.aclnnMoeEPLBUpdateExpert(bytearray(size), size, executor, stream) == 0
    assert aclnn.aclrtSynchronizeStream(stream) == 0, aclnn.aclGetRecentErrMsg()
    assert torch.equal(out, call["expert_ids"])
    aclnn.aclrtDestroyStream(stream)

    def dispatch(rank):
        values = Chain().inputs(rank) | Chain().attributes(rank) | Chain().outputs(rank)
        values["x"].requires_grad_()
        values["expand_x"].requires_grad_()
        _, size, executor = first_stage("MoeDistributeDispatchV2", pick("MoeDistributeDispatchV2", values))
        _, stream = aclnn.aclrtCreateStream()
        assert aclnn.aclnnMoeDistributeDispatchV2(bytearray(size), size, executor, stream) == 0
        status = aclnn.aclrtSynchronizeStreamWithTimeout(stream, 30000)
        aclnn.aclrtDestroyStream(stream)
        return status

    with em.local_world(2, timeout_s=HANG_S) as world:
        assert world.run(dispatch) == [0, 0]


@pytest.mark.parametrize("make", [bytearray, np.zeros, lambda size: memoryview(bytes(size)), torch.zeros])
def test_a_workspace_must_really_have_its_bytes(valid, make):
    _, stream = aclnn.aclrtCreateStream()
    _, size, executor = first_stage("MoeEPLBUpdateExpert", valid["MoeEPLBUpdateExpert"])
    run = aclnn.aclnnMoeEPLBUpdateExpert
    assert run(make(10), size, executor, stream) == 161002
    assert aclnn.aclGetRecentErrMsg().startswith("`workspaceSize` is ")
    assert run(make(size), size, executor, stream) == 0
    assert aclnn.aclrtSynchronizeStream(stream) == 0
    aclnn.aclrtDestroyStream(stream)


def test_a_wrong_number_of_arguments_is_pythons_error():
    with pytest.raises(TypeError):
        aclnn.aclnnMoeUpdateExpertGetWorkspaceSize(None)


def test_the_second_stage_checks_what_is_not_there(valid):
    _, size, executor = first_stage("MoeUpdateExpert", valid["MoeUpdateExpert"])
    _, stream = aclnn.aclrtCreateStream()
    workspace = torch.empty(size, dtype=torch.uint8)
    run = aclnn.aclnnMoeUpdateExpert
    wrong = [
        (run(workspace, size, None, stream), 161001, "`executor` is None"),
        (run(workspace, size, executor, None), 161001, "`stream` is None"),
        (run(None, size, executor, stream), 161001, "`workspace` is a null pointer"),
        (run(workspace, size - 1, executor, stream), 161002, "`workspaceSize` is 16777215"),
        (run(workspace[:-1], size, executor, stream), 161002, "`workspaceSize` is 16777215"),
        (run(workspace, "all", executor, stream), 161002, "`workspaceSize` is 'all'"),
        (aclnn.aclnnMoeEPLBUpdateExpert(workspace, size, executor, stream), 561000, "made by aclnnMoeUpdateExpertGet"),
    ]
    # Only the last message is kept, so each is asked for by a call of its own.
    assert [status for status, _, _ in wrong] == [code for _, code, _ in wrong]
    assert wrong[-1][2] in aclnn.aclGetRecentErrMsg()
    run(None, size, executor, stream)
    assert wrong[2][2] in aclnn.aclGetRecentErrMsg()
    run(workspace[:-1], size, executor, stream)
    assert wrong[4][2] in aclnn.aclGetRecentErrMsg()
    assert run(workspace, size, executor, stream) == 0
    assert run(workspace, size, executor, stream) == 561000
    assert "has been used" in aclnn.aclGetRecentErrMsg()
    assert aclnn.aclrtSynchronizeStream(stream) == 0
    assert aclnn.aclrtDestroyStream(stream) == 0
    _, size, executor = first_stage("MoeUpdateExpert", valid["MoeUpdateExpert"])
    assert run(workspace, size, executor, stream) == 107017
    assert "has been destroyed" in aclnn.aclGetRecentErrMsg()


def test_repeatable_executors(valid):
    _, stream = aclnn.aclrtCreateStream()
    _, size, executor = first_stage("MoeUpdateExpert", valid["MoeUpdateExpert"])
    assert aclnn.aclSetAclOpExecutorRepeatable(None) == 561103
    assert aclnn.aclDestroyAclOpExecutor(None) == 561103
    assert aclnn.aclSetAclOpExecutorRepeatable(executor) == 0
    workspace = torch.empty(size, dtype=torch.uint8)
    assert [aclnn.aclnnMoeUpdateExpert(workspace, size, executor, stream) for _ in range(3)] == [0, 0, 0]
    assert aclnn.aclDestroyAclOpExecutor(executor) == 0
    assert aclnn.aclnnMoeUpdateExpert(workspace, size, executor, stream) == 561000
    assert aclnn.aclSetAclOpExecutorRepeatable(executor) == 561000
    assert aclnn.aclDestroyAclOpExecutor(executor) == 561000
    assert "has been destroyed" in aclnn.aclGetRecentErrMsg()
    assert aclnn.aclrtSynchronizeStream(stream) == 0
    aclnn.aclrtDestroyStream(stream)


def test_streams_that_are_not_there_and_odd_time_outs():
    for call in (aclnn.aclrtSynchronizeStream, aclnn.aclrtDestroyStream):
        assert call(None) == 107000
        assert aclnn.aclGetRecentErrMsg().startswith("`stream` is None")
    _, stream = aclnn.aclrtCreateStream()
    for timeout in (-2, "soon", None, 0.5):
        assert aclnn.aclrtSynchronizeStreamWithTimeout(stream, timeout) == 107000
        assert aclnn.aclGetRecentErrMsg().startswith(f"`timeout` is {timeout!r}")
    assert aclnn.aclrtSynchronizeStreamWithTimeout(stream, 0) == 0
    assert aclnn.aclrtSynchronizeStreamWithTimeout(stream, -1) == 0
    assert aclnn.aclrtDestroyStream(stream) == 0
    assert aclnn.aclrtDestroyStream(stream) == 0
    assert aclnn.aclrtSynchronizeStreamWithTimeout(stream, 0) == 107017


def test_a_rank_that_never_calls_is_named():
    chain = Chain(ep=3)
    with em.local_world(3, timeout_s=HANG_S) as world:
        streams, name = [aclnn.aclrtCreateStream()[1] for _ in range(3)], world.ranks[0].ep.name

        def launch(index):
            rank = world.ranks[index]
            values = chain.inputs(rank) | chain.attributes(rank) | chain.outputs(rank)
            _, size, executor = first_stage("MoeDistributeDispatchV2", pick("MoeDistributeDispatchV2", values))
            return aclnn.aclnnMoeDistributeDispatchV2(bytearray(size), size, executor, streams[index])

        assert [launch(index) for index in (0, 1)] == [0, 0]
        for index in (0, 1):
            assert aclnn.aclrtSynchronizeStreamWithTimeout(streams[index], 200) == 507046
            message = aclnn.aclGetRecentErrMsg()
            assert f"as rank {index} of group {name!r} waits for rank 2 of group {name!r}" in message
        assert launch(2) == 0
        assert [aclnn.aclrtSynchronizeStreamWithTimeout(stream, 30000) for stream in streams] == [0, 0, 0]
        for stream in streams:
            aclnn.aclrtDestroyStream(stream)


def test_ranks_that_disagree_all_hear_why():
    with em.local_world(2, timeout_s=HANG_S) as world:
        streams = [aclnn.aclrtCreateStream()[1] for _ in range(2)]
        for rank, stream in zip(world.ranks, streams, strict=True):
            chain = Chain(tokens=3 + rank.index)
            values = chain.inputs(rank) | chain.attributes(rank) | chain.outputs(rank)
            status, size, executor = first_stage("MoeDistributeDispatchV2", pick("MoeDistributeDispatchV2", values))
            assert status == 0
            assert aclnn.aclnnMoeDistributeDispatchV2(bytearray(size), size, executor, stream) == 0
        for stream in streams:
            assert aclnn.aclrtSynchronizeStreamWithTimeout(stream, 30000) == 361001
            assert "6 on rank 0 and 8 on rank 1" in aclnn.aclGetRecentErrMsg()
            aclnn.aclrtDestroyStream(stream)


# The published demo (§7): 8 expert-parallel ranks of 2 tensor-parallel peers, as one thread launches them. ------------

BS, DEMO_HIDDEN, K, EXPERTS = 8, 7168, 3, 8


def demo_rank(rank, stream, one):
    """Update, dispatch and combine with add and RMS norm on one rank's stream; `one` fills x, residual, gamma."""

    def ones(*shape):
        return torch.full(shape, one, dtype=torch.int16).view(torch.bfloat16)

    def zeros(*shape, dtype=torch.int32):
        return torch.zeros(shape, dtype=dtype)

    group = (rank.ep.name, 8, rank.ep.rank, EXPERTS, rank.tp.name, 2, rank.tp.rank, 0, 0, 0)
    table = torch.tensor([[1, expert] for expert in range(EXPERTS)], dtype=torch.int32)
    ids, balanced = torch.tensor([[0, 1, 2]] * BS, dtype=torch.int32), zeros(BS, K)
    scales = torch.full((BS, K), 0.1)
    expand_x, assist_info, counts = zeros(128, DEMO_HIDDEN, dtype=torch.bfloat16), zeros(64 * 128), zeros(16)
    nums, tp_counts = zeros(1, dtype=torch.int64), zeros(2)
    y, rstd, x_out = ones(BS, 1, DEMO_HIDDEN), zeros(BS, 1, 1, dtype=torch.float32), ones(BS, 1, DEMO_HIDDEN)

    def run(operator, *arguments):
        status, size, executor = getattr(aclnn, f"aclnn{operator}GetWorkspaceSize")(*arguments)
        assert status == 0, aclnn.aclGetRecentErrMsg()
        assert getattr(aclnn, f"aclnn{operator}")(bytearray(size), size, executor, stream) == 0

    run("MoeEPLBUpdateExpert", ids, table, rank.ep.rank, 8, 0, balanced)
    dynamic, expand_scales = torch.zeros(128), torch.zeros(64)
    outputs = (expand_x, dynamic, assist_info, nums, counts, tp_counts, expand_scales)
    run(
        *("MoeDistributeDispatchV2", ones(BS, DEMO_HIDDEN), balanced, None, None, scales, *group, 0, 64, 0, None),
        *outputs,
    )
    given = (expand_x, balanced, assist_info, counts, scales, ones(BS, 1, DEMO_HIDDEN), ones(DEMO_HIDDEN), tp_counts)
    optional = (None, None, None, None, None, ones(BS, 1, DEMO_HIDDEN))
    run("MoeDistributeCombineAddRmsNorm", *given, *optional, *group, 64, 0, 0, 1, None, 1e-6, y, rstd, x_out)
    return balanced, expand_x, assist_info, nums, counts, tp_counts, y, rstd, x_out


# The page's literal 1 as bf16 bits is 2⁻¹³³, so sums stay subnormal (xOut 0x0003, y 0); 0x3F80 is a true 1.0, whose
# sum is 2.6 = 3·0.1·2 + 1 + 1. Of rstd = 1/√(mean + 1e-6): the sum takes 5 roundings, the square 1 more, its scale 2
# and the tree over 7168 columns 13, so the mean is off by 2·5 + 16 halves of a last place at most, and the root halves
# that; with the addition, the root and the division of their own, 13 + 3 of 2⁻²⁴ = 2⁻²⁰.
@pytest.mark.parametrize(
    ("one", "x_bits", "y_bits", "rstd"), [(0x0001, 0x0003, 0x0000, 1e3), (0x3F80, 0x4026, 0x3F80, 6.760001**-0.5)]
)
def test_the_demo_gives_the_published_values(one, x_bits, y_bits, rstd):
    with em.local_world(8, 2, timeout_s=HANG_S) as world:
        streams = [aclnn.aclrtCreateStream()[1] for _ in world.ranks]
        results = [demo_rank(rank, stream, one) for rank, stream in zip(world.ranks, streams, strict=True)]
        for stream in streams:
            assert aclnn.aclrtSynchronizeStreamWithTimeout(stream, 60000) == 0, aclnn.aclGetRecentErrMsg()
            aclnn.aclrtDestroyStream(stream)
    for index, (balanced, expand_x, assist_info, nums, counts, tp_counts, y, rstd_out, x_out) in enumerate(results):
        ep = index // 2
        rows = 64 if ep < 3 else 0
        assert (balanced == torch.tensor([0, 1, 2])).all()
        assert (expand_x[: 2 * rows].view(torch.int16) == one).all()
        assert not expand_x[2 * rows :].any()
        assert (
            assist_info[: 3 * rows].tolist() == [n for s in range(8) for t in range(8) for n in (s, t, ep)][: 3 * rows]
        )
        assert nums.tolist() == [2 * rows]
        assert counts.tolist() == [rows // 8 * (s + 1) for s in range(8)] * 2
        assert tp_counts.tolist() == [rows, rows]
        assert (x_out.view(torch.int16) == x_bits).all()
        assert (y.view(torch.int16) == y_bits).all()
        assert torch.allclose(rstd_out, torch.tensor(rstd), rtol=2**-20, atol=0)


def test_outputs_stay_untouched_until_the_stream_runs(valid):
    """The second stage returns at once; nothing is written before the work runs."""
    _, stream = aclnn.aclrtCreateStream()
    gate = threading.Event()
    stream.enqueue(gate.wait)
    out = torch.full((3, 2), UNTOUCHED, dtype=torch.int32)
    _, size, executor = first_stage("MoeEPLBUpdateExpert", valid["MoeEPLBUpdateExpert"] | {"balanced_expert_ids": out})
    assert aclnn.aclnnMoeEPLBUpdateExpert(bytearray(size), size, executor, stream) == 0
    assert (out == UNTOUCHED).all()
    gate.set()
    assert aclnn.aclrtSynchronizeStream(stream) == 0
    assert (out != UNTOUCHED).all()
    aclnn.aclrtDestroyStream(stream)


def test_the_least_hidden_size_is_the_chips(valid):
    narrow = {"x": torch.zeros(3, HIDDEN - 1, dtype=torch.bfloat16)}
    assert first_stage("MoeDistributeDispatchV2", valid["MoeDistributeDispatchV2"] | narrow) == (561002, 0, None)
    assert "1023" in aclnn.aclGetRecentErrMsg()
