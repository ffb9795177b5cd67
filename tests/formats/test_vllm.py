"""vLLM's and LMDeploy's files: layers by name, lines under their own maps, what float32 and one window cannot hold."""

from __future__ import annotations

import json

import numpy as np

from evenmoe import formats
from evenmoe.placement import Placement
from tests.formats.files import written


def test_names_of_layers_carry_the_models_numbers():
    contents = formats.read(json.dumps({"model.layers.4.mlp": [1, 0], "model.layers.3.mlp": [0, 1]}), num_ranks=2)
    assert contents.layer_ids == (3, 4)
    assert contents.placement == Placement([[0, 1], [1, 0]], 2)


def test_vllms_lines_are_brought_to_experts_by_their_own_maps(tmp_path):
    lines = [
        {"record_type": "eplb_load_meta", "version": 1, "model": "m"},
        {"record_type": "eplb_load_stats", "expert_load": [[1, 2, 4]], "p2l_map": [[0, 1, 0]]},
        {"record_type": "eplb_load_stats", "expert_load": [[1, 2, 4]], "p2l_map": [[0, 1, 1]]},
    ]
    contents = formats.read(written(tmp_path, "\n".join(map(json.dumps, lines))))
    assert contents.load is not None
    assert contents.load.tolist() == [[[5, 2]], [[1, 6]]]
    assert contents.metadata == {"model": "m"}


def test_the_mapping_record_of_vllm_is_a_layer_map():
    record = {"record_type": "eplb_initial_mapping", "version": 1, "num_slots": 3}
    contents = formats.read(json.dumps({**record, "initial_global_assignments": {"0": [0, 1, 0]}}), num_ranks=1)
    assert (contents.format, contents.placement) == ("vllm-layer-map", Placement([[0, 1, 0]], 1))


def test_what_float32_cannot_hold_is_said(tmp_path):
    notes = formats.write(tmp_path / "l.safetensors", np.array([[2**24 + 1, 1]]), format="vllm-safetensors")
    assert notes == ("rounded to float32, which the format demands",)


def test_windows_that_a_format_cannot_hold_are_summed_and_said(tmp_path):
    notes = formats.write(tmp_path / "l.json", np.array([[[1, 2]], [[3, 4]]]), format="lmdeploy")
    assert notes == ("summed 2 windows: the format holds one",)
    assert json.loads((tmp_path / "l.json").read_text()) == [[4, 6]]
