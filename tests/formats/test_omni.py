"""omni-infer's pattern: text and .npy by hand, and what such an array is not taken for."""

from __future__ import annotations

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.errors import ConstraintError
from evenmoe.placement import Placement
from tests.beside import BESIDE
from tests.formats.files import read_error

#: Two devices, two layers, three experts.
TEXT = "2 2 3\n1 1 0 0 1 1\n1 0 1 1 0 1\n"
PLACEMENT = Placement([[0, 1, 0, 2], [1, 2, 0, 2]], 2)


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("\n", "\r\n"), "2 2 3\n" + "\n".join(TEXT[6:].split())])
def test_text_and_npy_are_the_same_placement(text, tmp_path):
    (tmp_path / "p.txt").write_text(text)
    np.save(tmp_path / "p.npy", np.array([[[1, 1, 0], [0, 1, 1]], [[1, 0, 1], [1, 0, 1]]], np.int32))
    for name in ("p.txt", "p.npy"):
        contents = formats.read(tmp_path / name)
        assert (contents.format, contents.placement, contents.notes) == ("omni-pattern", PLACEMENT, ())


@pytest.mark.parametrize("suffix", ["txt", "npy"])
def test_what_is_written_is_what_the_program_reads(suffix, tmp_path):
    target = tmp_path / f"p.{suffix}"
    notes = formats.write(target, Placement([[1, 0, 2, 0], [1, 2, 0, 2]], 2), format="omni-pattern")
    assert notes == ("left out the order of slots within ranks: the program sorts the experts of a device",)
    pattern = np.load(target) if suffix == "npy" else np.array(target.read_text().split()[3:], int).reshape(2, 2, 3)
    assert pattern.tolist() == [[[1, 1, 0], [0, 1, 1]], [[1, 0, 1], [1, 0, 1]]]
    assert suffix == "npy" or target.read_text().startswith("2 2 3\n1 1 0 0 1 1 1")


def test_an_expert_twice_on_a_rank_has_no_place(tmp_path):
    with pytest.raises(ConstraintError, match="with expert 1 twice on rank 1 in layer 0: it must hold"):
        formats.write(tmp_path / "p.npy", Placement([[0, 2, 1, 1]], 2), format="omni-pattern")


def test_uneven_devices_are_found(tmp_path):
    (tmp_path / "p.txt").write_text("2 1 3\n1 1 1\n1 0 0\n")
    assert [f.kind for f in formats.check(tmp_path / "p.txt").findings] == ["uneven-ranks"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 2 3\n1 1 0\n", "is a pattern of 3 digits with the header 2 2 3"),
        ("1 1 3\n1 2 1\n", "is a pattern with something else than 0 and 1, separated by spaces"),
        ("1 1 4\n10 1 1\n", "is a pattern with something else than 0 and 1, separated by spaces"),
        (
            "999999999 999999999 999999999\n1\n",
            "is a pattern of 1 digits with the header 999999999 999999999 999999999",
        ),
        ("1 1 0\n", "with its pattern of shape (1, 1, 0): it must have 3 dimensions there, none empty"),
        ("1 1 2\n0 0\n", "no slot for expert 0|0 slots"),
    ],
)
def test_what_is_wrong_is_said(text, message, tmp_path):
    (tmp_path / "p.txt").write_text(text)
    found = read_error(tmp_path / "p.txt")
    assert any(part in found for part in message.split("|")), found


def test_loads_maps_and_tables_of_zeros_and_ones_are_no_patterns(tmp_path):
    """An expert on no device, devices with different numbers of experts, -1."""
    for array, format in (
        (np.array([[[0, 1, 0], [0, 1, 0]]]), "vllm-ascend-load"),
        (np.array([[[0, -1], [-1, 0]]]), "slot-map"),
        (np.array([[[1, 0], [1, 1]]]), "eplb-table"),
    ):
        np.save(tmp_path / "x.npy", array)
        told = {"placement": Placement([[0, 1, 2, 0, 1, 2]], 2)} if format == "vllm-ascend-load" else {"num_ranks": 2}
        assert formats.read(tmp_path / "x.npy", **told).format == format


def test_a_real_pattern_comes_back(tmp_path):
    source = BESIDE / "data" / "formats" / "omni_placement_dsv3_16dev_58moe.txt"
    if not source.is_file():
        pytest.skip("this machine lacks the pattern of a real server")
    contents = formats.read(source)
    assert contents.placement is not None
    assert (contents.placement.num_layers, contents.placement.num_slots, contents.placement.num_ranks) == (58, 272, 16)
    formats.write(tmp_path / "p.txt", contents.placement, format="omni-pattern")
    assert (tmp_path / "p.txt").read_text().split() == source.read_text().split()
