"""What the numbers of a load count: whole windows or unused places, experts or slots, all ranks or one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from evenmoe import formats
from evenmoe.errors import FileFormatError
from evenmoe.formats.catalogue import FORMATS
from evenmoe.io.torch_file import torch_bytes
from evenmoe.placement import Placement

#: Expert 0 has two replicas in the first layer, expert 1 in the second.
MAP = Placement([[0, 1, 2, 0], [2, 1, 0, 1]], 2)
PER_SLOT = np.array([[[1, 2, 4, 8], [16, 32, 64, 128]]])
PER_EXPERT = [[1 + 8, 2, 4], [64, 32 + 128, 16]]
_LOADS = [entry for entry in map(FORMATS.get, FORMATS) if entry.kind == "load" and entry.write]


def loaded(source, **told) -> list:
    contents = formats.read(source, **told)
    assert contents.load is not None
    return contents.load.tolist()


def refused(source, **told) -> str:
    with pytest.raises(FileFormatError) as caught:
        formats.read(source, **told)
    return str(caught.value)


# Windows in which nothing was recorded: SGLang's recorder saves its whole ring.


def ring(path: Path, recorded: int = 1, places: int = 4) -> Path:
    counts = np.zeros((places, 1, 4), np.int32)
    counts[:recorded, 0] = [6, 2, 0, 0]
    dump = {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}
    path.write_bytes(torch_bytes(dump))
    return path


def test_unused_places_of_a_ring_are_no_windows(tmp_path):
    contents = formats.read(ring(tmp_path / "ring.pt"))
    assert contents.load is not None
    assert contents.load.tolist() == [[[6, 2, 0, 0]]]
    assert contents.empty_windows == 3
    assert "left out 3 of 4 windows, in which nothing was recorded" in contents.notes


@pytest.mark.parametrize("entry", _LOADS, ids=lambda entry: entry.name)
def test_no_format_takes_nothing_for_a_window(entry, tmp_path):
    """Empty windows first, between and last; formats of one window sum them."""
    load = np.zeros((5, 2, 4), np.int64)
    load[1], load[3] = [[6, 2, 0, 1], [0, 0, 5, 0]], [[0, 1, 0, 0], [3, 0, 0, 2]]
    target = tmp_path / "load"
    formats.write(target, load, format=entry.name, layer_ids=[0, 1])
    told = {"num_layers": 2, "num_experts": 4} if entry.name == "mindie-csv" else {}
    found = loaded(target, format=entry.name, **told)
    assert found in (load[[1, 3]].tolist(), [load.sum(axis=0).tolist()])


def test_a_window_with_one_token_in_one_layer_is_kept(tmp_path):
    load = np.zeros((3, 2, 2), np.int64)
    load[0, 0, 1] = load[2, 1, 0] = 1
    formats.write(tmp_path / "l.npz", load, format="evenmoe-trace")
    contents = formats.read(tmp_path / "l.npz")
    assert contents.load is not None
    assert (contents.load.tolist(), contents.empty_windows) == (load[[0, 2]].tolist(), 1)


def test_windows_of_other_layers_are_kept_when_layers_are_chosen(tmp_path):
    """Whether anything was recorded is asked of the whole file; the window counts for the layer or not, as it is."""
    load = np.array([[[6, 2], [0, 0]], [[0, 0], [1, 1]], [[0, 0], [0, 0]]])
    formats.write(tmp_path / "l.npz", load, format="evenmoe-trace")
    contents = formats.read(tmp_path / "l.npz", layers="0")
    assert contents.load is not None
    assert contents.load[:, 0].sum(axis=0).tolist() == [6, 2]


def test_a_load_of_nothing_is_refused(tmp_path):
    np.savez(tmp_path / "l.npz", load=np.zeros((3, 2, 4), np.int64))
    assert "no tokens in any layer: it must hold recorded counts; record some traffic first" in refused(
        tmp_path / "l.npz"
    )
    assert [f.kind for f in formats.check(tmp_path / "l.npz").findings] == ["no-tokens"]


def test_findings_name_the_windows_of_the_file(tmp_path):
    np.savez(tmp_path / "l.npz", load=np.array([[[0, 0]], [[0, 0]], [[-1, 2]]]))
    assert formats.check(tmp_path / "l.npz").findings[0].text == "-1 in window 2, layer 0, expert 0"


def test_check_counts_both(tmp_path):
    checked = formats.check(ring(tmp_path / "ring.pt", recorded=3, places=1000))
    assert checked.summary == {"num_windows": 3, "num_layers": 1, "num_experts": 4, "num_empty_windows": 997}
    assert checked.clean


# Counts of slots: brought to experts by the map that was in use, wherever the width is its slots.


@pytest.mark.parametrize("entry", _LOADS, ids=lambda entry: entry.name)
def test_the_map_is_applied_wherever_the_width_is_its_slots(entry, tmp_path):
    target = tmp_path / "load"
    formats.write(target, PER_SLOT, format=entry.name, layer_ids=[0, 1])
    if entry.name in ("sglang-detail", "vllm-jsonl"):
        message = refused(target, format=entry.name, placement=MAP)
        assert "is a load that holds the map of its own slots: it must be read by that; leave placement" in message
        return
    contents = formats.read(target, format=entry.name, placement=MAP)
    assert contents.load is not None
    assert contents.load.tolist() == [PER_EXPERT]
    assert contents.placement == MAP


@pytest.mark.parametrize("entry", _LOADS, ids=lambda entry: entry.name)
def test_the_map_is_refused_where_the_width_is_another(entry, tmp_path):
    target = tmp_path / "load"
    formats.write(target, PER_SLOT[..., :3], format=entry.name, layer_ids=[0, 1])
    message = refused(target, format=entry.name, placement=MAP)
    if entry.name not in ("sglang-detail", "vllm-jsonl"):
        assert "a load with 3 counts per layer: it must have one for each of the 4 slots of its placement; " in message
    assert "leave placement (--map) out" in message


def test_slots_of_several_windows_and_layers_are_found_by_number(tmp_path):
    """A load of some layers under a map of all of them, dense ones included."""
    numbered = Placement([[0, 1, 2, 0], [0, 1, 2, 0], [2, 1, 0, 1]], 2)
    load = np.array([[[1, 2, 4, 8]], [[16, 32, 64, 128]]])
    formats.write(tmp_path / "l.npz", load, format="evenmoe-trace", layer_ids=[5])
    found = loaded(tmp_path / "l.npz", placement=numbered, placement_layers=(3, 4, 5))
    assert found == [[[4, 2 + 8, 1]], [[64, 32 + 128, 16]]]
    message = refused(tmp_path / "l.npz", placement=numbered, placement_layers=(2, 3, 4))
    assert (
        "a load with layer 5: it must have layers of its placement, which are 2 to 4; give the placement that was"
        in message
    )
    assert "a load with 1 layers: it must have the 3 layers of its placement" in refused(
        tmp_path / "l.npz", placement=numbered
    )


def test_the_map_is_refused_for_a_placement():
    text = json.dumps({"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 1]]})
    message = refused(text, num_ranks=2, placement=MAP)
    assert "is a placement (sglang-location): it takes no placement (--map); leave that out" in message


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"num_ranks": 4}, "it takes no num_ranks (--ranks)"),
        ({"num_slots": 4}, "it takes no num_slots (--slots)"),
        ({"shared_devices": 0}, "it takes no shared_devices (--shared-devices)"),
        (
            {"num_layers": 3},
            "a load with 2 layers: it must have the 3 that were asked for; leave num_layers (--num-layers)",
        ),
        (
            {"num_experts": 6},
            "a load with 4 experts: it must have the 6 that were asked for; leave num_experts (--experts)",
        ),
        (
            {"num_experts": 3},
            "a load with 4 experts: it must have the 3 that were asked for; if it counts slots, pass their",
        ),
    ],
)
def test_what_says_nothing_about_a_load_is_no_option_for_it(told, message, tmp_path):
    formats.write(tmp_path / "l.npz", PER_SLOT, format="evenmoe-trace")
    assert message in refused(tmp_path / "l.npz", **told)
    with pytest.raises(FileFormatError, match=r"takes no|asked for"):
        formats.check(tmp_path / "l.npz", **told)


def test_sizes_that_the_load_has_may_be_given(tmp_path):
    formats.write(tmp_path / "l.npz", PER_SLOT, format="evenmoe-trace")
    assert loaded(tmp_path / "l.npz", num_layers=2, num_experts=4) == PER_SLOT.tolist()


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


# Counts of one rank: SGLang's per_pass and per_token dumps, and its old CSV.


def detail(path: Path, *records: dict, slots=((0, 1, 2, 3),)) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(torch_bytes({"records": list(records), "last_physical_to_logical_map": np.array(slots)}))
    return path


def per_pass(number: int, rank: int, *rows: list[int]) -> dict:
    counts = np.array(rows, np.int32)
    return {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary", "global_physical_count": counts}


def test_the_ranks_of_a_pass_are_one_window(tmp_path):
    detail(tmp_path / "dumps" / "a_0.pt", per_pass(7, 0, [3, 0, 0, 0]))
    detail(tmp_path / "dumps" / "a_1.pt", per_pass(7, 1, [0, 0, 0, 5]))
    contents = formats.read(tmp_path / "dumps")
    assert contents.load is not None
    assert (contents.format, contents.load.tolist()) == ("sglang-detail", [[[3, 0, 0, 5]]])
    assert contents.notes == ("summed the passes of 2 ranks",)
    assert formats.check(tmp_path / "dumps").findings == ()


def test_passes_come_in_order_from_several_files_of_a_rank_each_under_its_own_map(tmp_path):
    """Rank 1 was dumped twice; before the second dump the placement had changed."""
    folder = tmp_path / "dumps"
    detail(folder / "1.5_0.pt", per_pass(10, 0, [0, 1, 0, 0]), per_pass(9, 0, [1, 0, 0, 0]))
    detail(folder / "1.5_1.pt", per_pass(9, 1, [2, 0, 0, 0]))
    detail(folder / "2.5_1.pt", per_pass(10, 1, [4, 0, 0, 0]), slots=[[3, 2, 1, 0]])
    (folder / "notes.txt").write_text("mine")
    contents = formats.read(folder)
    assert contents.load is not None
    assert contents.load.tolist() == [[[3, 0, 0, 0]], [[0, 1, 0, 4]]]
    assert contents.notes == ("left out 1 other files of the folder", "summed the passes of 2 ranks")


def test_tokens_of_all_ranks_are_counted_together(tmp_path):
    """Rank 1 had no token in the pass."""
    ids = np.array([[[0, 1, *[-1] * 6], [3, 0, *[-1] * 6]]], np.int32)
    for rank, chosen in enumerate((ids, ids[:, :0], ids[:, :1])):
        record = {"forward_pass_id": 4, "rank": rank, "gatherer_key": "primary", "topk_ids_of_layer": chosen}
        detail(tmp_path / "dumps" / f"{rank}.pt", record)
    contents = formats.read(tmp_path / "dumps")
    assert contents.load is not None
    assert contents.load.tolist() == [[[3, 2, 0, 1]]]
    assert contents.notes == ("kept the routing of 3 tokens, 2 experts each", "summed the passes of 3 ranks")
    assert contents.trace is not None
    assert contents.trace.routing is not None
    assert contents.trace.routing.tolist() == [[[0, 1]], [[3, 0]], [[0, 1]]]


def test_a_pass_of_a_rank_is_counted_once(tmp_path):
    detail(tmp_path / "dumps" / "a.pt", per_pass(7, 0, [3, 0, 0, 0]))
    detail(tmp_path / "dumps" / "copy of a.pt", per_pass(7, 0, [3, 0, 0, 0]))
    message = refused(tmp_path / "dumps")
    assert (
        "a recording with pass 7 of rank 0 twice, in a.pt and copy of a.pt: it must hold each pass of a rank once; put"
        in message
    )
    one = detail(tmp_path / "one.pt", per_pass(7, 0, [3, 0, 0, 0]), per_pass(7, 0, [1, 0, 0, 0]))
    assert "a recording with pass 7 of rank 0 twice, in one.pt" in refused(one)


def test_a_file_of_one_rank_is_said_to_be_alone(tmp_path):
    path = detail(tmp_path / "a_0.pt", per_pass(7, 0, [3, 0, 0, 0]), per_pass(8, 0, [0, 1, 0, 0]))
    contents = formats.read(path)
    assert contents.load is not None
    assert contents.load.tolist() == [[[3, 0, 0, 0]], [[0, 1, 0, 0]]]
    note = "rank 0 alone: the recorder counts each rank's own tokens; name the folder of all ranks' files to have them"
    assert contents.notes[0].startswith(note)
    assert formats.check(path).notes == contents.notes
    detail(tmp_path / "dumps" / "a_3.pt", per_pass(7, 3, [3, 0, 0, 0]))
    assert formats.read(tmp_path / "dumps").notes[0].startswith("rank 3 alone: ")


def test_ranks_and_passes_that_are_missing_are_found(tmp_path):
    detail(tmp_path / "dumps" / "0.pt", per_pass(7, 0, [3, 0, 0, 0]), per_pass(8, 0, [1, 0, 0, 0]))
    detail(tmp_path / "dumps" / "2.pt", per_pass(7, 2, [0, 0, 0, 5]))
    found = formats.check(tmp_path / "dumps").findings
    assert [(f.kind, f.severity, f.rank) for f in found] == [
        ("missing-rank", "error", None),
        ("incomplete-pass", "warning", 2),
    ]
    assert found[1].text == "1 of 2 passes that not all ranks recorded: pass 8 has no rank 2"
    assert any("pass 8 has no rank 2" in note for note in formats.read(tmp_path / "dumps").notes)


def test_dumps_of_two_models_are_refused(tmp_path):
    detail(tmp_path / "dumps" / "a.pt", per_pass(7, 0, [3, 0, 0, 0]))
    detail(tmp_path / "dumps" / "b.pt", per_pass(7, 1, [3, 0]), slots=[[0, 1]])
    assert (
        "a folder with 1 layers of 4 experts in a.pt and 1 layers of 2 experts in b.pt: it must hold dumps of one"
        in refused(tmp_path / "dumps")
    )


def table(path: Path, *lines: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["layer_id,expert_id,count", *lines]) + "\n")
    return path


def test_the_old_tables_of_all_ranks_are_one_window(tmp_path):
    """Rank 1 has a layer that rank 0 has not; rank 2 had no token at all."""
    folder = tmp_path / "tables"
    table(folder / "expert_distribution_rank0_timestamp1744347750.3.csv", "3,0,3", "3,3,1")
    table(folder / "expert_distribution_rank1_timestamp1744347750.0.csv", "3,3,5", "4,1,2")
    table(folder / "expert_distribution_rank2_timestamp1744347751.0.csv")
    contents = formats.read(folder)
    assert contents.load is not None
    assert (contents.format, contents.load.tolist()) == ("sglang-csv", [[[3, 0, 0, 6], [0, 2, 0, 0]]])
    assert contents.layer_ids == (3, 4)
    assert contents.notes == ("summed the counts of 3 ranks",)


def test_tables_of_several_dumps_are_windows(tmp_path):
    """The recorder starts anew after each; 9 seconds come before 10."""
    folder = tmp_path / "tables"
    for rank in (0, 1):
        table(folder / f"expert_distribution_rank{rank}_timestamp10.{rank}.csv", f"0,{rank},1")
        table(folder / f"expert_distribution_rank{rank}_timestamp9.{rank}.csv", f"0,{rank},4", "0,2,1")
    assert loaded(folder) == [[[4, 4, 2]], [[1, 1, 0]]]
    table(folder / "expert_distribution_rank1_timestamp11.csv", "0,1,9")
    assert (
        "a folder with 3 files of rank 1 and 2 of rank 0: it must have as many of every rank; put the files"
        in refused(folder)
    )


def test_a_table_of_a_rank_is_counted_once(tmp_path):
    folder = tmp_path / "tables"
    table(folder / "rank0_timestamp1.csv", "0,0,3", "0,1,1")
    table(folder / "rank0_timestamp2.csv", "0,0,3", "0,1,1")
    message = refused(folder)
    assert (
        "a folder with the same counts of rank 0 twice, in rank0_timestamp1.csv and rank0_timestamp2.csv: it must"
        in message
    )


def test_tables_without_a_rank_in_their_names_are_ranks(tmp_path):
    table(tmp_path / "tables" / "a.csv", "0,0,3")
    table(tmp_path / "tables" / "b.csv", "0,1,5")
    contents = formats.read(tmp_path / "tables")
    assert contents.load is not None
    assert (contents.load.tolist(), contents.notes) == ([[[3, 5]]], ("summed the counts of all files",))


def test_a_table_of_one_rank_is_said_to_be_alone(tmp_path):
    named = table(tmp_path / "expert_distribution_rank5_timestamp1.csv", "0,0,3", "0,1,1")
    assert formats.read(named).notes[0].startswith("rank 5 alone: the recorder counts each rank's own tokens; ")
    assert formats.read(table(tmp_path / "x.csv", "0,0,3")).notes[0].startswith("one rank alone: ")
    table(tmp_path / "tables" / "rank1.csv", "0,0,3")
    assert formats.read(tmp_path / "tables").notes[0].startswith("rank 1 alone: ")


def test_tables_of_a_folder_that_are_not_the_recorders_are_left_out_and_said(tmp_path):
    table(tmp_path / "tables" / "rank0.csv", "0,0,3")
    (tmp_path / "tables" / "other.csv").write_text("a,b\n1,2\n")
    contents = formats.read(tmp_path / "tables")
    assert contents.load is not None
    assert contents.load.tolist() == [[[3]]]
    assert "left out 1 other files of the folder" in contents.notes


@pytest.mark.parametrize("name", ["sglang-detail", "sglang-csv", "tensorrt-llm-statistics", "mindie-csv"])
def test_an_empty_folder_is_refused_in_words(name, tmp_path):
    (tmp_path / "none").mkdir()
    assert "of no known format" in refused(tmp_path / "none")
    assert "must hold" in refused(tmp_path / "none", format=name)
