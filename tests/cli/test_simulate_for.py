"""`simulate --for ENGINE` and `report --for ENGINE`: what is marked, and where it is said."""

from __future__ import annotations

import json
import re

import pytest

from tests.cli.running import Run
from tests.report.parsed import parse, table
from tests.traces.synthetic import trace_file

WORLD = ("--ranks", 8, "--tokens-per-rank", 2, "--workers", 1)


@pytest.fixture
def trace(tmp_path) -> str:
    return str(trace_file("synthetic_gpt_oss_20b", tmp_path))


def words(text: str) -> str:
    return " ".join(text.split())


def test_what_the_engine_cannot_run_is_marked(evenmoe: Run, tmp_path, trace):
    page = tmp_path / "page.html"
    call = ("simulate", trace, *WORLD, "--for", "tensorrt-llm")
    done = evenmoe(*call, "--report", page, "--out", tmp_path / "a.sim")
    assert done.code == 0, done.err
    said = json.loads(evenmoe(*call, "--json").out)
    names = [policy["name"] for policy in said["policies"]]
    unable = {policy["name"]: policy["cannot_run"] for policy in said["policies"] if policy["cannot_run"]}
    assert unable == {"evenmoe:rule=batch": "batch rule", "oracle": "sees the step"}
    assert said["engine"]["rules"] == ["occurrence", "even"]
    assert said["headline"]["sentence"] in words(done.out)
    assert said["headline"]["sentence"].startswith("Under tensorrt-llm's own rule (occurrence), ")
    assert "Against tensorrt-llm's own balancer, own" in said["headline"]["sentence"]
    assert "* tensorrt-llm cannot run evenmoe:rule=batch (batch rule); oracle (sees the step)" in words(done.out)
    marked = set(re.findall(r"^ (\S+) \*", done.out, flags=re.MULTILINE))
    assert marked == set(unable)
    root = parse(page.read_text(encoding="utf-8"))
    rows = table(root, "All policies on the same steps")
    shown = {row[0].shown: row[-1].shown for row in rows}
    assert shown == {name: f"no: {unable[name]}" if name in unable else "yes" for name in names}
    assert "On tensorrt-llm" in root.text
    report = evenmoe("report", tmp_path / "a.sim", "-o", page)
    assert said["headline"]["sentence"] in words(report.out)
    assert "* tensorrt-llm cannot run" in words(report.out)
    settings = {each["name"]: each["value"] for each in said["settings"]}
    assert settings["the engine's own balancer"].endswith("; it plans once")


def test_a_report_for_an_engine_that_the_replay_was_not_for(evenmoe: Run, tmp_path, trace):
    out, page = tmp_path / "a.sim", tmp_path / "page.html"
    done = evenmoe("simulate", trace, *WORLD, "--out", out, "--json")
    assert json.loads(done.out)["engine"] is None
    said = json.loads(evenmoe("report", out, "-o", page, "--for", "vllm-ascend", "--json").out)
    assert said["engine"]["name"] == "vllm-ascend"
    able = [policy["name"] for policy in said["policies"] if policy["cannot_run"] is None]
    assert said["headline"]["policy"] in able
    assert all("slots=" in name or name == "identity" for name in able)  # one replica each: no rule matters
    assert said["headline"]["beside_own"] is None
    assert "vllm-ascend's own balancer was not replayed" in said["headline"]["details"][0]


@pytest.mark.parametrize("command", ["simulate", "report"])
def test_an_engine_that_is_none(evenmoe: Run, tmp_path, trace, command):
    done = evenmoe(command, trace, "--for", "x")
    assert done.code == 2
    assert "`--for` is 'x': it must be one of sglang, vllm, tensorrt-llm, vllm-ascend, mindie, evenmoe," in done.err


def test_an_own_balancer_of_no_engine(evenmoe: Run, trace):
    done = evenmoe("simulate", trace, *WORLD, "-p", "own")
    assert done.code == 2
    assert "and begins with 'own', an engine's own balancer; say for which engine (--for)." in words(done.err)


def test_the_interval_is_the_engines_unless_it_is_given(evenmoe: Run, trace):
    few = ("-p", "own", "-p", "evenmoe")
    for options, horizon, refresh in (
        (("--for", "sglang"), 1000, "1000"),
        (("--for", "sglang", "--refresh", 4), 1000, "4"),
        (("--for", "sglang", "--horizon", 77), 77, "1000"),
        (("--for", "mindie"), 3000, "3000"),
        ((), 3000, None),
    ):
        policies = few if options else few[2:]
        said = json.loads(evenmoe("simulate", trace, *WORLD, *policies, *options, "--json").out)
        assert said["horizon_steps"] == horizon
        settings = {each["name"]: each["value"] for each in said["settings"]}
        assert refresh in (None, settings["refresh every"])
