"""What is pinned of the command line: simulations, their page, plans, conversions, differences, findings, files.

Options are written here once each, so that a renamed one is renamed in one place.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evenmoe.cli import main
from tests.pins.cases import Cases
from tests.pins.inputs import distinct_ids, drifted, drifting, integers, sha256, skewed

cases = Cases()


@contextmanager
def folder() -> Iterator[None]:
    """Inside a new folder that holds the inputs; names are relative, since the page shows them."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            _write_inputs()
            yield
        finally:
            os.chdir(before)


def evenmoe(*arguments: object, code: int = 0) -> str:
    """Standard output of one command."""
    out, err, argv = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO(), sys.argv
    sys.argv = ["evenmoe", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as done:
        if done.code != code:
            raise AssertionError(f"{sys.argv} ended with {done.code}: {err.getvalue()}") from None
    finally:
        sys.argv = argv
    out.seek(0)
    return out.read()


def _write_inputs() -> None:
    layers, experts, top_k, windows, tokens = 3, 16, 4, 6, 64
    seeds = 500 + 10 * np.arange(windows)[:, None] + np.arange(layers) // 2
    ids = np.stack([distinct_ids(seed, tokens, top_k, experts).numpy() for seed in seeds.reshape(-1).tolist()])
    ids = ids.reshape(windows, layers, tokens, top_k)
    load = np.zeros((windows, layers, experts), np.int64)
    for w, layer in np.ndindex(windows, layers):
        load[w, layer] = np.bincount(ids[w, layer].reshape(-1), minlength=experts)
    np.savez("trace.npz", load=load, routing=ids.transpose(0, 2, 1, 3).reshape(-1, layers, top_k).astype(np.uint16))
    np.savez("loads.npz", load=drifting(510, 5, 3, 16))
    np.savez("one.npz", load=skewed(520, 3, 16))
    np.savez("later.npz", load=drifted(skewed(520, 3, 16), 530))
    gaps = drifting(540, 4, 2, 12) * (integers(541, 3, 4, 2, 12) > 0)
    gaps[1] = 0
    np.savez("gaps.npz", load=gaps)


def numbers_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number of an object of JSON with its path; members of a list that have names are called by them."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers_of(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            name = item.get("name", index) if isinstance(item, dict) else index
            yield from numbers_of(item, f"{path}[{name}]")
    elif value is None or isinstance(value, bool | int | float):
        yield path, value


def _sorted_numbers(text: str) -> list[list[Any]]:
    return [list(pair) for pair in sorted(numbers_of(json.loads(text)), key=lambda pair: pair[0])]


SIZES = ("--expert-bytes", 4e6, "--expert-flops", 1e7, "--hidden", 64, "--workers", 1)
EVERY_KIND = ("identity", "static", "greedy", "evenmoe", "oracle")
RULES = ("rank", "token", "occurrence", "batch", "even")


def _simulate(*arguments: object) -> dict[str, Any]:
    with folder():
        return {"numbers": _sorted_numbers(evenmoe("simulate", *arguments, *SIZES, "--json"))}


def simulation(name: str, trace: str, *arguments: object, policies: tuple[str, ...] = ()) -> None:
    chosen = [word for policy in policies for word in ("--policy", policy)]
    cases.add(f"simulate/{name}", partial(_simulate, trace, *arguments, *chosen))


def _simulations() -> None:
    world = ("--ranks", 4, "--tokens-per-rank", 16, "--steps", 6)
    simulation("the default policies", "trace.npz", *world)
    simulation("the default policies, loads alone", "loads.npz", *world, "--top-k", 4)
    simulation("the default policies, two nodes", "trace.npz", *world, "--nodes", 2)
    simulation(
        "groups kept inside nodes", "trace.npz", *world, "--nodes", 2, "--groups", 4, "--refresh", 2,
        policies=("static", "greedy", "evenmoe:start=scratch", "oracle:rule=even"),
    )  # fmt: skip
    for kind in EVERY_KIND:
        by_rule = tuple(f"{kind}:rule={rule}" for rule in RULES)
        simulation(f"{kind} by every rule", "trace.npz", *world, "--refresh", 2, policies=by_rule)
        simulation(
            f"{kind} by every rule, two nodes, loads alone", "loads.npz", *world, "--top-k", 2, "--nodes", 2,
            "--refresh", 2, "--slots", 24, policies=by_rule,
        )  # fmt: skip
    simulation(
        "options of policies", "trace.npz", *world, "--refresh", 2,
        policies=(
            "static:slots=24,window=2,pieces=2", "static:planner=greedy,plan-for=even", "greedy:window=1,refresh=3",
            "evenmoe:max-copies=2,start=previous", "evenmoe:target-par=1.05,start=first,rule=even",
            "evenmoe:start=scratch,pieces=3,window=4", "oracle:planner=greedy", "evenmoe:rule=batch,window=1",
        ),
    )  # fmt: skip
    simulation("decoding", "trace.npz", *world, "--chunk", 1, "--seed", 3)
    simulation("a row per expert", "trace.npz", *world, "--row-per-expert", policies=("greedy",))
    simulation("windows that are empty", "gaps.npz", *world, "--top-k", 2, policies=("greedy", "evenmoe:refresh=2"))
    simulation("eight ranks, unlike the trace", "trace.npz", "--ranks", 8, "--tokens-per-rank", 6, "--steps", 5)
    simulation(
        "costs", "trace.npz", *world, "--copy-bytes", 3e5, "--dispatch-row-bytes", 96, "--combine-row-bytes", 192,
        "--flops-per-s", 6e11, "--memory-bytes-per-s", 7e10, "--within-bytes-per-s", 8e9, "--between-bytes-per-s",
        9e8, "--latency-us", 11, "--nodes", 2, policies=("evenmoe:refresh=2",),
    )  # fmt: skip
    simulation(
        "a synthetic trace", "synthetic:mixtral", "--ranks", 4, "--tokens-per-rank", 8, "--steps", 3,
        policies=("greedy", "evenmoe:rule=batch"),
    )  # fmt: skip


def _report(*arguments: object) -> dict[str, Any]:
    with folder():
        evenmoe("simulate", *arguments, *SIZES, "--out", "found.sim", "--report", "at-once.html")
        found = evenmoe("report", "found.sim", "--out", "page.html", "--json")
        page, at_once = Path("page.html").read_text("utf-8"), Path("at-once.html").read_text("utf-8")
        text = re.sub(r"\b[0-9a-f]{64}\b|<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
        return {
            "page": sha256(page),
            "page_at_once": sha256(at_once),
            "numbers_of_the_page": sha256(" ".join(re.findall(r"\d[\d.,]*", text))),
            "numbers": _sorted_numbers(found),
        }


def _reports() -> None:
    world = ("--ranks", 4, "--tokens-per-rank", 16, "--steps", 6)
    cases.add("report/the default policies", partial(_report, "trace.npz", *world))
    cases.add("report/two nodes, details", partial(_report, "trace.npz", *world, "--nodes", 2, "--details"))
    cases.add("report/loads alone", partial(_report, "loads.npz", *world, "--top-k", 4, "-p", "evenmoe:refresh=2"))


def _files(path: Path) -> str:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return sha256(*(part for file in files if file.is_file() for part in (file.name, file.read_bytes())))


def _plan(source: str, *arguments: object, before: tuple[object, ...] = ()) -> dict[str, Any]:
    with folder():
        if before:
            evenmoe("plan", "one.npz", "--out", "before.json", *before)
        found = evenmoe("plan", source, "--out", "plan.json", "--json", *arguments)
        return {"file": _files(Path("plan.json")), "numbers": _sorted_numbers(found)}


def _plans() -> None:
    sizes = ("--ranks", 4, "--slots", 24)
    cases.add("plan/windows", partial(_plan, "loads.npz", *sizes))
    cases.add("plan/the sum", partial(_plan, "loads.npz", *sizes, "--mean"))
    cases.add("plan/merged windows", partial(_plan, "loads.npz", *sizes, "--most-windows", 2))
    cases.add("plan/nodes", partial(_plan, "one.npz", *sizes, "--nodes", 2, "--groups", 4, "--seed", 3))
    for rule in RULES:
        cases.add(f"plan/rule {rule}", partial(_plan, "one.npz", *sizes, "--rule", rule))
    previous = ("--previous", "before.json")
    cases.add("plan/previous", partial(_plan, "later.npz", *previous, before=sizes))
    cases.add("plan/previous, few copies", partial(_plan, "later.npz", *previous, "--max-copies", 3, before=sizes))
    cases.add("plan/previous, a goal", partial(_plan, "later.npz", *previous, "--target-par", 1.1, before=sizes))
    cases.add("plan/some layers", partial(_plan, "one.npz", *sizes, "--layers", "1:3", "--first-layer", 0))


PLACEMENT_FORMATS = {
    "evenmoe-placement": "json",
    "sglang-location": "json",
    "ascend-map": "json",
    "slot-map": "npy",
    "omni-pattern": "npy",
    "vllm-list": "json",
    "vllm-layer-map": "json",
    "tensorrt-llm": "yaml",
    "deepseek": "npz",
    "eplb-table": "npy",
}
MORE_PLACEMENTS = (
    ("sglang-location", "pt"), ("slot-map", "pt"), ("tensorrt-llm", "json"), ("deepseek", "pt"),
    ("eplb-table", "npz"), ("eplb-table", "pt"), ("omni-pattern", "txt"),
)  # fmt: skip
LOAD_FORMATS = (
    ("evenmoe-trace", "npz"), ("sglang-logical-count", "json"), ("sglang-logical-count", "pt"), ("sglang-stat", "pt"),
    ("sglang-detail", "pt"), ("sglang-csv", "csv"), ("vllm-ascend-load", "pt"), ("vllm-ascend-load", "npy"),
    ("mindie-csv", "csv"), ("vllm-safetensors", "safetensors"), ("vllm-jsonl", "jsonl"), ("lmdeploy", "json"),
    ("sglang-detail", ""), ("sglang-csv", ""), ("mindie-csv", ""), ("tensorrt-llm-statistics", ""),
)  # fmt: skip


def _convert(source: str, form: str, ending: str, back: str | None, read: tuple[object, ...] = ()) -> dict[str, Any]:
    """Written in the format; and what is read from there, in the project's own format."""
    with folder():
        if source == "plan.json":
            evenmoe("plan", "one.npz", "--out", source, "--ranks", 4, "--slots", 24)
        target = Path(f"there.{ending}" if ending else "there")
        evenmoe("convert", source, target, "--to", form, "--first-layer", 0)
        pin: dict[str, Any] = {"bytes": sum(f.stat().st_size for f in [target, *target.rglob("*")] if f.is_file())}
        pin["files"] = _files(target)
        if back:
            again = Path(f"again.{'json' if back == 'evenmoe-placement' else 'npz'}")
            evenmoe("convert", target, again, "--to", back, "--from", form, *read)
            pin["read_again"] = _files(again)
        return pin


def _conversions() -> None:
    for form, ending in (*PLACEMENT_FORMATS.items(), *MORE_PLACEMENTS):
        read = () if form in ("evenmoe-placement", "ascend-map", "slot-map", "omni-pattern") else ("--ranks", 4)
        read += ("--first-layer", 0) if form == "sglang-location" else ()
        cases.add(f"convert/{form}.{ending}", partial(_convert, "plan.json", form, ending, "evenmoe-placement", read))
    for form, ending in LOAD_FORMATS:
        read = ("--num-layers", 3, "--experts", 16) if form == "mindie-csv" else ()
        name = f"{form}.{ending}" if ending else f"{form}, a folder"
        cases.add(f"convert/{name}", partial(_convert, "one.npz", form, ending, "evenmoe-trace", read))
    for form in ("sglang-logical-count", "sglang-stat", "vllm-jsonl", "tensorrt-llm-statistics", "evenmoe-trace"):
        ending = {"sglang-logical-count": "json", "sglang-stat": "pt", "vllm-jsonl": "jsonl", "evenmoe-trace": "npz"}
        name, ending = f"convert/{form}, windows", ending.get(form, "")
        cases.add(name, partial(_convert, "loads.npz", form, ending, "evenmoe-trace"))


def _diff(*arguments: object) -> dict[str, Any]:
    with folder():
        evenmoe("plan", "one.npz", "--out", "before.json", "--ranks", 4, "--slots", 24)
        evenmoe("plan", "later.npz", "--out", "after.json", "--previous", "before.json", "--max-copies", 4)
        return {"numbers": _sorted_numbers(evenmoe("diff", "before.json", *arguments, "--json"))}


_UNSOUND = '{"0": [0, 1, 1, 1, 2, 0, 4, 3], "1": [0, 1, 2, 3, 0, 1, 2, 3]}'


def _check(source: str, *arguments: object, code: int = 0) -> dict[str, Any]:
    with folder():
        Path("unsound.json").write_text(_UNSOUND)
        evenmoe("plan", "one.npz", "--out", "plan.json", "--ranks", 4, "--slots", 24, "--rule", "rank")
        found = evenmoe("check", source, *arguments, "--json", code=code)
        return {"numbers": _sorted_numbers(found), "severities": [f["severity"] for f in json.loads(found)["findings"]]}


def _others() -> None:
    cases.add("diff/a plan that copies four", partial(_diff, "after.json"))
    cases.add("diff/bytes", partial(_diff, "after.json", "--expert-bytes", 1000))
    cases.add("diff/nothing", partial(_diff, "before.json"))
    cases.add("check/a plan", partial(_check, "plan.json"))
    cases.add("check/a load", partial(_check, "gaps.npz"))
    cases.add("check/a placement that is wrong", partial(_check, "unsound.json", "--ranks", 4, code=1))


for _add in (_simulations, _reports, _plans, _conversions, _others):
    _add()
