"""The operators as torch knows them: schema, fake kernels, and no graph break where nothing is communicated."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import evenmoe as em
from evenmoe.contract.calls import AddRmsNormCall, CombineCall, DispatchCall, UpdateExpertCall
from evenmoe.contract.limits import ATLAS_A3, UNLIMITED
from evenmoe.contract.operators import OPERATORS
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.errors import ConstraintError
from evenmoe.ops import operator
from evenmoe.ops.combine import combining
from evenmoe.ops.operator import CALL_TYPES, Prepared, check_types, collective
from evenmoe.ops.update_expert import update_expert
from evenmoe.transport.call import GroupCall
from evenmoe.transport.world import Rank
from tests.worlds import CONST_EXPERTS, Case, Spec, assert_same_bits, outputs_of, run_rank

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
TABLE = torch.tensor([[1, 0, 0, 0], [2, 1, 7, 0], [3, 2, 8, 13]], dtype=torch.int32)
IDS = torch.tensor([[0, 1], [2, 1], [1, 0], [0, 2]])
PRUNING = (torch.full((4, 2), 0.5), torch.tensor([0.25, 0.75]), torch.tensor([True, True, True, False]))
WORLDS = [
    Spec(moe_ranks=1, experts_per_rank=3, top_k=2, virtual=(1, 1, 1), shared_x="flat", max_bs=5),
    Spec(moe_ranks=1, experts_per_rank=2, quant_mode=2, smooth=True, mask="assignments", comm_quant_mode=2, max_bs=5),
]


def registered_call(
    function: Callable, translate: Callable, call_type: type, *args: Any, **keywords: Any
) -> dict[str, Any]:
    """What a public function passes to its registered operator."""
    bound = inspect.signature(function).bind(*args, **keywords)
    bound.apply_defaults()
    with translate(call_type, dict(bound.arguments)) as call:
        return check_types(function.__name__, call)


def dispatching(call_type: type, given: dict[str, Any]) -> AbstractContextManager[Any]:
    return collective("dispatch", call_type, given, given["x"])


def calls_on_one_rank(rank: Rank, case: Case) -> dict[str, dict[str, Any]]:
    """{operator: arguments} of the three collectives on a world of one rank."""
    spec = case.spec
    shared = {"ep": rank.ep, "x_active_mask": None if case.masks is None else case.masks[0], **case.sizes}
    sending = {"scales": case.scales, "quant_mode": spec.quant_mode, **shared}
    dispatched = em.dispatch(case.x[0], case.ids[0], **sending)
    returning = {
        "shared_expert_x": None if case.shared_x is None else case.shared_x[0],
        "ori_x": None if case.ori_x is None else case.ori_x[0],
        "comm_quant_mode": spec.comm_quant_mode,
        **dict(zip(CONST_EXPERTS, case.const, strict=True)),
        **shared,
    }
    rows = (case.expert_out(0, len(dispatched.expand_x)), case.ids[0], dispatched, case.weights[0])
    norm = (case.residual[0], case.gamma[0])
    return {
        "dispatch": registered_call(em.dispatch, dispatching, DispatchCall, case.x[0], case.ids[0], **sending),
        "combine": registered_call(em.combine, combining, CombineCall, *rows, **returning),
        "combine_add_rms_norm": registered_call(
            em.combine_add_rms_norm, combining, AddRmsNormCall, *rows, *norm, **returning
        ),
    }


@pytest.mark.parametrize("name", ["dispatch", "combine", "combine_add_rms_norm"])
@pytest.mark.parametrize("spec", WORLDS, ids=["virtual experts", "quantised"])
def test_opcheck_of_the_collectives(name, spec, monkeypatch):
    # Outputs of several calls are compared, and one output of dispatch is the call's number: here always the first's.
    monkeypatch.setattr(GroupCall, "number", property(lambda self: 0, lambda self, number: None), raising=False)
    with em.local_world(1) as world:
        arguments = calls_on_one_rank(world.ranks[0], Case(spec))[name]
        torch.library.opcheck(getattr(torch.ops.evenmoe, name).default, (), arguments, test_utils=CHECKS)


@pytest.mark.parametrize("pruning", [(None, None, None), PRUNING], ids=["whole", "pruned"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_opcheck_of_update_expert(mode, dtype, pruning):
    keywords = {"local_rank_id": 3, "world_size": 4, "balance_mode": mode, "check_values": True, "limits": "relaxed"}
    torch.library.opcheck(
        torch.ops.evenmoe.update_expert.default, (IDS.to(dtype), TABLE, *pruning), keywords, test_utils=CHECKS
    )


@pytest.mark.parametrize("mode", ["rank", "token", "occurrence"])
def test_update_expert_compiles_without_a_graph_break(mode):
    torch._dynamo.reset()
    compiled = torch.compile(update_expert, fullgraph=True, backend="aot_eager")
    for ids in (IDS, IDS[:3].int(), IDS.T[:, :1].contiguous()):
        got, want = (function(ids, TABLE, 3, 4, mode) for function in (compiled, update_expert))
        assert_same_bits(got[0], want[0], "ids")
        assert_same_bits(got[1], want[1], "mask")
    got, want = (function(IDS, TABLE, 3, 4, mode, *PRUNING) for function in (compiled, update_expert))
    assert_same_bits(got[0], want[0], "ids")
    assert_same_bits(got[1], want[1], "mask")


def test_calls_go_past_torch_only_where_nothing_of_torch_would_see_them(monkeypatch):
    """Plain tensors in inference mode; not fake or traced ones, nor where a gradient may be wanted."""
    call = UpdateExpertCall(expert_ids=IDS, eplb_table=TABLE, local_rank_id=3, world_size=4)
    past: list[int] = []
    run = operator._RUNS["update_expert"]

    def counted(*given: Any, **attributes: Any) -> Any:
        past.append(1)
        return run(*given, **attributes)

    monkeypatch.setitem(operator._RUNS, "update_expert", counted)
    wanted = operator.perform("update_expert", call)
    assert not past
    with torch.inference_mode():
        got = operator.perform("update_expert", call)
        assert len(past) == 1
        assert_same_bits(got[0], wanted[0], "ids")
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert type(operator.perform("update_expert", call)[0]).__name__ == "FakeTensor"
        traced = make_fx(lambda ids: operator.perform("update_expert", replace(call, expert_ids=ids))[0])(IDS)
        assert any(node.target is torch.ops.evenmoe.update_expert.default for node in traced.graph.nodes)
        assert len(past) == 1


def test_the_table_and_the_calls_have_the_same_arguments():
    for name, described in OPERATORS.items():
        taken = {argument.name for argument in described.arguments} - (
            {"dispatch_number"} if name in ("dispatch", "dispatch_v1") else set()
        )
        ours = {field.name for field in fields(CALL_TYPES[name])} - {"hccl_buffer_bytes", "generation"}
        second = name.removesuffix("_v1")  # whose fields a call of the first version has, too
        later = {argument.name for argument in OPERATORS[second].arguments} - taken if second != name else set()
        assert ours - later == taken, name


def test_a_call_is_prepared_once_for_all_of_its_shapes():
    """Values do not matter; a shape, a dtype, an attribute or the limits do. No plan keeps a tensor."""
    seen = []

    def prepare(call: Any) -> int:
        assert isinstance(call.expert_ids, TensorSpec)
        seen.append(call)
        return len(seen)

    prepared = Prepared("update_expert", prepare, lambda call, layout, elastic_info: layout)
    base = {"expert_ids": IDS, "eplb_table": TABLE, "world_size": 4, "limits": ATLAS_A3}
    changes: list[dict[str, Any]] = [
        {},
        {"expert_ids": IDS[:2]},
        {"expert_ids": IDS.int()},
        {"world_size": 5},
        {"limits": UNLIMITED},
        {"expert_scales": torch.ones(4, 2)},
    ]
    for _ in range(2):
        assert [prepared(UpdateExpertCall(**base | change)) for change in changes] == [1, 2, 3, 4, 5, 6]
    assert prepared(UpdateExpertCall(**base | {"expert_ids": IDS + 1})) == 1
    kept = weakref.ref(mine := IDS.clone())
    prepared(UpdateExpertCall(**base | {"expert_ids": mine, "world_size": 6}))
    del mine
    gc.collect()
    assert kept() is None


def test_plans_are_kept_for_a_bounded_number_of_shapes(monkeypatch):
    monkeypatch.setattr(operator, "_KEPT", 3)
    seen = []
    prepared = Prepared("update_expert", lambda call: seen.append(call.world_size) or len(seen), lambda *_: True)
    for world_size in (1, 2, 3, 1, 4, 1):
        prepared(UpdateExpertCall(expert_ids=IDS, eplb_table=TABLE, world_size=world_size))
    assert seen == [1, 2, 3, 4, 1]


def test_what_was_checked_elsewhere_is_not_checked_again():
    """But planned, for every elastic info, and with the layout of that check."""
    planned = []

    def plan(call: Any, layout: str, elastic_info: tuple[int, ...] | None) -> tuple[str, object]:
        planned.append(elastic_info)
        return layout, elastic_info

    prepared = Prepared("update_expert", lambda call: "own", plan)
    call = UpdateExpertCall(expert_ids=IDS, eplb_table=TABLE, world_size=4)
    prepared.accept(call, "first stage's")
    for _ in range(2):
        assert prepared(call) == ("first stage's", None)
        assert prepared(call, (0, 1)) == ("first stage's", (0, 1))
        assert prepared(UpdateExpertCall(expert_ids=IDS, eplb_table=TABLE, world_size=5)) == ("own", None)
    assert planned == [None, (0, 1), None]


def test_a_call_that_is_an_error_is_one_each_time():
    with em.local_world(1) as world:
        for _ in range(2):
            with pytest.raises(ConstraintError, match="`moe_expert_num` is 0"):
                em.dispatch(torch.ones(2, 3), IDS[:2].int(), ep=world.ranks[0].ep, num_experts=0)


FAKE_WORLDS = [
    Spec(shared_experts=1, shared_ranks=1, moe_ranks=3, experts_per_rank=2, quant_mode=2, top_k=2),
    Spec(tp=2, moe_ranks=2, dtype="float16"),
    Spec(moe_ranks=3, experts_per_rank=2, elastic="scaled", seed=5, virtual=(1, 0, 0)),
    Spec(moe_ranks=2, max_bs=0),
]


@pytest.mark.parametrize("spec", FAKE_WORLDS, ids=["shared rank, int8", "two peers", "scaled down", "no token"])
def test_fake_tensors_have_the_shapes_of_real_ones(spec):
    """On every rank, though nothing is communicated: the ranks are asked one after the other."""
    case = Case(spec)
    with em.local_world(spec.ep, max(spec.tp, 1)) as world:
        real = world.run(lambda rank: run_rank(rank, case))
        for rank, outputs in zip(world.ranks, real, strict=True):
            if outputs is None:
                continue
            with FakeTensorMode() as mode:
                fake = run_rank(rank, _Faked(case, mode))
            for ours, theirs in zip(_all(fake), _all(outputs), strict=True):
                assert type(ours).__name__ == "FakeTensor"
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


class _Faked:
    """A case whose tensors are fake."""

    def __init__(self, case: Case, mode: FakeTensorMode) -> None:
        self._case, self._mode = case, mode

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._case, name)
        if isinstance(value, torch.Tensor):
            return self._mode.from_tensor(value)
        if isinstance(value, list):
            return [self._mode.from_tensor(item) if isinstance(item, torch.Tensor) else item for item in value]
        return value

    def expert_out(self, index: int, rows: int) -> torch.Tensor:
        with self._mode:
            return torch.empty((rows, self._case.spec.hidden), dtype=self._case.dtype)


def _all(outputs: tuple) -> list[torch.Tensor]:
    dispatched, y, normed = outputs
    return [*outputs_of(dispatched).values(), y, *normed]
