"""evenmoe's trace file has one reader and one writer, whichever door it comes through, and loses nothing on the way."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.errors import FileFormatError
from evenmoe.formats.catalogue import FORMATS
from evenmoe.formats.contents import ReadOptions
from evenmoe.placement import Placement
from evenmoe.traces.trace import Trace, load_trace, save_trace

ARRAYS = ("load", "routing", "seq_start", "load_by_rank", "layer_ids")
#: 2 windows of one token each, 2 layers, 3 experts, top-2; token 0 of rank 0, token 1 of rank 1.
WHOLE = Trace(
    "whole",
    np.array([[[1, 1, 0], [0, 1, 1]], [[1, 0, 1], [1, 1, 0]]]),
    routing=np.array([[[0, 1], [2, 1]], [[2, 0], [0, 1]]], np.uint16),
    seq_start=np.array([0, 1, 2]),
    load_by_rank=np.array([[[[1, 1, 0], [0, 1, 1]], [[0] * 3] * 2], [[[0] * 3] * 2, [[1, 0, 1], [1, 1, 0]]]]),
    layer_ids=np.array([3, 4]),
    metadata={"model": "m", "tokens_per_window": 1, "seed": 7},
)


@pytest.fixture
def whole(tmp_path):
    save_trace(WHOLE, tmp_path / "whole.npz")
    return tmp_path / "whole.npz"


def assert_equal(found: Trace, expected: Trace) -> None:
    for name in ARRAYS:
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        assert other is None or np.array_equal(one, other), name
    assert found.metadata == expected.metadata


def test_a_trace_converted_to_a_trace_is_the_same_file(whole, tmp_path):
    done = formats.convert(whole, tmp_path / "again.npz", "evenmoe-trace")
    assert done.notes == ()
    assert (tmp_path / "again.npz").read_bytes() == whole.read_bytes()
    assert_equal(load_trace(tmp_path / "again.npz"), WHOLE)


def test_the_reader_of_formats_gives_the_whole_trace(whole):
    contents = formats.read(whole)
    assert contents.trace is not None
    assert_equal(contents.trace, WHOLE)
    assert (contents.layer_ids, contents.metadata) == ((3, 4), WHOLE.metadata)
    assert contents.load is not None
    assert np.array_equal(contents.load, WHOLE.load)


def test_some_layers_of_a_trace(whole, tmp_path):
    formats.convert(whole, tmp_path / "one.npz", "evenmoe-trace", layers="4")
    expected = dataclasses.replace(
        WHOLE,
        load=np.array([[[0, 1, 1]], [[1, 1, 0]]]),
        routing=np.array([[[2, 1]], [[0, 1]]]),
        load_by_rank=np.array([[[[0, 1, 1]], [[0, 0, 0]]], [[[0, 0, 0]], [[1, 1, 0]]]]),
        layer_ids=np.array([4]),
    )
    assert_equal(load_trace(tmp_path / "one.npz"), expected)


def test_layers_that_a_trace_does_not_number_are_numbered(tmp_path):
    save_trace(dataclasses.replace(WHOLE, layer_ids=None), tmp_path / "counted.npz")
    formats.convert(tmp_path / "counted.npz", tmp_path / "same.npz", "evenmoe-trace")
    assert load_trace(tmp_path / "same.npz").layer_ids is None
    formats.convert(tmp_path / "counted.npz", tmp_path / "numbered.npz", "evenmoe-trace", first_layer=3)
    assert_equal(load_trace(tmp_path / "numbered.npz"), WHOLE)
    with pytest.raises(FileFormatError, match="with layer 3 as its first: it must begin with layer 1"):
        formats.convert(tmp_path / "numbered.npz", tmp_path / "x.npz", "evenmoe-trace", first_layer=1)


@pytest.mark.parametrize("ids", [[4, 3], [2**40, 5]])
def test_layer_numbers_in_any_order_stay_so_in_a_trace(ids, tmp_path):
    save_trace(dataclasses.replace(WHOLE, layer_ids=np.array(ids)), tmp_path / "t.npz")
    formats.convert(tmp_path / "t.npz", tmp_path / "u.npz", "evenmoe-trace")
    assert (tmp_path / "u.npz").read_bytes() == (tmp_path / "t.npz").read_bytes()


KEPT = {
    "vllm-jsonl": {"model"},
    "vllm-safetensors": {"model"},
    "tensorrt-llm-statistics": {"model", "seed", "tokens_per_window"},
}
OTHERS = [name for name in FORMATS if (f := FORMATS.get(name)).kind == "load" and f.write and name != "evenmoe-trace"]


@pytest.mark.parametrize("to", OTHERS)
def test_what_another_format_cannot_hold_is_named(to, whole, tmp_path):
    done = formats.convert(whole, tmp_path / "out", to)
    names = ["routing", "seq_start", "load_by_rank"]
    names += [name for name in ("model", "seed", "tokens_per_window") if name not in KEPT.get(to, ())]
    assert done.notes[0] == f"left out {', '.join(f'`{name}`' for name in names)}: the format has no place for them"
    assert formats.write(tmp_path / "direct", WHOLE, format=to) == done.notes


def test_metadata_that_another_format_holds_arrives(whole, tmp_path):
    formats.convert(whole, tmp_path / "out.jsonl", "vllm-jsonl")
    assert formats.read(tmp_path / "out.jsonl").metadata == {"model": "m"}
    formats.convert(tmp_path / "out.jsonl", tmp_path / "back.npz", "evenmoe-trace")
    assert load_trace(tmp_path / "back.npz").metadata == {"model": "m"}


def test_hidden_layers_come_back_by_way_of_a_trace(tmp_path):
    """Layers 1 and 2 of 5 hidden ones are MoE layers."""
    text = json.dumps({"logical_count": [[0, 0], [1, 2], [3, 4], [0, 0], [0, 0]]})
    formats.convert(text, tmp_path / "t.npz", "evenmoe-trace")
    formats.convert(tmp_path / "t.npz", tmp_path / "back.json", "sglang-logical-count")
    assert json.loads((tmp_path / "back.json").read_text()) == {"logical_count": [json.loads(text)["logical_count"]]}


def test_metadata_that_no_trace_holds_is_named(tmp_path):
    notes = formats.write(
        tmp_path / "t.npz",
        WHOLE.load,
        format="evenmoe-trace",
        metadata={"a": 1, "b": [1], "c": True, "d": float("nan")},
    )
    assert notes == ("left out `b`, `c`, `d`: a trace's metadata are texts and finite numbers",)
    assert load_trace(tmp_path / "t.npz").metadata == {"a": 1}


def test_metadata_too_long_to_be_read_is_not_written(tmp_path):
    with pytest.raises(FileFormatError, match="`metadata` of 65548 characters: it must be at most 65536 characters"):
        save_trace(dataclasses.replace(WHOLE, metadata={"text": "x" * (65536)}), tmp_path / "t.npz")
    assert not (tmp_path / "t.npz").exists()


WRONG = {
    "routing of another model": {"routing": np.array([[[0, 7], [0, 1]]])},
    "routing in floats": {"routing": np.ones((1, 2, 1))},
    "requests without tokens": {"seq_start": np.array([0, 1])},
    "ranks that sum to something else": {"load_by_rank": np.ones((2, 1, 2, 3), int)},
    "layers numbered twice": {"layer_ids": np.array([1, 1])},
    "metadata that are no object": {"metadata": np.array("[1]")},
    "metadata that are numbers": {"metadata": np.array(3)},
}


@pytest.mark.parametrize("arrays", WRONG.values(), ids=WRONG)
def test_a_wrong_trace_is_refused_in_the_same_words_by_both_doors(arrays, tmp_path):
    np.savez(tmp_path / "t.npz", load=WHOLE.load, **arrays)
    with pytest.raises(FileFormatError) as by_trace:
        load_trace(tmp_path / "t.npz")
    with pytest.raises(FileFormatError) as by_format:
        formats.read(tmp_path / "t.npz")
    assert str(by_format.value) == str(by_trace.value)


def test_whole_numbers_in_floats_are_counts(tmp_path):
    np.savez(tmp_path / "t.npz", load=WHOLE.load.astype(float), routing=WHOLE.routing)
    contents = formats.read(tmp_path / "t.npz")
    assert contents.trace is not None
    assert contents.trace.load.dtype == np.int64


def test_parts_of_tokens_are_a_load_and_no_trace(tmp_path):
    np.savez(tmp_path / "t.npz", load=WHOLE.load / 2, routing=WHOLE.routing, layer_ids=[3, 4])
    contents = formats.read(tmp_path / "t.npz")
    assert contents.load is not None
    assert contents.load.tolist() == (WHOLE.load / 2).tolist()
    assert (contents.trace, contents.layer_ids) == (None, (3, 4))
    assert contents.notes == ("left out `routing`: `load` holds no whole numbers, and is no trace's",)
    with pytest.raises(ValueError, match=r"`value` is 0.5 at .*: it must hold whole numbers for evenmoe-trace"):
        formats.convert(tmp_path / "t.npz", tmp_path / "u.npz", "evenmoe-trace")


@pytest.mark.parametrize("largest", [2.0**61, 2.0**63, 1e19, 1.7e308])
def test_more_tokens_than_a_trace_may_hold_are_a_load_and_no_trace(tmp_path, largest):
    """Two of the smallest, 2**61, are the 2**62 that a trace must stay below; 2**63 has no int64."""
    np.savez(tmp_path / "t.npz", load=np.array([[largest, largest]]), metadata='{"top_k": 1}')
    contents = formats.read(tmp_path / "t.npz")
    assert contents.load is not None
    assert contents.load.tolist() == [[[largest, largest]]]
    assert contents.trace is None
    assert contents.notes[0] == "left out `metadata`: `load` holds 2**62 tokens or more, and is no trace's"


# Windows in which nothing was recorded.

GAP = Trace("gap", np.array([[[0, 0]], [[3, 1]], [[0, 0]], [[1, 1]]]), layer_ids=np.array([5]))


def test_a_trace_that_is_written_again_keeps_its_empty_windows_and_no_note_says_otherwise(tmp_path):
    save_trace(GAP, tmp_path / "gap.npz")
    done = formats.convert(tmp_path / "gap.npz", tmp_path / "again.npz", "evenmoe-trace")
    assert (done.notes, done.contents.empty_windows) == ((), 0)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "gap.npz").read_bytes()
    contents = formats.read(tmp_path / "gap.npz")
    assert contents.trace is not None
    assert contents.load is not None
    assert (contents.trace.num_windows, len(contents.load), contents.empty_windows) == (4, 2, 2)


def test_another_format_is_given_the_windows_with_tokens_alone_and_says_so(tmp_path):
    save_trace(GAP, tmp_path / "gap.npz")
    done = formats.convert(tmp_path / "gap.npz", tmp_path / "stat.pt", "sglang-stat")
    assert "left out 2 of 4 windows, in which nothing was recorded" in done.notes
    again = formats.read(tmp_path / "stat.pt").load
    assert again is not None
    assert again.tolist() == [[[3, 1]], [[1, 1]]]


# Slots.


def test_a_map_brings_a_whole_trace_to_experts(tmp_path):
    """Slots 0 and 2 hold expert 0; what the trace says beside its load stays."""
    slots = np.array([[[4, 4, 6, 2]], [[0, 0, 0, 0]]])
    save_trace(Trace("", slots, layer_ids=np.array([5]), metadata={"top_k": 2}), tmp_path / "slots.npz")
    options = ReadOptions(placement=Placement([[0, 1, 0, 2]], 2), placement_layers=(5,))
    formats.convert(tmp_path / "slots.npz", tmp_path / "experts.npz", "evenmoe-trace", options=options)
    again = load_trace(tmp_path / "experts.npz")
    assert again.load.tolist() == [[[10, 4, 2]], [[0, 0, 0]]]
    assert again.layer_ids is not None
    assert (again.layer_ids.tolist(), again.metadata) == ([5], {"top_k": 2})


@pytest.mark.parametrize("more", ["routing", "load_by_rank"])
def test_a_map_is_refused_for_a_trace_that_names_experts(tmp_path, more):
    load = np.array([[[2, 0, 0, 0]]])
    arrays = {"routing": np.zeros((2, 1, 1), np.uint16), "load_by_rank": load[:, None]}
    np.savez(tmp_path / "t.npz", load=load, **{more: arrays[more]})
    with pytest.raises(FileFormatError, match=r"must count slots alone to take a placement \(--map\); leave"):
        formats.read(tmp_path / "t.npz", placement=Placement([[0, 1, 0, 2]], 2))


def test_the_first_layer_finds_the_layers_of_a_map_with_dense_rows(tmp_path):
    """The load's only row is layer 1, whose slots 0 and 2 hold expert 1."""
    np.save(tmp_path / "load.npy", np.array([[4, 4, 6, 2]]))
    found = formats.read(
        tmp_path / "load.npy",
        placement=Placement([[0, 1, 2, 0], [1, 0, 1, 2]], 2),
        placement_layers=(0, 1),
        first_layer=1,
    )
    assert found.load is not None
    assert (found.load.tolist(), found.layer_ids) == ([[[4, 10, 2]]], (1,))
