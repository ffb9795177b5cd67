"""`evenmoe simulate` as its users meet it."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from evenmoe.cli.simulate import progress_bar
from evenmoe.simulator.store import load_simulation
from evenmoe.traces.synthesis import small_trace

SIZES = ("--expert-bytes", 4e6, "--expert-flops", 1e7, "--hidden", 64)
SMALL = ("--ranks", 4, "--tokens-per-rank", 16, "--steps", 6, "--workers", 1, *SIZES)


@pytest.fixture
def trace(tmp_path) -> Path:
    made = small_trace()
    np.savez(tmp_path / "trace.npz", load=made.load, routing=made.routing)
    return tmp_path / "trace.npz"


@pytest.fixture
def loads(tmp_path) -> Path:
    np.savez(tmp_path / "loads.npz", load=small_trace().load)
    return tmp_path / "loads.npz"


def test_the_tables_name_every_policy(evenmoe, trace):
    done = evenmoe("simulate", trace, *SMALL)
    assert done.code == 0, done.err
    assert "trace: 6 steps of 64 tokens on 4 ranks, 1 node" in done.out
    for word in (
        "identity",
        "greedy",
        "evenmoe:slots=32",
        "evenmoe:rule=batch",
        "oracle",
        "Mean PAR",
        "Worst",
        "Break-",
    ):
        assert word in done.out
    assert max(len(line) for line in done.out.splitlines()) <= 80
    assert "Every token-expert assignment is the recorded one" in done.err


def test_json_is_one_object_whose_keys_have_units(evenmoe, trace):
    done = evenmoe("simulate", trace, *SMALL, "--json", "--policy", "greedy", "-p", "evenmoe:refresh=2")
    found = json.loads(done.out)
    assert [policy["name"] for policy in found["policies"]] == ["identity", "greedy", "evenmoe:refresh=2"]
    assert found["tokens_per_step"] == 64
    policy = found["policies"][2]
    assert policy["num_slots"] == 36
    assert policy["extra_memory_bytes_per_rank"] == 4 * 4_000_000  # one slot a rank in each of 4 layers
    assert policy["break_even_steps"] is None or policy["break_even_steps"] >= 0
    assert {"mean_par", "step_time_us", "copies", "deduplicated_rows_within_node"} <= policy.keys()
    names = [row["name"] for row in found["settings"]]
    assert names[:3] == ["command", "model", f"SHA-256 of {trace}"]
    assert done.err == ""


def test_placements_that_are_policies_are_among_the_files(evenmoe, trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = evenmoe("plan", trace, "--ranks", 8, "--slots", 40, "--all", "-o", "p.json")
    assert planned.code == 0, planned.err
    policies = ("-p", "file:p.json", "-p", "file:p.json:rule=token", "-p", "greedy")
    done = evenmoe("simulate", trace, *SMALL, "--ranks", 8, *policies, "--report", "page.html", "--json")
    assert done.code == 0, done.err
    digest = hashlib.sha256(Path("p.json").read_bytes()).hexdigest()
    settings = {row["name"]: row["value"] for row in json.loads(done.out)["settings"]}
    assert settings["SHA-256 of p.json"] == digest
    assert len([name for name in settings if name.startswith("SHA-256")]) == 2
    assert digest in Path("page.html").read_text(encoding="utf-8")


def test_every_option_reaches_the_replay(evenmoe, trace, tmp_path):
    out, page = tmp_path / "out.sim", tmp_path / "page.html"
    sizes = ("--ranks", 8, "--nodes", 4, "--tokens-per-rank", 6, "--chunk", 2, "--steps", 5, "--top-k", 4, "--seed", 7)
    plans = ("--slots", 48, "--groups", 4, "--refresh", 2, "--window", 3, "--horizon", 9, "-p", "greedy")
    bytes_ = ("--expert-bytes", 2, "--copy-bytes", 3, "--dispatch-row-bytes", 4, "--combine-row-bytes", 5)
    speeds = ("--flops-per-s", 6, "--memory-bytes-per-s", 7, "--within-bytes-per-s", 8, "--between-bytes-per-s", 9)
    costs = (
        "--hidden",
        10,
        "--expert-flops",
        1,
        "--latency-us",
        11,
        "--row-per-expert",
        "--no-copy-overlap",
        *bytes_,
        *speeds,
    )
    rest = ("--workers", 2, "--details", "--out", out, "--report", page)
    done = evenmoe("simulate", trace, *sizes, *plans, *costs, *rest)
    assert done.code == 0, done.err
    simulation = load_simulation(out)
    settings = {name: value for name, value, _ in simulation.settings}
    expected = {
        "ranks": "8", "nodes": "4", "tokens per rank and step": "6", "tokens of a request per step": "2", "steps": "5",
        "slots": "48", "expert groups kept inside nodes": "4", "refresh every": "2", "window": "3", "seed": "7",
        "FLOP per row of an expert": "1", "weights of an expert": "2", "copied expert": "3", "row to an expert": "4",
        "row back": "5", "achieved by a rank": "6", "reading weights": "7", "link to ranks of the node": "8",
        "link to other nodes": "9", "latency of an exchange": "11", "token rows in step times": "one per expert",
        "model": "not known", "horizon of the first plan": "9", "experts are copied": "between steps",
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    assert simulation.policies[1].details is not None
    assert "4 groups kept inside nodes" in simulation.policies[1].description
    assert "<html" in page.read_text()[:200]


def test_the_file_is_read_by_report(evenmoe, trace, tmp_path):
    evenmoe("simulate", trace, *SMALL, "--out", tmp_path / "out.sim", "-p", "greedy")
    done = evenmoe("report", tmp_path / "out.sim", "--out", tmp_path / "page.html")
    assert done.code == 0, done.err
    assert "<html" in (tmp_path / "page.html").read_text()[:200]


def test_the_same_call_gives_the_same_bytes(evenmoe, loads, tmp_path):
    out = tmp_path / "out.sim"
    call = ("simulate", loads, *SMALL, "--top-k", 4, "--out", out)
    assert evenmoe(*call).code == 0
    first = out.read_bytes()
    assert evenmoe(*call).code == 0
    assert out.read_bytes() == first


def test_loads_alone_say_what_is_drawn(evenmoe, loads):
    done = evenmoe("simulate", loads, *SMALL, "--top-k", 4, "-p", "evenmoe:rule=token")
    assert done.code == 0
    assert "draws its counts" in done.err
    assert "expected values" in done.err


def test_a_load_of_another_format_is_replayed_like_a_trace(evenmoe, loads, tmp_path):
    rows = [
        f"{layer},{expert},{count}"
        for layer, experts in enumerate(small_trace().load[0].tolist())
        for expert, count in enumerate(experts)
    ]
    (tmp_path / "counts.csv").write_text("\n".join(["layer_id,expert_id,count", *rows]) + "\n")
    np.savez(tmp_path / "one.npz", load=small_trace().load[0])
    options = (*SMALL, "--top-k", 4, "-p", "greedy", "--json")
    found = [json.loads(evenmoe("simulate", tmp_path / name, *options).out) for name in ("counts.csv", "one.npz")]
    assert found[0]["policies"] == found[1]["policies"]
    assert found[0]["trace"] == "counts"


def test_a_synthetic_trace_brings_its_model(evenmoe):
    done = evenmoe(
        "simulate", "synthetic:mixtral", "--ranks", 4, "--tokens-per-rank", 8, "--steps", 3, "--json", "-p", "greedy"
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["num_layers"], found["num_experts"], found["top_k"]) == (32, 8, 2)
    assert {"name": "model", "value": "mixtral-8x7b", "unit": ""} in found["settings"]
    assert not any("SHA-256" in row["name"] for row in found["settings"])


def test_nodes_have_eight_ranks_where_that_divides(evenmoe, trace):
    few = ("--tokens-per-rank", 2, "--steps", 1, "--json", "-p", "identity", *SIZES)
    assert json.loads(evenmoe("simulate", trace, "--ranks", 16, *few).out)["num_nodes"] == 2
    assert json.loads(evenmoe("simulate", trace, "--ranks", 12, *few).out)["num_nodes"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-p", "best"), "use one of identity"),
        (("-p", "greedy:refresh=0"), "1 or more"),
        (("-p", "greedy", "-p", "greedy"), "given once"),
        (("--slots", 33), "use a multiple of 4, 32 or more"),
        (("--chunk", 5), "use one of [1, 2, 4, 8, 16]"),
        (("--nodes", 3), "use one of [1, 2, 4]"),
        (("--top-k", 3), "must be that of the trace, 4"),
        (("--model", "mixtrall"), "the nearest is"),
        (("--flops-per-s", 0), "more than 0"),
        (("--latency-us", "nan"), "0 or more"),
        (("--out", "missing/out.sim"), "folder that exists"),
        (("--ranks", 0), "--ranks"),
        (("--refresh", "often"), "`--refresh` is often: it must be a number of steps or auto; use 1 or more"),
        (("--refresh", 0), "must be a number of steps or auto"),
        (("--horizon", 0), "--horizon"),
        (("--steps", "x"), "--steps"),
        (("-p", "evenmoe:groups=4,rule=batch", "--nodes", 2), "can be planned"),
    ],
)
def test_mistakes_are_explained(evenmoe, trace, arguments, words):
    done = evenmoe("simulate", trace, *SMALL, *arguments)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_wrong_files_are_explained(evenmoe, tmp_path, trace):
    missing = evenmoe("simulate", tmp_path / "nothing.npz", *SMALL)
    assert missing.code == 2
    assert "nothing.npz" in missing.err
    (tmp_path / "text.npz").write_text("hello")
    text = evenmoe("simulate", tmp_path / "text.npz", *SMALL)
    assert text.code == 2
    assert "text.npz" in text.err
    np.savez(tmp_path / "bad.npz", load=np.ones(3))
    assert "bad.npz" in evenmoe("simulate", tmp_path / "bad.npz", *SMALL).err
    devices = [{"device_id": device, "device_expert": [0, 1 + device]} for device in range(2)]
    layers = [{"layer_id": 0, "device_count": 2, "device_list": devices}]
    (tmp_path / "placement.json").write_text(json.dumps({"moe_layer_count": 1, "layer_list": layers}))
    assert "must be a load or a trace" in evenmoe("simulate", tmp_path / "placement.json", *SMALL).err
    assert "must be one of" in evenmoe("simulate", "synthetic:nothing", *SMALL).err
    assert "must not be the trace" in evenmoe("simulate", trace, *SMALL, "--out", trace).err
    both = evenmoe("simulate", trace, *SMALL, "--out", tmp_path / "a", "--report", tmp_path / "a")
    assert "must not be the file of --out" in both.err


def test_an_unknown_model_is_asked_for(evenmoe, trace, loads):
    done = evenmoe("simulate", trace, "--ranks", 4, "--expert-bytes", 4)
    assert done.code == 2
    assert "--expert-flops, --hidden" in done.err
    assert "experts a token has" in evenmoe("simulate", loads, *SMALL).err


def test_the_progress_bar_is_for_terminals():
    for terminal in (True, False):
        text = io.StringIO()
        with progress_bar("replaying", Console(file=text, force_terminal=terminal, width=80)) as progress:
            progress(1, 4)
            progress(3, 4)
        assert ("replaying" in text.getvalue()) is terminal
        assert ("3/4" in text.getvalue()) is terminal
        assert ("left" in text.getvalue()) is terminal


def test_a_trace_from_a_pipe_keeps_its_routing(evenmoe, trace, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(trace.read_bytes())))
    done = evenmoe("simulate", "-", *SMALL, "--policy", "greedy")
    assert done.code == 0, done.err
    assert "Every token-expert assignment is the recorded one" in done.err


def test_mixed_windows_are_more_even_and_said_to_be_wanted(evenmoe, tmp_path):
    """Windows that each have one hot expert; as many mixed as there are experts are even."""
    load = np.full((8, 1, 8), 10)
    load[np.arange(8), 0, np.arange(8)] += 800
    np.savez(tmp_path / "l.npz", load=load)
    sizes = ("--top-k", 1, "--ranks", 4, "--slots", 8, "--hidden", 8, "--expert-flops", 1, "--expert-bytes", 1000)
    sizes += ("--steps", 8, "-p", "static", "--workers", 1, "--tokens-per-rank", 512)
    alone, mixed = (evenmoe("simulate", tmp_path / "l.npz", *sizes, *more) for more in ((), ("--mix", 8)))
    assert "Every step is drawn from one window of the trace" in " ".join(alone.err.split())
    pars = [
        json.loads(evenmoe("simulate", tmp_path / "l.npz", *sizes, *more, "--json").out)["policies"][0]["mean_par"]
        for more in ((), ("--mix", 8))
    ]
    assert pars[0] > 3
    # 2,048 tokens on 4 ranks: 512 ± 20 each, and the largest of four is 1.03 standard deviations above their mean.
    assert 1 <= pars[1] < 1.15
    assert mixed.code == 0
    done = evenmoe("simulate", tmp_path / "l.npz", *sizes, "--mix", 9)
    assert (done.code, done.out) == (2, "")
    assert "`--mix` is 9: it must be 1 to 8, the windows with tokens; mix fewer windows, or record more." in done.err
