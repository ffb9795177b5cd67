"""What SGLang's recorder leaves, rank by rank: per_pass and per_token dumps, and the CSV of its older versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from evenmoe import formats
from evenmoe.io.torch_file import torch_bytes
from tests.formats.files import loaded, read_error, written


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
    ids = np.full((1, 3, 8), -1, np.int32)  # the recorder keeps 8 places, the model uses 2
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
    message = read_error(tmp_path / "dumps")
    assert (
        "a recording with pass 7 of rank 0 twice, in a.pt and copy of a.pt: it must hold each pass of a rank once; put"
        in message
    )
    one = detail(tmp_path / "one.pt", per_pass(7, 0, [3, 0, 0, 0]), per_pass(7, 0, [1, 0, 0, 0]))
    assert "a recording with pass 7 of rank 0 twice, in one.pt" in read_error(one)


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
        in read_error(tmp_path / "dumps")
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
        in read_error(folder)
    )


def test_a_table_of_a_rank_is_counted_once(tmp_path):
    folder = tmp_path / "tables"
    table(folder / "rank0_timestamp1.csv", "0,0,3", "0,1,1")
    table(folder / "rank0_timestamp2.csv", "0,0,3", "0,1,1")
    message = read_error(folder)
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
