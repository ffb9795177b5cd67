"""vLLM-Ascend's tensors: slots are not experts, stages are windows, empty columns are nothing."""

from __future__ import annotations

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.errors import FileFormatError
from evenmoe.io.torch_file import torch_bytes
from evenmoe.placement import Placement
from tests.formats.files import written


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


def test_columns_that_no_rank_holds_are_no_experts(tmp_path):
    table = np.array([[[0, 1, -1, -1], [1, -1, 0, -1]]], np.int32)
    contents = formats.read(written(tmp_path, torch_bytes(table)))
    assert contents.placement == Placement([[0, 1, 2, 0]], 2)
    assert contents.notes == ("took 3 experts for all: the last 1 columns are -1 everywhere",)
    assert [f.kind for f in formats.check(tmp_path / "file", num_experts=4).findings] == ["missing-expert"]
