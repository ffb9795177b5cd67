"""`evenmoe plan --for ENGINE`: the engine's file, options and rule; what is judged is what the file holds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evenmoe.engines import ENGINES
from evenmoe.formats import read
from evenmoe.placement import Placement
from evenmoe.rules import RULES
from tests.cli.running import Run

NAMES = list(ENGINES)


def load(tmp_path, windows: int = 9) -> tuple[str, np.ndarray]:
    found = np.random.default_rng(0).poisson(900 / np.arange(1, 9), (windows, 2, 8))
    np.savez(tmp_path / "l.npz", load=found, layer_ids=[3, 4])
    return str(tmp_path / "l.npz"), found


WORLD = ("--ranks", 4, "--slots", 12)


@pytest.mark.parametrize("name", NAMES)
def test_plans_for_engines(evenmoe: Run, tmp_path, name):
    source, _ = load(tmp_path)
    engine = ENGINES.get(name)
    out = str(tmp_path / f"p{engine.suffixes[0] if engine.suffixes else '.json'}")
    call = ("plan", source, *WORLD, "--for", name, "-o", out)
    done = evenmoe(*call, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert (said["to"], said["rule"]) == (engine.format, RULES.get(engine.rule).name)
    assert said["engine"]["launch"] == list(engine.launch(out, 4, 12, 8))
    read(out, format=engine.format, num_ranks=4, num_experts=8)
    shown = evenmoe(*call).out
    for option in engine.launch(out, 4, 12, 8):
        assert f"    {option}\n" in shown
    assert f"beside its own balancer ({engine.balancer_words}; " in shown


def test_what_is_judged_is_what_the_file_holds(evenmoe: Run, tmp_path):
    """The rank rule plans an order of replicas, which Ascend's map has no place for."""
    source, counts = load(tmp_path)
    out = tmp_path / "p.json"
    said = json.loads(evenmoe("plan", source, *WORLD, "--for", "mindie", "-o", out, "--json").out)
    written = read(out, num_ranks=4, num_experts=8).placement
    assert isinstance(written, Placement)
    total = counts.sum(axis=0)
    loads = RULES.get("rank").rank_loads(total, written)
    assert said["par"]["planned"]["all_tokens"]["mean"] == pytest.approx(
        (loads.max(axis=1) / loads.mean(axis=1)).mean(), abs=1e-6
    )
    assert not any("order of replicas" in note for note in said["notes"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--for", "x"), "`--for` is 'x': it must be one of sglang, vllm, tensorrt-llm, vllm-ascend, mindie, evenmoe,"),
        (("--for", "sglang"), "`--out` is not given: it must name the file that sglang reads; pass -o placement.json."),
        (("--for", "sglang", "-o", "p.txt"), "`--out` is p.txt: it must end in .json or .pt for sglang; name it "),
        (("--for", "vllm", "-o", "p.json", "--rule", "batch"), "`--rule` is batch beside --for vllm: it must be "),
        (("--for", "vllm", "-o", "p.json", "--to", "deepseek"), "`--to` is deepseek beside --for vllm: it must be "),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(evenmoe: Run, tmp_path, monkeypatch, options, text):
    monkeypatch.chdir(tmp_path)
    source, _ = load(tmp_path)
    done = evenmoe("plan", source, *WORLD, *options)
    assert done.code == 2
    assert text in done.err.replace("\n", " ")


def test_an_engine_of_the_users(evenmoe: Run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from evenmoe.engines.engine import Engine\n"
        "MINE = Engine('mine', 'mine 1', 'vllm-list', 'even', 'any', ('--map {path}',))\n"
    )
    source, _ = load(tmp_path)
    done = evenmoe("plan", source, *WORLD, "--for", "py:mine.py:MINE", "-o", "p.json", "--all")
    assert done.code == 0, done.err
    assert "for mine 1 (replicas: any):\n    --map p.json\n" in done.out
    assert "own balancer" not in done.out


def lite(tmp_path, layers: int = 26) -> str:
    """Counts of 26 layers of 64 experts, which is DeepSeek-V2-Lite, whose first layer is dense."""
    np.savez(tmp_path / "l.npz", load=np.random.default_rng(0).poisson(900 / np.arange(1, 65), (2, layers, 64)))
    return str(tmp_path / "l.npz")


FAST = ("--ranks", 8, "--slots", 72, "--planner", "greedy", "--all")


def test_dense_layers_of_a_known_model_are_known(evenmoe: Run, tmp_path):
    out = tmp_path / "p.json"
    done = evenmoe("plan", lite(tmp_path), *FAST, "--for", "sglang", "-o", out, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["layer_ids"] == list(range(1, 27))
    assert "layers are numbered 1-26 as in deepseek-v2-lite, 26 layers of 64 experts (--first-layer)" in said["notes"]
    rows = json.loads(out.read_text())["physical_to_logical_map"]
    assert (len(rows), rows[0]) == (27, [slot % 64 for slot in range(72)])  # as SGLang begins
    told = evenmoe("plan", lite(tmp_path), *FAST, "--for", "sglang", "-o", out, "--first-layer", 4, "--json")
    said = json.loads(told.out)
    assert (said["layer_ids"][0], [note for note in said["notes"] if "numbered" in note]) == (4, [])
    assert len(json.loads(out.read_text())["physical_to_logical_map"]) == 30


def test_a_model_that_is_not_known_needs_the_number_before_it_is_planned(evenmoe: Run, tmp_path, monkeypatch):
    monkeypatch.setattr("evenmoe.planner.plan.plan_with", lambda *_: pytest.fail("planned"))
    done = evenmoe("plan", lite(tmp_path, layers=25), *FAST, "--for", "sglang", "-o", tmp_path / "p.json")
    assert done.code == 2
    assert "must say the model's own number of each of the 25 rows: sglang-location counts dense layers" in done.err
    assert not (tmp_path / "p.json").exists()


def test_numbers_of_the_placement_in_use_count_more_than_those_of_a_model(evenmoe: Run, tmp_path):
    before, out = tmp_path / "before.json", tmp_path / "p.json"
    source = lite(tmp_path)
    assert evenmoe("plan", source, *FAST, "--first-layer", 0, "-o", before).code == 0
    done = evenmoe("plan", source, "--previous", before, "--max-copies", 0, "--all", "-o", out, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["copies"] == 0


def test_uneven_ranks_have_no_balancer_to_compare_with(evenmoe: Run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from evenmoe.engines.engine import Engine\n"
        "MINE = Engine('mine', 'mine 1', 'evenmoe-placement', 'even', 'any', ('--map {path}',))\n"
    )
    source, _ = load(tmp_path)
    call = ("plan", source, *WORLD, "--dead", "3", "--for", f"py:{tmp_path}/mine.py:MINE", "-o", tmp_path / "p.json")
    done = evenmoe(*call, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["engine"]["own_balancer"] is None
