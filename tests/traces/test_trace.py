"""`load_trace`: what it reads, what it refuses and in which words, and that real traces fit."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.errors import FileFormatError
from evenmoe.traces.trace import Trace, load_trace
from tests.beside import measured_names
from tests.traces.npz import archive, at, npy, npy_claiming, npz
from tests.traces.synthetic import SYNTHETIC, trace_file

LOAD = np.arange(24).reshape(2, 3, 4)
ROUTING = np.arange(30).reshape(5, 3, 2) % 4
INTEGERS = [f"{order}{kind}{size}" for order in "<>" for kind in "iu" for size in (1, 2, 4, 8)]


def same(trace: Trace, name: str, load: np.ndarray, routing: np.ndarray | None) -> None:
    assert trace.name == name
    assert trace.load.dtype == np.int64
    assert trace.load.tolist() == load.tolist()
    assert (trace.num_layers, trace.num_experts) == load.shape[1:]
    assert (trace.routing is None) == (routing is None)
    if routing is not None:
        assert trace.routing.dtype == np.uint16
        assert trace.routing.tolist() == routing.tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(1, 4)] * 3),
    st.sampled_from(INTEGERS),
    st.booleans(),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    st.integers(0, 2**32),
)
def test_what_is_written_is_read(tmp_path_factory, shape, dtype, fortran, version, compression, seed):
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 100, shape).astype(dtype, order="F" if fortran else "C")
    tokens, top_k = rng.integers(1, 5), rng.integers(1, shape[2] + 1)
    routing = rng.permuted(np.tile(np.arange(shape[2]), (tokens, shape[1], 1)), axis=2)[:, :, :top_k].astype(dtype)
    members = {"load.npy": npy(load, version), "routing.npy": npy(routing, version), "else.npy": b"not looked at"}
    path = at(tmp_path_factory.getbasetemp() / "a trace.npz", archive(members, compression=compression))
    same(load_trace(path), "a trace", load, routing)
    same(load_trace(str(path)), "a trace", load, routing)


def test_one_window_without_its_axis(tmp_path):
    path = at(tmp_path / "one.npz", npz(load=LOAD[0], routing=ROUTING, seq_start=np.array([0, 5])))
    same(load_trace(path), "one", LOAD[:1], ROUTING)


def test_routing_of_no_token_is_none(tmp_path):
    same(load_trace(at(tmp_path / "none.npz", npz(load=LOAD, routing=ROUTING[:0]))), "none", LOAD, None)


def test_the_largest_counts(tmp_path):
    load = np.array([[[2**62 - 2**10, 0]]])
    assert load_trace(at(tmp_path / "large.npz", npz(load=load))).load.tolist() == load.tolist()


INTACT = ": it must be a numpy .npz; write it with numpy.savez."
SHAPED = "it must hold as many bytes as its shape says, and at most 536870912 numbers; write it again."
COUNTED = "it must hold token counts, not negative, fewer than 2**62 together; check how it was recorded."
INTEGRAL = "it must hold integers; convert it with .astype(np.int64)."


def claiming(shape: str, data: bytes = b"\x01" * 8, dtype: str = "<i8") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    return archive({"load.npy": npy_claiming(header, data)})


ERRORS = {
    "text": (b"layer,expert,load\n0,0,17\n", "not an intact .npz file (File is not a zip file)" + INTACT),
    "nothing": (b"", "not an intact .npz file (File is not a zip file)" + INTACT),
    "a bare .npy": (npy(LOAD), "not an intact .npz file (File is not a zip file)" + INTACT),
    "cut": (npz(load=LOAD)[:-30], "not an intact .npz file (File is not a zip file)" + INTACT),
    "text as an array": (
        archive({"load.npy": b"0,0,17\n" * 9}),
        r"not an intact .npz file (the magic string is not correct; expected b'\x93NUMPY', got b'0,0,17')" + INTACT,
    ),
    "a checksum": (
        archive({"load.npy": npy(LOAD)}).replace(b"\x17\0\0\0\0\0\0\0", b"\x16\0\0\0\0\0\0\0"),
        "not an intact .npz file (Bad CRC-32 for file 'load.npy')" + INTACT,
    ),
    "empty archive": (archive({}), "a file of nothing: it must hold `load`; record loads first."),
    "without load": (
        npz(routing=ROUTING, counts=LOAD),
        "a file of counts, routing: it must hold `load`; record loads first.",
    ),
    "load under a bare name": (
        archive({"load": npy(LOAD)}),
        "a file of load: it must hold `load`; record loads first.",
    ),
    "fractions": (npz(load=LOAD / 2), f"`load` of dtype float64: {INTEGRAL}"),
    "truth values": (npz(load=LOAD > 2), f"`load` of dtype bool: {INTEGRAL}"),
    "times": (npz(load=LOAD.astype("m8[s]")), f"`load` of dtype timedelta64[s]: {INTEGRAL}"),
    "objects": (npz(load=LOAD.astype(object)), f"`load` of dtype object: {INTEGRAL}"),
    "records": (npz(load=np.zeros((1, 2), "i8,i4")), f"`load` of dtype [('f0', '<i8'), ('f1', '<i4')]: {INTEGRAL}"),
    "routing of fractions": (npz(load=LOAD, routing=ROUTING / 1), f"`routing` of dtype float64: {INTEGRAL}"),
    "negative": (npz(load=LOAD - 1), f"`load` with counts from -1 to 22: {COUNTED}"),
    "too many": (
        npz(load=np.array([[2**64 - 1, 1]], np.uint64)),
        f"`load` with counts from 1 to 18446744073709551615: {COUNTED}",
    ),
    "too many together": (
        npz(load=np.array([[2**61], [2**61]])),
        f"`load` with counts from 2305843009213693952 to 2305843009213693952: {COUNTED}",
    ),
    "one axis": (
        npz(load=LOAD[0, 0]),
        "`load` of shape (4,): it must be (windows, layers, experts), no axis empty; "
        "record one row of experts per window and layer.",
    ),
    "four axes": (
        npz(load=LOAD[None]),
        "`load` of shape (1, 2, 3, 4): it must be (windows, layers, experts), no axis empty; "
        "record one row of experts per window and layer.",
    ),
    "no expert": (
        npz(load=LOAD[:, :, :0]),
        "`load` of shape (2, 3, 0): it must be (windows, layers, experts), no axis empty; "
        "record one row of experts per window and layer.",
    ),
    "routing of other layers": (
        npz(load=LOAD, routing=ROUTING[:, :2]),
        "`routing` of shape (5, 2, 2): it must be (tokens, 3, k); record one row per token.",
    ),
    "routing without k": (
        npz(load=LOAD, routing=ROUTING[:, :, 0]),
        "`routing` of shape (5, 3): it must be (tokens, 3, k); record one row per token.",
    ),
    "routing to nobody": (
        npz(load=LOAD, routing=ROUTING[:, :, :0]),
        "`routing` of shape (5, 3, 0): it must be (tokens, 3, k); record one row per token.",
    ),
    "routing beyond": (
        npz(load=LOAD, routing=ROUTING + 1),
        "`routing` with ids from 1 to 4: it must hold experts, 0 to 3; record ids of the same model as `load`.",
    ),
    "an expert twice": (
        npz(load=LOAD, routing=np.where(np.arange(30).reshape(5, 3, 2) == 15, 2, ROUTING)),
        "`routing` with expert 2 twice for token 2, layer 1: it must hold distinct experts per token and layer; "
        "record the top-k as the model chose them.",
    ),
    "routing below": (
        npz(load=LOAD, routing=ROUTING - 1),
        "`routing` with ids from -1 to 2: it must hold experts, 0 to 3; record ids of the same model as `load`.",
    ),
    "a claim of 2^60 numbers": (claiming("(1, 1, 1152921504606846976)"), None),
    "a claim beyond 64 bits": (claiming("(4294967296, 4294967296, 4294967296)"), None),
    "a claim of fewer bytes": (claiming("(1, 1, 2)", b"\0" * 24), None),
    "a claim of more bytes": (claiming("(1, 1, 2)", b"\0" * 8), None),
    "a claim below zero": (claiming("(1, 1, -1)"), None),
    "two claims below zero": (
        claiming("(1, -1, -1)"),
        "not an intact .npz file (can only specify one unknown dimension)" + INTACT,
    ),
}


@pytest.mark.parametrize("mistake", ERRORS)
def test_wrong_files(tmp_path, mistake):
    data, text = ERRORS[mistake]
    path = at(tmp_path / "wrong.npz", data)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError) as caught:
            load_trace(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"`{path}` is ")
    assert message.endswith(SHAPED if text is None else text)
    assert caught.value.status == 161002
    assert peak < 4 << 20  # numpy's memory is traced: nothing of the claimed size was asked for


def test_more_numbers_than_fit(tmp_path, monkeypatch):
    """int8 takes a byte in the file and eight as int64, so a small archive of zeros could fill the memory."""
    monkeypatch.setattr("evenmoe.io.npz._LARGEST_BYTES", 8 * 24)
    path = at(tmp_path / "bomb.npz", npz(load=LOAD.astype(np.int8)))
    assert load_trace(path).load.tolist() == LOAD.tolist()
    at(path, npz(load=np.zeros((1, 1, 25), np.int8)))
    with pytest.raises(FileFormatError, match="and at most 24 numbers; write it again"):
        load_trace(path)


def test_a_missing_file(tmp_path):
    for path, reason in (
        (tmp_path / "none.npz", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (at(tmp_path / "file", b"") / "none.npz", "Not a directory"),
    ):
        with pytest.raises(FileFormatError) as caught:
            load_trace(path)
        assert str(caught.value) == f"`{path}` is not readable ({reason}): it must be an existing file; check the path."


def test_no_code_runs(tmp_path):
    """An object array is a pickle, and reading a pickle runs it."""
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (ran,)

    path = at(tmp_path / "evil.npz", npz(load=np.array([[[Evil()]]], object), routing=np.array([Evil()], object)))
    with pytest.raises(FileFormatError, match="of dtype object"):
        load_trace(path)
    assert not ran.exists()


# Windows, layers, experts and, where tokens are known, tokens and top-k.
RECORDED = {
    "synthetic_gpt_oss_20b": (9, 24, 32, 4),
    "synthetic_deepseek_v2_lite": (7, 26, 64, 6),
    "deepseek_v2_lite_esft_intent": (127, 26, 64, 6),
    "deepseek_v2_lite_esft_law": (33, 26, 64, 6),
    "deepseek_v2_lite_esft_summary": (13, 26, 64, 6),
    "gpt_oss_20b_mmlu_pro_and_other": (89, 24, 32, 4),
    "mixtral_8x7b_mmlu": (14042, 32, 8, None),
    "deepseek_v4_flash_decode": (6, 40, 256, 6),
    "deepseek_moe_16b_cdmoe": (1, 27, 64, None),
    "deepseek_v3_single_prompt": (1, 58, 256, None),
    "olmoe_1b7b_base": (6, 3, 64, None),
}


@pytest.mark.parametrize("name", [*SYNTHETIC, *measured_names(*RECORDED)])
def test_recorded_traces(name, tmp_path):
    windows, layers, experts, top_k = RECORDED[name]
    trace = load_trace(trace_file(name, tmp_path))
    assert trace.load.shape == (windows, layers, experts)
    assert trace.name == name
    assert (trace.load.sum(axis=(0, 2)) > 0).all()
    assert (trace.routing is None) == (top_k is None)
    if trace.routing is None:
        return
    tokens = len(trace.routing)
    assert trace.routing.shape == (tokens, layers, top_k)
    for layer in (0, layers - 1):  # the tokens are those that the loads count
        counted = np.bincount(trace.routing[:, layer].ravel(), minlength=experts)
        assert counted.tolist() == trace.load[:, layer].sum(axis=0).tolist()


@pytest.mark.parametrize("name", ["synthetic", *measured_names("deepseek_v3_layer_extremes_derived")])
def test_a_file_of_derived_numbers_is_no_trace(name, tmp_path):
    """The hottest and the coldest expert of every layer are no load of all of them."""
    extremes = npz(layer=np.arange(3, 61), hot_id=np.zeros(58, int), hot_count=np.ones(58, int), total=np.ones(58, int))
    path = at(tmp_path / "synthetic.npz", extremes) if name == "synthetic" else trace_file(name, tmp_path)
    with pytest.raises(FileFormatError, match="it must hold `load`; record loads first"):
        load_trace(path)
