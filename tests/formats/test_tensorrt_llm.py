"""TensorRT-LLM's placements and statistics: the model's layer numbers, ranks summed, slots under its balancer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from evenmoe import formats
from evenmoe.errors import ConstraintError
from evenmoe.placement import Placement
from tests.formats.files import written


def test_a_format_of_model_layers_asks_for_the_first(tmp_path):
    with pytest.raises(ConstraintError, match=r"must say the model's own number of each of the 1 rows.*--first-layer"):
        formats.write(tmp_path / "out.yaml", Placement([[0, 1, 2]], 1), format="tensorrt-llm")
    assert not (tmp_path / "out.yaml").exists()


def test_model_layers_survive_where_both_have_them(tmp_path):
    yaml = "num_slots: 3\ninitial_global_assignments:\n  3: [0, 1, 2]\n  4: [2, 0, 1]\n"
    formats.convert(written(tmp_path, yaml), tmp_path / "out.json", "sglang-location")
    rows = json.loads((tmp_path / "out.json").read_text())["physical_to_logical_map"]
    assert rows == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2], [2, 0, 1]]


def test_a_gap_in_model_layers_is_found():
    rows = {str(layer): [0, 1] for layer in (3, 4, 5, 7)}
    found = formats.check(json.dumps({"num_slots": 2, "initial_global_assignments": rows})).findings
    assert [(f.kind, f.severity, f.layer) for f in found] == [("layer-gap", "warning", 7)]


def test_every_second_layer_is_no_gap():
    rows = {str(layer): [0, 1] for layer in (1, 3, 5, 7)}
    assert not formats.check(json.dumps({"num_slots": 2, "initial_global_assignments": rows})).findings


def test_layer_0_of_a_tensorrt_llm_file_is_worth_a_warning():
    checked = formats.check(json.dumps({"num_slots": 2, "initial_global_assignments": {"0": [0, 1]}}))
    assert [(f.kind, f.layer) for f in checked.findings] == [("layer-numbering", 0)]
    assert checked.clean


def test_the_ranks_of_tensorrt_llm_are_summed(tmp_path):
    from safetensors.numpy import save

    folder = tmp_path / "statistics"
    folder.mkdir()
    (folder / "meta_info.json").write_text('{"num_experts": 2, "num_experts_per_token": 1}')
    one = {"5_3": np.array([1, 2], np.int32), "5_4": np.array([3, 4], np.int32), "6_3": np.array([5, 6], np.int32)}
    (folder / "rank0.safetensors").write_bytes(save({**one, "6_4": np.array([7, 8], np.int32)}))
    (folder / "rank1.safetensors").write_bytes(save(one))
    (folder / "rank0_raw.safetensors").write_bytes(b"left alone")
    contents = formats.read(folder)
    assert contents.load is not None
    assert contents.load.tolist() == [[[2, 4], [6, 8]], [[10, 12], [7, 8]]]
    assert contents.layer_ids == (3, 4)
    assert contents.notes[-1] == "summed 2 ranks"
    (folder / "rank1.safetensors").rename(folder / "rank2.safetensors")
    assert [f.kind for f in formats.check(folder).findings] == ["missing-rank"]


def statistics(folder: Path, *ranks: list[int]) -> Path:
    folder.mkdir()
    meta = {"num_experts": len(ranks[0]), "num_experts_per_token": 2}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    for rank, row in enumerate(ranks):
        (folder / f"rank{rank}.safetensors").write_bytes(save({"7_3": np.array(row, np.int32)}))
    return folder


def test_tensorrt_llm_counts_slots_under_its_load_balancer(tmp_path):
    folder = statistics(tmp_path / "s", [4, 3, 5, 0], [0, 1, 1, 2])
    contents = formats.read(folder, placement=Placement([[0, 1, 0, 2]], 2))
    assert contents.load is not None
    assert contents.load.tolist() == [[[10, 4, 2]]]
    assert not any("slots" in note for note in contents.notes)
    formats.write(tmp_path / "again", contents.load, format=contents.format, layer_ids=[3], metadata=contents.metadata)
    assert json.loads((tmp_path / "again" / "meta_info.json").read_text())["num_experts"] == 3


def test_without_a_map_it_is_said_what_cannot_be_told(tmp_path):
    folder = statistics(tmp_path / "s", [4, 3, 5, 0], [0, 1, 1, 2])
    contents = formats.read(folder)
    assert contents.load is not None
    assert contents.load.tolist() == [[[4, 4, 6, 2]]]
    said = [note for note in contents.notes if "load balancer" in note]
    assert said == [
        "took the 4 counts for those of experts: recorded under TensorRT-LLM's load balancer they are of slots, which "
        "the files do not tell; then pass its placement (--map FILE)"
    ]
    assert not any("load balancer" in note for note in formats.read(folder, num_experts=4).notes)
