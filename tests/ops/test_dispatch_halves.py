"""Setup and teardown of dispatch and of combine give the reference's bits on random worlds, several pending at once."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.contract.half_calls import (
    CombineSetupCall,
    CombineTeardownCall,
    DispatchSetupCall,
    DispatchTeardownCall,
)
from evenmoe.contract.limits import RELAXED
from evenmoe.errors import ConstraintError, LostRankError, RankDisagreementError
from evenmoe.ops import combine_halves, dispatch_halves
from evenmoe.ops.operator import perform
from evenmoe.reference.combine import combine as reference_combine
from evenmoe.reference.dispatch import dispatch as reference_dispatch
from evenmoe.transport.pending import MOST
from tests.lagging import let_lag
from tests.patience import HANG_S
from tests.worlds import Case, Lent, Spec, assert_same_bits, specs

assert {dispatch_halves, combine_halves}  # imported so that the operators are registered


def fitted(spec: Spec) -> Spec:
    """The nearest world that the halves take: no peers, virtual experts or masks of entries, half of the ranks MoE."""
    shared = (spec.shared_experts, spec.shared_ranks)
    if spec.shared_ranks > spec.ep // 2:
        shared = (0, 0)
    physical = (spec.ep - shared[1]) * spec.experts_per_rank
    return replace(
        spec,
        tp=0,
        shared_experts=shared[0],
        shared_ranks=shared[1],
        moe_ranks=spec.ep - shared[1],
        virtual=(0, 0, 0),
        mask="none" if spec.mask == "assignments" else spec.mask,
        top_k=min(spec.top_k, physical),
        max_bs=max(spec.max_bs, 1),
        elastic="none",
        comm_quant_mode=0,
        shared_x="none",
    )


def attributes(rank, case: Case) -> dict:
    spec = case.spec
    return {
        "group_ep": rank.ep.name,
        "ep_world_size": spec.ep,
        "ep_rank_id": rank.ep.rank,
        "moe_expert_num": case.sizes["num_experts"],
        "shared_expert_num": spec.shared_experts,
        "shared_expert_rank_num": spec.shared_ranks,
        "global_bs": case.global_bs,
        "comm_type": 2,
        "check_values": spec.seed % 3 > 0,
        "limits": RELAXED,
    }


def padded_scales(case: Case) -> torch.Tensor | None:
    """With a row for every shared expert, whether ranks hold it or not."""
    if case.scales is None:
        return None
    missing = case.spec.shared_experts if not case.spec.shared_ranks else 0
    return torch.cat([torch.full((missing, case.spec.hidden), 7.0), case.scales])


def set_up_dispatch(rank, case: Case):
    lent = Lent(case, rank.index)
    call = DispatchSetupCall(
        x=lent.mine(case.x),
        expert_ids=lent.mine(case.ids),
        scales=lent(padded_scales(case)),
        x_active_mask=lent.mine(case.masks),
        quant_mode=case.spec.quant_mode,
        **attributes(rank, case),
    )
    outputs = perform("dispatch_setup", call)
    lent.take_back()
    return outputs


def tear_down_dispatch(rank, case: Case, y, info):
    lent = Lent(case, rank.index)
    call = DispatchTeardownCall(
        x=lent.mine(case.x),
        y=torch.full_like(y, 3),  # its values travelled with the setup
        expert_ids=lent.mine(case.ids),
        comm_cmd_info=info,
        quant_mode=case.spec.quant_mode,
        **attributes(rank, case),
    )
    outputs = perform("dispatch_teardown", call)
    lent.take_back()
    return outputs


def set_up_combine(rank, case: Case, assist):
    lent = Lent(case, rank.index)
    rows = case.expert_out(rank.index, len(assist) // 128)[: len(assist) // 128]
    ids = lent.mine(case.ids)
    call = CombineSetupCall(
        expand_x=lent(rows), expert_ids=ids, assist_info_for_combine=lent(assist), **no_shared(attributes(rank, case))
    )
    outputs = perform("combine_setup", call)
    lent.take_back()
    return outputs


def tear_down_combine(rank, case: Case, index, quantized, info):
    lent = Lent(case, rank.index)
    call = CombineTeardownCall(
        expand_x=torch.zeros((len(quantized), case.spec.hidden), dtype=case.dtype),
        quant_expand_x=quantized,
        expert_ids=lent.mine(case.ids),
        expand_idx=lent(index),
        expert_scales=lent.mine(case.weights),
        comm_cmd_info=info,
        x_active_mask=lent.mine(case.masks),
        **no_shared(attributes(rank, case)),
    )
    outputs = perform("combine_teardown", call)
    lent.take_back()
    return outputs


def no_shared(given: dict) -> dict:
    return given | {"shared_expert_num": 0}


def run_halves(rank, spec: Spec):
    """Two calls pending at once, torn down in the other order; between them the same dispatch in one call."""
    case, other = Case(spec), Case(replace(spec, seed=spec.seed + 1))
    first, second = set_up_dispatch(rank, case), set_up_dispatch(rank, other)
    whole = em.dispatch(
        case.x[rank.index],
        case.ids[rank.index],
        ep=rank.ep,
        x_active_mask=None if case.masks is None else case.masks[rank.index],
        **case.sizes,
    )
    late = tear_down_dispatch(rank, other, second[0], second[2])
    early = tear_down_dispatch(rank, case, first[0], first[2])
    results = [(first, early), (second, late)]
    if spec.shared_ranks:
        return results, whole.expand_x.shape, None
    back = [set_up_combine(rank, c, done[2]) for c, done in ((case, early), (other, late))]
    sums = [
        tear_down_combine(rank, c, set_up[1], *pair)
        for c, set_up, pair in reversed(list(zip((case, other), (first, second), back, strict=True)))
    ]
    return results, whole.expand_x.shape, sums[::-1]


def assert_right(spec: Spec, found):
    for which, case in enumerate((Case(spec), Case(replace(spec, seed=spec.seed + 1)))):
        shared = {"x_active_mask": case.masks, **case.sizes}
        want = reference_dispatch(case.x, case.ids, scales=case.scales, quant_mode=spec.quant_mode, **shared)
        sums = None
        if not spec.shared_ranks:
            rows = [case.expert_out(i, len(d.expand_x)) for i, d in enumerate(want)]
            sums = reference_combine(rows, case.ids, want, case.weights, **shared)
        for rank, (results, _, back) in enumerate(found):
            (y, index, _), (expand_x, scales, assist, nums) = results[which]
            there, counts = want[rank], want[rank].ep_recv_counts
            assert_same_bits(expand_x, there.expand_x, f"expand_x on rank {rank}")
            assert_same_bits(scales, there.dynamic_scales, f"scales on rank {rank}")
            assert_same_bits(nums, there.expert_token_nums, f"nums on rank {rank}")
            assert torch.equal(assist[: len(counts)], counts), rank
            assert not assist[len(counts) :].any()
            assert index.tolist() == plain_places(case, rank), rank
            assert_same_bits(*plain_message(case, rank, y), f"y on rank {rank}")
            if sums is not None:
                assert_same_bits(back[which], sums[rank], f"x on rank {rank}")


def active_rows(case: Case, rank: int) -> int:
    return len(case.ids[rank]) if case.masks is None else int(case.masks[rank].sum())


def plain_places(case: Case, rank: int) -> list[int]:
    seen, found = {}, []
    for token, row in enumerate(case.ids[rank].tolist()):
        for expert in row:
            found.append(seen.get(expert, 0) if token < active_rows(case, rank) else 0)
            seen[expert] = seen.get(expert, 0) + 1
    return found


def plain_message(case: Case, rank: int, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, what it must be): x by expert, then token; tokens for shared experts behind; zeros elsewhere."""
    if case.spec.quant_mode:  # the values are compared where they arrive
        return y[:0], y[:0]
    ids, x, hidden = case.ids[rank], case.x[rank], case.spec.hidden
    wanted = torch.zeros_like(y)
    count = active_rows(case, rank)
    pairs = sorted((expert, token) for token in range(count) for expert in ids[token].tolist())
    for row, (_, token) in enumerate(pairs):
        wanted[row, :hidden] = x[token]
    if case.spec.shared_ranks:
        for shared in range(case.spec.shared_experts):
            for token in range(count):
                wanted[len(ids) * case.top_k + shared * count + token, :hidden] = x[token]
    return y, wanted


@settings(max_examples=60, deadline=None)
@given(specs().map(fitted))
def test_threads(spec):
    with em.local_world(spec.ep, timeout_s=HANG_S) as world:
        assert_right(spec, world.run(lambda rank: run_halves(rank, spec)))


@settings(max_examples=15, deadline=None)
@given(specs().map(fitted), st.randoms(use_true_random=False))
def test_threads_that_lag(spec, random):
    with em.local_world(spec.ep, timeout_s=HANG_S) as world:
        for rank in world.ranks:
            let_lag(rank.ep, random.choice([0.0, 0.001, 0.004]))
        assert_right(spec, world.run(lambda rank: run_halves(rank, spec)))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_processes(processes, data):
    spec = fitted(data.draw(specs(ep=4, tp=0)))
    assert_right(spec, processes.run((4, 1), run_halves, spec))


SPEC = Spec(seed=4, moe_ranks=2, experts_per_rank=2, top_k=2, max_bs=3, shared_experts=0, hidden=4)


def test_a_setup_does_not_wait_and_a_teardown_needs_setups_alone():
    """Rank 0 comes to its second setup before rank 1 begins at all, and tears down before rank 1 does."""
    came, torn = [], []

    def step(rank):
        case = Case(SPEC)
        if rank.index == 1:
            while "set up" not in came:
                time.sleep(0.001)
        made = [set_up_dispatch(rank, case) for _ in range(3)]
        came.append("set up")
        if rank.index == 1:
            while not torn:
                time.sleep(0.001)
        for y, _, info in made:
            tear_down_dispatch(rank, case, y, info)
        torn.append(rank.index)

    with em.local_world(2, timeout_s=HANG_S) as world:
        world.run(step)
    assert torn == [0, 1]


def fails(rank, call) -> str:
    with pytest.raises((ConstraintError, RankDisagreementError, LostRankError)) as raised:
        call()
    return str(raised.value)


def test_a_teardown_without_its_setup_is_named():
    def step(rank):
        case = Case(SPEC)
        y, index, info = set_up_dispatch(rank, case)
        texts = [fails(rank, lambda: tear_down_dispatch(rank, case, y, torch.zeros_like(info)))]
        assist = tear_down_dispatch(rank, case, y, info)[2]
        texts.append(fails(rank, lambda: tear_down_dispatch(rank, case, y, info)))
        quantized, commands = set_up_combine(rank, case, assist)
        commands[0] += 1
        texts.append(fails(rank, lambda: tear_down_combine(rank, case, index, quantized, commands)))
        commands[0] -= 1
        tear_down_combine(rank, case, index, quantized, commands)
        return texts

    with em.local_world(2, timeout_s=HANG_S) as world:
        for first, second, third in world.run(step):
            assert first == (
                "`comm_cmd_info` is [0, 0, …]: it must be what the setup wrote, unchanged; pass the comm_cmd_info of "
                "the setup."
            )
            assert second == (
                "`comm_cmd_info` is of no setup of dispatch that is pending here (pending are none): it must come from "
                "a setup of this rank and group that was not torn down; pass what it gave."
            )
            assert third.startswith("`comm_cmd_info` is [1162694470, ")


def test_a_teardown_that_differs_from_its_setup_is_named_and_may_be_repeated():
    def step(rank):
        case, other = Case(SPEC), Case(SPEC)
        y, _, info = set_up_dispatch(rank, case)
        other.ids[rank.index] = other.ids[rank.index].flip(1)
        texts = [fails(rank, lambda: tear_down_dispatch(rank, other, y, info))]
        other.global_bs = 6 - case.global_bs
        texts.append(fails(rank, lambda: tear_down_dispatch(rank, other, y, info)))
        tear_down_dispatch(rank, case, y, info)
        return texts

    with em.local_world(2, timeout_s=HANG_S) as world:
        assert (
            world.run(step)
            == [
                [
                    "`expert_ids` is another tensor: it must be that of the setup; pass the same to setup and "
                    "teardown.",
                    "`global_bs` is 6: it must be 0, as in the setup; pass the same to setup and teardown.",
                ]
            ]
            * 2
        )


def test_a_setup_that_is_never_torn_down_is_named():
    def step(rank):
        case = Case(SPEC)
        y, _, info = set_up_dispatch(rank, case)
        if rank.index == 1:  # it has the rows of rank 0 all the same
            tear_down_dispatch(rank, case, y, info)

    with em.local_world(2, timeout_s=HANG_S) as world:
        with pytest.raises(ConstraintError) as raised:
            world.run(step)
        assert str(raised.value) == (
            "`comm_cmd_info` is left of 1 setups of dispatch: it must be given to the teardown of its setup; call the "
            "teardown of every setup."
        )
        assert world.run(lambda rank: rank.index) == [0, 1]


def test_too_many_setups_are_named():
    def step(rank):
        case = Case(SPEC)
        made = [set_up_dispatch(rank, case) for _ in range(MOST)]
        text = fails(rank, lambda: set_up_dispatch(rank, case))
        for y, _, info in made:
            tear_down_dispatch(rank, case, y, info)
        return text

    with em.local_world(2, timeout_s=HANG_S) as world:
        for text in world.run(step):
            assert text == (
                "`dispatch_setup` is called with 64 setups pending: it must leave at most 64 setups of a group without "
                "their teardowns; call the teardown of every setup."
            )


def test_a_rank_that_sets_up_something_else_is_named():
    def step(rank):
        case = Case(SPEC if rank.index == 0 else replace(SPEC, hidden=5))
        y, _, info = set_up_dispatch(rank, case)
        return fails(rank, lambda: tear_down_dispatch(rank, case, y, info))

    with em.local_world(2, timeout_s=HANG_S) as world:
        assert (
            world.run(step)
            == [
                "`hidden size of x` is 4 on rank 0 and 5 on rank 1: it must be equal on every rank of a group; pass "
                "the same on all ranks."
            ]
            * 2
        )


def test_a_wrong_setup_is_told_to_the_others_and_the_next_is_right():
    def step(rank):
        case = Case(SPEC)
        if rank.index == 0:
            wrong = Case(SPEC)
            wrong.ids[0][0, 0] = 99
            text = fails(rank, lambda: set_up_dispatch(rank, wrong))
        else:
            y, _, info = set_up_dispatch(rank, case)
            text = fails(rank, lambda: tear_down_dispatch(rank, case, y, info))
        y, _, info = set_up_dispatch(rank, case)
        tear_down_dispatch(rank, case, y, info)
        return text

    with em.local_world(2, timeout_s=HANG_S) as world:
        own, other = world.run(step)
    assert own.startswith("`expert_ids` is 99 for token 0, k 0: it must be 0 to 3")
    assert "the call of setup of dispatch on rank 0` is refused there" in other


def test_a_rank_that_never_sets_up_is_named():
    def step(rank):
        if rank.index == 1:
            return ""
        case = Case(SPEC)
        y, _, info = set_up_dispatch(rank, case)
        return fails(rank, lambda: tear_down_dispatch(rank, case, y, info))

    with em.local_world(2, timeout_s=HANG_S) as world:
        text, _ = world.run(step)
    assert "rank 1, which ended its part of the run" in text


def test_rows_that_did_not_come_are_named_unless_they_weigh_nothing():
    def step(rank):
        case = Case(SPEC)
        y, index, info = set_up_dispatch(rank, case)
        assist = tear_down_dispatch(rank, case, y, info)[2]
        quantized, commands = set_up_combine(rank, case, torch.zeros_like(assist))
        text = fails(rank, lambda: tear_down_combine(rank, case, index, quantized, commands))
        quantized, commands = set_up_combine(rank, case, torch.zeros_like(assist))
        case.weights = [torch.zeros_like(w) for w in case.weights]
        return text, float(tear_down_combine(rank, case, index, quantized, commands).abs().sum())

    with em.local_world(2, timeout_s=HANG_S) as world:
        for text, total in world.run(step):
            assert "`expand_idx` is 0 for token 0, k 0: it must be 0, below the 0 rows that expert" in text
            assert total == 0.0
