"""DLBlas's files of one rank each, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evenmoe import formats
from tests.formats.files import read_error


def dump(path: Path, **layers: list[int]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(layers))
    return path


def test_the_ranks_are_summed(tmp_path):
    """Rank 1 has a layer that rank 0 has not; 10 comes after 9."""
    dump(tmp_path / "d" / "expert_load_rank0.json", layer_9=[3, 0, 1], layer_10=[1, 1, 0])
    dump(tmp_path / "d" / "expert_load_rank1.json", layer_10=[0, 4, 0], layer_11=[2, 2, 2])
    contents = formats.read(tmp_path / "d")
    assert contents.load is not None
    assert (contents.format, contents.layer_ids) == ("dlblas-load", (9, 10, 11))
    assert contents.load.tolist() == [[[3, 0, 1], [1, 5, 0], [2, 2, 2]]]
    assert contents.notes == ("summed the counts of 2 ranks",)


def test_one_file_is_said_to_be_alone(tmp_path):
    contents = formats.read(dump(tmp_path / "expert_load_rank5.json", layer_3=[3, 0, 1]))
    assert contents.notes[0].startswith("rank 5 alone: the recorder counts each rank's own tokens; ")


def test_a_rank_that_is_missing_is_found_and_one_twice_read_error(tmp_path):
    for rank in (0, 2):
        dump(tmp_path / "d" / f"expert_load_rank{rank}.json", layer_3=[3, 1])
    assert [f.kind for f in formats.check(tmp_path / "d").findings] == ["missing-rank"]
    dump(tmp_path / "d" / "copy_of_expert_load_rank2.json", layer_3=[3, 1])
    assert (
        "with rank 2 twice, in copy_of_expert_load_rank2.json and expert_load_rank2.json: it must hold each"
        in read_error(tmp_path / "d")
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"layer_3": [1, 2], "layer_4": [1]}, "with 1 experts in one layer and 2 in another: it must have as many"),
        ({"layer_3": [1, 2], "total": [1]}, "with the key 'total': it must name layers `layer_<n>`; record again"),
        ({"layer_3": "x"}, "with `layer_3` 'x': it must hold numbers there"),
        ({}, "a json file without layers: it must map `layer_<n>` to counts"),
    ],
)
def test_what_is_wrong_is_said(layers, message, tmp_path):
    assert message in read_error(dump(tmp_path / "x.json", **layers), format="dlblas-load")


def test_ranks_of_other_widths_are_read_error(tmp_path):
    dump(tmp_path / "d" / "expert_load_rank0.json", layer_3=[3, 1])
    dump(tmp_path / "d" / "expert_load_rank1.json", layer_3=[3, 1, 2])
    assert "with 3 experts in `layer_3`: it must have the 2 of the other ranks; record" in read_error(tmp_path / "d")
