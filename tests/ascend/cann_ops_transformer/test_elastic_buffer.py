"""ElasticBuffer gives the bits of plain loops, on threads and on processes, and says what is wrong with a call."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.ascend.cann_ops_transformer import ElasticBuffer, EPHandle, ops
from evenmoe.ascend.torch_npu import NpuCallError
from tests.ascend.cann_ops_transformer.plain_loops import World, plain, run, worlds
from tests.patience import HANG_S
from tests.worlds import assert_same_bits


def assert_equal(got, want):
    for rank, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        for name, value in ours.items():
            if value is None:
                assert theirs[name] is None, (rank, name)
                continue
            parts, wanted = (v if isinstance(v, tuple) else (v,) for v in (value, theirs[name]))
            for part, other in zip(parts, wanted, strict=True):
                assert_same_bits(part, other, f"{name} on rank {rank}")


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_threads(world):
    with em.local_world(world.ranks, timeout_s=HANG_S) as ranks:
        assert_equal(ranks.run(lambda rank: run(rank, world)), plain(world))


@settings(max_examples=15, deadline=None)
@given(worlds(ranks=4))
def test_processes(processes, world):
    assert_equal(processes.run((4, 1), run, world), plain(world))


def test_a_token_crosses_once():
    """Rank 0's token has three entries on rank 1, one of them twice: one slot, three rows."""
    world = World(0, 2, 2, 2, 1, 3, torch.bfloat16, False, False, True, False, True)

    def step(rank):
        buffer = ElasticBuffer(rank.ep, num_max_tokens_per_rank=1, hidden=3, num_topk=3)
        x, ids = world.inputs(rank.ep.rank)[0][:1], torch.tensor([[2, 3, 3], [0, -1, 1]][rank.index : rank.index + 1])
        return buffer.dispatch(x, topk_idx=ids.int(), num_experts=4)[3]

    with em.local_world(2, timeout_s=HANG_S) as ranks:
        first, second = ranks.run(step)
    assert second.num_recv_tokens == 1
    assert second.num_recv_tokens_per_expert.tolist() == [1, 2]
    assert second.recv_src_metadata.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 2, 0]]
    assert first.recv_src_metadata.tolist() == [[1, 0, 0, 0], [1, 0, 2, 0]]
    assert second.dst_buffer_slot_idx.tolist() == [[0, -1, 0]]


def test_handles_of_different_dispatches_do_not_mix():
    def step(rank):
        buffer = ElasticBuffer(rank.ep, num_max_tokens_per_rank=1, hidden=2, num_topk=1)
        x, ids = torch.zeros(1, 2, dtype=torch.bfloat16), torch.tensor([[1 - rank.index]], dtype=torch.int32)
        handles = [buffer.dispatch(x, topk_idx=ids, num_experts=2)[3] for _ in range(2)]
        with pytest.raises(NpuCallError, match="of dispatch"):
            buffer.combine(x, handles[rank.index])
        return buffer.combine(x, handles[0])[0].tolist()

    with em.local_world(2, timeout_s=HANG_S) as world:
        assert world.run(step) == [[[0.0, 0.0]]] * 2


def test_a_table_is_read_by_all(processes):
    def job(rank):
        buffer = ElasticBuffer(rank.ep, num_cpu_bytes=2 << 20)
        with pytest.raises(NpuCallError, match="engram_fetch"):
            buffer.engram_fetch(torch.zeros(1, dtype=torch.int32))
        buffer.engram_write((torch.arange(3 * 128).reshape(3, 128) + 1000 * rank.index).half())
        wait = buffer.engram_fetch(torch.tensor([5, 0, 2, -1, 12], dtype=torch.int32))
        with pytest.raises(NpuCallError, match="pending"):
            buffer.engram_fetch(torch.zeros(1, dtype=torch.int32))
        found = wait()[:, 0].tolist()
        buffer.engram_write(torch.zeros(0, 128, dtype=torch.float32))
        empty = buffer.engram_fetch(torch.zeros(2, dtype=torch.int32))()
        buffer.destroy()
        return found, tuple(empty.shape), float(empty.sum())

    with em.local_world(4, timeout_s=HANG_S) as world:
        assert world.run(job) == [([1256.0, 0.0, 256.0, 0.0, 0.0], (2, 128), 0.0)] * 4


def bad_call(rank, wrong):
    """One rank of two calls wrongly; the other one is told, and the next call is right."""
    buffer = ElasticBuffer(rank.ep, num_max_tokens_per_rank=2, hidden=4, num_topk=2)
    good = {
        "x": torch.zeros(2, 4, dtype=torch.bfloat16),
        "topk_idx": torch.tensor([[0, 1], [1, 0]], dtype=torch.int32),
        "num_experts": 2,
    }
    call = good | (wrong if rank.index == 0 else {})
    with pytest.raises(NpuCallError) as raised:
        buffer.dispatch(call.pop("x"), **call)
    rows, _, _, handle = buffer.dispatch(good.pop("x"), **good)
    return str(raised.value), len(rows), isinstance(handle, EPHandle)


WRONG = {
    "no ids": ({"topk_idx": None}, "`topk_idx` is None: it must be given without a handle; pass it, or a handle."),
    "experts": (
        {"num_experts": 3},
        "`num_experts` is 3: it must be 2 to 2048, and a multiple of the 2 ranks; pad the experts if need be.",
    ),
    "no tokens": (
        {"x": torch.zeros(0, 4, dtype=torch.bfloat16), "topk_idx": torch.zeros(0, 2, dtype=torch.int32)},
        "`x` is of 0 tokens: it must have 1 to 2 tokens; split the batch.",
    ),
    "dtype": (
        {"topk_idx": torch.zeros(2, 2, dtype=torch.int64)},
        "`topk_idx` is int64 (2, 2): it must be int32; convert it to int32.",
    ),
    "id": (
        {"topk_idx": torch.tensor([[0, 2], [1, 0]], dtype=torch.int32)},
        "`topk_idx` is 2 in places: it must be below num_experts 2, or negative for an entry that is not sent; pass "
        "ids of the experts.",
    ),
    "fp8": (
        {"x": torch.zeros(2, 4).to(torch.float8_e5m2)},
        "`x` is float8_e5m2 alone: it must come with its scales; pass (tokens, scales).",
    ),
    "alignment": ({"expert_alignment": 8}, "`expert_alignment` is 8: it must be 1 or None; leave it out."),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_named_on_all_ranks(name):
    wrong, text = WRONG[name]
    with em.local_world(2, timeout_s=HANG_S) as world:
        (own, *first), (other, *second) = world.run(lambda rank: bad_call(rank, wrong))
    assert own == text
    assert "the call of ElasticBuffer.dispatch on rank 0" in other
    assert first == second == [4, True] or first == second


def test_options_that_a_handle_has_already_are_errors():
    def step(rank):
        buffer = ElasticBuffer(rank.ep, num_max_tokens_per_rank=1, hidden=1, num_topk=1)
        x, ids = torch.zeros(1, 1, dtype=torch.bfloat16), torch.tensor([[rank.index]], dtype=torch.int32)
        handle = buffer.dispatch(x, topk_idx=ids, num_experts=2)[3]
        texts = []
        for extra in ({"topk_idx": ids}, {"num_experts": 2}, {"do_cpu_sync": True}, {"num_max_tokens_per_rank": 1}):
            with pytest.raises(NpuCallError) as raised:
                buffer.dispatch(x, handle=handle, **extra)
            texts.append(raised.value.argument)
        with pytest.raises(NpuCallError, match="bias"):
            buffer.combine(x, handle, bias=x)
        return texts

    names = ["topk_idx", "num_experts", "do_cpu_sync", "num_max_tokens_per_rank"]
    with em.local_world(2, timeout_s=HANG_S) as world:
        for texts in world.run(step):
            assert [t if t in names else n for t, n in zip(texts, names, strict=True)] == names


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5))
def test_all_come_to_a_barrier(ranks):
    came = []

    def step(rank):
        buffer = ElasticBuffer(rank.ep)
        came.append(rank.index)
        buffer.barrier(use_comm_stream=False, with_cpu_sync=True)
        return len(came)

    with em.local_world(ranks, timeout_s=HANG_S) as world:
        assert world.run(step) == [ranks] * ranks


def test_a_destroyed_buffer_is_of_no_use():
    def step(rank):
        buffer = ElasticBuffer(rank.ep)
        buffer.destroy()
        buffer.destroy()
        with pytest.raises(NpuCallError, match="barrier` is called on a buffer that was destroyed"):
            buffer.barrier()

    with em.local_world(2, timeout_s=HANG_S) as world:
        world.run(step)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_cpu_bytes": 1}, "`num_cpu_bytes` is 1: it must be whole 2 MiB; use get_engram_storage_size_hint."),
        (
            {"hidden": 8},
            "`num_max_tokens_per_rank` is None: it must be given with the two others; pass all three, or none of them.",
        ),
    ],
)
def test_a_buffer_is_not_made_of_wrong_sizes(arguments, text):
    with em.local_world(1) as world, pytest.raises(NpuCallError) as raised:
        ElasticBuffer(world.ranks[0].ep, **arguments)
    assert str(raised.value) == text


def test_dispatch_needs_the_sizes_and_two_ranks():
    with em.local_world(1) as world:
        x, ids = torch.zeros(1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32)
        with pytest.raises(NpuCallError, match="`num_max_tokens_per_rank` is None: it must be given for dispatch"):
            ElasticBuffer(world.ranks[0].ep).dispatch(x, topk_idx=ids, num_experts=2)
        sized = ElasticBuffer(world.ranks[0].ep, num_max_tokens_per_rank=1, hidden=1, num_topk=1)
        with pytest.raises(NpuCallError, match="`group` is of 1 ranks: it must have 2 to 128"):
            sized.dispatch(x, topk_idx=ids, num_experts=2)
    with pytest.raises(NpuCallError, match="`group` is None"):
        ElasticBuffer(None)
    with pytest.raises(NpuCallError, match="`group` is a int"):
        ElasticBuffer(3)


def test_upstreams_names_are_there():
    assert (ops.ElasticBuffer, ops.EPHandle) == (ElasticBuffer, EPHandle)
