"""`evenmoe convert`, as on the command line."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.formats.catalogue import FORMATS
from evenmoe.placement import Placement
from tests.effort import effort

PLACEMENT = Placement([[0, 1, 2, 0], [2, 1, 0, 1]], 2)


@pytest.fixture
def table(tmp_path):
    """The placement as an EPLB table, which says nothing of ranks."""
    path = tmp_path / "table.npy"
    formats.write(path, PLACEMENT, format="eplb-table")
    return path


@pytest.fixture
def stdin(monkeypatch):
    """`stdin(data)`: what the command finds on standard input."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_placement_in_another_tools_format(evenmoe, table, tmp_path):
    done = evenmoe("convert", table, tmp_path / "map.json", "--to", "ascend-map", "--ranks", 2)
    assert done.code == 0
    assert done.out == f"{table} (eplb-table: 2 layers, 4 slots, 3 experts) -> {tmp_path / 'map.json'} (ascend-map)\n"
    assert formats.read(tmp_path / "map.json").placement == PLACEMENT


def test_ranks_are_asked_for_only_where_they_are_written(evenmoe, table, tmp_path):
    assert evenmoe("convert", table, tmp_path / "list.json", "--to", "vllm-list").code == 0
    done = evenmoe("convert", table, tmp_path / "map.json", "--to", "ascend-map")
    assert done.code == 2
    assert f"evenmoe: `{table}` is a eplb-table file, which says nothing of ranks: it must be" in done.err
    assert "--ranks" in done.err
    assert not (tmp_path / "map.json").exists()


def test_a_pipe_from_end_to_end(evenmoe, stdin):
    stdin(b'{"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 1]]}')
    done = evenmoe("convert", "-", "-", "--to", "vllm-list", "--first-layer", 0)
    assert done.code == 0
    assert json.loads(done.out) == PLACEMENT.slot_to_expert.tolist()
    assert "- (sglang-location: 2 layers, 4 slots, 3 experts) -> - (vllm-list)" in done.err
    stdin(done.out.encode())
    again = evenmoe("convert", "-", "-", "--to", "tensorrt-llm", "--first-layer", 3, "--json")
    assert again.out.endswith("  3: [0, 1, 2, 0]\n  4: [2, 1, 0, 1]\n")
    assert json.loads(again.err)["from"] == "vllm-list"


def test_a_real_pipe(tmp_path):
    command = [sys.executable, "-m", "evenmoe", "convert", "-", "-", "--to", "eplb-table", "--ranks", "2"]
    done = subprocess.run(command, input=b"[[0, 1, 2, 0], [2, 1, 0, 1]]", capture_output=True, check=True)
    table = np.load(io.BytesIO(done.stdout))
    assert np.array_equal(table[0], PLACEMENT.eplb_table(0).numpy())


def test_the_json_summary_is_one_object(evenmoe, table, tmp_path):
    done = evenmoe("convert", table, tmp_path / "map.json", "--to", "ascend-map", "--ranks", 2, "--json")
    assert json.loads(done.out) == {
        "schema": 1,
        "source": str(table),
        "target": str(tmp_path / "map.json"),
        "from": "eplb-table",
        "to": "ascend-map",
        "kind": "placement",
        "num_layers": 2,
        "num_slots": 4,
        "num_experts": 3,
        "notes": [],
    }


def test_what_is_dropped_is_said(evenmoe, tmp_path):
    text = json.dumps({"logical_count": [[[0, 0], [1, 2]], [[0, 0], [3, 4]]]})
    done = evenmoe("convert", text, tmp_path / "load.json", "--to", "lmdeploy")
    assert done.code == 0
    assert done.err.splitlines() == [
        "note: left out 1 layers without a token, taken for dense ones: 0",
        "note: numbered layers 1 from 0: the format counts MoE layers",
        "note: summed 2 windows: the format holds one",
    ]
    assert json.loads((tmp_path / "load.json").read_text()) == [[4, 6]]


def test_counts_per_slot_need_their_placement(evenmoe, tmp_path, table):
    np.save(tmp_path / "slots.npy", np.arange(16, 24).reshape(2, 2, 2))
    assert evenmoe("convert", tmp_path / "slots.npy", tmp_path / "l.json", "--to", "lmdeploy").code == 2
    done = evenmoe(
        "convert", tmp_path / "slots.npy", tmp_path / "l.json", "--to", "lmdeploy", "--map", table, "--ranks", 2
    )
    assert done.code == 0
    assert json.loads((tmp_path / "l.json").read_text()) == [[16 + 19, 17, 18], [22, 21 + 23, 20]]


def test_the_word_trivial(evenmoe, tmp_path):
    sizes = ("--num-layers", 2, "--experts", 3, "--slots", 4, "--ranks", 2)
    assert evenmoe("convert", "trivial", tmp_path / "m.json", "--to", "ascend-map", *sizes).code == 0
    assert formats.read(tmp_path / "m.json").placement == Placement([[0, 1, 2, 0]] * 2, 2)
    assert "must come with sizes" in evenmoe("convert", "trivial", "-", "--to", "vllm-list").err


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("lmdeploy", "`--to` is lmdeploy: it must hold a placement, for that is the value, and holds a load"),
        ("nothing", "`--to` is 'nothing': it must be one of evenmoe-placement, "),
        ("tensorrt-llm", "must say the model's own number of each of the 2 rows"),
    ],
)
def test_a_target_that_does_not_fit(to, message, evenmoe, table, tmp_path):
    (tmp_path / "out").write_text("old")
    done = evenmoe("convert", table, tmp_path / "out", "--to", to)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert (tmp_path / "out").read_text() == "old"


def test_every_format_is_listed(evenmoe):
    done = evenmoe("convert", "--list-formats")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == list(FORMATS)
    helped = "".join(evenmoe("convert", "--help").out.split())  # a line may end at the hyphen of a name
    assert all(name in helped for name in FORMATS)


def test_help_needs_no_numpy():
    code = "import sys; import evenmoe.cli; print(*sorted({'numpy', 'torch', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_large_conversion_is_quick(tmp_path):
    """61 layers of 320 ranks, 1 slot each."""
    slots = np.tile(np.r_[np.arange(256), np.arange(64)], (58, 1))
    formats.write(tmp_path / "map.json", Placement(slots, 320), format="ascend-map")
    # 70 where this was written (0.4 s), busy or idle; seconds would be felt.
    spent = effort(lambda: formats.convert(tmp_path / "map.json", tmp_path / "out.yaml", "tensorrt-llm", first_layer=3))
    assert spent < 300
