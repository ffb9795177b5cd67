"""The first versions of dispatch and combine over real ranks give the reference's bits; what is wrong is an error."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.contract.calls import CombineV1Call, DispatchV1Call
from evenmoe.contract.layout import make_layout
from evenmoe.contract.limits import RELAXED
from evenmoe.errors import ConstraintError, RankDisagreementError
from evenmoe.ops import combine_v1, dispatch_v1  # noqa: F401  registers the operators
from evenmoe.ops.dispatch_v1 import shared_places
from evenmoe.ops.operator import perform
from evenmoe.reference.first_version import DispatchedV1
from evenmoe.reference.first_version import combine_v1 as reference_combine
from evenmoe.reference.first_version import dispatch_v1 as reference_dispatch
from evenmoe.transport.world import Rank
from tests.worlds import Case, Lent, Spec, assert_same_bits, specs


@st.composite
def first_specs(draw: st.DrawFn, ep: int | None = None, tp: int | None = None) -> Spec:
    """The worlds of the second version that the first has: one shared expert whose ranks divide the world, no more."""
    spec = draw(specs(ep=ep, tp=tp))
    ep = spec.ep
    shared = draw(st.sampled_from([0, *(ranks for ranks in range(1, ep) if ep % ranks == 0)]))
    moe_ranks = ep - shared
    sizes = spec.sizes if shared == 0 else "equal"
    return replace(
        spec,
        shared_experts=1,
        shared_ranks=shared,
        moe_ranks=moe_ranks,
        virtual=(0, 0, 0),
        top_k=min(spec.top_k, moe_ranks * spec.experts_per_rank),
        mask="none",
        sizes=sizes,
        elastic="none",
    )


def attributes(rank: Rank, case: Case) -> dict:
    spec = case.spec
    return {
        "group_ep": rank.ep.name,
        "ep_world_size": spec.ep,
        "ep_rank_id": rank.ep.rank,
        "moe_expert_num": spec.moe_ranks * spec.experts_per_rank,
        "group_tp": rank.tp.name if spec.tp else "",
        "tp_world_size": spec.tp,
        "tp_rank_id": rank.tp.rank if spec.tp == 2 else 0,
        "shared_expert_rank_num": spec.shared_ranks,
        "global_bs": case.global_bs,
        "check_values": spec.seed % 3 > 0,
        "limits": RELAXED,
    }


def run_rank(rank: Rank, case: Case) -> tuple[DispatchedV1, torch.Tensor]:
    spec, i = case.spec, rank.index
    lent = Lent(case, i)
    call = DispatchV1Call(
        x=lent.mine(case.x),
        expert_ids=lent.mine(case.ids),
        scales=lent(case.scales),
        expert_scales=lent.mine(case.gates),
        quant_mode=spec.quant_mode,
        expert_token_nums_type=spec.nums_type,
        **attributes(rank, case),
    )
    *outputs, number = perform("dispatch_v1", call)
    lent.take_back()
    dispatched = DispatchedV1(*outputs)
    lent = Lent(case, i)
    y = perform(
        "combine_v1",
        CombineV1Call(
            expand_x=lent(case.expert_out(i, len(dispatched.expand_x))),
            expert_ids=lent.mine(case.ids),
            expand_idx=lent(dispatched.expand_idx),
            ep_send_counts=lent(dispatched.ep_recv_counts),
            tp_send_counts=lent(dispatched.tp_recv_counts) if spec.tp == 2 else None,
            expert_scales=lent.mine(case.weights),
            comm_quant_mode=spec.comm_quant_mode,
            dispatch_number=number,
            **attributes(rank, case),
        ),
    )
    lent.take_back()
    return dispatched, y


def in_process(rank: Rank, spec: Spec) -> tuple[DispatchedV1, torch.Tensor]:
    return run_rank(rank, Case(spec))


def run_reference(case: Case) -> list[tuple[DispatchedV1, torch.Tensor]]:
    spec = case.spec
    shared = {
        "num_experts": spec.moe_ranks * spec.experts_per_rank,
        "tp_world_size": spec.tp,
        "shared_expert_rank_num": spec.shared_ranks,
    }
    dispatched = reference_dispatch(
        case.x,
        case.ids,
        scales=case.scales,
        quant_mode=spec.quant_mode,
        global_bs=case.global_bs,
        expert_token_nums_type=spec.nums_type,
        **shared,
    )
    rows = [case.expert_out(i, len(d.expand_x)) for i, d in enumerate(dispatched)]
    y = reference_combine(rows, case.ids, dispatched, case.weights, comm_quant_mode=spec.comm_quant_mode, **shared)
    return list(zip(dispatched, y, strict=True))


def assert_equal(results: list, expected: list) -> None:
    for index, (got, want) in enumerate(zip(results, expected, strict=True)):
        for name, ours, theirs in zip(DispatchedV1._fields, got[0], want[0], strict=True):
            assert_same_bits(ours, theirs, f"{name} on rank {index}")
        assert_same_bits(got[1], want[1], f"y on rank {index}")


def run_in_threads(spec: Spec) -> list:
    case = Case(spec)
    with em.local_world(spec.ep, max(spec.tp, 1), timeout_s=60.0) as world:
        return world.run(lambda rank: run_rank(rank, case))


@settings(max_examples=100, deadline=None)
@given(first_specs())
def test_threads(spec):
    assert_equal(run_in_threads(spec), run_reference(Case(spec)))


@pytest.mark.parametrize(("ep", "tp"), [(4, 1), (2, 2)])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_processes(processes, ep, tp, data):
    spec = data.draw(first_specs(ep=ep, tp=tp))
    assert_equal(processes.run((ep, tp), in_process, spec), run_reference(Case(spec)))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 9))
def test_tokens_are_divided_as_the_kernel_computes_it(shared, times, tokens):
    """The rank is ⌈(t + 1 + ⌊r·Bs / Sr⌋)·Sr / Bs⌉ − 1 − r (§2.17); here it is found in the starts of the parts."""
    for rank in range(shared, shared * times):
        layout = make_layout(
            ep=shared * times,
            rank=rank,
            num_experts=shared * (times - 1),
            num_tokens=tokens,
            hidden=1,
            top_k=1,
            shared_ranks=shared,
        )
        destination, place = shared_places(layout, "cpu")
        before, seen = rank * tokens // shared, dict.fromkeys(range(shared), 0)
        for token in range(tokens):
            want = -(-(token + 1 + before) * shared // tokens) - 1 - rank
            assert (destination[token], place[token]) == (want, seen[want])
            seen[want] += 1


SPEC = Spec(seed=4, moe_ranks=2, experts_per_rank=2, max_bs=3, top_k=2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"expand_idx": lambda t: t.flip(0)},
            r"`expand_idx` is \d+ for token \d+, k \d+: it must be \d+, the position",
        ),
        ({"ep_send_counts": lambda t: torch.cat([t[-1:], t[1:]])}, "it must be running sums; pass the ep_recv"),
        ({"ep_send_counts": lambda t: t + 100}, "must count 0 to 12 rows of this rank"),
        ({"expert_ids": lambda t: (t + 1) % 4}, "rows are due here, while .* came, or of others: it must be the ids"),
    ],
)
@pytest.mark.parametrize("check_values", [False, True])
def test_what_is_not_dispatchs_is_an_error(changes, text, check_values):
    """On every rank if it shows before the rows have moved, else where it is wrong; the next call is right."""
    case = Case(SPEC)

    def step(rank):
        common = attributes(rank, case) | {"check_values": check_values}
        given = {"x": case.x[rank.index], "expert_ids": case.ids[rank.index]}
        out = perform("dispatch_v1", DispatchV1Call(**given, **common))
        back = {
            "expand_x": out[0],
            "expert_ids": case.ids[rank.index],
            "expand_idx": out[2],
            "ep_send_counts": out[4],
            "expert_scales": case.weights[rank.index],
        }
        wrong = back | {name: change(back[name]) for name, change in changes.items()} if rank.index == 0 else back
        said = ""
        try:
            perform("combine_v1", CombineV1Call(**wrong, **common))
        except (ConstraintError, RankDisagreementError) as error:
            said = str(error)
        return said, perform("combine_v1", CombineV1Call(**back, **common))

    with em.local_world(2, timeout_s=60.0) as world:
        (wrong, first), (told, second) = world.run(step)
    assert re.search(text, wrong), wrong
    assert bool(told) == ("ep_send_counts" in changes)
    for y, x, weights in zip((first, second), case.x, case.weights, strict=True):
        # One rounding of the sum to bfloat16, 2⁻⁹ of it at most, and the sum's own in float32.
        want = x.float() * weights.sum(1, keepdim=True)
        bound = 2.0**-8 * (x.float().abs() * weights.abs().sum(1, keepdim=True)) + 1e-30
        assert ((y.float() - want).abs() <= bound).all()


def test_the_two_versions_are_two_operators():
    def step(rank):
        x, ids = torch.ones(1, 1), torch.zeros((1, 1), dtype=torch.int32)
        given = {"group_ep": rank.ep.name, "ep_world_size": 2, "ep_rank_id": 1, "moe_expert_num": 2}
        first = DispatchV1Call(x=x, expert_ids=ids, limits=RELAXED, **given)
        with pytest.raises(RankDisagreementError, match="dispatch_v1"):
            em.dispatch(x, ids, ep=rank.ep, num_experts=2) if rank.index == 0 else perform("dispatch_v1", first)
        return True

    with em.local_world(2, timeout_s=60.0) as world:
        assert world.run(step) == [True, True]


def test_more_rows_for_the_shared_expert_than_there_is_room_for_are_an_error():
    """Five of ten ranks hold the shared expert, G = 10·3, so A = 6. Rank 5 has 2 tokens, rank 0 gets 1 of rank 7."""

    def step(rank):
        tokens = sizes[rank.index]
        x, ids = torch.ones(tokens, 1), torch.zeros((tokens, 1), dtype=torch.int32)
        given = {"group_ep": rank.ep.name, "ep_world_size": 10, "ep_rank_id": rank.index, "moe_expert_num": 5}
        given |= {"shared_expert_rank_num": 5, "global_bs": 30, "limits": RELAXED}
        try:
            return len(perform("dispatch_v1", DispatchV1Call(x=x, expert_ids=ids, **given))[0])
        except (ConstraintError, RankDisagreementError) as error:
            return str(error)

    sizes = [3] * 10
    with em.local_world(10, timeout_s=60.0) as world:
        assert world.run(step) == [6] * 5 + [30] * 5
        sizes[7] = 2  # part 2·2 // 5 … 3·2 // 5 is one token where that of three tokens is none
        said = world.run(step)
        assert all("which makes room for 6 rows, while 7 come" in text for text in said)
