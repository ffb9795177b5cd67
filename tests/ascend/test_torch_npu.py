"""torch_npu: the signatures and outputs of specification §5, and the values of the package's own operators."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

import evenmoe as em
from evenmoe.ascend import patch, torch_npu
from evenmoe.ascend.torch_npu import NpuCallError
from tests.ascend.calls import CHAINS, HIDDEN, Chain, expected
from tests.patience import HANG_S
from tests.worlds import assert_same_bits

# The listing of §5, the newest signature of each function: positional arguments, then the keyword-only ones.
_GROUP_KEYWORDS = (
    'group_tp="", tp_world_size=0, tp_rank_id=0, expert_shard_type=0, shared_expert_num=1, shared_expert_rank_num=0'
)
_VIRTUAL_KEYWORDS = "zero_expert_num=0, copy_expert_num=0, const_expert_num=0"
_CONSTANTS = "elastic_info=None, ori_x=None, const_expert_alpha_1=None, const_expert_alpha_2=None, const_expert_v=None"
_HALF_GROUP = "group_ep, ep_world_size, ep_rank_id, moe_expert_num"
LISTING = {
    "npu_moe_init_routing": "x, row_idx, expert_idx, active_num",
    "npu_moe_init_routing_v2": "x, expert_idx, *, scale=None, offset=None, active_num=-1, expert_capacity=-1, "
    "expert_num=-1, drop_pad_mode=0, expert_tokens_num_type=0, expert_tokens_num_flag=False, quant_mode=-1, "
    "active_expert_range=(), row_idx_type=0, x_dtype=None",
    "npu_moe_eplb_update_expert": "expert_ids, eplb_table, local_rank_id, world_size, *, balance_mode=0",
    "npu_moe_update_expert": "expert_ids, eplb_table, *, expert_scales=None, pruning_threshold=None, active_mask=None, "
    "local_rank_id=-1, world_size=-1, balance_mode=0",
    "npu_moe_distribute_dispatch": "x, expert_ids, group_ep, ep_world_size, ep_rank_id, moe_expert_num, *, "
    f"scales=None, x_active_mask=None, expert_scales=None, {_GROUP_KEYWORDS}, quant_mode=0, global_bs=0, "
    "expert_token_nums_type=1",
    "npu_moe_distribute_combine": "expand_x, expert_ids, expand_idx, ep_send_counts, expert_scales, group_ep, "
    "ep_world_size, ep_rank_id, moe_expert_num, *, tp_send_counts=None, x_active_mask=None, activation_scale=None, "
    "weight_scale=None, group_list=None, expand_scales=None, shared_expert_x=None, "
    f"{_GROUP_KEYWORDS}, global_bs=0, out_dtype=0, comm_quant_mode=0, group_list_type=0",
    "npu_moe_distribute_dispatch_v2": "x, expert_ids, group_ep, ep_world_size, ep_rank_id, moe_expert_num, *, "
    "scales=None, x_active_mask=None, expert_scales=None, elastic_info=None, performance_info=None, "
    f"{_GROUP_KEYWORDS}, quant_mode=0, global_bs=0, expert_token_nums_type=1, comm_alg='', {_VIRTUAL_KEYWORDS}, "
    "y_dtype=None, x_dtype=None, scales_dtype=None",
    "npu_moe_distribute_combine_v2": "expand_x, expert_ids, assist_info_for_combine, ep_send_counts, expert_scales, "
    "group_ep, ep_world_size, ep_rank_id, moe_expert_num, *, tp_send_counts=None, x_active_mask=None, "
    f"expand_scales=None, shared_expert_x=None, {_CONSTANTS}, performance_info=None, {_GROUP_KEYWORDS}, global_bs=0, "
    f"comm_quant_mode=0, comm_alg='', {_VIRTUAL_KEYWORDS}",
    "npu_moe_distribute_combine_add_rms_norm": "expand_x, expert_ids, expand_idx, ep_send_counts, expert_scales, "
    "residual_x, gamma, group_ep, ep_world_size, ep_rank_id, moe_expert_num, *, tp_send_counts=None, "
    "x_active_mask=None, activation_scale=None, weight_scale=None, group_list=None, expand_scales=None, "
    f"shared_expert_x=None, {_CONSTANTS}, {_GROUP_KEYWORDS}, global_bs=0, out_dtype=0, comm_quant_mode=0, "
    f"group_list_type=0, comm_alg='', norm_eps=1e-06, {_VIRTUAL_KEYWORDS}",
    "npu_moe_distribute_dispatch_setup": f"x, expert_ids, {_HALF_GROUP}, *, scales=None, x_active_mask=None, "
    "expert_shard_type=0, shared_expert_num=1, shared_expert_rank_num=0, quant_mode=0, global_bs=0, comm_type=0, "
    "comm_alg='', y_dtype=None",
    "npu_moe_distribute_dispatch_teardown": f"x, y, expert_ids, comm_cmd_info, {_HALF_GROUP}, *, expert_shard_type=0, "
    "shared_expert_num=1, shared_expert_rank_num=0, quant_mode=0, global_bs=0, expert_token_nums_type=1, comm_type=0, "
    "comm_alg=''",
    "npu_moe_distribute_combine_setup": f"expand_x, expert_ids, assist_info_for_combine, {_HALF_GROUP}, *, "
    "expert_shard_type=0, shared_expert_num=1, shared_expert_rank_num=0, global_bs=0, comm_quant_mode=0, comm_type=0, "
    "comm_alg=''",
    "npu_moe_distribute_combine_teardown": "expand_x, quant_expand_x, expert_ids, expand_idx, expert_scales, "
    f"comm_cmd_info, {_HALF_GROUP}, *, x_active_mask=None, shared_expert_x=None, expert_shard_type=0, "
    "shared_expert_num=1, shared_expert_rank_num=0, global_bs=0, comm_quant_mode=0, comm_type=0, comm_alg=''",
}


@pytest.mark.parametrize("name", LISTING)
def test_signatures_are_those_of_the_listing(name):
    listed = {}
    exec(f"def listed({LISTING[name]}): pass", {}, listed)
    ours = inspect.signature(getattr(torch_npu, name)).parameters.values()
    wanted = inspect.signature(listed["listed"]).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in wanted]


def test_the_api_has_no_function_that_the_listing_lacks():
    assert {name for name in vars(torch_npu) if name.startswith("npu_")} == set(LISTING)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1, 2, 3), {}),  # `world_size` is missing
        ((1, 2, 3, 4, 0), {}),  # `balance_mode` is keyword-only
        ((1, 2, 3, 4), {"expert_ids": 1}),
        ((1, 2, 3, 4), {"unknown": 1}),
        ((1, 2, 3), {"unknown": 1}),
    ],
)
def test_arguments_that_do_not_fit_are_a_type_error(args, kwargs):
    def listed(expert_ids, eplb_table, local_rank_id, world_size, *, balance_mode=0):
        raise AssertionError("never called")

    with pytest.raises(TypeError):
        listed(*args, **kwargs)
    with pytest.raises(TypeError):
        torch_npu.npu_moe_eplb_update_expert(*args, **kwargs)


# Values and shapes ---------------------------------------------------------------------------------------------------


def keywords(name, values):
    """Of `values` what the function takes, but for the tensors that are None: its defaults serve."""
    parameters = inspect.signature(getattr(torch_npu, name)).parameters
    return {key: value for key, value in values.items() if key in parameters and value is not None}


def call(name, values):
    return getattr(torch_npu, name)(**keywords(name, values))


def run_api(chain, rank):
    given, attributes = chain.inputs(rank), chain.attributes(rank)
    ids, _ = call("npu_moe_update_expert", given | attributes | {"expert_scales": None})
    assert torch.equal(ids, given["expert_ids"])
    old = call("npu_moe_eplb_update_expert", given | attributes)
    assert torch.equal(old, ids)
    dispatched = call("npu_moe_distribute_dispatch_v2", given | attributes)
    rows = torch.randn(dispatched[0].shape, generator=torch.Generator().manual_seed(rank.index)).to(chain.dtype)
    back = {
        "expand_x": rows,
        "assist_info_for_combine": dispatched[2],
        "expand_idx": dispatched[2],
        "ep_send_counts": dispatched[4],
        "tp_send_counts": dispatched[5] if chain.tp == 2 else None,  # as the newest examples call it
        "expand_scales": dispatched[6],
    }
    combined = call("npu_moe_distribute_combine_v2", given | attributes | back)
    normed = call("npu_moe_distribute_combine_add_rms_norm", given | attributes | back)
    return given, rows, dispatched, combined, normed


@pytest.mark.parametrize("name", CHAINS)
def test_the_api_gives_the_operators_values(name):
    chain = CHAINS[name]
    with em.local_world(chain.ep, max(chain.tp, 1), timeout_s=HANG_S) as world:
        got = world.run(lambda rank: run_api(chain, rank))
        want = world.run(lambda rank: expected(chain, rank, *got[rank.index][:2]))
    for index, (_, _, dispatched, combined, normed) in enumerate(got):
        fields = ("expand_x", "dynamic_scales", "assist_info_for_combine", "expert_token_nums", "ep_recv_counts")
        for ours, field in zip(dispatched, (*fields, "tp_recv_counts", "expand_scales"), strict=True):
            assert_same_bits(ours, getattr(want[index]["dispatch"], field), f"{field} on rank {index}")
        assert_same_bits(combined, want[index]["combine"], f"combine on rank {index}")
        for ours, theirs in zip(normed, want[index]["combine_add_rms_norm"], strict=True):
            assert_same_bits(ours, theirs, f"combine_add_rms_norm on rank {index}")


def shapes_of(chain, ep_rank):
    """§5, restated: the allocated shapes of dispatch's outputs."""
    shared = ep_rank < chain.shared_ranks
    local = 1 if shared else chain.num_experts // (chain.ep - chain.shared_ranks)
    if shared:
        capacity = chain.tokens * -(-chain.ep // (chain.shared_ranks // chain.shared_experts))
    else:
        capacity = chain.tokens * chain.ep * min(local, chain.top_k)
    return [
        (max(capacity, capacity * chain.tp), HIDDEN),
        (capacity if chain.tp == 0 else capacity * chain.tp,),
        (max(chain.tokens * chain.top_k, 128 * capacity),),
        (local,),
        (chain.ep * local * (2 if chain.tp == 2 else 1),),
        (chain.tp,),
        (capacity,),
    ]


@pytest.mark.parametrize("name", CHAINS)
def test_outputs_are_allocated_as_listed(name):
    chain = CHAINS[name]
    with em.local_world(chain.ep, max(chain.tp, 1), timeout_s=HANG_S) as world:
        got = world.run(lambda rank: run_api(chain, rank))
    for index, (_, _, dispatched, combined, normed) in enumerate(got):
        assert [tuple(tensor.shape) for tensor in dispatched] == shapes_of(chain, index // max(chain.tp, 1))
        sent = torch.int8 if chain.quant_mode == 2 else chain.dtype
        dtypes = [sent, torch.float32, torch.int32, torch.int64, torch.int32, torch.int32, torch.float32]
        assert [tensor.dtype for tensor in dispatched] == dtypes
        assert combined.shape == (chain.tokens, HIDDEN)
        three = [(chain.tokens, 1, HIDDEN), (chain.tokens, 1, 1), (chain.tokens, 1, HIDDEN)]
        assert [tuple(tensor.shape) for tensor in normed] == three


@pytest.mark.parametrize(("ep", "more"), [(4, 0), (8, 2 * 16 * 2 * 1), (9, 2 * 18 * 2 * 1)])
def test_expert_scales_enlarge_the_counts(ep, more):
    """By 2·G·K·(ep // 8); here Bs is 2, so G is 2·ep, and K is 2 (§5)."""
    chain = Chain(ep=ep, tokens=2, experts_per_rank=1)

    def step(rank):
        return call("npu_moe_distribute_dispatch_v2", chain.inputs(rank) | chain.attributes(rank))[4]

    with em.local_world(ep, timeout_s=HANG_S) as world:
        for counts in world.run(step):
            assert counts.shape == (ep + more,)
            assert not counts[ep:].any()


def test_numbers_may_be_numpys_and_tensors_may_be_positional():
    chain = Chain()

    def step(rank):
        given, sizes = chain.inputs(rank), (np.int64(2), np.int32(rank.index), np.int64(4))
        return torch_npu.npu_moe_distribute_dispatch_v2(given["x"], given["expert_ids"], rank.ep.name, *sizes)[4]

    with em.local_world(2, timeout_s=HANG_S) as world:
        assert [int(counts[-1]) for counts in world.run(step)] != [0, 0]


# Errors --------------------------------------------------------------------------------------------------------------

DISPATCH = "npu_moe_distribute_dispatch_v2"
COMBINE = "npu_moe_distribute_combine_v2"
NORM = "npu_moe_distribute_combine_add_rms_norm"
CAPACITY = 3 * 2 * 2  # tokens, ranks, experts per rank
BACK = {
    "expand_x": torch.zeros(CAPACITY, HIDDEN, dtype=torch.bfloat16),
    "assist_info_for_combine": torch.zeros(128 * CAPACITY, dtype=torch.int32),
    "expand_idx": torch.zeros(128 * CAPACITY, dtype=torch.int32),
    "ep_send_counts": torch.zeros(4, dtype=torch.int32),
    "tp_send_counts": torch.zeros(0, dtype=torch.int32),
}
INVALID = [
    # What the wrapper looks at
    (DISPATCH, {"x": torch.zeros(HIDDEN, dtype=torch.bfloat16)}, 561002, "`x` is bfloat16 (1024,): it must be 2-D"),
    (DISPATCH, {"expert_ids": torch.zeros(3, dtype=torch.int32)}, 561002, "`expert_ids` is int32 (3,): it must be 2-D"),
    (DISPATCH, {"ep_rank_id": 2}, 561002, "`ep_rank_id` is 2: it must be 0 to 1"),
    (DISPATCH, {"ep_rank_id": -1}, 561002, "`ep_rank_id` is -1"),
    (DISPATCH, {"shared_expert_rank_num": 2}, 561002, "`shared_expert_rank_num` is 2: it must be 0 to 1"),
    (DISPATCH, {"shared_expert_rank_num": -1}, 561002, "`shared_expert_rank_num` is -1"),
    (DISPATCH, {"shared_expert_num": 2}, 561002, "`shared_expert_rank_num` is 0 with shared_expert_num 2"),
    (DISPATCH, {"expert_token_nums_type": 2}, 561002, "`expert_token_nums_type` is 2"),
    # and it looks before the first stage does
    (DISPATCH, {"quant_mode": 9, "expert_token_nums_type": 2}, 561002, "`expert_token_nums_type` is 2"),
    # What the first stage looks at
    (DISPATCH, {"x": None}, 161001, "`x` is None: it must be given"),
    (DISPATCH, {"x": [[1.0]]}, 161002, "`x` is a list: it must be a torch.Tensor"),
    (DISPATCH, {"x": torch.zeros(3, HIDDEN)}, 161002, "`x` is float32 (3, 1024): it must be bfloat16 or float16"),
    (DISPATCH, {"x": torch.zeros(3, 1023).half()}, 561002, "1023"),
    (DISPATCH, {"expert_ids": torch.zeros(3, 2, dtype=torch.int64)}, 161002, "`expert_ids` is int64 (3, 2)"),
    (DISPATCH, {"quant_mode": 1}, 561002, "static quantisation is not supported"),
    (DISPATCH, {"quant_mode": None}, 561002, "`quant_mode` is None: it must be an integer"),
    (DISPATCH, {"performance_info": torch.zeros(2, dtype=torch.int64)}, 561002, "`performance_info` is int64 (2,)"),
    (DISPATCH, {"y_dtype": 1}, 561002, "`y_dtype` is 1: it must be None on Atlas A3"),
    (DISPATCH, {"group_ep": ""}, 161001, "`group_ep` is ''"),
    (DISPATCH, {"group_ep": None}, 161001, "`group_ep` is None"),
    (DISPATCH, {"group_tp": None}, 161001, "`group_tp` is None"),
    (DISPATCH, {"group_ep": "g" * 128}, 161001, "`group_ep` is 128 characters long"),
    (DISPATCH, {"group_ep": "nobody"}, 561002, "`group_ep` is 'nobody' (rank 0): it must name an open group"),
    (DISPATCH, {"group_ep": ["ep"]}, 561002, "`group_ep` is ['ep']: it must be text"),
    (DISPATCH, {"group_ep": "nobody", "quant_mode": 9}, 561002, "`quant_mode` is 9"),
    (DISPATCH, {"tp_world_size": 2, "group_tp": "nobody"}, 561002, "with 2 experts per rank"),
    (COMBINE, {"expand_x": torch.zeros(CAPACITY, HIDDEN)}, 161002, "`expand_x` is float32 (12, 1024)"),
    (COMBINE, {"expand_x": torch.zeros(CAPACITY, HIDDEN, dtype=torch.int32)}, 561002, "it must not be int32"),
    (COMBINE, {"expert_ids": torch.zeros(3, 2, dtype=torch.int64)}, 161002, "`expert_ids` is int64 (3, 2)"),
    (COMBINE, {"group_ep": "g" * 128}, 161002, "`group_ep` is 128 characters long"),
    (NORM, {"expand_x": torch.zeros(CAPACITY, HIDDEN).half()}, 161002, "`expand_x` is float16 (12, 1024)"),
    (NORM, {"expand_idx": None}, 161001, "`expand_idx` is None: it must be given; pass dispatch's assist_info_for_"),
    (COMBINE, {"assist_info_for_combine": None}, 161001, "`assist_info_for_combine` is None"),
    (NORM, {"gamma": None}, 161001, "`gamma` is None"),
    (NORM, {"norm_eps": "small"}, 561002, "`norm_eps` is 'small'"),
    ("npu_moe_update_expert", {"world_size": 1}, 561002, "`world_size` is 1: it must be 2 to 768"),
    ("npu_moe_update_expert", {"active_mask": torch.ones(3, dtype=torch.bool)}, 561002, "`pruning_threshold` is None"),
    ("npu_moe_eplb_update_expert", {"balance_mode": 1}, 561002, "`balance_mode` is 1: it must be 0"),
    ("npu_moe_eplb_update_expert", {"world_size": 385}, 561002, "`world_size` is 385: it must be 2 to 384"),
    (
        "npu_moe_eplb_update_expert",
        {"expert_ids": torch.zeros(3, 2, dtype=torch.int64)},
        161002,
        "`expert_ids` is int64 (3, 2): it must be int32",
    ),
]


@pytest.mark.parametrize(("name", "changes", "status", "text"), INVALID)
def test_what_the_chip_does_not_take_is_an_error(name, changes, status, text):
    chain = Chain()
    with em.local_world(2) as world:
        rank = world.ranks[0]
        values = {**chain.inputs(rank), **chain.attributes(rank), **BACK, **changes}
        parameters = inspect.signature(getattr(torch_npu, name)).parameters
        arguments = {key: value for key, value in values.items() if key in parameters}
        rank.ep.exchange_views = lambda *_: None  # an error is told to the others, who are not here
        with pytest.raises(NpuCallError) as caught:
            getattr(torch_npu, name)(**arguments)
    assert text in str(caught.value)
    assert "limits=" not in str(caught.value), "advice that the function cannot take"
    assert caught.value.status == status
    assert isinstance(caught.value, RuntimeError)
    assert pickle.loads(pickle.dumps(caught.value)).status == status


@pytest.mark.parametrize("changes", [{"expert_token_nums_type": 2}, {"quant_mode": 1}, {"y_dtype": 1}, {"x": None}])
def test_the_other_ranks_are_told_of_an_error(changes):
    chain = Chain(ep=3)

    def step(rank):
        try:
            values = chain.inputs(rank) | chain.attributes(rank) | (changes if rank.index == 1 else {})
            parameters = inspect.signature(torch_npu.npu_moe_distribute_dispatch_v2).parameters
            torch_npu.npu_moe_distribute_dispatch_v2(**{key: values[key] for key in values if key in parameters})
        except NpuCallError as error:
            return str(error)

    with em.local_world(3, timeout_s=HANG_S) as world:
        messages = world.run(step)
    (argument,) = changes
    assert f"`{argument}` is" in messages[1]
    for message in (messages[0], messages[2]):
        assert "the call of dispatch on rank 1" in message
        assert f"`{argument}` is" in message


# `import torch_npu` --------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
import torch_npu
table = torch.tensor([[1, 0, 0], [2, 1, 7]], dtype=torch.int32)
ids, mask = torch_npu.npu_moe_update_expert(torch.tensor([[0, 1]]), table, local_rank_id=4, world_size=8)
assert ids.tolist() == [[0, 7]]
"""


def test_a_script_that_imports_torch_npu_runs_under_the_patch_only():
    with pytest.raises(ModuleNotFoundError):
        exec(SCRIPT, {})
    with patch() as patched:
        assert patched.active
        exec(SCRIPT, {})
    with pytest.raises(ModuleNotFoundError):
        exec(SCRIPT, {})


def test_an_explicit_patch_stays_until_it_is_undone():
    patched = patch()
    exec(SCRIPT, {})
    inner = patch()
    inner.undo()
    exec(SCRIPT, {})
    outlives = patch()
    patched.undo()
    patched.undo()
    exec(SCRIPT, {})
    outlives.undo()
    with pytest.raises(ModuleNotFoundError):
        exec(SCRIPT, {})


def test_the_patch_is_undone_after_a_failure():
    with pytest.raises(ZeroDivisionError), patch():
        _ = 1 / 0
    assert "torch_npu" not in sys.modules


def test_the_real_package_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "torch_npu.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with patch() as patched:
        assert not patched.active
        import torch_npu as found

        assert found.real
    assert sys.modules.pop("torch_npu").real


def test_import_has_no_side_effect():
    code = (
        "import sys, evenmoe, evenmoe.ascend; assert 'torch' not in sys.modules; import evenmoe.ascend.torch_npu, "
        "evenmoe.ascend.aclnn; assert 'torch_npu' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Groups of torch.distributed -----------------------------------------------------------------------------------------


def run_in_user_group(rank, members):
    """A group made with torch.distributed, used by its name, destroyed, and used again."""
    group = dist.new_group(members)
    if rank.index not in members:
        return None
    name, place, ranks = group.group_name, members.index(rank.index), len(members)
    x = torch.full((1, 1024), float(place), dtype=torch.bfloat16)
    ids = torch.tensor([[(place + 1) % ranks]], dtype=torch.int32)

    def step(at=place, size=ranks):
        return torch_npu.npu_moe_distribute_dispatch_v2(x, ids, name, size, at, size)

    results = [step()[0][0, 0].item() for _ in range(2)]
    for wrong in ({"at": (place + 1) % ranks}, {"size": ranks + 1}):
        try:
            step(**wrong)
        except NpuCallError as error:
            results.append(str(error))
    dist.destroy_process_group(group)
    try:
        step()
    except NpuCallError as error:
        results.append(str(error))
    return results


def test_groups_of_torch_distributed_are_found_by_name(processes):
    results = processes.run((4, 1), run_in_user_group, [0, 1, 3])
    assert results[2] is None
    for place, index in enumerate([0, 1, 3]):
        assert not isinstance(results[index], Exception), results[index]
        first, again, wrong_rank, wrong_size, destroyed = results[index]
        assert first == again == (place - 1) % 3
        assert "must name an open group that this rank belongs to" in wrong_rank
        assert "must have the 4 ranks that the call names" in wrong_size
        assert "must name an open group" in destroyed


def run_in_world(rank):
    x = torch.full((1, 1024), float(rank.index), dtype=torch.bfloat16)
    ids = torch.tensor([[1 - rank.ep.rank]], dtype=torch.int32)
    outputs = torch_npu.npu_moe_distribute_dispatch_v2(
        x, ids, rank.ep.name, 2, rank.ep.rank, 2, group_tp=rank.tp.name, tp_world_size=2, tp_rank_id=rank.tp.rank
    )
    return outputs[0][:2, 0].tolist()


def test_the_names_of_a_process_world_serve(processes):
    # Ranks 0 and 1 are EP rank 0's peers, 2 and 3 EP rank 1's; each gets its own row first, then its peer's.
    assert processes.run((2, 2), run_in_world) == [[2, 3], [3, 2], [0, 1], [1, 0]]


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("quant_mode", [0, 2])
def test_the_first_versions_as_servers_call_them(shared, quant_mode):
    """omni-infer passes a mask and the name of a group of peers; vllm-ascend the weights and counts without peers."""

    def step(rank):
        generator = torch.Generator().manual_seed(rank.index)
        x = torch.randn((3, 7168), generator=generator).to(torch.bfloat16)
        ids = torch.stack([torch.randperm(8 - shared, generator=generator)[:2] for _ in range(3)]).int()
        weights = torch.rand((3, 2), generator=generator)
        mask = torch.tensor([True, False, False])  # not looked at
        groups = {"group_ep": rank.ep.name, "ep_world_size": 8, "ep_rank_id": rank.index}
        groups |= {"group_tp": rank.ep.name, "tp_world_size": 1, "tp_rank_id": 0}
        common = {"expert_shard_type": 0, "shared_expert_rank_num": shared, "moe_expert_num": 8 - shared}
        common |= {"global_bs": 0, **groups, "x_active_mask": mask}
        out = torch_npu.npu_moe_distribute_dispatch(
            x=x, expert_ids=ids, scales=None, quant_mode=quant_mode, expert_scales=weights, **common
        )
        expand_x, dynamic_scales, expand_idx, token_nums, ep_counts, tp_counts, expand_scales = out
        assert len(ep_counts) == 8 + 2 * 24 * 2  # 2·G·K·(ep // 8) more with the weights
        assert not expand_scales.any()
        assert int(token_nums.sum()) == int(ep_counts[7])
        rows = expand_x if quant_mode == 0 else (expand_x.float() * dynamic_scales[:, None]).to(torch.bfloat16)
        back = {"expand_x": rows, "expert_ids": ids, "expand_idx": expand_idx, "expert_scales": weights}
        y = torch_npu.npu_moe_distribute_combine(
            ep_send_counts=ep_counts, tp_send_counts=tp_counts, expand_scales=expand_scales, **back, **common
        )
        with pytest.raises(torch_npu.NpuCallError, match=r"`shared_expert_x` is .*: it must be None; add it after"):
            torch_npu.npu_moe_distribute_combine(ep_send_counts=ep_counts, shared_expert_x=x, **back, **common)
        return x.float(), weights, y.float()

    with em.local_world(8, timeout_s=HANG_S) as world:
        for x, weights, y in world.run(step):
            total = weights.sum(1, keepdim=True) + (shared > 0)
            # A row in int8 is off by half a step, 1/254 of its largest value and float32's share of it; it and the sum
            # are rounded to bfloat16, by 2⁻⁹ of themselves, which are a step larger at most.
            step_size = x.abs().amax(1, keepdim=True) / 254 if quant_mode else torch.zeros(1)
            bound = (step_size * (1 + 2.0**-6) + 2.0**-8 * x.abs()) * total + 2.0**-8 * (x * total).abs()
            assert ((y - x * total).abs() <= bound).all()
