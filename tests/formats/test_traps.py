"""What goes wrong silently between tools: layer numbers, dense layers, MTP, shared experts, slots, dumps, overflows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.errors import ConstraintError, FileFormatError
from evenmoe.io.torch_file import torch_bytes
from evenmoe.placement import Placement


def written(tmp_path, content: bytes | str, name: str = "file"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


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


# Dense layers: SGLang has a row for every hidden layer, zeros for a dense one.


def test_dense_layers_of_a_stat_dump_are_left_out_and_said(tmp_path):
    counts = np.zeros((2, 5, 4), np.int32)
    counts[:, 2:] = 7
    path = written(
        tmp_path, torch_bytes({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": 0.5})
    )
    contents = formats.read(path)
    assert contents.layer_ids == (2, 3, 4)
    assert contents.load is not None
    assert contents.load.tolist() == counts[:, 2:].tolist()
    assert contents.notes == ("left out 2 layers without a token, taken for dense ones: 0-1",)
    assert contents.metadata == {"num_hidden_layers": 5, "average_utilization_rate_over_window": 0.5}


def test_layers_behind_the_last_counted_one_come_back(tmp_path):
    counts = np.zeros((1, 5, 2), np.int32)
    counts[:, 1:3] = 1
    first = written(tmp_path, torch_bytes({"rank": 0, "logical_count": counts}))
    formats.convert(first, tmp_path / "second.pt", "sglang-stat")
    again = formats.read(tmp_path / "second.pt")
    assert (again.layer_ids, again.metadata["num_hidden_layers"]) == ((1, 2), 5)


def test_a_dump_without_a_token_is_refused(tmp_path):
    path = written(tmp_path, torch_bytes({"rank": 0, "logical_count": np.zeros((1, 2, 2), np.int32)}))
    with pytest.raises(FileFormatError, match="without a single token: it must hold recorded counts"):
        formats.read(path)


# Layer numbers: TensorRT-LLM and SGLang count dense layers, the others do not.


def test_a_format_of_model_layers_asks_for_the_first(tmp_path):
    with pytest.raises(ConstraintError, match=r"must say the model's own number of each of the 1 rows.*--first-layer"):
        formats.write(tmp_path / "out.yaml", Placement([[0, 1, 2]], 1), format="tensorrt-llm")
    assert not (tmp_path / "out.yaml").exists()


def test_model_layers_survive_where_both_have_them(tmp_path):
    yaml = "num_slots: 3\ninitial_global_assignments:\n  3: [0, 1, 2]\n  4: [2, 0, 1]\n"
    formats.convert(written(tmp_path, yaml), tmp_path / "out.json", "sglang-location")
    rows = json.loads((tmp_path / "out.json").read_text())["physical_to_logical_map"]
    assert rows == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2], [2, 0, 1]]


def test_an_ascend_map_with_the_models_numbers_is_found():
    found = formats.check(expert_map({3: [[0], [1]], 4: [[1], [0]]})).findings
    assert [(f.kind, f.severity, f.layer) for f in found] == [("layer-numbering", "error", 3)]
    assert found[0].fix == "subtract 3 from every layer_id"


def test_a_missing_layer_of_an_ascend_map_is_found():
    found = formats.check(expert_map({0: [[0], [1]], 2: [[1], [0]]}, count=3)).findings
    assert [(f.kind, f.layer) for f in found] == [("layer-count", None), ("layer-gap", 2)]


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


def test_names_of_layers_carry_the_models_numbers():
    contents = formats.read(json.dumps({"model.layers.4.mlp": [1, 0], "model.layers.3.mlp": [0, 1]}), num_ranks=2)
    assert contents.layer_ids == (3, 4)
    assert contents.placement == Placement([[0, 1], [1, 0]], 2)


def test_layers_are_chosen_by_the_files_numbers():
    text = json.dumps({"physical_to_logical_map": [[0, 1], [0, 1], [1, 0], [0, 1]]})
    contents = formats.read(text, num_ranks=1, layers="1:3")
    assert contents.layer_ids == (1, 2)
    assert contents.placement == Placement([[0, 1], [1, 0]], 1)
    assert formats.read(text, num_ranks=1, layers="2").layer_ids == (2,)
    with pytest.raises(FileFormatError, match="of layers 0 to 3: it must have a layer in 4:"):
        formats.read(text, num_ranks=1, layers="4:")
    with pytest.raises(ConstraintError, match="`layers` is '1-3': it must be first:end or a number"):
        formats.read(text, num_ranks=1, layers="1-3")


# The MTP layer and devices of the shared expert.


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


# Ranks that are not summed, slots that are not experts, dumps that are appended.


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


def test_slots_are_never_taken_for_experts(tmp_path):
    path = written(tmp_path, "1,2,3\n")
    with pytest.raises(FileFormatError, match=r"with counts of 3 slots.*--map FILE.*\(--experts\) 3"):
        formats.read(path, num_layers=1)
    tensor = written(tmp_path, torch_bytes(np.full((1, 2, 2), 9)), "slots.pt")
    with pytest.raises(FileFormatError, match=r"of shape \(1, 2, 2\), counts per slot.*--map FILE"):
        formats.read(tensor)
    contents = formats.read(tensor, placement=Placement([[0, 1, 2, 0]], 2))
    assert contents.load is not None
    assert contents.load.tolist() == [[[18, 9, 9]]]


def test_stages_of_loads_per_slot_are_windows(tmp_path):
    tensor = written(tmp_path, torch_bytes(np.arange(8).reshape(2, 1, 2, 2)))
    contents = formats.read(tensor, placement=Placement([[0, 1, 1, 0]], 2))
    assert contents.load is not None
    assert contents.load.tolist() == [[[0 + 3, 1 + 2]], [[4 + 7, 5 + 6]]]


def test_counts_per_pass_are_brought_to_experts_by_the_map_of_the_dump(tmp_path):
    records = [
        {"forward_pass_id": 1, "gatherer_key": "primary", "global_physical_count": np.array([[1, 2, 4]])},
        {"forward_pass_id": 1, "gatherer_key": "other", "global_physical_count": np.array([[9, 9, 9]])},
    ]
    dump = {"records": records, "last_physical_to_logical_map": np.array([[0, 1, 0]])}
    contents = formats.read(written(tmp_path, torch_bytes(dump)))
    assert contents.load is not None
    assert contents.load.tolist() == [[[5, 2]]]
    assert contents.notes[0] == "left out 1 records of other gatherers than `primary`"


def test_tokens_of_one_rank_are_counted_and_a_token_of_one_expert_twice_is_no_routing(tmp_path):
    ids = np.full((1, 3, 8), -1, np.int32)  # the recorder keeps 8 places, the model picks 2
    ids[0, :, :2] = [[0, 1], [0, 2], [2, 0]]
    record = {"forward_pass_id": 1, "rank": 3, "gatherer_key": "primary", "topk_ids_of_layer": ids}
    dump = {"records": [record], "last_physical_to_logical_map": np.array([[0, 1, 0]])}
    contents = formats.read(written(tmp_path, torch_bytes(dump)))
    assert contents.load is not None
    assert contents.load.tolist() == [[[5, 1]]]
    assert contents.notes[0] == (
        "counted 2 of 3 tokens, but left them out of the routing: they do not have 2 different experts in every layer"
    )
    assert contents.notes[1] == "kept the routing of 1 tokens, 2 experts each"
    assert contents.notes[2].startswith("rank 3 alone: ")


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


# Overflows and rounding.


def test_a_count_that_ran_over_int32_is_found(tmp_path):
    counts = np.array([[[5, -(2**31) + 4]]], np.int32)
    found = formats.check(written(tmp_path, torch_bytes({"rank": 0, "logical_count": counts}))).findings
    assert [(f.kind, f.layer, f.expert) for f in found] == [("negative", 0, 1)]
    assert found[0].fix == "check for an int32 overflow"


def test_a_long_window_is_written_in_64_bits_and_said(tmp_path):
    load = np.array([[[2**31, 1]]])
    notes = formats.write(tmp_path / "stat.pt", load, format="sglang-stat", layer_ids=[0])
    assert notes == ("wrote int64: a count does not fit int32",)
    assert formats.read(tmp_path / "stat.pt").load.tolist() == load.tolist()  # type: ignore[union-attr]
    found = formats.check(tmp_path / "stat.pt").findings
    assert [(f.kind, f.severity, f.expert) for f in found] == [("int32-overflow", "warning", 0)]


def test_what_float32_cannot_hold_is_said(tmp_path):
    notes = formats.write(tmp_path / "l.safetensors", np.array([[2**24 + 1, 1]]), format="vllm-safetensors")
    assert notes == ("rounded to float32, which the format demands",)


def test_windows_that_a_format_cannot_hold_are_summed_and_said(tmp_path):
    notes = formats.write(tmp_path / "l.json", np.array([[[1, 2]], [[3, 4]]]), format="lmdeploy")
    assert notes == ("summed 2 windows: the format holds one",)
    assert json.loads((tmp_path / "l.json").read_text()) == [[4, 6]]


def test_part_of_a_token_is_refused_where_counts_are_whole(tmp_path):
    with pytest.raises(
        ConstraintError, match=r"`value` is 0.5 at \(0, 0, 1\): it must hold whole numbers for sglang-stat"
    ):
        formats.write(tmp_path / "stat.pt", np.array([[1, 0.5]]), format="sglang-stat", layer_ids=[0])


def test_sums_that_would_lose_digits_are_refused(tmp_path):
    path = written(tmp_path, json.dumps([[2**52, 2**52 + 1, 70]]))
    with pytest.raises(FileFormatError, match=r"9.01e\+15 tokens together: it must hold fewer than 2\*\*53"):
        formats.read(path)


# Maps whose last axis is longer than the experts are many.


def test_columns_that_no_rank_holds_are_no_experts(tmp_path):
    table = np.array([[[0, 1, -1, -1], [1, -1, 0, -1]]], np.int32)
    contents = formats.read(written(tmp_path, torch_bytes(table)))
    assert contents.placement == Placement([[0, 1, 2, 0]], 2)
    assert contents.notes == ("took 3 experts for all: the last 1 columns are -1 everywhere",)
    assert [f.kind for f in formats.check(tmp_path / "file", num_experts=4).findings] == ["missing-expert"]


# Writing.


def test_a_failure_leaves_the_old_file_as_it_was(tmp_path, monkeypatch):
    """Opening the map for writing to see whether it can be opened empties it: that is how maps were lost."""
    target = tmp_path / "map.json"
    target.write_text("old")
    with pytest.raises(ConstraintError):
        formats.write(target, np.ones((1, 2)), format="ascend-map")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        formats.write(target, Placement([[0]], 1), format="ascend-map")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]


def test_a_link_stays_a_link_and_a_mode_stays(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    formats.write(link, Placement([[0]], 1), format="vllm-list")
    assert link.is_symlink()
    assert json.loads(real.read_text()) == [[0]]
    assert real.stat().st_mode & 0o777 == 0o600


def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "precious").write_text("1")
    with pytest.raises(ConstraintError, match="must be a new or an empty folder"):
        formats.write(tmp_path / "old", np.ones((1, 1, 2), int), format="tensorrt-llm-statistics", layer_ids=[0])
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "precious"]
