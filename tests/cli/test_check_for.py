"""`evenmoe check --for ENGINE`: exit codes and words; tests/engines/test_findings.py has the findings."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.engines import ENGINES
from evenmoe.placement import Placement
from tests.cli.running import Run


@pytest.mark.parametrize("name", list(ENGINES))
def test_what_plan_writes_for_an_engine_is_fit_for_it(evenmoe: Run, tmp_path, name):
    load = np.random.default_rng(0).poisson(9000 / np.arange(1, 13) ** 2, (4, 2, 12))
    np.savez(tmp_path / "l.npz", load=load, layer_ids=[3, 4])
    engine = ENGINES.get(name)
    out = tmp_path / f"p{engine.suffixes[0] if engine.suffixes else '.json'}"
    planned = evenmoe("plan", tmp_path / "l.npz", "--ranks", 8, "--slots", 32, "--for", name, "--all", "-o", out)
    assert planned.code == 0, planned.err
    done = evenmoe("check", out, "--ranks", 8, "--experts", 12, "--for", name, "--json")
    said = json.loads(done.out)
    assert said["engine"] == name
    errors = [finding["kind"] for finding in said["findings"] if finding["severity"] == "error"]
    assert errors == ([] if engine.loads_file else ["engine-file"])
    assert done.code == (0 if engine.loads_file else 1)


def test_in_words(evenmoe: Run, tmp_path):
    path = tmp_path / "p.json"
    formats.write(path, Placement([[1, 0, 0, 0, 0, 0, 2, 3]], 8), format="ascend-map")
    done = evenmoe("check", path, "--for", "mindie")
    assert done.code == 1
    assert "engine-idle: it must be chosen by some rank; of 5 replicas mindie's ranks choose 4; plan it " in done.out
    assert done.out.endswith("(replicas: that of Ascend's operator in balance mode 0: rank r takes replica r // "
                             "ceil(ranks / replicas))\n")  # fmt: skip
    assert evenmoe("check", path).code == 0
    done = evenmoe("check", "-", "--for", "mindie")
    assert (done.code, done.out) == (2, "")
    assert "`--for` is mindie: it must come with a file, not standard input; name the file." in done.err
