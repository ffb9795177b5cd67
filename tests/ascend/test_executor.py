"""Executors: the values that the package's own operators give, written where the operator writes, and nowhere else."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import evenmoe as em
from evenmoe.ascend import status
from evenmoe.ascend.executor import WORKSPACE_BYTES, Executor, stage_one
from evenmoe.ascend.status import AclError
from evenmoe.ascend.stream import Stream
from evenmoe.errors import ConstraintError, EvenmoeError, MissingArgumentError, UnsupportedTypeError
from tests.ascend.calls import CHAINS, HIDDEN, UNTOUCHED, Chain, expected, pick
from tests.patience import HANG_S, until
from tests.worlds import assert_same_bits, strided

NEWEST = {
    "update_expert": "MoeUpdateExpert",
    "dispatch": "MoeDistributeDispatchV4",
    "combine": "MoeDistributeCombineV4",
    "combine_add_rms_norm": "MoeDistributeCombineAddRmsNormV2",
}
OLDEST = {
    "update_expert": "MoeEPLBUpdateExpert",
    "dispatch": "MoeDistributeDispatchV2",
    "combine": "MoeDistributeCombineV2",
    "combine_add_rms_norm": "MoeDistributeCombineAddRmsNorm",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def first_stage(operator, values):
    return stage_one(operator, pick(operator, values))


def launch(executor, stream):
    executor.launch(executor.operator, True, executor.workspace_size, stream)


def launch_chain(chain, rank, stream, operators, place=lambda tensor: tensor):
    """All four operators of one rank onto one stream; returns (inputs, rows for combine, outputs)."""
    given = {name: None if tensor is None else place(tensor) for name, tensor in chain.inputs(rank).items()}
    out = {name: place(tensor) for name, tensor in chain.outputs(rank).items()}
    attributes = chain.attributes(rank)
    update = {} if chain.pruning else {"expert_scales": None}
    launch(first_stage(operators["update_expert"], given | attributes | update | out), stream)
    mapped = given | {"expert_ids": out["balanced_expert_ids"]}
    launch(first_stage(operators["dispatch"], mapped | attributes | out), stream)
    rows = place(torch.randn(out["expand_x"].shape, generator=torch.Generator().manual_seed(rank.index)))
    back = {
        "expand_x": rows.to(chain.dtype),
        "assist_info_for_combine": out["assist_info_for_combine"],
        "ep_send_counts": out["ep_recv_counts"],
        "tp_send_counts": out["tp_recv_counts"],
    }
    results = {name: out[name] for name in ("y_out", "rstd_out")}
    for family in ("combine", "combine_add_rms_norm"):
        out[family] = place(chain.x_out(with_norm=family != "combine"))
        arguments = mapped | attributes | results | back | {"x_out": out[family]}
        launch(first_stage(operators[family], arguments), stream)
    return given, back["expand_x"], out


def run_chain(chain, operators, place=lambda tensor: tensor):
    with em.local_world(chain.ep, max(chain.tp, 1), timeout_s=HANG_S) as world:
        streams = [Stream(f"stream {rank.index}") for rank in world.ranks]
        # One host thread launches on every rank, and only then waits.
        launched = [launch_chain(chain, *pair, operators, place) for pair in zip(world.ranks, streams, strict=True)]
        for stream in streams:
            stream.synchronize(60)
            stream.destroy()
    return launched


def assert_written(output, values, what):
    """The first entries are the values, all others as they were."""
    assert_same_bits(output[: len(values)].contiguous(), values.contiguous(), what)
    assert (output[len(values) :] == UNTOUCHED).all(), f"{what} was written behind its {len(values)} entries"


def check_chain(chain, launched):
    with em.local_world(chain.ep, max(chain.tp, 1), timeout_s=HANG_S) as world:
        want = world.run(lambda rank: expected(chain, rank, *launched[rank.index][:2]))
    for index, (given, _, out) in enumerate(launched):
        d = want[index]["dispatch"]
        ep = index // max(chain.tp, 1)
        local = 1 if ep < chain.shared_ranks else chain.experts_per_rank
        own = int(d.ep_recv_counts[chain.ep * local - 1])
        rows = int(d.tp_recv_counts.sum()) if chain.tp == 2 else own
        assert torch.equal(out["balanced_expert_ids"], given["expert_ids"]), index
        assert_written(out["expand_x"], d.expand_x[:rows], f"expand_x on rank {index}")
        scales = d.dynamic_scales[: rows if chain.quant_mode == 2 else 0]
        assert_written(out["dynamic_scales"], scales, f"dynamic_scales on rank {index}")
        assert_written(
            out["assist_info_for_combine"], d.assist_info_for_combine[: 3 * own], f"assist_info on rank {index}"
        )
        for name in ("expert_token_nums", "ep_recv_counts", "tp_recv_counts"):
            assert_written(out[name], getattr(d, name), f"{name} on rank {index}")
        weighted = 0 if ep < chain.shared_ranks or chain.tp == 2 else own
        assert_written(out["expand_scales"], d.expand_scales[:weighted], f"expand_scales on rank {index}")
        active = active_tokens(given["x_active_mask"], chain.tokens)
        normed = zip(("y_out", "rstd_out", "combine_add_rms_norm"), want[index]["combine_add_rms_norm"], strict=True)
        for name, values in (("combine", want[index]["combine"]), *normed):
            assert_same_bits(out[name][active], values[active], f"{name} on rank {index}")
            assert (out[name][~active] == UNTOUCHED).all(), f"{name} on rank {index}"


def active_tokens(mask, num_tokens):
    if mask is None:
        return torch.ones(num_tokens, dtype=torch.bool)
    return mask.clone() if mask.dim() == 1 else mask.any(dim=1)


@pytest.mark.parametrize("name", CHAINS)
def test_newest_versions_give_the_operators_values(name):
    check_chain(CHAINS[name], run_chain(CHAINS[name], NEWEST))


@pytest.mark.parametrize("name", ["plain", "tp", "shared"])
def test_oldest_versions_give_the_operators_values(name):
    check_chain(CHAINS[name], run_chain(CHAINS[name], OLDEST))


@pytest.mark.parametrize("name", ["plain", "quantized", "masked assignments"])
def test_strided_views_with_an_offset_are_read_and_written(name):
    launched = run_chain(CHAINS[name], NEWEST, place=strided)
    assert not launched[0][2]["expand_x"].is_contiguous()
    check_chain(CHAINS[name], launched)


def test_pruning_writes_the_mask_and_its_absence_does_not():
    chain = Chain(ep=2, pruning=True, tokens=4)
    for given, _, out in run_chain(chain, NEWEST):
        _, mask = em.update_expert(
            given["expert_ids"],
            given["eplb_table"],
            world_size=2,
            local_rank_id=0,
            expert_scales=given["expert_scales"],
            pruning_threshold=given["pruning_threshold"],
        )
        assert mask.any()
        assert not mask.all()
        assert torch.equal(out["balanced_active_mask"], mask)
    for _, _, out in run_chain(Chain(), NEWEST):
        assert not out["balanced_active_mask"].any()  # it was given full of False


# Of four ranks with two experts each rank 1 is lost: 3 ranks and 6 experts are left, none of them shared (§2.11).
SCALED_DOWN = torch.tensor([1, 3, 0, 6, 0, -1, 1, 2, 0, 2, 3, -1], dtype=torch.int32)
LEFT = [0, 2, 3]


def scaled_down_inputs(chain, rank):
    given = chain.inputs(rank) | {"elastic_info": SCALED_DOWN}
    # Two distinct experts of the six for every token.
    given["expert_ids"] = given["expert_ids"] % 3 + torch.tensor([0, 3], dtype=torch.int32)
    return given


def launch_scaled_down(chain, rank, stream):
    out = chain.outputs(rank)
    launch(
        first_stage(NEWEST["dispatch"], scaled_down_inputs(chain, rank) | chain.attributes(rank) | out),
        stream,
    )
    return out


def test_one_rank_of_four_is_gone():
    """The active ranks' outputs are the operator's, and only they take part."""
    chain = Chain(ep=4)
    with em.local_world(4, timeout_s=HANG_S) as world:
        streams = [Stream() for _ in LEFT]
        launched = [
            launch_scaled_down(chain, world.ranks[index], stream) for index, stream in zip(LEFT, streams, strict=True)
        ]
        for stream in streams:
            stream.synchronize(60)
            stream.destroy()

    def step(rank):
        if rank.index in LEFT:
            given = scaled_down_inputs(chain, rank)
            return em.dispatch(
                given["x"], given["expert_ids"], ep=rank.ep, num_experts=8, elastic_info=given["elastic_info"]
            )

    with em.local_world(4, timeout_s=HANG_S) as world:
        want = world.run(step)
    for index, out in zip(LEFT, launched, strict=True):
        own = int(want[index].ep_recv_counts[5])
        assert own > 0
        assert_written(out["expand_x"], want[index].expand_x[:own], "expand_x")
        assert_written(out["ep_recv_counts"], want[index].ep_recv_counts[:6], "ep_recv_counts")


def test_in_a_scaled_down_world_nobody_waits_for_the_lost_rank():
    chain = Chain(ep=4)
    with em.local_world(4, timeout_s=HANG_S) as world:
        streams = [Stream() for _ in LEFT]
        launch_scaled_down(chain, world.ranks[0], streams[0])
        launch_scaled_down(chain, world.ranks[2], streams[1])
        message = error_of(status.RT_STREAM_SYNC_TIMEOUT, streams[0].synchronize, 0.3)
        assert "waits for rank 3 of group" in message  # by its old number, as the group knows it
        launch_scaled_down(chain, world.ranks[3], streams[2])
        for stream in streams:
            stream.synchronize(HANG_S)
            stream.destroy()


# The executor itself -------------------------------------------------------------------------------------------------


def update_call(**changes):
    chain = Chain()
    with em.local_world(2) as world:
        rank = world.ranks[0]
        values = chain.inputs(rank) | chain.attributes(rank) | chain.outputs(rank)
    return first_stage("MoeEPLBUpdateExpert", values | changes)


@pytest.fixture
def stream():
    stream = Stream("the stream")
    yield stream
    stream.destroy()


def error_of(code, call, *arguments):
    with pytest.raises(AclError) as caught:
        call(*arguments)
    assert caught.value.status == code, caught.value
    return str(caught.value)


def test_an_executor_serves_one_call(stream):
    executor = update_call()
    launch(executor, stream)
    assert "has been used: an executor serves one call" in error_of(status.INNER, launch, executor, stream)
    assert "has been used" in error_of(status.INNER, executor.make_repeatable)
    assert "has been used" in error_of(status.INNER, executor.destroy)
    stream.synchronize(10)


def test_two_threads_cannot_both_use_an_executor(stream):
    for _ in range(20):
        executor, outcomes = update_call(), []

        def use(executor=executor, outcomes=outcomes):
            try:
                launch(executor, stream)
                outcomes.append(status.SUCCESS)
            except AclError as error:
                outcomes.append(error.status)

        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == [status.SUCCESS, status.INNER, status.INNER]


def test_a_repeatable_executor_serves_many_and_reads_the_values_of_their_time(stream):
    executor = update_call()
    executor.make_repeatable()
    ids, out = executor.tensors["expert_ids"], executor.outputs["balanced_expert_ids"]
    assert ids is not None
    for value in range(4):
        ids.fill_(value)
        launch(executor, stream)
        stream.synchronize(10)
        assert (out == value).all()
    executor.destroy()
    assert "has been destroyed" in error_of(status.INNER, launch, executor, stream)
    assert "has been destroyed" in error_of(status.INNER, executor.destroy)


def test_an_executor_that_is_not_wanted_is_destroyed(stream):
    executor = update_call()
    executor.destroy()
    assert "has been destroyed" in error_of(status.INNER, launch, executor, stream)


def test_the_workspace_must_be_there_and_large_enough(stream):
    executor = update_call()
    assert executor.workspace_size == WORKSPACE_BYTES == 16 * 2**20
    name = executor.operator
    message = error_of(status.PARAM_INVALID, executor.launch, name, True, WORKSPACE_BYTES - 1, stream)
    assert "`workspaceSize` is 16777215: aclnnMoeEPLBUpdateExpert needs 16777216 bytes" in message
    assert "`workspace` is a null pointer" in error_of(
        status.PARAM_NULLPTR, executor.launch, name, False, WORKSPACE_BYTES, stream
    )
    launch(executor, stream)  # a wrong call does not use it up
    stream.synchronize(10)


def test_an_executor_belongs_to_its_operator(stream):
    message = error_of(status.INNER, update_call().launch, "MoeUpdateExpert", True, WORKSPACE_BYTES, stream)
    assert "it must be given to aclnnMoeEPLBUpdateExpert, not to aclnnMoeUpdateExpert" in message


def test_wrong_values_show_at_synchronization_and_write_nothing(stream):
    executor = update_call(expert_ids=torch.full((3, 2), 99, dtype=torch.int32))
    launch(executor, stream)
    message = error_of(status.RUNTIME_ERROR, stream.synchronize, 10)
    assert message.startswith("aclnnMoeEPLBUpdateExpert failed: `expert_ids` is 99 for token 0, k 0: it must be a row")
    assert (executor.outputs["balanced_expert_ids"] == UNTOUCHED).all()


def test_a_destroyed_stream_takes_no_call_and_leaves_the_executor_unused(stream):
    executor, gone = update_call(), Stream()
    gone.destroy()
    error_of(status.RT_INVALID_HANDLE, launch, executor, gone)
    launch(executor, stream)
    stream.synchronize(10)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"expert_ids": None}, MissingArgumentError, "`expert_ids` is None"),
        ({"expert_ids": [[0]]}, UnsupportedTypeError, "`expert_ids` is a list: it must be a torch.Tensor"),
        ({"expert_ids": torch.zeros(3, 2).int().to_sparse()}, UnsupportedTypeError, "`expert_ids` is torch.sparse_coo"),
        ({"balanced_expert_ids": 3}, UnsupportedTypeError, "`balanced_expert_ids` is a int"),
        ({"world_size": "2"}, ConstraintError, "`world_size` is '2': it must be an integer"),
        ({"world_size": 2**63}, ConstraintError, "`world_size` is 9223372036854775808: it must fit into 64 bits"),
        ({"expert_ids": torch.zeros(3, 2, dtype=torch.int64)}, UnsupportedTypeError, "`expert_ids` is int64"),
        ({"balance_mode": 1}, ConstraintError, "`balance_mode` is 1"),
    ],
)
def test_the_first_stage_names_what_is_wrong(changes, error, text):
    with pytest.raises(EvenmoeError) as caught:
        update_call(**changes)
    assert type(caught.value) is error
    assert text in str(caught.value)


def test_a_group_that_is_not_open_is_the_last_error():
    chain = Chain()
    with em.local_world(2) as world:
        rank = world.ranks[0]
        values = chain.inputs(rank) | chain.attributes(rank) | chain.outputs(rank)
    with pytest.raises(ConstraintError, match=r"`group_ep` is 'local.*must name an open group"):
        first_stage("MoeDistributeDispatchV2", values)
    with pytest.raises(ConstraintError, match=r"`quant_mode` is 9"):
        first_stage("MoeDistributeDispatchV2", values | {"quant_mode": 9})


# Ranks that stay away ------------------------------------------------------------------------------------------------


def launch_dispatch(chain, rank, stream) -> Executor:
    values = chain.inputs(rank) | chain.attributes(rank) | chain.outputs(rank)
    executor = first_stage("MoeDistributeDispatchV4", values)
    launch(executor, stream)
    return executor


def test_a_rank_that_never_calls_is_named_when_the_wait_times_out():
    chain = Chain(ep=3)
    with em.local_world(3, timeout_s=HANG_S) as world:
        name = world.ranks[0].ep.name
        streams = [Stream(f"stream {index}") for index in range(3)]
        for index in (0, 2):
            begun = launch_dispatch(chain, world.ranks[index], streams[index])
            until(lambda begun=begun: "waits for rank 1" in begun.describe())
        for index in (0, 2):
            message = error_of(status.RT_STREAM_SYNC_TIMEOUT, streams[index].synchronize, 0.3)
            assert f"aclnnMoeDistributeDispatchV4 as rank {index} of group {name!r} waits for rank 1 " in message
        launch_dispatch(chain, world.ranks[1], streams[1])  # late, but it comes
        for stream in streams:
            stream.synchronize(HANG_S)
            stream.destroy()


def test_a_rank_that_keeps_its_tensor_parallel_peer_waiting_is_named():
    """Its peer waits in another group; the search goes through the peer to the group where somebody is missing."""
    chain = Chain(ep=2, tp=2, experts_per_rank=1)
    with em.local_world(2, 2, timeout_s=HANG_S) as world:
        streams = [Stream() for _ in world.ranks]
        away = 2  # expert-parallel rank 1 of the first expert-parallel group
        here = [rank for rank in world.ranks if rank.index != away]
        calls = {rank.index: launch_dispatch(chain, rank, streams[rank.index]) for rank in here}
        missing = f"rank 1 of group {world.ranks[away].ep.name!r}"
        until(lambda: missing in calls[1].describe())
        assert missing in error_of(status.RT_STREAM_SYNC_TIMEOUT, streams[1].synchronize, 0.1)
        launch_dispatch(chain, world.ranks[away], streams[away])
        for stream in streams:
            stream.synchronize(HANG_S)
            stream.destroy()


def test_a_rank_that_never_calls_at_all_fails_the_others():
    chain = Chain(ep=3)
    with em.local_world(3, timeout_s=0.3) as world:
        streams = [Stream(f"stream {index}") for index in (0, 1)]
        executors = [launch_dispatch(chain, rank, stream) for rank, stream in zip(world.ranks, streams, strict=False)]
        for stream in streams:
            message = error_of(status.RUNTIME_ERROR, stream.synchronize, HANG_S)
            assert "waited 0.3 s in group" in message or "gave up after 0.3 s" in message
            assert "2" in message.partition("group")[2]
            stream.destroy()
        for executor in executors:
            assert (executor.outputs["expand_x"] == UNTOUCHED).all()


def test_a_stream_destroyed_with_work_queued_writes_nothing_any_more():
    chain = Chain(ep=2)
    with em.local_world(2, timeout_s=HANG_S) as world:
        first, second = Stream("first"), Stream("second")
        waiting = launch_dispatch(chain, world.ranks[0], first)
        queued = launch_dispatch(chain, world.ranks[0], first)
        until(lambda: "waits for rank 1" in waiting.describe())
        first.destroy()
        waiting.tensors["x"].fill_(99)  # its owner's again, and never read after this
        served = launch_dispatch(chain, world.ranks[1], second)
        second.synchronize(HANG_S)  # rank 0 has taken part in the exchange, so rank 1 is served
        rows = int(served.outputs["ep_recv_counts"][3])
        assert rows > 0
        assert not (served.outputs["expand_x"][:rows] == 99).any()
        time.sleep(0.05)
        for executor in (waiting, queued):
            for name in ("expand_x", "ep_recv_counts"):
                assert (executor.outputs[name] == UNTOUCHED).all()
        second.destroy()


def test_sizes_are_the_chips():
    """The tests above run at the least sizes that the first stage takes."""
    with em.local_world(2) as world:
        rank = world.ranks[0]
        chain = Chain()
        values = chain.inputs(rank) | chain.attributes(rank) | chain.outputs(rank)
        with pytest.raises(ConstraintError, match="1023"):
            first_stage("MoeDistributeDispatchV2", values | {"x": values["x"][:, : HIDDEN - 1]})
