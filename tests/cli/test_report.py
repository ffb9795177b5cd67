"""`evenmoe report` on the command line."""

from __future__ import annotations

import hashlib
import json
import math

import pytest

from evenmoe.simulator.store import save_simulation
from tests.report.replays import make_replay

PICTURES = ("par.png", "load.png", "replicas.png", "traffic.png", "time.png")


@pytest.fixture
def replay(tmp_path):
    path = tmp_path / "replay.sim"
    save_simulation(make_replay(steps=20, layers=2), path)
    return path


def test_a_page_and_its_pictures(tmp_path, replay, evenmoe):
    page, folder = tmp_path / "page.html", tmp_path / "new" / "pictures"
    done = evenmoe("report", replay, "-o", page, "--figures", folder)
    assert (done.code, done.err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == sorted(PICTURES)
    text = page.read_text(encoding="utf-8")
    assert hashlib.sha256(replay.read_bytes()).hexdigest() in text
    assert f"evenmoe report {replay} -o {page} --figures {folder}" in text
    assert "evenmoe" in done.out
    assert str(page) in done.out.replace("\n", "")


def test_json_is_one_object_with_units(tmp_path, replay, evenmoe):
    done = evenmoe("report", replay, "-o", tmp_path / "page.html", "--json")
    found = json.loads(done.out)
    simulation = make_replay(steps=20, layers=2)
    base = simulation.policies[0]
    assert found["page_bytes"] == (tmp_path / "page.html").stat().st_size
    assert found["figures"] == []
    assert found["input_sha256"] == {str(replay): hashlib.sha256(replay.read_bytes()).hexdigest()}
    for policy, shown in zip(simulation.policies, found["policies"], strict=True):
        gain = 100 * (1 - sum(policy.step_time) / sum(base.step_time))
        # Of 20 steps; the copies before step 16, which are the first, are spread over 3,000.
        net = 100 * (1 - sum(policy.step_time + sum(policy.copy_time) / 3000) / sum(base.step_time))
        even = policy.break_even_steps
        assert shown["name"] == policy.name
        # Sums of 40 doubles in another order: 40 roundings of 2⁻⁵³ each are far below 1e-12.
        assert shown["mean_par"] == pytest.approx(sum(policy.par.ravel()) / policy.par.size, rel=1e-12)
        assert shown["gain_percent"] == pytest.approx(gain, rel=1e-12, abs=1e-12)
        assert shown["net_gain_percent"] == pytest.approx(net, rel=1e-12, abs=1e-12)
        assert shown["copies"] == policy.copies.sum()
        assert shown["break_even_steps"] == (even if math.isfinite(even) else None)
        assert shown["memory_bytes_per_rank"] == policy.memory_per_rank


def test_a_policy_that_never_pays_is_null_in_json(tmp_path, evenmoe):
    simulation = make_replay(steps=20, layers=2)
    object.__setattr__(simulation.policies[1], "break_even_steps", math.inf)
    save_simulation(simulation, tmp_path / "a")
    done = evenmoe("report", tmp_path / "a", "-o", tmp_path / "page.html", "--json")
    assert json.loads(done.out, parse_constant=pytest.fail)["policies"][1]["break_even_steps"] is None


@pytest.mark.parametrize("content", [b"", b"no simulation", b"PK\x03\x04", None])
def test_something_else_is_refused(tmp_path, evenmoe, content):
    source = tmp_path / "a.sim"
    if content is not None:
        source.write_bytes(content)
    done = evenmoe("report", source, "-o", tmp_path / "page.html")
    assert done.code == 2
    assert str(source) in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "page.html").exists()


def test_the_input_is_never_replaced(replay, evenmoe):
    before = replay.read_bytes()
    done = evenmoe("report", replay, "-o", replay)
    assert done.code == 2
    assert "--out" in done.err
    assert replay.read_bytes() == before


@pytest.mark.parametrize("option", ["-o", "--figures"])
def test_places_that_cannot_be_written(tmp_path, replay, evenmoe, option):
    (tmp_path / "file").write_text("")
    done = evenmoe("report", replay, "-o", tmp_path / "page.html", option, tmp_path / "file" / "inside")
    assert done.code == 2
    assert "inside" in done.err
    assert "Traceback" not in done.err
