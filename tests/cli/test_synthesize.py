"""`evenmoe synthesize`, as on the command line."""

from __future__ import annotations

import json

from evenmoe.traces import load_trace, synthesize
from evenmoe.traces.models import MODELS
from tests.cli.running import Run


def test_every_option_reaches_the_trace(evenmoe: Run, tmp_path):
    out = tmp_path / "made.npz"
    options = ("--model", "gpt-oss-20b", "--windows", 5, "--tokens-per-window", 100, "--requests", 2, "--num-layers", 3)
    done = evenmoe(
        "synthesize", *options, "--routing", "--source-ranks", 4, "--skew", 1, "--seed", 7, "-o", out, "--json"
    )
    assert (done.code, done.err) == (0, "")
    said = json.loads(done.out)
    trace = load_trace(out)
    again = synthesize(
        "gpt-oss-20b", num_windows=5, tokens_per_window=100, requests=2, num_layers=3, routing=True, source_ranks=4,
        skew=1.0, seed=7,
    )  # fmt: skip
    assert (trace.load == again.load).all()
    assert (trace.routing == again.routing).all()
    assert (trace.load_by_rank == again.load_by_rank).all()
    assert said["parameters"] == dict(trace.metadata)
    assert said["target_bytes"] == out.stat().st_size
    assert (said["num_tokens"], said["num_source_ranks"], said["routing"]) == (500, 4, True)
    assert said["statistics_median_of_layers"]["locality_of_neighbors"] > 1
    text = evenmoe("synthesize", *options, "-o", out).out
    assert text.startswith(f"{out}: 5 windows of 100 tokens, 3 layers, 32 experts, top-4; ")
    assert "locality" not in text
    assert "gini" in text


def test_models_are_listed(evenmoe: Run):
    done = evenmoe("synthesize", "--list-models")
    assert done.code == 0
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", *MODELS]
    assert "deepseek-v3        58 (3-60)            256     8   7168   2048      44.0" in lines


def test_mistakes(evenmoe: Run, tmp_path):
    done = evenmoe("synthesize", "--model", "gpt5", "-o", tmp_path / "p.npz")
    assert done.code == 2
    assert done.err.startswith("evenmoe: `--model` is 'gpt5': it must be one of deepseek-moe-16b, ")
    done = evenmoe("synthesize", "-o", tmp_path / "no" / "p.npz", "--windows", 1, "--num-layers", 1)
    assert done.code == 2
    assert "No such file or directory" in done.err
