"""Setup and teardown as programs call them: one thread for all ranks, and the functions of torch_npu."""

from __future__ import annotations

import pytest
import torch

import evenmoe as em
from evenmoe.ascend import aclnn, torch_npu
from tests.ascend.calls import UNTOUCHED, pick
from tests.patience import HANG_S
from tests.worlds import assert_same_bits

EP, EXPERTS, TOKENS, HIDDEN, TOP_K = 2, 32, 8, 4096, 6  # the least that combine takes
LOCAL = EXPERTS // EP
ROWS = TOKENS * EP * TOP_K
I32 = torch.int32


def made(rank, seed=0):
    generator = torch.Generator().manual_seed(10 * seed + rank.index)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)]).int()
    x = torch.randn((TOKENS, HIDDEN), generator=generator).bfloat16()
    return x, ids, torch.rand((TOKENS, TOP_K), generator=generator)


def attributes(rank):
    return {
        "group_ep": rank.ep.name,
        "ep_world_size": EP,
        "ep_rank_id": rank.index,
        "moe_expert_num": EXPERTS,
        "shared_expert_num": 0,
        "comm_type": 2,
    }


def want(rank, seed=0):
    x, ids, weights = made(rank, seed)
    dispatched = em.dispatch(x, ids, ep=rank.ep, num_experts=EXPERTS)
    return dispatched, em.combine(dispatched.expand_x, ids, dispatched, weights, ep=rank.ep)


def whole_chain(rank, seed=0, **options):
    """By the functions of torch_npu: the outputs of dispatch, and of combine without experts between."""
    x, ids, weights = made(rank, seed)
    group = tuple(attributes(rank)[name] for name in ("group_ep", "ep_world_size", "ep_rank_id", "moe_expert_num"))
    others = {"shared_expert_num": 0, "comm_type": 2}
    y, index, info = torch_npu.npu_moe_distribute_dispatch_setup(x, ids, *group, **others, **options)
    quant = {"quant_mode": options.get("quant_mode", 0)}
    ended = torch_npu.npu_moe_distribute_dispatch_teardown(x, y, ids, info, *group, **others, **quant)
    if quant["quant_mode"]:
        return ended, None
    sent, info = torch_npu.npu_moe_distribute_combine_setup(ended[0], ids, ended[2], *group, **others)
    return ended, torch_npu.npu_moe_distribute_combine_teardown(
        ended[0], sent, ids, index, weights, info, *group, **others
    )


def test_the_functions_of_torch_npu_give_what_dispatch_and_combine_do():
    with em.local_world(EP, timeout_s=HANG_S) as world:
        got, wanted = world.run(whole_chain), world.run(want)
    for (ended, combined), (dispatched, y) in zip(got, wanted, strict=True):
        rows = int(dispatched.expert_token_nums.sum())
        assert_same_bits(ended[0][:rows], dispatched.expand_x[:rows], "expand_x")
        assert_same_bits(ended[2][: EP * LOCAL], dispatched.ep_recv_counts, "counts")
        assert_same_bits(ended[3], dispatched.expert_token_nums, "expert_token_nums")
        assert_same_bits(combined, y, "combine")


def test_y_dtype_may_say_int8_where_it_is():
    with em.local_world(EP, timeout_s=HANG_S) as world:
        for (expand_x, *_), _ in world.run(lambda rank: whole_chain(rank, quant_mode=2, y_dtype=1)):
            assert expand_x.dtype == torch.int8
        with pytest.raises(torch_npu.NpuCallError) as raised:
            world.run(lambda rank: whole_chain(rank, y_dtype=1))
    text = "`y_dtype` is 1: it must be None, or int8 (1) under quant_mode 2; leave it out."
    assert str(raised.value) == text
    assert raised.value.status == 561002


def outputs():
    shapes = {
        "y": ((TOKENS * TOP_K, HIDDEN), torch.bfloat16),
        "expand_idx": ((TOKENS * TOP_K,), I32),
        "comm_cmd_info": ((16 * (TOKENS * TOP_K + EP * LOCAL),), I32),
        "expand_x": ((ROWS, HIDDEN), torch.bfloat16),
        "dynamic_scales": ((ROWS,), torch.float32),
        "assist_info_for_combine": ((128 * ROWS,), I32),
        "expert_token_nums": ((LOCAL,), torch.int64),
        "quant_expand_x": ((ROWS, 6144), torch.int8),
        "x_out": ((TOKENS, HIDDEN), torch.bfloat16),
    }
    return {name: torch.full(shape, UNTOUCHED, dtype=dtype) for name, (shape, dtype) in shapes.items()}


def launch(operator, values, stream):
    defaults = {"expert_shard_type": 0, "shared_expert_rank_num": 0, "quant_mode": 0, "global_bs": 0}
    defaults |= {"expert_token_nums_type": 1, "comm_quant_mode": 0, "comm_alg": ""}
    first = getattr(aclnn, f"aclnn{operator}GetWorkspaceSize")
    status, size, executor = first(**pick(operator, defaults | values))
    assert status == 0, aclnn.aclGetRecentErrMsg()
    assert getattr(aclnn, f"aclnn{operator}")(bytearray(size), size, executor, stream) == 0


def test_one_thread_sets_up_two_exchanges_of_all_ranks_and_ends_them_in_another_order():
    with em.local_world(EP, timeout_s=HANG_S) as world:
        streams = [aclnn.aclrtCreateStream()[1] for _ in world.ranks]

        def wait():
            for stream in streams:
                assert aclnn.aclrtSynchronizeStream(stream) == 0, aclnn.aclGetRecentErrMsg()

        def on_all(operator, seed):
            for rank, stream in zip(world.ranks, streams, strict=True):
                launch(operator, values[seed][rank.index], stream)

        values = {}
        for seed in (0, 1):
            values[seed] = []
            for rank in world.ranks:
                x, ids, weights = made(rank, seed)
                given = {"x": x, "expert_ids": ids, "expert_scales": weights}
                values[seed].append(given | attributes(rank) | outputs())
            on_all("MoeDistributeDispatchSetup", seed)
        for seed in (1, 0):
            on_all("MoeDistributeDispatchTeardown", seed)
        wait()
        ended = {seed: [dict(given) for given in values[seed]] for seed in values}
        for seed in (0, 1):
            for given in values[seed]:
                given["comm_cmd_info"] = torch.full((16 * (ROWS + EP),), UNTOUCHED, dtype=I32)
            on_all("MoeDistributeCombineSetup", seed)
        for seed in (1, 0):
            on_all("MoeDistributeCombineTeardown", seed)
        wait()
        for seed, given in values.items():
            wanted = world.run(lambda rank, seed=seed: want(rank, seed))
            for index, (dispatched, y) in enumerate(wanted):
                rows = int(dispatched.expert_token_nums.sum())
                assert_same_bits(ended[seed][index]["expand_x"][:rows], dispatched.expand_x[:rows], "expand_x")
                assert (ended[seed][index]["expand_x"][rows:] == UNTOUCHED).all()
                assert (ended[seed][index]["dynamic_scales"] == UNTOUCHED).all()
                assert (given[index]["quant_expand_x"] == UNTOUCHED).all()
                assert_same_bits(given[index]["x_out"], y, "x_out")
        # A teardown that comes again finds nothing, and says so at synchronization.
        launch("MoeDistributeCombineTeardown", values[0][0], streams[0])
        assert aclnn.aclrtSynchronizeStream(streams[0]) == 361001
        assert "`comm_cmd_info` is" in (aclnn.aclGetRecentErrMsg() or "")
        for stream in streams:
            aclnn.aclrtDestroyStream(stream)
