"""SGLang's files: rows of dense layers, counts that run over, and its recorder's statistics."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.errors import ConstraintError, FileFormatError
from evenmoe.io.torch_file import torch_bytes
from evenmoe.placement import Placement
from tests.formats.files import written


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


def test_part_of_a_token_is_refused_where_counts_are_whole(tmp_path):
    with pytest.raises(
        ConstraintError, match=r"`value` is 0.5 at \(0, 0, 1\): it must hold whole numbers for sglang-stat"
    ):
        formats.write(tmp_path / "stat.pt", np.array([[1, 0.5]]), format="sglang-stat", layer_ids=[0])
