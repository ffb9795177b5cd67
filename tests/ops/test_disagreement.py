"""Ranks that call with different sizes, call different operators, or are refused: all of them raise, and none waits.

One rank, the third of four, is the odd one. Threads and gloo processes run the same scenarios; the error must be there
within 5 s, although an exchange may take a minute, and afterwards the same world still works.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import evenmoe as em
from evenmoe.contract.calls import DispatchV1Call
from evenmoe.contract.half_calls import DispatchSetupCall, DispatchTeardownCall
from evenmoe.contract.limits import RELAXED
from evenmoe.errors import (
    ConstraintError,
    EvenmoeError,
    MissingArgumentError,
    RankDisagreementError,
    UnsupportedTypeError,
)
from evenmoe.ops import dispatch_halves, dispatch_v1
from evenmoe.ops.operator import perform
from evenmoe.transport.world import Rank
from tests.lagging import let_lag
from tests.processes import TRANSPORTS

assert {dispatch_halves, dispatch_v1}  # imported so that the operators are registered
ODD = 2
PATIENCE_S = 60.0  # the time-out of the worlds: nobody waits for it, however busy the machine is
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """What the odd rank does differently.

    Attributes:
        change: the arguments of an honest call -> those that differ.
        named: the size that the errors name, and its values on the other ranks and on the odd one.
        refused: the odd rank's own error instead, and that with TP where it differs.
    """

    change: Callable[[Arguments], Arguments]
    named: tuple[str, str, str] = ("", "", "")
    refused: type[EvenmoeError] | None = None
    refused_with_tp: type[EvenmoeError] | None = None


def wider(name: str) -> Callable[[Arguments], Arguments]:
    return lambda call: {name: torch.ones(len(call[name]), 5, dtype=torch.bfloat16)}


def halves(name: str) -> Callable[[Arguments], Arguments]:
    return lambda call: {name: call[name].half()}


def doubles(name: str) -> Callable[[Arguments], Arguments]:
    return lambda call: {name: call[name].double()}


def masked(call: Arguments) -> Arguments:
    return {"x_active_mask": torch.ones(2, dtype=torch.bool)}


def one_expert_each(call: Arguments) -> Arguments:
    """Top-1; unchecked, since the assist info of the others' top-2 would be refused before the sizes are compared."""
    few = {name: call[name][:, :1] for name in ("expert_ids", "expert_scales") if name in call}
    return {**few, "check_values": False}


TOKENS = "tokens per rank times ranks (global_bs)"
DISPATCH = {
    "hidden": Scenario(wider("x"), ("hidden size of x", "3", "5")),
    "dtype": Scenario(halves("x"), ("dtype of x", "bfloat16", "float16")),
    "top-k": Scenario(one_expert_each, ("top-k of expert_ids", "2", "1")),
    "experts": Scenario(
        lambda call: {"num_experts": 2 * call["num_experts"]},
        ("num_experts", "4", "8"),
        refused_with_tp=ConstraintError,
    ),
    "quantised": Scenario(lambda call: {"quant_mode": 2}, ("quant_mode", "0", "2")),
    "global_bs": Scenario(lambda call: {"global_bs": 3 * call["num_experts"]}, (TOKENS, "8", "12")),
    "tokens": Scenario(
        lambda call: {name: call[name].repeat(2, 1) for name in ("x", "expert_ids")}, (TOKENS, "8", "16")
    ),
    "mask": Scenario(masked, ("presence of x_active_mask", "absent", "given")),
    "virtual experts": Scenario(lambda call: {"zero_expert_num": 3}, ("zero_expert_num", "0", "3")),
    "wrong dtype": Scenario(doubles("x"), refused=UnsupportedTypeError),
    "wrong id": Scenario(lambda call: {"expert_ids": call["expert_ids"] + 10}, refused=ConstraintError),
    "a list": Scenario(lambda call: {"x": call["x"].tolist()}, refused=UnsupportedTypeError),
    "unknown limits": Scenario(lambda call: {"limits": "moon"}, refused=ConstraintError),
}
COMBINE = {
    "hidden": Scenario(wider("expert_out"), ("hidden size of expert_out", "3", "5")),
    "dtype": Scenario(halves("expert_out"), ("dtype of expert_out", "bfloat16", "float16")),
    "top-k": Scenario(one_expert_each, ("top-k of expert_ids", "2", "1")),
    "quantised": Scenario(
        lambda call: {"comm_quant_mode": 2}, ("comm_quant_mode", "0", "2"), refused_with_tp=ConstraintError
    ),
    "mask": Scenario(masked, ("presence of x_active_mask", "absent", "given")),
    "virtual experts": Scenario(lambda call: {"zero_expert_num": 3}, ("zero_expert_num", "0", "3")),
    "experts": Scenario(lambda call: {"num_experts": 2 * call["num_experts"]}, refused=ConstraintError),
    "global_bs": Scenario(lambda call: {"global_bs": 3 * call["num_experts"]}, refused=ConstraintError),
    "wrong dtype": Scenario(doubles("expert_scales"), refused=UnsupportedTypeError),
    "nothing dispatched": Scenario(lambda call: {"dispatched": None}, refused=MissingArgumentError),
}
SCENARIOS = {"dispatch": DISPATCH, "combine": COMBINE}
CASES = [(operator, name) for operator, scenarios in SCENARIOS.items() for name in scenarios]


def honest(rank: Rank, operator: str) -> Arguments:
    """A call that all ranks could make: two tokens each, to the first two experts."""
    ids = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    call: Arguments = {"expert_ids": ids, "ep": rank.ep, "num_experts": rank.ep.world_size}
    call["tp"] = rank.tp if rank.tp.world_size == 2 else None
    if operator == "dispatch":
        return {"x": torch.ones(2, 3, dtype=torch.bfloat16), **call}
    d = em.dispatch(**honest(rank, "dispatch"))
    return {"expert_out": d.expand_x, "dispatched": d, "expert_scales": torch.full((2, 2), 0.5), **call}


def timed(call: Callable[[], object]) -> tuple[str, str, float]:
    """(class of the error, its text, seconds)."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "none", "", time.monotonic() - start


def differ(rank: Rank, operator: str, name: str) -> tuple[str, str, float]:
    call = honest(rank, operator)
    if rank.index == ODD:
        call |= SCENARIOS[operator][name].change(call)
    return timed(lambda: getattr(em, operator)(**call))


def mix_up(rank: Rank, operator: str, odd_operator: str) -> tuple[str, str, float]:
    """The odd rank calls another operator; both calls are honest ones."""
    calls = {"dispatch": honest(rank, "dispatch"), "combine": honest(rank, "combine")}
    mine = odd_operator if rank.index == ODD else operator
    return timed(lambda: getattr(em, mine)(**calls[mine]))


def works(rank: Rank) -> bool:
    """Tokens come back as they went, half and half from two experts; with TP twice, once from each peer."""
    y = em.combine(**honest(rank, "combine"))
    return bool((y == (2.0 if rank.tp.world_size == 2 else 1.0)).all())


@pytest.fixture(params=["threads", *TRANSPORTS])
def run(request: pytest.FixtureRequest, processes: Any) -> Callable[..., list]:
    """run(world, job, *arguments): the results of the ranks, which must leave the world in order."""
    if request.param != "threads":

        def in_processes(shape: tuple[int, int], job: Callable, *arguments: object) -> list:
            by = {"transport": request.param}
            assert processes.run(shape, works, **by) == [True] * 4  # the first call of all imports half of torch
            results = processes.run(shape, job, *arguments, **by)
            assert processes.run(shape, works, **by) == [True] * 4
            return results

        return in_processes

    def in_threads(shape: tuple[int, int], job: Callable, *arguments: object) -> list:
        with em.local_world(*shape, timeout_s=60.0) as world:
            assert world.run(works) == [True] * 4
            results = world.run(lambda rank: job(rank, *arguments))
            assert world.run(works) == [True] * 4
        return results

    return in_threads


def assert_all_raised(results: list[tuple[str, str, float]], odd_error: type[EvenmoeError] | None) -> None:
    for index, (kind, text, seconds) in enumerate(results):
        own = odd_error is not None and index == ODD
        assert kind == (odd_error.__name__ if own else RankDisagreementError.__name__), (index, text)
        assert seconds < PATIENCE_S, (index, text)


@pytest.mark.parametrize(("operator", "name"), CASES)
def test_one_rank_differs(run, operator, name):
    scenario = SCENARIOS[operator][name]
    results = run((4, 1), differ, operator, name)
    assert_all_raised(results, scenario.refused)
    if scenario.refused is None:
        size, common, odd = scenario.named
        for _, text, _ in results:
            assert text == (
                f"`{size}` is {common} on ranks 0, 1, 3 and {odd} on rank 2: it must be equal on every rank of a "
                "group; pass the same on all ranks."
            )
        return
    others = [text for index, (_, text, _) in enumerate(results) if index != ODD]
    own = results[ODD][1]
    assert len(set(others)) == 1
    assert others[0].startswith(f"`the call of {operator} on rank 2` is refused there (")
    shared = min(len(own), 200)  # 320 bytes of the odd rank's message travel
    assert own[:shared] in others[0]
    assert others[0].endswith("it must be accepted on every rank; correct the arguments of rank 2.")


@pytest.mark.parametrize(("operator", "name"), CASES)
def test_one_rank_differs_with_tp(run, operator, name):
    """Two ranks of two peers: the odd one's group and its peer learn it from the sizes, the others from them."""
    scenario = SCENARIOS[operator][name]
    refused = scenario.refused or scenario.refused_with_tp
    results = run((2, 2), differ, operator, name)
    assert_all_raised(results, refused)
    named = scenario.named[0] if refused is None else results[ODD][1][:60]
    for _, text, _ in results:
        assert named in text


@pytest.mark.parametrize("shape", [(4, 1), (2, 2)])
@pytest.mark.parametrize(("operator", "odd_operator"), [("dispatch", "combine"), ("combine", "dispatch")])
def test_one_rank_calls_another_operator(run, shape, operator, odd_operator):
    results = run(shape, mix_up, operator, odd_operator)
    assert_all_raised(results, None)
    for _, text, _ in results:
        assert "the operator" in text
        assert re.search("combine( of dispatch [0-9]+)? on rank", text)
    if shape == (4, 1):
        where = {"dispatch": "dispatch", "combine": "combine of dispatch N"}
        assert {re.sub("of dispatch [0-9]+", "of dispatch N", text) for _, text, _ in results} == {
            f"`the operator` is {where[operator]} on ranks 0, 1, 3 and {where[odd_operator]} on rank 2: it must be the "
            "same on every rank of a group; call the collective operators in the same order on all ranks."
        }


def crowd(rank: Rank, operator: str, more: Arguments) -> tuple[str, str, float]:
    """Unchecked ids that all name expert 0, twice in each token: more rows than its rank has room for."""
    call: Arguments = honest(rank, "dispatch")
    call |= {**more, "expert_ids": torch.zeros((2, 2), dtype=torch.int32), "check_values": False}
    if operator == "dispatch":
        return timed(lambda: em.dispatch(**call))
    group: Arguments = {"group_ep": rank.ep.name, "ep_world_size": rank.ep.world_size, "ep_rank_id": rank.ep.rank}
    own: Arguments = {name: call[name] for name in ("x", "expert_ids", "check_values")} | group | {"limits": RELAXED}
    own["moe_expert_num"] = call["num_experts"]
    if operator == "dispatch_v1":
        peers = {} if call["tp"] is None else {"group_tp": rank.tp.name, "tp_world_size": 2, "tp_rank_id": rank.tp.rank}
        return timed(lambda: perform(operator, DispatchV1Call(**own, **peers, **more)))
    own["comm_type"] = 2
    y, _, commands = perform("dispatch_setup", DispatchSetupCall(**own))
    return timed(lambda: perform("dispatch_teardown", DispatchTeardownCall(**own, y=y, comm_cmd_info=commands)))


@pytest.mark.parametrize("shape", [(4, 1), (2, 2)])
@pytest.mark.parametrize(
    ("operator", "more"),
    [
        ("dispatch", {}),
        ("dispatch", {"quant_mode": 2}),
        ("dispatch_v1", {}),
        ("dispatch_v1", {"quant_mode": 2}),
        ("dispatch_setup", {}),
    ],
)
def test_more_rows_than_there_is_room_for(run, shape, operator, more):
    """No row is ever left out: the rank that they come to says so, and the others hear of it."""
    ranks = shape[0]
    results = run(shape, crowd, operator, more)
    own = (
        f"`expert_ids` is such that {4 * ranks} rows come here: it must bring at most {2 * ranks} rows; let no expert "
        "occur twice in a token."
    )
    for index, (kind, text, _) in enumerate(results):
        crowded = index // shape[1] == 0
        assert kind == ("ConstraintError" if crowded else "RankDisagreementError")
        assert text == own if crowded else own in text


def combine_in_another_order(rank: Rank) -> tuple[str, str, float]:
    """Two dispatches of equal sizes are in flight, and the odd rank combines the second one first."""
    first, second = honest(rank, "combine"), honest(rank, "combine")
    return timed(lambda: em.combine(**(second if rank.index == ODD else first)))


@pytest.mark.parametrize("shape", [(4, 1), (2, 2)])
def test_one_rank_combines_in_another_order(run, shape):
    results = run(shape, combine_in_another_order)
    assert_all_raised(results, None)
    texts = [re.sub("[0-9]+ on", "N on", text) for _, text, _ in results]
    if shape == (4, 1):
        assert set(texts) == {
            "`the call` is combine of dispatch N on ranks 0, 1, 3 and combine of dispatch N on rank 2: it must be the "
            "same on every rank of a group; call the collective operators in the same order on all ranks."
        }
    assert all("combine of dispatch" in text for text in texts)


def tell_apart_by_peers(rank: Rank) -> tuple[str, str, float]:
    """All ranks of one peer combine the second dispatch first: each expert-parallel group agrees in itself."""
    first, second = honest(rank, "combine"), honest(rank, "combine")
    return timed(lambda: em.combine(**(second if rank.tp.rank else first)))


def test_peers_that_combine_in_another_order(run):
    results = run((2, 2), tell_apart_by_peers)
    assert_all_raised(results, None)
    assert all("tensor-parallel step of combine of dispatch" in text for _, text, _ in results)


def miscount(rank: Rank) -> tuple[str, str, float]:
    call = honest(rank, "combine")
    if rank.index == ODD:
        counts = call["dispatched"].tp_recv_counts.clone()
        counts[1 - rank.tp.rank] += 1
        call["dispatched"] = replace(call["dispatched"], tp_recv_counts=counts)
    return timed(lambda: em.combine(**call))


def test_a_wrong_count_of_peer_rows_is_refused_by_both_peers(run):
    """Only one of them would notice what it is offered; the other would wait for it in the exchange that follows."""
    results = run((2, 2), miscount)
    assert [kind for kind, _, _ in results] == ["RankDisagreementError"] * 2 + ["ConstraintError"] * 2
    assert all(seconds < PATIENCE_S for _, _, seconds in results)
    assert results[ODD][1] == (
        "`tp_send_counts` is [4, 5] with 4 rows of this rank, 4 of its peer and 4 offered by it: it must count the "
        "rows of both peers, own first in expert_out; pass the tp_recv_counts and ep_recv_counts that dispatch "
        "returned on both peers."
    )
    assert "is [4, 4] with 4 rows of this rank, 4 of its peer and 5 offered by it" in results[3][1]


# Rank 3 of four is gone; the odd rank has other numbers for those that are left, or another number of experts.
VECTORS = {
    "honest": [1, 3, 0, 3, 0, 1, 2, -1, 0, 1, 2, -1],
    "numbers": [1, 3, 0, 3, 1, 0, 2, -1, 1, 0, 2, -1],
    "experts": [1, 3, 0, 6, 0, 1, 2, -1, 0, 1, 2, -1],
}


def scale_down(rank: Rank, name: str) -> tuple[str, str, float]:
    if rank.index == 3:
        return "gone", "", 0.0
    vector = torch.tensor(VECTORS[name if rank.index == ODD else "honest"], dtype=torch.int32)
    return timed(lambda: em.dispatch(**honest(rank, "dispatch") | {"elastic_info": vector, "num_experts": 8}))


@pytest.mark.parametrize("name", ["numbers", "experts"])
def test_another_view_of_who_is_left(run, name):
    results = run((4, 1), scale_down, name)
    assert [kind for kind, _, _ in results] == ["RankDisagreementError"] * 3 + ["gone"]
    for _, text, seconds in results[:3]:
        assert "digest of elastic_info" in text
        assert seconds < PATIENCE_S
    assert [kind for kind, _, _ in run((4, 1), scale_down, "honest")] == ["none"] * 3 + ["gone"]


def dispatch_without_tp(rank: Rank) -> tuple[str, str, float]:
    call = honest(rank, "dispatch")
    return timed(lambda: em.dispatch(**call | ({"tp": None} if rank.index == ODD else {})))


def test_one_rank_without_its_peer():
    """It cannot tell its peer, which learns from threads that the rank has ended; gloo's peer waits for its timeout."""
    with em.local_world(2, 2, timeout_s=60.0) as world:
        results = world.run(dispatch_without_tp)
    assert [kind for kind, _, _ in results] == ["RankDisagreementError"] * 3 + ["LostRankError"]
    assert "tensor-parallel world size is 2 on rank 0 and 0 on rank 1" in results[0][1].replace("`", "")
    assert "rank 0" in results[3][1]


def test_the_caller_may_reuse_expert_out_while_its_peer_still_reads():
    def reuse(rank: Rank) -> torch.Tensor:
        call = honest(rank, "combine")
        y = em.combine(**call)
        call["expert_out"].zero_()
        return y

    with em.local_world(2, 2, timeout_s=60.0) as world:
        for rank in (world.ranks[1], world.ranks[3]):
            let_lag(rank.tp, 0.2)
        assert all((y == 2.0).all() for y in world.run(reuse))
