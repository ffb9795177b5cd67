"""`evenmoe plan`: any load in, any placement out; the numbers are those of plain loops."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evenmoe import count_copies, plan
from evenmoe.formats import FORMATS, read, write
from evenmoe.placement import Placement, default_placement
from evenmoe.planner.greedy import plan_greedy
from evenmoe.rules import RULES
from evenmoe.traces import load_trace, save_trace, synthesize
from tests.cli.running import Run

RANKS, SLOTS, LAYER_IDS = 4, 20, (1, 2, 3)


@pytest.fixture
def load() -> np.ndarray:
    """6 windows of 3 layers, 16 experts."""
    return np.random.default_rng(0).zipf(1.7, (6, 3, 16)).clip(0, 900).astype(np.int64)


@pytest.fixture
def trace(tmp_path: Path, load: np.ndarray) -> Path:
    path = tmp_path / "load.npz"
    np.savez(path, load=load, layer_ids=np.array(LAYER_IDS))
    return path


def par(load: np.ndarray, placement: Placement) -> float:
    """Mean over layers, by plain loops; every replica takes an even share."""
    ratios = []
    for layer, row in enumerate(load.tolist()):
        slots = placement.slot_to_expert[layer].tolist()
        per_rank = len(slots) // placement.num_ranks
        ranks = [0.0] * placement.num_ranks
        for slot, expert in enumerate(slots):
            ranks[slot // per_rank] += row[expert] / slots.count(expert)
        ratios.append(max(ranks) / (sum(ranks) / len(ranks)))
    return sum(ratios) / len(ratios)


def test_numbers_are_those_of_plain_loops(evenmoe: Run, tmp_path, trace, load):
    out = tmp_path / "p.json"
    done = evenmoe("plan", trace, "-o", out, "--ranks", RANKS, "--slots", SLOTS, "--json")
    assert (done.code, done.err) == (0, "")
    said = json.loads(done.out)
    placement = read(out).placement
    assert placement == plan(load, num_ranks=RANKS, num_slots=SLOTS)
    identity = default_placement(3, 16, RANKS)
    for name, each in (("default_placement", identity), ("planned", placement)):
        found = said["par"][name]
        assert found["all_tokens"]["mean"] == pytest.approx(par(load.sum(axis=0), each), abs=1e-6)
        windows = [par(window, each) for window in load]
        assert found["mean_of_windows"]["mean"] == pytest.approx(np.mean(windows), abs=1e-6)
        worst = found["all_tokens"]["worst_layer"]
        layer = LAYER_IDS.index(worst)
        only = Placement(each.slot_to_expert[layer : layer + 1], RANKS)
        assert found["all_tokens"]["worst"] == pytest.approx(par(load.sum(axis=0)[layer : layer + 1], only), abs=1e-6)
    assert said["replicas_per_expert"] == {
        "min": int(placement.num_replicas.min()),
        "max": int(placement.num_replicas.max()),
    }
    sizes = {
        name: said[f"num_{name}"] for name in ("windows", "planned_windows", "layers", "experts", "ranks", "slots")
    }
    assert list(sizes.values()) == [6, 6, 3, 16, RANKS, SLOTS]
    assert (said["copies"], said["from"], said["to"]) == (None, "evenmoe-trace", "evenmoe-placement")
    assert said["layer_ids"] == list(LAYER_IDS)
    bound = said["par_lower_bound"]["mean"]
    assert 1 <= bound <= said["par"]["planned"]["all_tokens"]["mean"]


def test_text(evenmoe: Run, tmp_path, trace):
    done = evenmoe("plan", trace, "-o", tmp_path / "p.json", "--ranks", RANKS, "--slots", SLOTS)
    assert (done.code, done.err) == (0, "")
    for text in (
        "6 windows, 3 layers, 16 experts",
        "4 ranks, 20 slots, rule even; planned on 6 windows",
        "default placement",
        "planned",
        "no placement beats",
        "replicas per expert: 1 to ",
        f"written: {tmp_path / 'p.json'} (evenmoe-placement)",
    ):
        assert text in done.out, text
    assert "copies" not in done.out
    assert "\x1b" not in done.out  # no colour off a terminal


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS.get(n).kind == "load" and FORMATS.get(n).write])
def test_every_load_gives_the_same_plan(evenmoe: Run, tmp_path, load, name):
    total = load.sum(axis=0, keepdims=True)
    container = FORMATS.get(name).containers[0]
    source = tmp_path / ("load" if container == "folder" else f"load.{container}")
    placement = default_placement(3, 16, RANKS)
    more = ("--num-layers", 3, "--experts", 16) if name == "mindie-csv" else ()  # slots, dump after dump
    write(source, total, format=name, layer_ids=LAYER_IDS, metadata={"placement": placement})
    done = evenmoe(
        "plan", source, "-o", tmp_path / "p.json", "--ranks", RANKS, "--slots", SLOTS, "--from", name, *more, "--json"
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["from"] == name
    assert read(tmp_path / "p.json").placement == plan(total[0], num_ranks=RANKS, num_slots=SLOTS)


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS.get(n).kind == "placement"])
def test_every_placement_format_holds_the_plan(evenmoe: Run, tmp_path, trace, load, name):
    target = tmp_path / f"p.{FORMATS.get(name).containers[0]}"
    done = evenmoe("plan", trace, "-o", target, "--ranks", RANKS, "--slots", SLOTS, "--to", name, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["to"] == name
    written = read(target, format=name, num_ranks=RANKS, num_experts=16).placement
    expected = plan(load, num_ranks=RANKS, num_slots=SLOTS)
    assert written is not None
    # SGLang's file has a row for the dense layer 0 as well.
    held, planned = written.slot_to_expert[-3:], expected.slot_to_expert
    if name == "omni-pattern":  # which sorts the slots of a rank
        planned = np.sort(planned.reshape(3, RANKS, -1), axis=2).reshape(3, -1)
    assert (held == planned).all()
    assert written.num_layers == (4 if name == "sglang-location" else 3)
    kept = tmp_path / "kept.json"
    again = evenmoe("plan", trace, "--ranks", RANKS, "--previous", target, "--max-copies", 0, "-o", kept, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["copies"] == 0
    assert count_copies(expected, read(kept).placement).tolist() == [0, 0, 0]


def test_from_a_placement_in_use(evenmoe: Run, tmp_path, trace, load):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    before = plan(load[0], num_ranks=RANKS, num_slots=SLOTS)
    write(old, before, format="evenmoe-placement", layer_ids=LAYER_IDS)
    done = evenmoe("plan", trace, "-o", new, "--previous", old, "--max-copies", 2, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    after = read(new).placement
    assert after == plan(load, num_ranks=RANKS, num_slots=SLOTS, previous=before, max_copies=2)
    assert said["copies_per_layer"] == count_copies(before, after).tolist()
    assert said["copies"] == sum(said["copies_per_layer"])
    assert max(said["copies_per_layer"]) <= 2
    found = said["par"]
    assert found["planned"]["mean_of_windows"]["mean"] <= found["previous"]["mean_of_windows"]["mean"]
    text = evenmoe("plan", trace, "--previous", old, "--target-par", "9").out
    assert "copies from the previous placement: 0 (0 to 0 per layer)" in text
    assert "written" not in text


def test_mean_windows_and_rules(evenmoe: Run, tmp_path, trace, load):
    out = tmp_path / "p.json"
    world = ("--ranks", RANKS, "--slots", SLOTS, "--json")
    for options, arguments in (
        (("--mean",), {"load": load.sum(axis=0)}),
        (("--most-windows", 2), {"load": np.stack([load[:3].sum(axis=0), load[3:].sum(axis=0)])}),
        (("--most-windows", 1), {"load": load.sum(axis=0)}),
        (("--rule", "batch"), {"load": load, "rule": "batch"}),
        (("--rule", "rank", "--seed", 3), {"load": load, "rule": "rank", "seed": 3}),
        (("--nodes", 2, "--groups", 4, "--mean"), {"load": load.sum(axis=0), "num_nodes": 2, "num_groups": 4}),
    ):
        done = evenmoe("plan", trace, "-o", out, *options, *world)
        assert done.code == 0, done.err
        assert read(out).placement == plan(**arguments, num_ranks=RANKS, num_slots=SLOTS), options
        said = json.loads(done.out)
        evenly = "--rule" not in options
        assert (said["par_lower_bound"] is not None) == evenly
    merged = evenmoe("plan", trace, "--most-windows", 4, *world[:-1])
    assert "planned on 4 windows" in merged.out
    assert merged.err == "note: merged 6 windows into 4 (--most-windows)\n"


def test_another_planner(evenmoe: Run, tmp_path, trace, load, monkeypatch):
    """By name, or a function of the user's in a file; what it does not take is an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import evenmoe\n\n\ndef first_window(load, *, num_ranks, num_slots):\n"
        "    return evenmoe.plan(load[0], num_ranks=num_ranks, num_slots=num_slots)\n"
    )
    call = ("plan", trace, "-o", "p.json", "--ranks", RANKS, "--slots", SLOTS, "-p")
    done = evenmoe(*call, "greedy")
    assert "planned by greedy on 6 windows" in done.out
    expected = plan_greedy(load, num_ranks=RANKS, num_slots=SLOTS)
    assert read("p.json").placement == expected
    mine = "py:mine.py:first_window"
    assert evenmoe(*call, mine).code == 0
    assert read("p.json").placement == plan(load[0], num_ranks=RANKS, num_slots=SLOTS)
    for more, text in (
        (("greedie",), "`--planner` is 'greedie': it must be one of evenmoe, greedy, or py:module:attribute; choose"),
        ((mine, "--nodes", 2, "--groups", 4), f"`--planner` is {mine}, which takes no `--nodes`: it must take it"),
    ):
        done = evenmoe(*call, *more)
        assert (done.code, done.out) == (2, "")
        assert text in done.err


def test_nodes_have_eight_ranks_where_that_divides(evenmoe: Run, trace):
    """As in `simulate`."""
    for ranks, more, nodes in ((16, (), 2), (4, (), 1), (4, ("--nodes", 2), 2)):
        done = evenmoe("plan", trace, "--ranks", ranks, "--slots", 2 * 16, *more, "--json")
        assert json.loads(done.out)["num_nodes"] == nodes


def test_experts_that_do_not_divide_have_no_identity(evenmoe: Run, tmp_path):
    path = tmp_path / "odd.npz"
    np.savez(path, load=np.arange(7)[None])
    said = json.loads(evenmoe("plan", path, "--ranks", 4, "--slots", 8, "--json").out)
    assert list(said["par"]) == ["planned"]


def test_pipes(tmp_path):
    """A synthetic trace through `-` into `plan`, the placement on standard output and the summary beside it."""
    evenmoe = [sys.executable, "-m", "evenmoe"]
    made = subprocess.run(
        [*evenmoe, "synthesize", "--model", "olmoe", "--num-layers", "2", "--windows", "3", "-o", "-", "--json"],
        capture_output=True,
        check=True,
    )
    assert json.loads(made.stderr)["target"] == "-"
    (tmp_path / "t.npz").write_bytes(made.stdout)
    assert load_trace(tmp_path / "t.npz").load.shape == (3, 2, 64)
    planned = subprocess.run(
        [*evenmoe, "plan", "-", "-o", "-", "--ranks", "8", "--slots", "72", "--to", "ascend-map", "--json"],
        input=made.stdout,
        capture_output=True,
        check=True,
    )
    assert json.loads(planned.stdout)["moe_layer_count"] == 2
    assert json.loads(planned.stderr)["num_slots"] == 72


def write_placement(path: Path) -> Path:
    write(path, default_placement(3, 16, RANKS), format="evenmoe-placement", layer_ids=(7, 8, 10))
    return path


def test_mistakes(evenmoe: Run, tmp_path, trace):
    """Exit code 2, one line that names what and how to mend it, nothing written."""
    other = write_placement(tmp_path / "other.json")
    world = ("--ranks", RANKS, "--slots", SLOTS)
    for arguments, text in (
        ((trace,), "`--ranks` is not given: it must say how large the world is; pass --ranks, or --previous with"),
        ((trace, "--ranks", 4), "`--slots` is not given: "),
        ((tmp_path / "none.npz", *world), "none.npz` is "),
        (
            (other, "--ranks", 8),
            "is a placement (evenmoe-placement): it must be a load or a trace; name the recorded load",
        ),
        (('{"0": [0, 1, 0, 1]}', "--ranks", 8), "is a placement (vllm-layer-map): it must be a load or a trace"),
        ((other, *world), "is a placement (evenmoe-placement): it must be a load or a trace; name the recorded load"),
        (
            (trace, *world, "--to", "vllm-jsonl"),
            "`--to` is 'vllm-jsonl': it must be a format of placements; use one of",
        ),
        ((trace, *world, "--to", "yaml"), "`--to` is 'yaml': "),
        ((trace, "--previous", trace), "`--previous` is "),
        (
            (trace, "--previous", other),
            "a placement of the layers 7-8, 10: it must hold the load's layers, 1-3; choose the layers",
        ),
        ((trace, *world, "--max-copies", 1), "`--max-copies` is 1: it needs `--previous`"),
        (
            (trace, *world, "--rule", "best"),
            f"`--rule` is 'best': it must be one of {', '.join(RULES)}",
        ),
        ((trace, *world, "--first-layer", 3), "layer 1 as its first: it must begin with layer 3, as --first-layer"),
        ((trace, "--ranks", 4, "--slots", 18), "`--slots` is 18"),
        ((trace, *world, "--map", trace), "`--map` is "),
    ):
        done = evenmoe("plan", *arguments, "-o", tmp_path / "p.json")
        assert done.code == 2, (arguments, done)
        assert done.err.startswith("evenmoe: "), (arguments, done.err)
        assert text in done.err, (text, done.err)
        assert len(done.err.splitlines()) == 1
        assert done.out == ""
        assert not (tmp_path / "p.json").exists()


def test_layer_numbers(evenmoe: Run, tmp_path, load):
    """SGLang counts dense layers: rows of a load that does not say which layer is first need to be told."""
    path = tmp_path / "bare.npz"
    np.savez(path, load=load)
    world = ("--ranks", RANKS, "--slots", SLOTS, "--to", "sglang-location", "-o", tmp_path / "p.json")
    done = evenmoe("plan", path, *world)
    assert done.code == 2
    assert "--first-layer" in done.err
    assert evenmoe("plan", path, *world, "--first-layer", 3).code == 0
    rows = json.loads((tmp_path / "p.json").read_text())["physical_to_logical_map"]
    assert len(rows) == 6
    assert evenmoe("plan", path, *world, "--first-layer", 3, "--layers", "1:").code == 0
    again = json.loads((tmp_path / "p.json").read_text())["physical_to_logical_map"]
    assert (len(again), again[3]) == (6, again[0]), "the second row is layer 4 also where the first is left out"


def test_whole_traces_are_read_as_loads(evenmoe: Run, tmp_path):
    """Routing, requests and ranks in the file do no harm."""
    trace = synthesize("olmoe", num_windows=2, tokens_per_window=64, num_layers=2, routing=True, source_ranks=2)
    save_trace(trace, tmp_path / "whole.npz")
    said = json.loads(evenmoe("plan", tmp_path / "whole.npz", "--ranks", 8, "--slots", 64, "--json").out)
    assert said["num_layers"] == 2
    assert any("routing" in note for note in said["notes"])
    assert io.BytesIO((tmp_path / "whole.npz").read_bytes()).read(2) == b"PK"


def test_judged_on_windows_that_were_not_planned_on(evenmoe: Run, tmp_path, trace, load):
    """The written plan has seen everything; the one that is judged, the first two thirds, by plain loops."""
    out = tmp_path / "p.json"
    done = evenmoe("plan", trace, "-o", out, "--ranks", RANKS, "--slots", SLOTS, "--json")
    said = json.loads(done.out)
    assert said["held_out"] == {
        "unit": "windows", "planned": 4, "judged": 2,
        "description": "planned on the first 4 windows, judged on the last 2",
    }  # fmt: skip
    assert read(out).placement == plan(load, num_ranks=RANKS, num_slots=SLOTS)
    identity, tried = default_placement(3, 16, RANKS), plan(load[:4], num_ranks=RANKS, num_slots=SLOTS)
    before, after = (np.mean([par(window, each) for window in load[4:]]) for each in (identity, tried))
    assert said["par"]["default_placement"]["held_out"]["mean"] == pytest.approx(before, abs=1e-6)
    assert said["par"]["planned"]["held_out"]["mean"] == pytest.approx(after, abs=1e-6)
    assert said["verdict"]["in_use"] == "default_placement"
    shown = evenmoe("plan", trace, "--ranks", RANKS, "--slots", SLOTS).out
    assert f"{after:.3f}" in shown
    assert said["verdict"]["sentence"] in shown


def test_previous_is_what_a_plan_is_compared_with(evenmoe: Run, tmp_path, trace):
    write(tmp_path / "old.json", Placement([[*range(16), 0, 1, 2, 3]] * 3, RANKS), format="evenmoe-placement")
    said = json.loads(evenmoe("plan", trace, "--previous", tmp_path / "old.json", "--max-copies", 2, "--json").out)
    assert said["verdict"]["in_use"] == "previous"


def test_all_windows_are_planned_on_if_asked(evenmoe: Run, trace):
    call = ("plan", trace, "--ranks", RANKS, "--slots", SLOTS, "--all")
    said = json.loads(evenmoe(*call, "--json").out)
    assert (said["held_out"], said["verdict"], said["par"]["planned"]["held_out"]) == (None, None, None)
    shown = evenmoe(*call).out
    assert "in-sample only (--all): what the plan does to other tokens was not looked at" in shown
    assert "unseen" not in shown


VERDICTS = {
    "gain": (np.full((9, 4, 8), 1000) + np.arange(9)[:, None, None] + 3000 * (np.arange(8) < 1), 16,
             "gain on unseen windows: the busiest rank does "),
    "balanced": (np.full((9, 4, 8), 1_000_000), 16,
                 "no gain: the default placement is as even as a balanced router makes it (PAR 1.000 of all tokens; "),
    "fixed": (np.full((9, 4, 4), 1000) + 3000 * (np.arange(4) < 1), 4,
              "no gain: the ranks' loads are those of the default placement; more slots could change them (--slots)"),
    "few": (np.full((9, 4, 8), 1) + (np.arange(8) < 1), 16,
            "too little to judge: the default placement has a PAR of 1.333 over all tokens, and sampling "),
    "one": (np.full((1, 4, 8), 5) + 10 * (np.arange(8) < 1), 16, " more as single windows"),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts_in_words(evenmoe: Run, tmp_path, name):
    load, slots, text = VERDICTS[name]
    np.savez(tmp_path / "l.npz", load=load)
    done = evenmoe("plan", tmp_path / "l.npz", "--ranks", 4, "--slots", slots)
    assert done.code == 0, done.err
    assert text in done.out


def test_nothing_to_compare_with(evenmoe: Run, tmp_path):
    np.savez(tmp_path / "l.npz", load=np.full((9, 2, 6), 50))
    call = ("plan", tmp_path / "l.npz", "--ranks", 4, "--slots", 8)
    assert json.loads(evenmoe(*call, "--json").out)["verdict"] is None
    assert "no verdict: the experts do not divide by the ranks" in evenmoe(*call).out


def test_tokens_are_divided_where_there_is_one_window(evenmoe: Run, tmp_path):
    trace = synthesize("olmoe", num_windows=1, tokens_per_window=960, num_layers=2, routing=True, requests=1)
    save_trace(trace, tmp_path / "whole.npz")
    said = json.loads(evenmoe("plan", tmp_path / "whole.npz", "--ranks", 8, "--slots", 64, "--json").out)
    assert said["held_out"]["unit"] == "tokens"
    assert "only judged by `routing`: a plan is made from loads" in said["notes"]


def test_decode_says_what_steps_cost(evenmoe: Run, tmp_path, load):
    from evenmoe.planner.decode import mean_step_costs
    from evenmoe.planner.options import PlanOptions

    path, out = tmp_path / "even.npz", tmp_path / "p.json"
    load = load + 200  # no expert has half of a layer
    np.savez(path, load=load)
    options = ("--objective", "decode", "--tokens-per-step", 16, "--top-k", 2, "--weight-rows", 35)
    done = evenmoe("plan", path, "-o", out, "--ranks", RANKS, "--slots", 16, "--json", *options)
    assert (done.code, done.err) == (0, "")
    decode = {"objective": "decode", "tokens_per_step": 16, "top_k": 2, "weight_rows": 35}
    assert read(out).placement == plan(load, num_ranks=RANKS, num_slots=16, **decode)
    asked = PlanOptions(RANKS, 16, **decode)
    planned = mean_step_costs(load[4:], plan(load[:4], num_ranks=RANKS, num_slots=16, **decode), asked).mean()
    ratio = planned / mean_step_costs(load[4:], default_placement(3, 16, RANKS), asked).mean()
    said = [note for note in json.loads(done.out)["notes"] if note.startswith("decode")]
    assert said == [
        f"decode: the costliest rank of a step costs {planned:.0f} rows, {ratio:.3f} of the default placement's "
        "(steps drawn from windows that the plan was not made from)"
    ]
    missing = evenmoe("plan", path, "--ranks", RANKS, "--slots", 16, *options[:4])
    assert missing.code == 2
    assert "`--top-k` is not given: it must say what a decode step is; pass --top-k" in " ".join(missing.err.split())
