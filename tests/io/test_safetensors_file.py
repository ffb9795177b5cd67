"""A safetensors file: a header that lies is named, and any bits of a number are read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evenmoe import formats
from tests.formats.files import read_error


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"m": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 4]}}, b"1234", "shape [1, 2] in bytes [0, 4]"),
        (
            {"m": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 8]}},
            b"1234",
            "in bytes [0, 8], which does not fit",
        ),
        ({"m": {"dtype": "Q", "shape": [1, 1], "data_offsets": [0, 4]}}, b"1234", "of dtype Q"),
        (
            {n: {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]} for n in "ab"},
            b"1234",
            "a gap or an overlap at byte 0",
        ),
        (
            {"m": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}},
            b"12345678",
            "8 bytes of data for tensors of 4",
        ),
    ],
)
def test_a_safetensors_header_that_lies(header, data, message, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "s").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert message in read_error(tmp_path / "s")


def test_a_signalling_nan_is_a_nan(tmp_path):
    from safetensors.numpy import save

    load = np.array([[0x7F800001, 0x3F800000]], np.uint32).view(np.float32)
    (tmp_path / "s").write_bytes(save({"m": load}))
    assert [f.kind for f in formats.check(tmp_path / "s").findings] == ["not-a-number"]
