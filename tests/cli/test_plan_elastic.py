"""`evenmoe plan` for uneven ranks, dead ranks, and from a placement of another world."""

from __future__ import annotations

import json

import numpy as np
import pytest

import evenmoe as em
from evenmoe import formats


@pytest.fixture
def files(tmp_path, monkeypatch, evenmoe) -> None:
    monkeypatch.chdir(tmp_path)
    load = np.random.default_rng(0).integers(1, 90, (2, 2, 16))
    np.savez("t.npz", load=load, layer_ids=np.array([3, 4]))
    assert evenmoe("plan", "t.npz", "--ranks", 4, "--slots", 24, "-o", "p.json").code == 0


@pytest.mark.usefixtures("files")
def test_slots_of_each_rank(evenmoe):
    done = evenmoe("plan", "t.npz", "--ranks", 4, "--slots", "5,5,4,4", "-o", "u.json")
    assert done.code == 0, done.err
    assert "4 ranks, 18 slots (5 x2, 4 x2), rule even" in done.out
    assert formats.read("u.json").placement.rank_sizes == (5, 5, 4, 4)
    assert (
        evenmoe("plan", "t.npz", "--ranks", 4, "--slots", "5,5,4,4", "-o", "t.yaml", "--to", "tensorrt-llm").code == 0
    )
    assert formats.read("t.yaml", num_ranks=4).placement == formats.read("u.json").placement
    again = evenmoe("plan", "t.npz", "--previous", "u.json", "--max-copies", 0, "-o", "v.json")
    assert again.code == 0, again.err
    assert formats.read("v.json").placement.rank_sizes == (5, 5, 4, 4)


@pytest.mark.usefixtures("files")
def test_ranks_that_died(evenmoe):
    done = evenmoe("plan", "t.npz", "--previous", "p.json", "--dead", "1", "-o", "d.json", "--json")
    assert done.code == 0, done.err
    before, after = formats.read("p.json").placement, formats.read("d.json").placement
    assert after.rank_sizes == (6, 0, 6, 6)
    assert json.loads(done.out)["copies"] == em.count_copies(before, after).sum()
    assert evenmoe("diff", "p.json", "d.json", "--dead", "1").code == 0
    said = json.loads(done.out)
    assert "compared with the placement of --previous as the fewest copies carry it over to this world" in said["notes"]
    assert set(said["par"]) == {"previous", "planned"}  # the default placement needs the rank that died


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("ranks", [3, 6])
def test_a_world_of_another_size(evenmoe, ranks):
    done = evenmoe("plan", "t.npz", "--previous", "p.json", "--ranks", ranks, "-o", "g.json")
    assert done.code == 0, done.err
    assert formats.read("g.json").placement.rank_sizes == (6,) * ranks


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--slots", "a"), "`--slots` is 'a': it must be a number, or one for each rank; write 72, or 9,9,8,8."),
        (("--slots", "9,9"), "`--slots` is [9 x2]: it must be one number, or one for each of the 4 ranks; give the"),
        (("--slots", 24, "--dead", "9"), "`--dead` is 9: it must be a rank, 0 to 3; leave it out."),
        (
            ("--slots", 24, "--dead", "0-2"),
            "must hold each of the 16 experts at least once; give 10 slots more, or keep",
        ),
        (("--slots", 24, "--dead", "0", "-p", "greedy"), "none of them dead, for the greedy planner"),
        (("--slots", 24, "--dead", "0", "--to", "vllm-list", "-o", "x"), "must have the same number of slots on every"),
    ],
)
def test_what_cannot_be(evenmoe, options, message):
    done = evenmoe("plan", "t.npz", "--ranks", 4, *options)
    assert (done.code, done.out.count("written")) == (2, 0)
    assert message in done.err
