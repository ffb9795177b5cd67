"""Requests, source ranks, layer numbers and metadata: read as written, refused in words, same bytes each time."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.errors import FileFormatError, UnsupportedTypeError
from evenmoe.io.npz import npz_bytes
from evenmoe.traces import Trace, load_trace, save_trace
from tests.beside import measured_names
from tests.traces.npz import at, npz
from tests.traces.synthetic import trace_file

LOAD = np.arange(24).reshape(2, 3, 4)
ROUTING = np.arange(30).reshape(5, 3, 2) % 4
FIELDS = ("load", "routing", "seq_start", "load_by_rank", "layer_ids")


def made(windows=2, ranks=3, layers=2, experts=5, tokens=7, top_k=2, seed=0, largest=9) -> Trace:
    """A trace with everything."""
    rng = np.random.default_rng(seed)
    by_rank = rng.integers(0, largest, (windows, ranks, layers, experts), endpoint=True)
    return Trace(
        "a trace",
        by_rank.sum(axis=1),
        rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=2)[:, :, :top_k].astype(np.uint16),
        np.sort(np.array([0, *rng.integers(0, tokens, 3, endpoint=True), tokens])),
        by_rank,
        rng.permutation(layers) + 3,
        {"model": "deepseek-v3", "tokens_per_window": 4096, "skew": 0.5, "note": "Grüße \x00"},
    )


def same(one: Trace, two: Trace) -> None:
    for name in FIELDS:
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert a.tolist() == b.tolist(), name
    assert dict(one.metadata) == dict(two.metadata)
    assert [type(v) for v in one.metadata.values()] == [type(v) for _, v in sorted(two.metadata.items())]


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(1, 4)] * 4, st.integers(1, 9)),
    st.sampled_from([0, 1, 255, 2**31 - 1, 2**40]),
    st.sets(st.sampled_from(FIELDS[1:])),
    st.integers(0, 2**32),
)
def test_what_is_saved_is_loaded(tmp_path_factory, sizes, largest, left_out, seed):
    windows, ranks, layers, experts, tokens = sizes
    if "routing" in left_out:
        left_out = {*left_out, "seq_start"}
    trace = made(windows, ranks, layers, experts, tokens, 1 + seed % experts, seed, largest)
    trace = replace(trace, **dict.fromkeys(left_out))
    path = tmp_path_factory.getbasetemp() / "saved.npz"
    save_trace(trace, path)
    loaded = load_trace(path)
    same(loaded, trace)
    assert loaded.name == "saved"
    assert (loaded.num_windows, loaded.num_layers, loaded.num_experts) == (windows, layers, experts)
    assert loaded.top_k == (None if "routing" in left_out else 1 + seed % experts)


def test_the_same_trace_gives_the_same_bytes(tmp_path, monkeypatch):
    save_trace(made(), tmp_path / "one.npz")
    monkeypatch.setattr("time.time", lambda: 1e9)
    save_trace(replace(made(), metadata=dict(reversed(made().metadata.items()))), tmp_path / "two.npz")
    one, two = ((tmp_path / name).read_bytes() for name in ("one.npz", "two.npz"))
    assert one == two
    with np.load(tmp_path / "one.npz", allow_pickle=False) as file:  # any numpy reads it
        assert set(file.files) == {*FIELDS, "metadata"}
        assert json.loads(str(file["metadata"])) == made().metadata


def test_it_appears_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = at(tmp_path / "kept.npz", b"older")
    with pytest.raises(FileFormatError, match="must hold token counts"):
        save_trace(negative(), path)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        save_trace(made(), path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["kept.npz"]
    assert path.read_bytes() == b"older"
    save_trace(made(), path)
    same(load_trace(path), made())
    plain = at(tmp_path / "plain", b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def negative() -> Trace:
    """A trace that was written to after it was made."""
    trace = made()
    trace.load[0, 0, 0] = -1
    return trace


def test_routing_stays_small(tmp_path):
    """Two bytes an id up to 65,536 experts."""
    for experts, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.int32)):
        load = np.zeros((1, 1, experts), np.int64)
        routing = np.array([[[0, experts - 1]]])
        read = load_trace(at(tmp_path / "wide.npz", npz(load=load, routing=routing))).routing
        assert read is not None
        assert read.dtype == dtype
        assert read.tolist() == routing.tolist()


def test_one_window_of_ranks_without_its_axis(tmp_path):
    by_rank = np.stack([LOAD[0], LOAD[1]])
    trace = load_trace(at(tmp_path / "one.npz", npz(load=by_rank.sum(axis=0), load_by_rank=by_rank)))
    assert trace.load_by_rank is not None
    assert trace.load_by_rank.tolist() == [by_rank.tolist()]


def test_requests_of_no_token(tmp_path):
    trace = load_trace(at(tmp_path / "r.npz", npz(load=LOAD, routing=ROUTING[:0], seq_start=np.array([0, 0]))))
    assert trace.routing is None
    assert trace.seq_start is None
    start = np.array([0, 0, 5, 5], np.uint8)
    trace = load_trace(at(tmp_path / "r.npz", npz(load=LOAD, routing=ROUTING, seq_start=start)))
    assert trace.seq_start is not None
    assert trace.seq_start.tolist() == start.tolist()


STARTS = (
    "it must be one row from 0 to the 5 tokens of `routing`; "
    "record the first token of every request and, last, the number of tokens."
)
RANKS = "it must be (2, ranks, 3, 4), as `load` is; record the ranks' loads of the same windows."
IDS = "it must be distinct and not negative; use the model's own layer numbers, or leave it out."
VALUES = "it must hold texts and finite numbers under text keys; leave other values out, or write them as text."
ERRORS = {
    "requests without tokens": (
        {"seq_start": [0, 5]},
        "`seq_start` without `routing`: it must split the tokens of `routing`; leave it out.",
    ),
    "requests that begin late": (
        {"routing": ROUTING, "seq_start": [1, 5]},
        f"`seq_start` of shape (2,) from 1 to 5: {STARTS}",
    ),
    "requests beyond the tokens": (
        {"routing": ROUTING, "seq_start": [0, 6]},
        f"`seq_start` of shape (2,) from 0 to 6: {STARTS}",
    ),
    "no request": ({"routing": ROUTING, "seq_start": np.zeros(0, int)}, f"`seq_start` of shape (0,): {STARTS}"),
    "requests in a square": ({"routing": ROUTING, "seq_start": [[0, 5]]}, f"`seq_start` of shape (1, 2): {STARTS}"),
    "requests backwards": (
        {"routing": ROUTING, "seq_start": np.array([0, 3, 2, 5], np.uint8)},
        "`seq_start` with 2 after 3 at request 1: it must not fall; order the requests as their tokens are.",
    ),
    "fractions of a request": (
        {"routing": ROUTING, "seq_start": [0.0, 5.0]},
        "`seq_start` of dtype float64: it must hold integers; convert it with .astype(np.int64).",
    ),
    "ranks of other windows": (
        {"load_by_rank": LOAD[:1, None]},
        f"`load_by_rank` of shape (1, 1, 3, 4): {RANKS}",
    ),
    "no rank": ({"load_by_rank": LOAD[:, None][:, :0]}, f"`load_by_rank` of shape (2, 0, 3, 4): {RANKS}"),
    "ranks without their axis": ({"load_by_rank": LOAD}, f"`load_by_rank` of shape (2, 3, 4): {RANKS}"),
    "ranks that lose a token": (
        {"load_by_rank": np.stack([LOAD - (LOAD == 17), 0 * LOAD], axis=1)},
        "`load_by_rank` with 16 tokens over the ranks where `load` has 17 (window 1, layer 1, expert 1): "
        "it must sum to `load` over the ranks; record both from the same tokens.",
    ),
    "ranks that give tokens back": (
        {"load_by_rank": np.stack([LOAD + 1, 0 * LOAD - 1], axis=1)},
        "`load_by_rank` with counts from -1 to 24: it must hold token counts, not negative, fewer than 2**62 together; "
        "check how it was recorded.",
    ),
    "numbers of other layers": (
        {"layer_ids": [1, 2]},
        "`layer_ids` of shape (2,): it must be (3,); give one number to every layer of `load`.",
    ),
    "a layer twice": ({"layer_ids": [1, 2, 1]}, f"`layer_ids` [1, 2, 1]: {IDS}"),
    "a layer below zero": ({"layer_ids": [1, 2, -1]}, f"`layer_ids` [1, 2, -1]: {IDS}"),
    "metadata of bytes": (
        {"metadata": np.frombuffer(b"{}", np.uint8)},
        "`metadata` of dtype uint8 and shape (2,): it must be one text; store json.dumps of a flat object.",
    ),
    "metadata of objects": (
        {"metadata": np.array({"model": "m"}, object)},
        "`metadata` of dtype object and shape (): it must be one text; store json.dumps of a flat object.",
    ),
    "metadata that is a list": (
        {"metadata": "[1]"},
        "`metadata` of type list: it must be an object; give names to its values.",
    ),
    "metadata in a tree": ({"metadata": '{"a": {}}'}, f"`metadata` with 'a': {{}}: {VALUES}"),
    "metadata of truth": ({"metadata": '{"a": true}'}, f"`metadata` with 'a': True: {VALUES}"),
    "metadata without number": ({"metadata": '{"a": NaN}'}, f"`metadata` with 'a': nan: {VALUES}"),
    "metadata without end": ({"metadata": '{"a": 1e999}'}, f"`metadata` with 'a': inf: {VALUES}"),
    "too much metadata": (
        {"metadata": '{"a": "' + "x" * 70000 + '"}'},
        "`metadata` of 70009 characters: it must be at most 65536 characters; store less.",
    ),
}


@pytest.mark.parametrize("mistake", ERRORS)
def test_wrong_arrays(tmp_path, mistake):
    arrays, text = ERRORS[mistake]
    path = at(tmp_path / "wrong.npz", npz(load=LOAD, **{name: np.asarray(array) for name, array in arrays.items()}))
    with pytest.raises(FileFormatError) as caught:
        load_trace(path)
    assert str(caught.value) == f"`{path}` is {text}"


@pytest.mark.parametrize("text", ["{", "", "[" * 60000, '{"a": 1,}', '{"a": ' + "9" * 5000 + "}"])
def test_metadata_that_is_not_json(tmp_path, text):
    path = at(tmp_path / "wrong.npz", npz(load=LOAD, metadata=np.array(text)))
    with pytest.raises(FileFormatError, match="`metadata` that is not JSON"):
        load_trace(path)


def test_what_was_written_to_after_it_was_made_is_not_saved(tmp_path):
    with pytest.raises(FileFormatError) as caught:
        save_trace(negative(), tmp_path / "wrong.npz")
    assert str(caught.value).startswith(f"`{tmp_path / 'wrong.npz'}` is `load` with counts from -1 to ")
    assert not list(tmp_path.iterdir())


def test_archives_refuse_objects():
    with pytest.raises(ValueError, match="allow_pickle"):
        npz_bytes({"load": np.array([None])}, compress=True)


# Requests and the layers' own numbers.
RECORDED = {"synthetic_deepseek_v2_lite": (7, range(1, 27)), "deepseek_v4_flash_decode": (6, range(3, 43))}


@pytest.mark.parametrize("name", ["synthetic_deepseek_v2_lite", *measured_names("deepseek_v4_flash_decode")])
def test_requests_and_layers_as_recorded(name, tmp_path):
    trace = load_trace(trace_file(name, tmp_path))
    requests, layers = RECORDED[name]
    assert trace.seq_start is not None
    assert trace.layer_ids is not None
    assert len(trace.seq_start) == requests + 1
    assert trace.layer_ids.tolist() == list(layers)
    save_trace(trace, tmp_path / "again.npz")
    same(load_trace(tmp_path / "again.npz"), trace)


def test_the_trace_comes_first_as_torch_save_has_it(tmp_path):
    with pytest.raises(UnsupportedTypeError) as caught:
        save_trace(tmp_path / "old.npz", made())
    assert str(caught.value) == (
        f"`trace` is of type {type(tmp_path).__name__}: it must be a Trace; "
        "call save_trace(trace, path), the trace first."
    )
    with pytest.raises(UnsupportedTypeError, match="of type ndarray: it must be a Trace; pass a Trace"):
        save_trace(made().load, tmp_path / "load.npz")
    assert not list(tmp_path.iterdir())
    made().save(tmp_path / "saved.npz")
    same(load_trace(tmp_path / "saved.npz"), made())


def test_a_trace_is_shown_in_one_line():
    trace = replace(made(windows=2, ranks=3, layers=4, experts=5, tokens=6, top_k=2), metadata={"model": "tiny"})
    requests = len(trace.seq_start) - 1
    assert repr(trace) == (
        f"Trace({trace.name!r}, windows=2, layers=4, experts=5, tokens=6, top_k=2, requests={requests}, "
        "source_ranks=3, model=tiny)"
    )
    assert repr(Trace("loads", trace.load)) == "Trace('loads', windows=2, layers=4, experts=5)"
