"""Megatron-Core's recorder: one .npz a rank, by hand; layers from 1, forwards that are not filled in."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from evenmoe import formats
from tests.formats.files import read_error

GARBAGE = -1_000_000_007  # the recorder's buffer is not cleared


def dump(path: Path, rank: int, layers: dict[int, list[list[int]]], group=(0, 1), forwards: int = 3) -> Path:
    """Counts of the forwards that each layer has."""
    path.parent.mkdir(exist_ok=True)
    experts = max((len(row) for rows in layers.values() for row in rows), default=4)
    loads = np.full((len(layers), forwards, experts), GARBAGE, np.int32)
    for row, counts in zip(loads, layers.values(), strict=True):
        row[: len(counts)] = np.array(counts).reshape(len(counts), experts)
    np.savez(
        path,
        dump_version=np.asarray("mcore_ep_load_dump_v1"),
        capture_id=np.asarray("20260101_000000_pid1"),
        loads=loads,
        layer_numbers=np.array(list(layers), np.int32),
        forward_counts=np.array([len(counts) for counts in layers.values()], np.int32),
        ep_group_ranks=np.array(group, np.int32),
        ep_rank=np.int32(rank % len(group)),
        ep_size=np.int32(len(group)),
        global_rank=np.int32(rank),
        num_global_physical_experts=np.int32(experts),
        num_local_physical_experts=np.int32(experts // len(group)),
    )
    return path


def test_the_ranks_of_a_forward_are_one_window(tmp_path):
    dump(tmp_path / "d" / "mcore_ep_loads_rank0_a.npz", 0, {4: [[3, 0], [1, 0]], 5: [[0, 2], [1, 1]]})
    dump(tmp_path / "d" / "mcore_ep_loads_rank1_b.npz", 1, {4: [[0, 5], [0, 1]], 5: [[1, 0], [2, 0]]})
    contents = formats.read(tmp_path / "d")
    assert contents.load is not None
    assert (contents.format, contents.layer_ids) == ("megatron-load", (3, 4))
    assert contents.load.tolist() == [[[3, 5], [1, 2]], [[1, 1], [3, 1]]]
    assert contents.notes == (
        "numbered the layers from 0, where Megatron counts from 1",
        "summed the forwards of 2 ranks",
    )
    assert formats.check(tmp_path / "d").findings == ()


def test_what_the_buffer_held_before_is_no_count(tmp_path):
    """Layer 5 has one forward of rank 1, which was stopped earlier."""
    dump(tmp_path / "d" / "0.npz", 0, {4: [[3, 0], [1, 0]], 5: [[0, 2], [1, 1]]})
    dump(tmp_path / "d" / "1.npz", 1, {4: [[0, 5], [0, 1]], 5: [[1, 0]]})
    contents = formats.read(tmp_path / "d")
    assert contents.load is not None
    assert contents.load.tolist() == [[[3, 5], [1, 2]], [[1, 1], [0, 0]]]
    assert "layers have 1 to 2 forwards: the rest are empty" in contents.notes
    assert "left out forwards that not all ranks recorded" in contents.notes


def test_groups_of_other_layers_stand_side_by_side_and_those_of_the_same_are_summed(tmp_path):
    """Ranks 0 and 1 hold layer 1, ranks 2 and 3 layer 2 (pipeline), ranks 4 and 5 layer 1 again (data)."""
    for rank in range(6):
        group = (rank // 2 * 2, rank // 2 * 2 + 1)
        dump(tmp_path / "d" / f"{rank}.npz", rank, {2 if rank in (2, 3) else 1: [[rank, 1]]}, group)
    contents = formats.read(tmp_path / "d")
    assert contents.load is not None
    assert (contents.load.tolist(), contents.layer_ids) == ([[[0 + 1 + 4 + 5, 4], [2 + 3, 2]]], (0, 1))
    assert "summed 3 expert-parallel groups" in contents.notes


def test_one_file_is_alone_and_a_rank_of_a_group_may_be_missing(tmp_path):
    path = dump(tmp_path / "d" / "1.npz", 1, {1: [[3, 0]]}, (0, 1, 2))
    assert formats.read(path).notes[-1].startswith("rank 1 alone: ")
    dump(tmp_path / "d" / "0.npz", 0, {1: [[3, 0]]}, (0, 1, 2))
    (finding,) = formats.check(tmp_path / "d").findings
    assert (finding.kind, finding.severity, finding.rank, finding.text) == (
        "missing-rank",
        "error",
        2,
        "2 ranks without rank 2",
    )


def test_layers_counted_from_0_stay(tmp_path):
    contents = formats.read(dump(tmp_path / "1.npz", 1, {0: [[3, 0]], 1: [[3, 1]]}))
    assert contents.layer_ids == (0, 1)
    assert not any("Megatron counts from 1" in note for note in contents.notes)


def test_what_is_wrong_is_said(tmp_path):
    dump(tmp_path / "d" / "a.npz", 1, {1: [[3, 0]]})
    dump(tmp_path / "d" / "b.npz", 1, {1: [[3, 0]]})
    assert "a folder with rank 1 twice, in a.npz and b.npz: it must hold one recording of each rank" in read_error(
        tmp_path / "d"
    )
    dump(tmp_path / "d" / "b.npz", 0, {1: [[3, 0, 1]]})
    assert "a folder with dumps of 2 and of 3 experts: it must hold dumps of one model" in read_error(tmp_path / "d")
    assert "without a forward: it must hold recorded counts" in read_error(dump(tmp_path / "0.npz", 0, {1: []}))
    for name, wrong, message in (
        ("forward_counts", [4], "with `forward_counts` from 4 to 4: it must be 0 to 1, the forwards of `loads`"),
        (
            "layer_numbers",
            [1, 2],
            "with 2 `layer_numbers` and 1 `forward_counts` for 1 layers: it must have one of each",
        ),
        ("layer_numbers", [-1], "with `layer_numbers` [-1]: it must be distinct, from 0 to 65535"),
    ):
        arrays = {"loads": np.ones((1, 1, 2), int), "layer_numbers": [1], "forward_counts": [1], name: wrong}
        np.savez(tmp_path / "x.npz", **arrays)
        assert message in read_error(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", loads=np.ones((1, 1, 2), int))
    assert "must be an .npz of `loads`, `layer_numbers` and `forward_counts`" in read_error(
        tmp_path / "x.npz", format="megatron-load"
    )
