"""What the numbers of a load count: whole windows or unused places, experts or slots."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.errors import FileFormatError
from evenmoe.formats.catalogue import FORMATS
from evenmoe.io.torch_file import torch_bytes
from evenmoe.placement import Placement
from tests.formats.files import loaded, read_error

#: Expert 0 has two replicas in the first layer, expert 1 in the second.
MAP = Placement([[0, 1, 2, 0], [2, 1, 0, 1]], 2)
PER_SLOT = np.array([[[1, 2, 4, 8], [16, 32, 64, 128]]])
PER_EXPERT = [[1 + 8, 2, 4], [64, 32 + 128, 16]]
_LOADS = [entry for entry in map(FORMATS.get, FORMATS) if entry.kind == "load" and entry.write]


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
    assert "no tokens in any layer: it must hold recorded counts; record some traffic first" in read_error(
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
        message = read_error(target, format=entry.name, placement=MAP)
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
    message = read_error(target, format=entry.name, placement=MAP)
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
    message = read_error(tmp_path / "l.npz", placement=numbered, placement_layers=(2, 3, 4))
    assert (
        "a load with layer 5: it must have layers of its placement, which are 2 to 4; give the placement that was"
        in message
    )
    assert "a load with 1 layers: it must have the 3 layers of its placement" in read_error(
        tmp_path / "l.npz", placement=numbered
    )


def test_the_map_is_refused_for_a_placement():
    text = json.dumps({"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 1]]})
    message = read_error(text, num_ranks=2, placement=MAP)
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
    assert message in read_error(tmp_path / "l.npz", **told)
    with pytest.raises(FileFormatError, match=r"takes no|asked for"):
        formats.check(tmp_path / "l.npz", **told)


def test_sizes_that_the_load_has_may_be_given(tmp_path):
    formats.write(tmp_path / "l.npz", PER_SLOT, format="evenmoe-trace")
    assert loaded(tmp_path / "l.npz", num_layers=2, num_experts=4) == PER_SLOT.tolist()
