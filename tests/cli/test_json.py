"""docs/json.md names every key of every command's --json, with the unit and definition that the vocabulary gives it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.placement import Placement
from evenmoe.quantities import BESIDE_OWN, EVIDENCE, QUANTITIES

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "json.md"
#: Objects whose keys depend on the input, and what the document calls these keys.
NAMED_BY_INPUT = {
    "input_sha256": "<path>",
    "parameters": "<name>",
    "statistics_median_of_layers": "<name>",
    "par": "<placement>",
    "par_per_layer": "<placement>",
}


def documented() -> dict[str, dict[str, tuple[str, str, str]]]:
    """(unit, better, definition) of every key of every command."""
    found: dict[str, dict[str, tuple[str, str, str]]] = {}
    for section in DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:]:
        command = section.partition("\n")[0].removeprefix("evenmoe ")
        rows = re.findall(r"^\| `([^`]*)` \| (.*?) ?\| (.*?) ?\| (.*) \|$", section, flags=re.MULTILINE)
        found[command] = {key: (unit, better, text) for key, unit, better, text in rows}
        assert len(found[command]) == len(rows), command
    found["report"] |= found["simulate"]
    return found


DOCUMENTED = documented()


def keys_of(value: object, path: str = "") -> Iterator[str]:
    """The paths of all leaves, as the document writes them; nothing for an empty list or object."""
    if isinstance(value, dict):
        for key, item in value.items():
            key = NAMED_BY_INPUT.get(path, key)
            yield from keys_of(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from keys_of(item, f"{path}[]")
    else:
        yield path


SIMULATION = (
    "--ranks", 2, "--tokens-per-rank", 4, "--steps", 18, "--refresh", 2, "--top-k", 1, "--hidden", 8, "--slots", 6,
    "--expert-flops", 1e10, "--expert-bytes", 1000, "--workers", 1,
)  # fmt: skip


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> None:
    """A ring of windows, one of them empty, a layer without tokens; placements of whole and of wrong slots."""
    monkeypatch.chdir(tmp_path)
    load = np.random.default_rng(1).integers(1, 90, (4, 3, 4))
    load[2], load[:, 1] = 0, 0
    formats.write("ring.pt", load, format="sglang-stat", layer_ids=[0, 1, 2])
    formats.write("before.json", Placement([[0, 1, 2, 3]] * 3, 2), format="evenmoe-placement", layer_ids=[0, 1, 2])
    formats.write("after.json", Placement([[0, 2, 1, 3]] * 3, 2), format="evenmoe-placement", layer_ids=[0, 1, 2])
    skewed = np.random.default_rng(2).multinomial(999, [0.6, 0.3, 0.05, 0.05], (40, 3))
    np.savez("skewed.npz", load=skewed)  # of which a gain is claimed
    np.savez("big.npz", load=np.random.default_rng(2).multinomial(9999, np.arange(1, 9) / 36, (24, 2)))
    Path("bad.json").write_text("[[0, 0, 2, 3], [0, 1, 2, 2]]")


WORLD = ("--ranks", 2, "--slots", 4)
ADVICE = ("--engine", "vllm", "--ranks", 2, "--model", "mixtral", "--tokens", 64, "--top-k", 2)
CALLS = {
    "simulate": [
        ("simulate", name, *SIMULATION, *options, "--json")
        for name in ("ring.pt", "skewed.npz")
        for options in ((), ("--for", "sglang"))
    ],
    "report": [
        call
        for name in ("ring.pt", "skewed.npz")
        for call in (
            ("simulate", name, *SIMULATION, "--out", "s.sim"),
            ("report", "s.sim", "--figures", "png", "--json"),
            ("simulate", name, *SIMULATION, "--for", "vllm", "--out", "v.sim"),
            ("report", "v.sim", "--json"),
        )
    ],
    "plan": [
        ("plan", "ring.pt", *WORLD, "--json"),
        ("plan", "ring.pt", *WORLD, "--all", "--json"),
        ("plan", "ring.pt", *WORLD, "--for", "sglang", "--out", "a.json", "--all", "--json"),
        ("plan", "ring.pt", *WORLD, "--for", "sglang", "--out", "s.json", "--json"),
        ("plan", "ring.pt", "--ranks", 2, "--slots", "3,2", "--json"),
        ("plan", "ring.pt", "--previous", "before.json", "--rule", "batch", "--out", "p.json", "--json"),
    ],
    "convert": [
        ("convert", "ring.pt", "l.npz", "--to", "evenmoe-trace", "--json"),
        ("convert", "before.json", "m.json", "--to", "ascend-map", "--json"),
    ],
    "advise": [
        ("advise", "big.npz", *ADVICE, *options, "--json") for options in ((), ("--gpu", "b200"))
    ],
    "check": [("check", "ring.pt", "--json"), ("check", "bad.json", "--from", "vllm-list", "--ranks", 2, "--json")],
    "diff": [
        ("diff", "before.json", "after.json", "--json"),
        ("diff", "before.json", "after.json", "--expert-bytes", 10, "--json"),
    ],
    "synthesize": [
        ("synthesize", "--model", "mixtral", "--num-layers", 2, "--windows", 2, "--tokens-per-window", 64, "--requests",
         2, "--routing", "--out", "t.npz", "--json"),
    ],
    "demo": [("demo", "--json")],
    "cann": [("cann", "--out", "cann", "--json")],
}  # fmt: skip


@pytest.mark.parametrize("command", CALLS)
@pytest.mark.usefixtures("small_demo", "inputs")
def test_every_key_is_documented_and_every_documented_key_is_printed(evenmoe, monkeypatch, command):
    monkeypatch.setattr("evenmoe.ascend.cann.build.build_tree", lambda out, limits: out / "latest")  # without g++
    printed: set[str] = set()
    for call in CALLS[command]:
        done = evenmoe(*call)
        assert done.code in (0, 1), done.err
        if "--json" not in call:
            continue
        (line,) = done.out.splitlines()
        found = json.loads(line, parse_constant=pytest.fail)
        assert next(iter(found)) == "schema"
        assert found["schema"] == 1
        printed |= set(keys_of(found))
    expected = DOCUMENTED[command].keys()
    nulls = {key for key in printed if any(other.startswith((f"{key}[", f"{key}.")) for other in expected)}
    assert printed - nulls == expected - nulls  # a list or an object that is null has nothing inside


def test_figures_are_documented_in_the_words_of_the_vocabulary():
    rows = {key.removeprefix("policies[].").removesuffix("[]"): row for key, row in DOCUMENTED["simulate"].items()}
    for name, quantity in QUANTITIES.items():
        assert rows[name] == (quantity.unit, quantity.better, quantity.definition)


def test_figures_of_a_verdict_are_documented_in_the_words_of_the_vocabulary():
    for name, quantity in EVIDENCE.items():
        assert DOCUMENTED["plan"][f"verdict.{name}"] == (quantity.unit, quantity.better, quantity.definition)


def test_figures_beside_an_own_balancer_are_documented_in_the_words_of_the_vocabulary():
    for name, quantity in BESIDE_OWN.items():
        row = DOCUMENTED["simulate"][f"headline.beside_own.{name}"]
        assert row == (quantity.unit, quantity.better, quantity.definition)


def test_keys_of_finds_every_leaf():
    value = {"a": [{"b": 1}, {"c": None}], "par": {"x": {"mean": 1.0}}, "none": [], "m": [[1]]}
    assert list(keys_of(value)) == ["a[].b", "a[].c", "par.<placement>.mean", "m[][]"]
