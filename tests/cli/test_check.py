"""`evenmoe check`, as on the command line."""

from __future__ import annotations

import json

import numpy as np

GOOD = '{"physical_to_logical_map": [[1, 0, 2, 0], [2, 1, 0, 1]]}'
BAD = '{"physical_to_logical_map": [[0, 0, 1, 3], [0, 1, 2, 3]]}'


def test_nothing_wrong(evenmoe):
    done = evenmoe("check", GOOD, "--ranks", 2)
    assert done.code == 0
    assert done.out == f"{GOOD}: sglang-location, 2 layers, 4 slots, 2 ranks, 3 experts\nnothing wrong\n"
    assert done.err == (
        "note: took 3 experts for all, which the slots show: with more, the last would be missing (--experts)\n"
    )
    assert evenmoe("check", GOOD, "--ranks", 2, "--experts", 3).err == ""


def test_findings_name_layer_rank_and_slot_and_exit_with_1(evenmoe):
    done = evenmoe("check", BAD, "--ranks", 2)
    assert done.code == 1
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.out.splitlines() if line.startswith("│")]
    assert rows == [
        ["error", "missing-expert", "0", "", "", "no slot for expert 2 in layer 0"],
        ["error", "duplicate-replica", "0", "0", "1", "expert 0 in slots 0 and 1 of rank 0 in layer 0"],
    ]
    assert "missing-expert: it must give every expert a slot; a token routed to it has nowhere to go" in done.out
    assert done.out.endswith("2 errors, 0 warnings\n")


def test_the_json_has_every_finding(evenmoe):
    done = evenmoe("check", BAD, "--ranks", 2, "--json")
    assert done.code == 1
    summary = json.loads(done.out)
    assert {key: summary[key] for key in ("format", "clean", "errors", "warnings", "num_slots", "num_ranks")} == {
        "format": "sglang-location",
        "clean": False,
        "errors": 2,
        "warnings": 0,
        "num_slots": 4,
        "num_ranks": 2,
    }
    place = ("kind", "layer", "rank", "slot", "expert")
    assert [summary["findings"][1][name] for name in place] == ["duplicate-replica", 0, 0, 1, 0]


def test_warnings_leave_the_code_at_0(evenmoe, tmp_path):
    np.savez(tmp_path / "t.npz", load=np.array([[[1, 2], [0, 0]]]))
    done = evenmoe("check", tmp_path / "t.npz")
    assert done.code == 0
    assert "no tokens in layer 1" in done.out
    assert done.out.endswith("0 errors, 1 warnings\n")


def test_a_file_that_cannot_be_read_exits_with_2(evenmoe, tmp_path):
    (tmp_path / "f").write_text('{"a": [1, ')
    done = evenmoe("check", tmp_path / "f")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"evenmoe: `{tmp_path / 'f'}` is ")
    assert "Traceback" not in done.err
    assert evenmoe("check", tmp_path / "none").code == 2


def test_many_findings_are_cut_in_text_and_whole_in_json(evenmoe):
    text = json.dumps({"physical_to_logical_map": [[0] * 150 + [1] * 150]})
    done = evenmoe("check", text, "--ranks", 1)
    assert done.code == 1
    assert "198 more; --json lists them" in done.out
    assert len(json.loads(evenmoe("check", text, "--ranks", 1, "--json").out)["findings"]) == 298


def test_standard_input(evenmoe, monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(BAD.encode())))
    assert evenmoe("check", "-", "--ranks", 2).code == 1
