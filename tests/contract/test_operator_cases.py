"""The recorded cases of MoeUpdateExpert, level by level; they lie beside the repository, not in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.contract.update_expert import check_update_expert, infer_update_expert
from evenmoe.errors import ConstraintError, UnsupportedTypeError

CASES = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "operator-cases.json"
DTYPES = {
    "INT32": "int32",
    "INT64": "int64",
    "FLOAT16": "float16",
    "BF16": "bfloat16",
    "FLOAT": "float32",
    "BOOL": "bool",
}


def recorded_cases():
    if not CASES.is_file():
        skip = pytest.mark.skip(reason="operator-cases.json is not beside this checkout (../shared/reference)")
        return [pytest.param(None, marks=skip, id="absent")]
    records = json.loads(CASES.read_text(encoding="utf-8"))
    return [pytest.param(record, id=f"{record['level']}-{record['case']}") for record in records]


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
