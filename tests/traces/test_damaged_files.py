"""Files damaged in every way that we could think of are refused, and nothing else ever happens to them."""

from __future__ import annotations

import random
import zipfile
from collections import Counter

import numpy as np

from evenmoe.errors import FileFormatError
from evenmoe.traces.trace import Trace, load_trace
from tests.traces.npz import archive, npy, npz

BY_RANK = np.arange(48).reshape(2, 2, 3, 4)
METADATA = '{"model": "mixtral-8x7b", "skew": 0.5, "seed": 3}'
LOAD = np.arange(24).reshape(2, 3, 4)
ROUTING = np.arange(30).reshape(5, 3, 2) % 4
HEADERS = [
    "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 3, 4), }",
    "{'descr': '>u2', 'fortran_order': True, 'shape': (24, 1, 1), }",
    "{'descr': '|i1', 'fortran_order': False, 'shape': (6, 4), }",
]
WORDS = [
    *("'<i8'", "'|O'", "'<m8[s]'", "'|b1'", "'<c16'", "'(2,)<i4'", "'<i3'", "'V8'", "'<U2'", "[('a', '<i8')]", "''"),
    *(
        "(2, 3, 4)",
        "(-2, -3, 4)",
        "(-1, 24)",
        "(0, 3, 4)",
        "()",
        "(24,)",
        "(1 << 60,)",
        "(2 ** 99, 1)",
        "(1152921504606846976,)",
    ),
    *(
        "(True, 3, 8)",
        "(2.0, 3, 4)",
        "2",
        "None",
        "True",
        "'False'",
        "{}",
        "[",
        ")",
        "'",
        "(" * 300,
        "-" * 5000,
        "\x00",
        "\n",
        "\t ",
        "9" * 5000,
    ),
    *("L", "0x18", "1e3", "é", "\\", "#", "'descr'", "'shape'", "'fortran_order'", ":", ","),
]


def originals() -> list[bytes]:
    return [
        npz(load=LOAD),
        npz(
            load=BY_RANK.sum(axis=1),
            load_by_rank=BY_RANK,
            routing=ROUTING,
            seq_start=np.array([0, 2, 2, 5]),
            layer_ids=np.array([1, 2, 4]),
            metadata=np.array(METADATA),
        ),
        npz(load=LOAD[0], routing=ROUTING, seq_start=np.array([0, 5])),
        npz(load=np.asfortranarray(LOAD.astype(">i2")), routing=ROUTING.astype(np.uint8)),
        *(
            archive({"load.npy": npy(LOAD), "routing.npy": npy(ROUTING, (2, 0))}, compression=method)
            for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        ),
    ]


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, insert, repeat, blank: the checksums of the archive notice most of it."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        # The central directory at the end is what the reader believes, so half of the damage goes there.
        start = rng.randrange(len(data)) if rng.random() < 0.5 else max(0, len(data) - 1 - rng.randrange(180))
        length = min(rng.choice([1, 1, 2, 4, 8, 40]), len(data) - start)
        kind = rng.randrange(6)
        if kind == 0:
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[start : start + length] = rng.randbytes(length)
        elif kind == 2:
            del data[start : start + length]
        elif kind == 3:
            data[start:start] = data[start : start + length]
        elif kind == 4:
            data[start : start + length] = rng.choice([b"\x00", b"\xff"]) * length
        elif start:
            del data[start:]
    return bytes(data) or b"\x00"


def mutated_member(rng: random.Random) -> bytes:
    """Damage inside an intact archive: the array's own header and bytes, with the checksums right."""
    text = rng.choice(HEADERS)
    for _ in range(rng.choice([1, 1, 2])):
        start = rng.randrange(len(text))
        stop = min(len(text), start + rng.choice([0, 1, 5, 12]))
        if rng.random() < 0.7:  # whole values rather than letters
            values = ["'<i8'", "(2, 3, 4)", "False", "'shape'", "'descr'"]
            value = rng.choice([v for v in values if v in text] or ["{"])
            start = max(text.find(value), 0)
            stop = start + len(value)
        text = text[:start] + rng.choice(WORDS) + text[stop:]
    version = rng.choice([b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"])
    body = text.encode("utf8")
    length = len(body) + rng.choice([0, 0, 0, 0, -1, 1, 7, 1000])
    length = max(0, length).to_bytes(2 if version[0] == 1 else 4, "little")
    data = b"\x93NUMPY" + version + length + body + bytes(rng.choice([192, 48, 24, 0, 191, 400]))
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data))]
    names = ["load.npy", "load.npy", "load", "routing.npy", "seq_start.npy", "load_by_rank.npy", "layer_ids.npy"]
    members = {rng.choice([*names, "metadata.npy"]): data}
    if rng.random() < 0.5:
        members.setdefault("load.npy", npy(LOAD))
    return archive(members, compression=rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))


def outcome(path) -> str:
    try:
        trace = load_trace(path)
    except FileFormatError as error:
        text = str(error)
        assert text.startswith(f"`{path}` is "), text
        return "refused"
    assert isinstance(trace, Trace)
    assert trace.load.dtype == np.int64
    assert trace.load.ndim == 3
    assert trace.load.size > 0
    assert trace.load.min() >= 0
    if trace.routing is not None:
        assert trace.routing.dtype == np.uint16
        assert trace.routing.shape[1] == trace.num_layers
        assert 0 <= trace.routing.min() <= trace.routing.max() < trace.num_experts
    if trace.seq_start is not None:
        assert trace.routing is not None
        assert trace.seq_start[0] == 0
        assert trace.seq_start[-1] == len(trace.routing)
        assert (np.diff(trace.seq_start) >= 0).all()
    if trace.load_by_rank is not None:
        assert (trace.load_by_rank.sum(axis=1) == trace.load).all()
    if trace.layer_ids is not None:
        assert len(set(trace.layer_ids.tolist())) == trace.num_layers
    assert all(isinstance(value, str | int | float) for value in trace.metadata.values())
    return "read"


def mutated_text(rng: random.Random) -> bytes:
    """Damage inside the metadata, which is JSON in an intact array."""
    text = METADATA
    for _ in range(rng.choice([1, 1, 2])):
        start = rng.randrange(len(text) + 1)
        stop = min(len(text), start + rng.choice([0, 1, 4]))
        text = text[:start] + rng.choice([*WORDS, "null", "true", "[1]", '{"a": 1}', "1e999", "NaN"]) + text[stop:]
    return npz(load=LOAD, metadata=np.array(text))


def test_mutated_metadata(tmp_path):
    rng = random.Random(20250802)
    path, outcomes = tmp_path / "some.npz", Counter()
    for _ in range(400):
        path.write_bytes(mutated_text(rng))
        outcomes[outcome(path)] += 1
    assert outcomes["refused"] > 150
    assert outcomes["read"] > 20


def test_mutated_files(tmp_path):
    rng = random.Random(20250801)
    files = originals()
    path, outcomes = tmp_path / "some.npz", Counter()
    for number in range(3000):
        path.write_bytes(mutated_member(rng) if number % 2 else mutated_bytes(rng, rng.choice(files)))
        outcomes[outcome(path), number % 2] += 1
    # The mutations are worth something: most break a file, some leave it readable.
    assert all(outcomes["refused", kind] > 500 and outcomes["read", kind] > 50 for kind in (0, 1)), outcomes
