"""Placements whose ranks have different numbers of slots in files: who holds them, and who says that it cannot."""

from __future__ import annotations

import json

import pytest

from evenmoe import formats
from evenmoe.errors import ConstraintError, FileFormatError
from evenmoe.formats.catalogue import FORMATS
from evenmoe.placement import Placement

FIRST = Placement([[0, 1, 2, 3, 0], [3, 2, 1, 0, 3]], 3, rank_sizes=[2, 2, 1])
ANY = Placement([[0, 1, 2, 3, 0], [3, 2, 1, 0, 3]], 3, rank_sizes=[1, 0, 4])


@pytest.mark.parametrize("placement", [FIRST, ANY])
def test_own_file(placement, tmp_path):
    formats.write(tmp_path / "p.json", placement, format="evenmoe-placement", layer_ids=[3, 4])
    said = json.loads((tmp_path / "p.json").read_text())
    assert (said["version"], said["rank_sizes"]) == (3, list(placement.rank_sizes))
    back = formats.read(tmp_path / "p.json")
    assert (back.placement, back.layer_ids) == (placement, (3, 4))
    assert formats.check(tmp_path / "p.json").summary["num_ranks"] == 3


def test_an_even_one_is_written_as_before(tmp_path):
    formats.write(tmp_path / "p.json", Placement([[0, 1]], 2, rank_sizes=[1, 1]), format="evenmoe-placement")
    said = json.loads((tmp_path / "p.json").read_text())
    assert said["version"] == 1
    assert "rank_sizes" not in said


def test_own_file_with_the_layer_of_multi_token_prediction(tmp_path):
    extra = {"mtp_layers": [[0, 1, 2, 3, 1]], "num_hidden_layers": 5}
    formats.write(tmp_path / "p.json", ANY, format="evenmoe-placement", layer_ids=[3, 4], metadata=extra)
    back = formats.read(tmp_path / "p.json")
    assert back.placement == ANY
    assert back.metadata["mtp_layers"] == [[0, 1, 2, 3, 1]]


@pytest.mark.parametrize("sizes", [[2, 2], [2, 2, 2], [-1, 3, 3], [1 << 40, 2, 3], [], "no", None, [1.5, 2, 1.5]])
def test_own_file_with_wrong_sizes(sizes, tmp_path):
    formats.write(tmp_path / "p.json", FIRST, format="evenmoe-placement")
    said = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps({**said, "rank_sizes": sizes}))
    with pytest.raises(FileFormatError, match="rank_sizes"):
        formats.read(tmp_path / "p.json")


def test_tensorrt_llm_gives_the_first_ranks_one_more(tmp_path):
    formats.write(tmp_path / "p.yaml", FIRST, format="tensorrt-llm", layer_ids=[3, 4])
    assert formats.read(tmp_path / "p.yaml", num_ranks=3).placement == FIRST
    assert formats.check(tmp_path / "p.yaml", num_ranks=3).clean
    with pytest.raises(ConstraintError) as caught:
        formats.write(tmp_path / "q.yaml", ANY, format="tensorrt-llm", layer_ids=[3, 4])
    assert str(caught.value) == (
        "`value` is a placement whose ranks have 1, 0, 4 slots: it must have the same number of slots on every rank, "
        "or one more on each of the first, for tensorrt-llm; give the ranks 2 x2, 1, or use evenmoe-placement."
    )
    assert not (tmp_path / "q.yaml").exists()


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS.get(name).kind == "placement"])
def test_formats_that_have_no_place_for_it_say_so(name, tmp_path):
    if FORMATS.get(name).write is None or FORMATS.get(name).uneven_ranks != "none":
        return
    with pytest.raises(
        ConstraintError, match=rf"must have the same number of slots on every rank for {name}; give all"
    ):
        formats.write(tmp_path / "p", FIRST, format=name, layer_ids=[0, 1])
    assert not (tmp_path / "p").exists()


def test_a_map_of_uneven_devices_is_still_wrong(tmp_path):
    """vllm-ascend makes one tensor of it."""
    devices = [{"device_id": 0, "device_expert": [0, 1]}, {"device_id": 1, "device_expert": [2]}]
    layer = {"layer_id": 0, "device_count": 2, "device_list": devices}
    (tmp_path / "m.json").write_text(json.dumps({"moe_layer_count": 1, "layer_list": [layer]}))
    with pytest.raises(FileFormatError, match="1 slots on rank 1 in layer 0, 2 on rank 0"):
        formats.read(tmp_path / "m.json")
