"""SGLang's recorder in mode per_token, as its own classes write it: every token's experts are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.io.torch_file import torch_bytes

#: Layer 0 is dense; slot 4 is another replica of expert 0.
SLOTS = np.array([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 0, 3]])


def record(number: int, rank: int, *tokens: tuple[list[int], list[int]], lengths: list[int] | None = None) -> dict:
    """A pass; of each token the slots in layers 1 and 2."""
    ids = np.full((3, len(tokens), 8), -1, np.int32)
    for token, layers in enumerate(tokens):
        for layer, chosen in enumerate(layers, start=1):
            ids[layer, token, : len(chosen)] = chosen
    counts = np.stack([np.bincount(row[row >= 0], minlength=6) for row in ids]).astype(np.int32)
    found = {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary", "input_ids": [1] * len(tokens)}
    found |= {"positions": list(range(len(tokens))), "extend_seq_lens": lengths, "forward_mode": 1 if lengths else 2}
    return {**found, "topk_ids_of_layer": ids, "misc_objects": [], "global_physical_count": counts}


def dump(path: Path, *records: dict) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(torch_bytes({"records": list(records), "last_physical_to_logical_map": SLOTS}))
    return path


def routing(path: Path, **told) -> tuple[list, list[int], list, tuple[str, ...]]:
    contents = formats.read(path, **told)
    trace = contents.trace
    assert trace is not None
    assert trace.routing is not None
    assert trace.seq_start is not None
    assert contents.load is not None
    return trace.routing.tolist(), trace.seq_start.tolist(), contents.load.tolist(), contents.notes


def test_tokens_become_the_routing_pass_by_pass_and_rank_by_rank(tmp_path):
    """Three tokens of prefill in two requests, and one of decode, on each of two ranks."""
    first = record(7, 0, ([0, 1], [0, 1]), ([4, 2], [4, 0]), ([5, 3], [2, 3]), lengths=[2, 1])
    dump(tmp_path / "d" / "0.pt", first, record(8, 0, ([1, 2], [5, 1])))
    dump(tmp_path / "d" / "1.pt", record(7, 1, ([2, 3], [0, 2])), record(8, 1))
    tokens, starts, load, notes = routing(tmp_path / "d")
    assert tokens == [
        [[0, 1], [3, 2]],
        [[0, 2], [0, 3]],
        [[1, 3], [1, 0]],
        [[2, 3], [3, 1]],
        [[1, 2], [3, 2]],
    ]
    assert starts == [0, 2, 3, 4, 5]
    assert load == [[[2, 2, 2, 2], [2, 2, 1, 3]], [[0, 1, 1, 0], [0, 0, 1, 1]]]
    assert "kept the routing of 5 tokens, 2 experts each" in notes
    assert formats.read(tmp_path / "d").layer_ids == (1, 2)


def test_padded_tokens_are_counted_where_the_recorder_counts_them_and_no_routing(tmp_path):
    path = dump(tmp_path / "x.pt", record(7, 0, ([0, 1], [0, 1]), ([4, 2], []), ([5, 3], [2, 3]), lengths=[2, 1]))
    tokens, starts, load, notes = routing(path)
    assert (tokens, starts) == ([[[0, 1], [3, 2]], [[1, 3], [1, 0]]], [0, 1, 2])
    assert load == [[[2, 2, 1, 1], [1, 1, 1, 1]]]
    assert any(note.startswith("counted 1 of 3 tokens, but left them out of the routing") for note in notes)


def test_a_padded_batch_does_not_say_its_requests(tmp_path):
    path = dump(tmp_path / "x.pt", record(7, 0, ([0, 1], [0, 1]), ([4, 2], [4, 0]), lengths=[1]))
    assert routing(path)[1] == [0, 1, 2]


@pytest.mark.parametrize("layers", ["2", "1:3"])
def test_layers_are_chosen_of_the_tokens_too(layers, tmp_path):
    path = dump(tmp_path / "x.pt", record(7, 0, ([0, 1], [0, 1]), ([4, 2], [4, 0]), lengths=[2]))
    tokens = np.array(routing(path)[0])
    assert routing(path, layers=layers)[0] == tokens[:, -(2 if ":" in layers else 1) :].tolist()


def test_records_that_only_count_are_said(tmp_path):
    counts = record(8, 0, ([0, 1], [0, 1]))
    del counts["topk_ids_of_layer"]
    path = dump(tmp_path / "x.pt", record(7, 0, ([0, 1], [0, 1])), counts)
    contents = formats.read(path)
    assert contents.trace is None
    assert "left out the tokens: some records only count them" in contents.notes


def test_a_plan_of_counts_and_a_trace_of_tokens_come_from_one_file(tmp_path):
    path = dump(tmp_path / "x.pt", record(7, 0, ([0, 1], [0, 1]), ([4, 2], [4, 0]), lengths=[2]))
    done = formats.convert(path, tmp_path / "t.npz", "evenmoe-trace")
    assert not any("left out `routing`" in note for note in done.notes)
    again = formats.read(tmp_path / "t.npz")
    assert again.trace is not None
    assert again.trace.routing is not None
    assert again.trace.routing.tolist() == routing(path)[0]
    done = formats.convert(path, tmp_path / "s.pt", "sglang-stat")
    assert any("left out `routing`, `seq_start`" in note for note in done.notes)
