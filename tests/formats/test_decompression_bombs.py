"""Small files that would be huge: what reading them takes is measured, not believed."""

from __future__ import annotations

import io
import json
import struct
import zipfile

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.errors import FileFormatError
from evenmoe.io import ALLOWANCE_BYTES
from evenmoe.io.torch_file import torch_bytes
from tests.formats.readings import read, take
from tests.own_process import STATUS, peak_bytes

_SIZE = 2 << 20

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="this machine lacks /proc, where a process's peak is read")


def _zip(entries: dict[str, bytes], packed: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packed) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _npy(shape: tuple[int, ...], data: bytes) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + data


def _safetensors(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _pickled(pickle: bytes, records: dict[str, bytes] | None = None, packed: int = zipfile.ZIP_STORED) -> bytes:
    return _zip({"archive/data.pkl": pickle, "archive/version": b"3\n", **(records or {})}, packed)


def _tensor_pickle(count: int, shape: tuple[int, int], stride: tuple[int, int]) -> bytes:
    """A dictionary {"logical_count": tensor} as torch.save pickles it, with any sizes."""

    def integer(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    return (
        b"\x80\x02}X\x0d\x00\x00\x00logical_countctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        b"ctorch\nLongStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + integer(count) + b"tQ" + integer(0)
        + integer(shape[0]) + integer(shape[1]) + b"\x86" + integer(stride[0]) + integer(stride[1])
        + b"\x86\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


def _filled(start: bytes, part: bytes, end: bytes, size: int = _SIZE) -> bytes:
    return start + part * (size // len(part)) + end


BOMBS = {
    "json, empty objects": _filled(b"[{}", b",{}", b"]"),
    "json, empty lists": _filled(b"[[]", b",[]", b"]"),
    "json, empty lists and one number": _filled(b"[[]", b",[]", b",1]"),
    "json, lists of one": _filled(b"[[1]", b",[1]", b"]"),
    "json, lists of one and of two": _filled(b"[[1]", b",[1],[1,2]", b"]"),
    "json, words": _filled(b"[null", b",null", b"]"),
    "json, letters": _filled(b'["a"', b',"a"', b"]"),
    "json, keys": b"{" + b",".join(b'"%x":0' % i for i in range(_SIZE // 9)) + b"}",
    "json, nested keys": _filled(b"", b'{"a":', b"0"),
    "json, brackets": b"[" * _SIZE,
    "json, one string": _filled(b'["', b"\\n", b'"]'),
    "json, one number": b"[" + b"9" * _SIZE + b"]",
    "json, small counts": _filled(b"[[1", b",1", b"]]"),
    "json, counts": _filled(b"[[300", b",412", b"]]"),
    "json, lines": _filled(b"{}", b"\n{}", b""),
    "json, lines of numbers": _filled(b"{}", b"\n1", b""),
    "json, equal slots": b'{"initial_global_assignments": {"0": [0%b]}}' % (b",0" * (1 << 20)),
    "json, equal slots in layers": b'{"initial_global_assignments": {%b}}'
    % b",".join(b'"%d": [0%b]' % (layer, b",0" * ((1 << 16) - 1)) for layer in range(16)),
    "yaml, aliases": b"a: &a [1,1]\n" + b"".join(b"%c: &%c [*%c,*%c]\n" % (c + 1, c + 1, c, c) for c in range(97, 120)),
    "yaml, numbers": _filled(b"a:\n", b"- 1\n", b""),
    "yaml, flow": _filled(b"a: [1", b",1", b"]"),
    "yaml, flow brackets": b"a: " + b"[" * _SIZE,
    "yaml, empty maps": _filled(b"a:\n", b"- {}\n", b""),
    "yaml, words": _filled(b"a:\n", b"- x\n", b""),
    "yaml, keys": b"".join(b"%x: 0\n" % i for i in range(_SIZE // 9)),
    "yaml, one word": b"a: " + b"x" * _SIZE,
    "yaml, comments": _filled(b"a: 1\n", b"#\n", b""),
    "csv, one column": _filled(b"", b"1\n", b""),
    "csv, one line": _filled(b"1", b",1", b"\n"),
    "csv, commas": b"1" + b"," * _SIZE,
    "csv, empty lines": b"1,1" + b"\n" * _SIZE,
    "sglang csv, far ids": b"layer_id,expert_id,count\n0,0,1\n" + b"".join(b"%d,2000000,1\n" % i for i in range(999)),
    "npz, zeros": _zip({"load.npy": _npy((1, 8, 1 << 22), bytes(1 << 28))}, zipfile.ZIP_DEFLATED),
    "npz, header": _zip({"load.npy": _npy((1 << 20, 1 << 20), b"12345678")}),
    "npy, header": _npy((1 << 20, 1 << 20), b"12345678"),
    "npy, no bytes": _npy((1 << 60, 1 << 60, 0), b""),
    "safetensors, header": struct.pack("<Q", 1 << 62) + b"{}",
    "safetensors, empty tensors": _safetensors(
        {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(_SIZE // 60)}
    ),
    "safetensors, shared bytes": _safetensors(
        {f"{i}_0": {"dtype": "U8", "shape": [99999], "data_offsets": [0, 99999]} for i in range(999)}, bytes(99999)
    ),
    "pt, packed": _pickled(b"\x80\x02" + b"}" * (1 << 28) + b".", packed=zipfile.ZIP_DEFLATED),
    "pt, dictionaries": _pickled(b"\x80\x02](" + b"}" * _SIZE + b"e."),
    "pt, lists": _pickled(b"\x80\x02](" + b"]" * _SIZE + b"e."),
    "pt, numbers": _pickled(b"\x80\x02](" + b"M\x00\x05" * (_SIZE // 3) + b"e."),
    "pt, memo": _pickled(b"\x80\x02]r\xff\xff\xff\xff."),
    "pt, a text's length": _pickled(b"\x80\x02X\xff\xff\xff\x7fa."),
    "pt, a storage beyond its record": _pickled(_tensor_pickle(1 << 30, (1, 1), (1, 1)), {"archive/data/0": bytes(8)}),
    "pt, a view beyond its storage": _pickled(_tensor_pickle(1, (1 << 20, 999), (1, 1)), {"archive/data/0": bytes(8)}),
    "pt, a view of one number": _pickled(_tensor_pickle(1, (1 << 20, 1 << 10), (0, 0)), {"archive/data/0": bytes(8)}),
    "pt, lists of lists": _pickled(b"\x80\x02]q\x00" + (b"](" + b"h\x00" * 9 + b"eq\x00") * 14 + b"."),
}  # fmt: skip


SMALL = {
    "json": b'{"0": [0]}',
    "yaml": b"a: [0]\n",
    "csv": b"1,1\n",
    "sglang csv": b"layer_id,expert_id,count\n0,0,1\n",
    "npz": _zip({"load.npy": _npy((1, 1, 1), bytes(8))}),
    "npy": _npy((1, 1, 1), bytes(8)),
    "safetensors": _safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "pt": torch_bytes({"rank": 0, "logical_count": np.ones((1, 1, 2), np.int32)}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_reading_a_bomb_takes_at_most_ten_times_its_size(name, tmp_path):
    path = tmp_path / "bomb"
    path.write_bytes(BOMBS[name])
    small = tmp_path / "small"
    small.write_bytes(SMALL[name.split(",")[0]])
    assert peak_bytes(read, path, small) <= 10 * len(BOMBS[name]) + ALLOWANCE_BYTES


@pytest.mark.parametrize(
    ("content", "small"),
    [
        (lambda: json.dumps([[1000 + i % 700 for i in range(1000)]] * 3000).encode(), "json"),
        (lambda: torch_bytes({"rank": 0, "logical_count": np.ones((50, 300, 256), np.int32)}), "pt"),
    ],
    ids=["json", "pt"],
)
def test_reading_a_large_honest_file_takes_less(content, small, tmp_path):
    path, first = tmp_path / "file", tmp_path / "small"
    path.write_bytes(content())
    first.write_bytes(SMALL[small])
    assert peak_bytes(read, path, first) <= 10 * path.stat().st_size


def test_the_measure_sees_memory():
    """Or no bomb would ever be seen."""
    assert 60 << 20 < peak_bytes(take, 8 << 20, 1) < 100 << 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pt, packed", "entry 'archive/data.pkl' is compressed, which torch.save never does"),
        ("pt, a storage beyond its record", "a storage '0' of 8589934592 bytes whose record has 8, at byte"),
        ("pt, a view of one number", "more than a file of its size may hold in memory, at byte"),
        ("pt, lists of lists", "is a pt file of no known format"),
        ("npz, zeros", "`load` of 268435456 bytes, more than 10 times the file"),
        ("npz, header", r"`load` of shape (1048576, 1048576) in"),
        ("yaml, aliases", "an anchor or alias, which none of these files needs, line 1 column 4"),
        ("json, brackets", "nested more than 16 levels deep, line 1 column 18"),
        ("json, empty objects", "more small values than a file of its size may hold in memory"),
        ("sglang csv, far ids", "with 1000 lines for 999 layers of 2000001 experts: it must have a line for most"),
        ("safetensors, shared bytes", "a gap or an overlap at byte 0 of the data"),
    ],
)
def test_a_bomb_is_named(name, message, tmp_path):
    path = tmp_path / "bomb"
    path.write_bytes(BOMBS[name])
    with pytest.raises(FileFormatError) as caught:
        formats.read(path, num_ranks=1)
    assert message in str(caught.value)


def test_a_view_beyond_its_storage_is_refused(tmp_path):
    path = tmp_path / "file"
    for shape, stride, fits in (((2, 4), (4, 1), True), ((2, 4), (5, 1), False), ((3, 4), (4, 1), False)):
        path.write_bytes(_pickled(_tensor_pickle(8, shape, stride), {"archive/data/0": np.arange(1, 9).tobytes()}))
        if fits:
            load = formats.read(path).load
            assert load is not None
            assert load.tobytes() == np.arange(1, 9).tobytes()
            continue
        with pytest.raises(FileFormatError, match=r"a tensor of shape \(., 4\) that reaches (8|11) in a storage of 8"):
            formats.read(path)


def test_entries_of_a_zip_that_share_bytes_are_refused(tmp_path):
    data = bytearray(_zip({"load.npy": _npy((1,), bytes(8)), "loae.npy": _npy((1,), bytes(8))}))
    second = data.rindex(b"PK\x01\x02")
    data[second + 42 : second + 46] = bytes(4)  # the directory's second entry begins where the first does
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(FileFormatError, match=r"a zip whose entry 'loae\.npy' overlaps another or the end"):
        formats.read(tmp_path / "file")
