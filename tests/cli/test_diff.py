"""`evenmoe diff`, as on the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given

import evenmoe as em
from evenmoe import formats
from evenmoe.formats.contents import ReadOptions
from evenmoe.placement import Placement
from tests.placements import placements, random_placement

BEFORE = '{"0": [0, 1, 0, 2], "1": [0, 1, 2, 1]}'
AFTER = '{"physical_to_logical_map": [[0, 1, 1, 2], [0, 1, 2, 1]]}'


def test_copies_by_layer_and_rank(evenmoe):
    """Only layer 0 changes: expert 1 comes to rank 1 in the place of expert 0's second replica."""
    done = evenmoe("diff", BEFORE, AFTER, "--ranks", 2, "--expert-bytes", 44_000_000)
    assert done.code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.out.splitlines() if line.startswith("│")]
    assert rows == [["0", "1", "0 1", "2", "1", "44.0"]]
    assert "1 copies in 1 of 2 layers, 0.044 GB to move\ncopies per rank: 0 1\n" in done.out


def test_the_json_has_the_whole_matrix(evenmoe):
    done = evenmoe("diff", BEFORE, AFTER, "--ranks", 2, "--expert-bytes", 10, "--json")
    assert json.loads(done.out) == {
        "schema": 1,
        "before": BEFORE,
        "after": AFTER,
        "layer_ids": [0, 1],
        "copies": 1,
        "copies_per_layer_and_rank": [[0, 1], [0, 0]],
        "experts_with_other_replica_count_per_layer": [2, 0],
        "slots_changed_per_layer": [1, 0],
        "expert_bytes": 10,
        "bytes_to_move": 10,
        "bytes_to_move_per_rank": [0, 10],
        "moves": [{"layer": 0, "expert": 1, "from_rank": 0, "to_rank": 1}],
    }


def test_the_same_placement_in_two_formats_needs_nothing(evenmoe, tmp_path):
    formats.convert(AFTER, tmp_path / "m.json", "ascend-map", first_layer=0, options=ReadOptions(num_ranks=2))
    done = evenmoe("diff", AFTER, tmp_path / "m.json", "--ranks", 2)
    assert done.code == 0
    assert "0 copies in 0 of 2 layers" in done.out


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ('{"0": [0, 1, 0, 2]}', "`AFTER` is one with num_layers 1: it must have the num_layers of the previous"),
        ('{"0": [0, 1, 0, 1], "1": [0, 1, 1, 1]}', "must have the num_experts of the previous placement, 3"),
        ('{"logical_count": [[5, 6]]}', "is a load: it must be a placement"),
    ],
)
def test_what_cannot_be_compared(after, message, evenmoe):
    done = evenmoe("diff", BEFORE, after, "--ranks", 2)
    assert done.code == 2
    assert message in done.err


def test_the_options_hold_for_both_files(evenmoe):
    """A placement counts no slots that a map could tell."""
    done = evenmoe("diff", AFTER, AFTER, "--ranks", 2, "--from", "sglang-location")
    assert "0 copies in 0 of 2 layers" in done.out
    done = evenmoe("diff", AFTER, BEFORE, "--ranks", 2, "--from", "sglang-location")
    assert (done.code, done.out) == (2, "")
    assert "is without `physical_to_logical_map`" in done.err
    done = evenmoe("diff", BEFORE, AFTER, "--ranks", 2, "--map", BEFORE)
    assert (done.code, done.out) == (2, "")
    assert "it takes no --map; leave that out" in done.err


@given(placements())
def test_copies_add_up_to_what_metrics_count(placement):
    rng = np.random.default_rng(1)
    other = random_placement(
        rng, placement.num_layers, placement.num_experts, placement.num_ranks, placement.slots_per_rank
    )
    change = formats.diff(placement, other)
    assert change.copies.sum(axis=1).tolist() == em.count_copies(placement, other).tolist()
    for layer, rank in np.ndindex(*change.copies.shape):  # by the definition, with sets
        first, last = rank * placement.slots_per_rank, (rank + 1) * placement.slots_per_rank
        held = set(placement.slot_to_expert[layer, first:last].tolist())
        new = [expert for expert in other.slot_to_expert[layer, first:last].tolist() if expert not in held]
        assert change.copies[layer, rank] == len(new)


def test_another_number_of_slots():
    change = formats.diff(Placement([[0, 1]], 2), Placement([[0, 1, 1, 0]], 2))
    assert (change.copies.tolist(), change.slots_changed.tolist()) == ([[1, 1]], [-1])


def test_worlds_of_different_sizes(evenmoe, tmp_path):
    small, large = tmp_path / "small.json", tmp_path / "large.json"
    formats.write(small, Placement([[0, 1, 2, 3]], 2), format="evenmoe-placement")
    formats.write(large, Placement([[0, 1, 2, 3, 0, 3]], 3), format="evenmoe-placement")
    done = evenmoe("diff", small, large)
    assert done.code == 0
    assert done.out.endswith("copies per rank: 0 0 2\nsent by rank: 1 1 0\n")
    said = json.loads(evenmoe("diff", large, small, "--dead", "1", "--json").out)
    assert said["moves"] == [
        {"layer": 0, "expert": 2, "from_rank": None, "to_rank": 1},
        {"layer": 0, "expert": 3, "from_rank": 2, "to_rank": 1},
    ]
    done = evenmoe("diff", large, small, "--dead", "1")
    assert "1 of them are held by no live rank: load their weights from the checkpoint\n" in done.out
    done = evenmoe("diff", large, small, "--dead", "x")
    assert (done.code, done.out) == (2, "")
    assert "`--dead` is 'x': it must be numbers, or ranges from low to high; write 3,7 or 8-15." in done.err
    done = evenmoe("diff", large, small, "--dead", "3")
    assert "`--dead` is 3: it must be a rank of the previous placement, 0 to 2; leave it out." in done.err


def test_sizes_come_from_the_other_file(evenmoe, tmp_path):
    own = tmp_path / "p.json"
    formats.write(own, Placement([[0, 1, 2, 1], [1, 2, 0, 0]], 2), format="evenmoe-placement", layer_ids=[1, 2])
    for pair in (("trivial", own), (own, "trivial")):
        said = json.loads(evenmoe("diff", *pair, "--json").out)
        assert said["layer_ids"] == [1, 2]
        assert said["slots_changed_per_layer"] == [1, 3]
    formats.convert(own, tmp_path / "sg.json", "sglang-location")
    for pair in ((own, tmp_path / "sg.json"), (tmp_path / "sg.json", own)):
        said = json.loads(evenmoe("diff", *pair, "--json").out)
        assert (said["layer_ids"], said["copies"]) == ([1, 2], 0)
    done = evenmoe("diff", tmp_path / "sg.json", own, "--ranks", 4)
    assert json.loads(evenmoe("diff", tmp_path / "sg.json", own, "--ranks", 4, "--json").out)["copies"] > 0, done.err
    done = evenmoe("diff", own, tmp_path / "sg.json", "--ranks-after", 4)
    assert "copies per rank: " in done.out
    done = evenmoe("diff", tmp_path / "sg.json", "trivial")
    assert (done.code, done.out) == (2, "")
    assert "which says nothing of ranks: it must be read with their number; pass --ranks." in done.err


def test_a_dense_layer_beside_rows_that_are_merely_counted(evenmoe, tmp_path):
    """The rows with the trivial map are dense, where they are as many as there are too many."""
    rows = [[0, 1, 2, 1], [1, 2, 0, 0]]
    formats.write(tmp_path / "p.json", Placement(rows, 2), format="evenmoe-placement")
    for dense in ([[0, 1, 2, 0], *rows], [rows[0], [0, 1, 2, 0], rows[1]]):
        (tmp_path / "sg.json").write_text(json.dumps({"physical_to_logical_map": dense}))
        done = evenmoe("diff", tmp_path / "p.json", tmp_path / "sg.json")
        assert "0 copies in 0 of 2 layers" in done.out, done.err
        assert "taken for dense ones: the other placement counts MoE layers alone" in done.err
    (tmp_path / "sg.json").write_text(json.dumps({"physical_to_logical_map": [rows[0], *rows]}))
    done = evenmoe("diff", tmp_path / "p.json", tmp_path / "sg.json")
    assert (done.code, done.out) == (2, "")
    assert "say which is the model's first MoE layer with --first-layer." in done.err


def test_trivial_takes_its_sizes_from_the_other(evenmoe, tmp_path):
    """Three layers that begin with the model's fifth, four slots for three experts: [0, 1 | 2, 0] is in use."""
    formats.write(
        tmp_path / "p.json", Placement([[0, 1, 2, 0]] * 3, 2), format="evenmoe-placement", layer_ids=[5, 6, 7]
    )
    for files in (("trivial", tmp_path / "p.json"), (tmp_path / "p.json", "trivial")):
        done = evenmoe("diff", *files, "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert (found["layer_ids"], found["copies"]) == ([5, 6, 7], 0)
    done = evenmoe("diff", "trivial", tmp_path / "p.json", "--experts", 4)
    assert done.code == 2
