"""Recorded cases of MoeUpdateExpert, level by level: a few of our own, and those that lie beside the repository."""

from __future__ import annotations

import json

import pytest

from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.contract.update_expert import infer_update_expert
from evenmoe.errors import ConstraintError, UnsupportedTypeError
from tests.beside import REFERENCE
from tests.contract.checks import check_update_expert

CASES = REFERENCE / "operator-cases.json"
DTYPES = {
    "INT32": "int32",
    "INT64": "int64",
    "FLOAT16": "float16",
    "BF16": "bfloat16",
    "FLOAT": "float32",
    "BOOL": "bool",
}


def tensors(*rows):
    return [{"name": name, "shape": shape, "dtype": dtype} for name, shape, dtype in rows]


def case(level, name, inputs, outputs, reason="valid", **attrs):
    """One record of our own, as the recorded ones are written."""
    expect = "success" if reason == "valid" or level == "kernel" else "failure"
    record = {"level": level, "case": name, "inputs": tensors(*inputs), "outputs": tensors(*outputs), "attrs": attrs}
    return record | {"expect": expect, "reason": reason}


IDS, TABLE = ("expert_ids", [3, 2], "INT32"), ("eplb_table", [4, 3], "INT32")
OUT = [("balanced_expert_ids", [3, 2], "INT32"), ("balanced_active_mask", [3, 2], "BOOL")]
PRUNING = [("expert_scales", [3, 2], "FLOAT16"), ("pruning_threshold", [2], "FLOAT16"), ("active_mask", [3], "BOOL")]
BY_RANK = {"local_rank_id": 1, "world_size": 2, "balance_mode": 0}
OWN = [
    case("tiling", "by_rank", [IDS, TABLE], OUT, **BY_RANK),
    case("tiling", "a_table_wider_than_ranks", [IDS, ("eplb_table", [4, 4], "INT32")], OUT, "eplb_table F", **BY_RANK),
    case("op_api", "a_rank_outside", [IDS, TABLE], OUT, "local_rank_id", **BY_RANK | {"local_rank_id": 2}),
    case("op_api", "by_token", [IDS, TABLE], OUT, local_rank_id=0, world_size=0, balance_mode=1),
    case("infershape", "as_the_ids", [IDS, TABLE], OUT),
    case(
        "inferdtype",
        "as_the_ids",
        [("expert_ids", None, "INT64"), ("eplb_table", None, "INT32")],
        [("balanced_expert_ids", None, "INT64"), ("balanced_active_mask", None, "BOOL")],
    ),
    case("torch_meta", "a_threshold_of_float16", [IDS, TABLE, *PRUNING], OUT, **BY_RANK),
    case("kernel", "smoke", [], [], "smoke run only, no numeric comparison"),
]


def recorded_cases():
    records = json.loads(CASES.read_text(encoding="utf-8")) if CASES.is_file() else []
    return [pytest.param(record, id=f"{record['level']}-{record['case']}") for record in OWN + records]


def specs(tensors):
    # The dtype-only level records no shapes; inference wants some 2-D one.
    return {t["name"]: TensorSpec(tuple(t["shape"] or (1, 1)), DTYPES[t["dtype"]]) for t in tensors}


@pytest.mark.parametrize("record", recorded_cases())
def test_recorded_case(record):
    inputs, outputs = specs(record["inputs"]), specs(record["outputs"])
    level = record["level"]
    if level in ("tiling", "op_api"):
        call = inputs | record["attrs"] | outputs
        if record["expect"] == "success":
            check_update_expert(**call)
        else:
            with pytest.raises(ConstraintError) as caught:
                check_update_expert(**call)
            # The reason names the argument, some with " output" behind it.
            assert record["reason"].split()[0] == caught.value.argument
    elif level in ("infershape", "inferdtype", "torch_meta"):
        assert infer_update_expert(inputs["expert_ids"], inputs["eplb_table"]) == (
            outputs["balanced_expert_ids"],
            outputs["balanced_active_mask"],
        )
        if level == "torch_meta":
            with pytest.raises(UnsupportedTypeError, match="pruning_threshold"):
                check_update_expert(**inputs, **record["attrs"])
    else:
        assert level == "kernel"
        assert record["reason"] == "smoke run only, no numeric comparison"
        ids, table = TensorSpec((128, 8), "int32"), TensorSpec((256, 8), "int32")  # the sizes in its notes
        check_update_expert(expert_ids=ids, eplb_table=table, local_rank_id=0, world_size=8)
