"""The payload of vLLM's profiling marks, by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evenmoe import formats
from tests.formats.files import read_error

SLOTS = [[0, 1, 2, 0], [2, 1, 0, 1]]


def flat(rows: list[list[int]], dtype: str) -> dict:
    return {"shape": list(np.shape(rows)), "dtype": dtype, "value": np.ravel(rows).tolist()}


def payload(step: int, load: list[list[int]], slots=SLOTS) -> dict:
    return {
        "step_idx": step,
        "ep_size": 2,
        "expert_load_pass": flat(load, "torch.int32"),
        "physical_to_logical_map": flat(slots, "torch.int64"),
    }


def test_the_slots_of_a_step_are_brought_to_experts():
    contents = formats.read(json.dumps(payload(3, [[1, 2, 4, 8], [1, 2, 4, 8]])))
    assert contents.load is not None
    assert (contents.format, contents.load.tolist()) == ("vllm-payload", [[[9, 2, 4], [4, 10, 1]]])
    assert contents.notes[0].startswith("one rank alone: ")


def test_steps_are_windows_and_the_ranks_of_a_step_are_summed_each_under_its_map(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(payload(n, [[1, 0, 0, 0], [n, 0, 0, 0]])) for n in (10, 9)))
    other = payload(9, [[0, 1, 0, 0], [0, 0, 0, 5]], [[2, 1, 0, 0], [2, 1, 0, 0]])
    (tmp_path / "b.json").write_text(json.dumps([other]))
    contents = formats.read(tmp_path)
    assert contents.load is not None
    assert contents.load.tolist() == [[[1, 1, 0], [5, 0, 9]], [[1, 0, 0], [0, 0, 10]]]
    assert contents.notes == ("summed the steps of all files",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_load_pass": None}, "without `expert_load_pass` in item 0: it must hold its shape and value"),
        ({"physical_to_logical_map": [[0, 1]]}, "without `physical_to_logical_map` in item 0: it must hold its shape"),
        (
            {"expert_load_pass": {"shape": [2, 3], "value": [1] * 8}},
            "with 8 values of `expert_load_pass` in item 0 for the shape [2, 3]: it must have (layers, slots) of them",
        ),
        (
            {"expert_load_pass": {"shape": [1 << 40, 1 << 40], "value": [1] * 8}},
            "with 8 values of `expert_load_pass` in item 0 for the shape [1099511627776, 1099511627776]: it must",
        ),
        ({"step_idx": "x"}, "with `step_idx` of item 0 'x': it must hold an integer there"),
        (
            {"physical_to_logical_map": flat([[0, 1, 2, 9], [0, 1, 2, 0]], "")},
            "with expert 9 in layer 0, slot 3 of its placement: it must place experts 0 to 3",
        ),
    ],
)
def test_what_is_wrong_is_said(change, message):
    assert message in read_error(json.dumps({**payload(0, [[1, 2, 4, 8], [1, 2, 4, 8]]), **change}))


def test_a_step_twice_is_read_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(payload(1, [[1] * 4, [1] * 4]))] * 2))
    assert "with step 1 twice: it must hold each step of a rank once; drop the copy" in read_error(tmp_path / "a.jsonl")
