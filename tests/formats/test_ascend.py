"""Ascend's expert maps and MindIE's CSV: layer numbers, the MTP layer, shared experts, ranks and dumps."""

from __future__ import annotations

import json

import pytest

from evenmoe import formats
from evenmoe.errors import FileFormatError
from evenmoe.placement import Placement
from tests.formats.files import written


def expert_map(layers: dict[int, list[list[int]]], count: int | None = None, **more) -> str:
    listed = [
        {
            "layer_id": number,
            "device_count": len(devices),
            "device_list": [{"device_id": d, "device_expert": e} for d, e in enumerate(devices)],
        }
        for number, devices in layers.items()
    ]
    return json.dumps({**more, "moe_layer_count": len(layers) if count is None else count, "layer_list": listed})


def test_an_ascend_map_with_the_models_numbers_is_found():
    found = formats.check(expert_map({3: [[0], [1]], 4: [[1], [0]]})).findings
    assert [(f.kind, f.severity, f.layer) for f in found] == [("layer-numbering", "error", 3)]
    assert found[0].fix == "subtract 3 from every layer_id"


def test_a_missing_layer_of_an_ascend_map_is_found():
    found = formats.check(expert_map({0: [[0], [1]], 2: [[1], [0]]}, count=3)).findings
    assert [(f.kind, f.layer) for f in found] == [("layer-count", None), ("layer-gap", 2)]


def test_the_mtp_layer_is_kept_apart_said_and_put_back(tmp_path):
    text = expert_map({0: [[0], [1]], 1: [[1], [0]], 2: [[0], [1]]}, count=2, strategy_version=9)
    contents = formats.read(text)
    assert contents.placement == Placement([[0, 1], [1, 0]], 2)
    assert contents.notes == ("kept the MTP layer apart from the MoE layers",)
    formats.write(tmp_path / "map.json", contents.placement, format="ascend-map", metadata=contents.metadata)
    assert json.loads((tmp_path / "map.json").read_text()) == json.loads(text)


def test_devices_of_the_shared_expert_are_left_out_said_and_put_back(tmp_path):
    text = expert_map({0: [[0], [0], [0, 1], [2, 3]], 1: [[0], [0], [3, 2], [1, 0]]})
    contents = formats.read(text)
    assert contents.placement == Placement([[0, 1, 2, 3], [3, 2, 1, 0]], 2)
    assert contents.notes == ("left out the first 2 devices, which hold the shared expert",)
    formats.write(tmp_path / "map.json", contents.placement, format="ascend-map", metadata=contents.metadata)
    assert json.loads((tmp_path / "map.json").read_text()) == json.loads(text)


def test_expert_0_on_the_first_device_is_no_shared_expert():
    contents = formats.read(expert_map({0: [[0], [1], [2]], 1: [[0], [2], [1]]}))
    assert contents.placement == Placement([[0, 1, 2], [0, 2, 1]], 3)


def test_one_expert_a_device_and_several_zeros_is_asked():
    text = expert_map({0: [[0], [0], [1]], 1: [[0], [0], [1]]})
    with pytest.raises(FileFormatError, match=r"with \[0\] on the first 2 devices.*--shared-devices\), 2 or 1, or 0"):
        formats.read(text)
    assert formats.read(text, shared_devices=1).placement == Placement([[0, 1], [0, 1]], 2)
    assert formats.read(text, shared_devices=0).placement == Placement([[0, 0, 1], [0, 0, 1]], 3)


def test_ranks_of_mindie_stand_side_by_side_or_are_summed(tmp_path):
    folder = tmp_path / "dumps"
    folder.mkdir()
    (folder / "decode_0.csv").write_text("1,2\n3,4\n5,6\n7,8\n")
    (folder / "decode_1.csv").write_text("10,20\n30,40\n50,60\n70,80\n")
    (folder / "decode_1_bak.csv").write_text("9,9\n")
    told = {"num_layers": 2}
    contents = formats.read(folder, num_experts=4, **told)
    assert contents.load is not None
    assert contents.load.tolist() == [[[1, 2, 10, 20], [3, 4, 30, 40]], [[5, 6, 50, 60], [7, 8, 70, 80]]]
    assert contents.notes == ("left out 1 other CSV files (_bak, topk)", "put 2 ranks side by side")
    placement = Placement([[0, 1, 2, 0], [2, 1, 0, 1]], 2)
    logical = formats.read(folder, placement=placement)  # the layers, too, come from the placement
    assert logical.load is not None
    assert logical.load[0].tolist() == [[1 + 20, 2, 10], [30, 4 + 40, 3]]
    (folder / "model_gen_config.json").write_text("{}")
    summed = formats.read(folder, num_experts=2, **told)
    assert summed.load is not None
    assert summed.load[0].tolist() == [[11, 22], [33, 44]]


def test_appended_dumps_are_never_taken_for_layers(tmp_path):
    path = written(tmp_path, "1,2\n3,4\n5,6\n7,8\n")
    with pytest.raises(FileFormatError, match=r"of 4 lines, which are layers of one dump or of several.*--num-layers"):
        formats.read(path, num_experts=2)
    with pytest.raises(FileFormatError, match="of 4 lines: it must have whole dumps of 3 layers"):
        formats.read(path, num_experts=2, num_layers=3)
