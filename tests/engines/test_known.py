"""What is known of engines fits together: formats exist, options are filled in."""

from __future__ import annotations

import json
import re

import pytest

from evenmoe.engines import ENGINES
from evenmoe.formats import FORMATS
from evenmoe.planner import PLANNERS
from evenmoe.rules import RULES

NAMES = list(ENGINES)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_the_registries(name):
    engine = ENGINES.get(name)
    assert engine.name == name
    assert FORMATS.get(engine.format).write is not None
    assert engine.balancer in PLANNERS
    RULES.get(engine.rule)
    assert (engine.window is None) == (engine.interval is None)
    assert all(suffix.removeprefix(".").replace("yml", "yaml") in FORMATS.get(engine.format).containers
               for suffix in engine.suffixes)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_options_have_their_values(name):
    launch = ENGINES.get(name).launch("P.json", 8, 40, 32)
    assert not re.search(r"\{(path|ranks|slots|redundant)\}", " ".join(launch))
    for option in launch:
        assert option.count("{") == option.count("}")
        for quoted in re.findall(r"'(\{.*\})'", option):
            json.loads(quoted)
    assert ENGINES.get(name).loads_file == any("P.json" in option for option in launch)


def test_only_evenmoe_can_split_a_batch():
    assert [name for name in NAMES if ENGINES.get(name).can_run("batch")] == ["evenmoe"]
    assert [name for name in NAMES if ENGINES.get(name).can_run("occurrence")] == ["tensorrt-llm", "evenmoe"]
    assert all(ENGINES.get("evenmoe").can_run(rule) for rule in RULES)
