"""Whatever specs and numbers come, a check answers with a layout or with an error of ours, never with another one."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.contract.layout import make_layout, scale_down
from evenmoe.contract.limits import ATLAS_A3, RELAXED, UNLIMITED
from evenmoe.contract.tensor_spec import ALLOCATED, TensorSpec
from evenmoe.contract.update_expert import infer_update_expert
from evenmoe.errors import EvenmoeError
from tests.contract.checks import check_combine, check_combine_add_rms_norm, check_dispatch, check_update_expert

EXTREMES = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 4, 8, 16, 17, 64, 128, 512, 1024, 2**31 - 1, 2**31, 2**63 - 1, 10**30]
SIZES = st.one_of(st.integers(-3, 20), st.sampled_from(EXTREMES))
DTYPES = st.sampled_from(["int8", "int32", "int64", "bool", "float16", "bfloat16", "float32", "float64", "", "ü"])
SPECS = st.builds(TensorSpec, st.lists(SIZES, max_size=4).map(tuple), DTYPES)
ATTRIBUTES = st.one_of(SIZES, st.sampled_from([None, True, 0.5, float("nan"), "2", ""]))
NAMES = st.sampled_from([None, "", "ep", "tp", "g" * 127, "g" * 128, "fullmesh_v1", "fullmesh_v2", "ü"])

# Small valid calls, so that changes of a few arguments reach the deep checks.
WORLD = {"group_ep": "ep", "ep_world_size": 2, "ep_rank_id": 0, "moe_expert_num": 4}
VALID = {
    check_update_expert: {
        "expert_ids": TensorSpec((3, 2), "int32"),
        "eplb_table": TensorSpec((4, 2), "int32"),
        "local_rank_id": 0,
        "world_size": 2,
    },
    check_dispatch: {"x": TensorSpec((3, 1024), "bfloat16"), "expert_ids": TensorSpec((3, 2), "int32"), **WORLD},
    check_combine: {
        "expand_x": TensorSpec((12, 1024), "bfloat16"),
        "expert_ids": TensorSpec((3, 2), "int32"),
        "assist_info_for_combine": TensorSpec((12 * 128,), "int32"),
        "ep_send_counts": TensorSpec((4,), "int32"),
        "expert_scales": TensorSpec((3, 2), "float32"),
        "tp_send_counts": TensorSpec((0,), "int32"),
        **WORLD,
    },
}
VALID[check_combine_add_rms_norm] = VALID[check_combine] | {
    "residual_x": TensorSpec((3, 1, 1024), "bfloat16"),
    "gamma": TensorSpec((1024,), "bfloat16"),
}
CHECKS = pytest.mark.parametrize("check", VALID, ids=lambda check: check.__name__)


def strategy_of(name, parameter):
    annotation = str(parameter.annotation)
    if name == "limits":
        return st.sampled_from([ATLAS_A3, RELAXED, UNLIMITED])
    if name == "hccl_buffer_bytes":
        return st.one_of(st.none(), SIZES)
    if annotation in ("Tensor", "Input[Tensor]", "Output[Tensor]"):
        return st.one_of(st.none(), SPECS, *([st.just(ALLOCATED)] if annotation.startswith("Output") else []))
    return NAMES if "str" in annotation else ATTRIBUTES


@st.composite
def changed_calls(draw, check):
    parameters = inspect.signature(check).parameters
    changed = draw(st.lists(st.sampled_from(list(parameters)), unique=True, max_size=6))
    return VALID[check] | {name: draw(strategy_of(name, parameters[name])) for name in changed}


@CHECKS
def test_the_starting_points_are_valid(check):
    check(**VALID[check])


@CHECKS
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_arguments_raise_nothing_else(check, data):
    error = answer(check, **data.draw(changed_calls(check)))
    if isinstance(error, EvenmoeError):
        assert str(error).startswith(f"`{error.argument}` is ")
        assert str(error).endswith(".")
        assert error.status in (161001, 161002, 561002)


def answer(call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except EvenmoeError as error:
        return error


@given(SPECS, SPECS)
def test_inference_raises_nothing_else(ids, table):
    inferred = answer(infer_update_expert, ids, table)
    if isinstance(inferred, EvenmoeError):
        assert inferred.argument in ("expert_ids", "eplb_table")
    else:
        assert inferred[0] == ids


@given(st.lists(st.integers(-2, 5), min_size=9, max_size=11))
def test_scaling_down_raises_nothing_else(info):
    layout = make_layout(ep=3, rank=2, num_experts=4, num_tokens=2, hidden=8, top_k=2, shared_ranks=1, elastic=True)
    after = answer(scale_down, layout, info)
    if isinstance(after, EvenmoeError):
        assert after.argument == "elastic_info"
    else:
        assert 0 <= after.rank < after.ep <= layout.ep
