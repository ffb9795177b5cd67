"""Layer numbers on the command line: from plan through any tool's format to any other's, and between two placements."""

from __future__ import annotations

import itertools
import json

import numpy as np

from tests.formats.engines import EXPERTS, NAMES, RANKS, SLOTS, Model, file_name, make


def test_plan_and_convert_give_what_plan_gives_alone(evenmoe, tmp_path):
    """For every pair of formats: plan → one → other is plan → other, byte for byte."""
    load = np.random.default_rng(3).integers(1, 100, (2, 3, EXPERTS))
    np.savez(tmp_path / "trace.npz", load=load, layer_ids=np.array([3, 4, 5]))
    paths = {name: tmp_path / file_name(name, name) for name in NAMES}
    for name, path in paths.items():
        done = evenmoe("plan", tmp_path / "trace.npz", "-o", path, "--to", name, "--ranks", RANKS, "--slots", SLOTS)
        assert done.code == 0, done.err
    for (one, source), (other, planned) in itertools.product(paths.items(), paths.items()):
        target = tmp_path / file_name("end", other)
        done = evenmoe("convert", source, target, "--to", other, "--from", one, "--first-layer", 3, "--ranks", RANKS)
        assert (done.code, done.out.count("->")) == (0, 1), (one, other, done.err)
        assert target.read_bytes() == planned.read_bytes(), (one, other)


def test_the_mtp_layer_on_the_command_line(evenmoe, tmp_path):
    model = Model([[0, 1, 2, 3, 0, 1]] * 3, [[0, 1, 2, 1, 0, 3], [3, 2, 1, 2, 3, 0]], [[0, 2, 3, 3, 1, 0]])
    ascend = tmp_path / "ascend.json"
    make("ascend-map", model, ascend)
    done = evenmoe("convert", ascend, tmp_path / "x.yaml", "--to", "tensorrt-llm", "--first-layer", 3)
    assert done.code == 2
    assert "evenmoe: `--hidden-layers` is not given" in done.err
    whole = ("--first-layer", 3, "--hidden-layers", 5)
    assert evenmoe("convert", ascend, tmp_path / "x.yaml", "--to", "tensorrt-llm", *whole).code == 0
    back = evenmoe("convert", tmp_path / "x.yaml", tmp_path / "y.json", "--to", "ascend-map", *whole, "--ranks", RANKS)
    assert (back.code, json.loads((tmp_path / "y.json").read_text())) == (0, json.loads(ascend.read_text()))
    assert "note: kept the MTP layer apart from the MoE layers" in back.err


PLAN = '{"model.layers.1.mlp": [3, 2, 1, 0], "model.layers.2.mlp": [2, 0, 3, 1]}'
SGLANG = '{"physical_to_logical_map": [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]]}'
COUNTED = "[[3, 2, 1, 0], [2, 0, 3, 1]]"


def test_diff_finds_the_layers_that_belong_together(evenmoe, tmp_path):
    (tmp_path / "list.json").write_text(COUNTED)
    done = evenmoe("diff", PLAN, SGLANG, "--ranks", 2)
    assert (done.code, done.out.splitlines()[-1]) == (0, "0 copies in 0 of 2 layers")
    assert "note: left out the rows 0 of the placement, taken for dense layers: the other has none" in done.err
    said = json.loads(evenmoe("diff", SGLANG, PLAN, "--ranks", 2, "--json").out)
    assert (said["layer_ids"], said["copies"], said["slots_changed_per_layer"]) == ([1, 2], 0, [0, 0])
    for told in ((), ("--first-layer", 1)):
        done = evenmoe("diff", SGLANG, tmp_path / "list.json", "--ranks", 2, *told)
        assert (done.code, done.out.splitlines()[-1]) == (0, "0 copies in 0 of 2 layers")


def test_diff_never_compares_a_layer_with_another(evenmoe):
    """Of equally many layers, numbered otherwise."""
    other = PLAN.replace("layers.2", "layers.5").replace("layers.1", "layers.2")
    done = evenmoe("diff", PLAN, other, "--ranks", 2)
    assert done.code == 2
    assert "`layers` is 1 in the previous placement alone: it must be the same in both; choose" in done.err
    done = evenmoe("diff", PLAN, other, "--ranks", 2, "--layers", "2", "--json")
    assert json.loads(done.out)["layer_ids"] == [2]
    assert json.loads(done.out)["copies"] == 2  # [2, 0 | 3, 1] -> [3, 2 | 1, 0]


def test_the_placement_in_use_is_matched_by_the_first_layer_that_plan_is_told(evenmoe, tmp_path):
    """A load that counts its layers, and a placement of SGLang with a dense first row."""
    np.save(tmp_path / "load.npy", np.array([[40, 10, 30, 20], [10, 20, 30, 40]]))
    (tmp_path / "sglang.json").write_text(SGLANG)
    options = ("--previous", tmp_path / "sglang.json", "--max-copies", 0, "--ranks", 2, "--first-layer", 1)
    done = evenmoe("plan", tmp_path / "load.npy", "-o", tmp_path / "out.json", "--to", "vllm-list", *options)
    assert done.code == 0, done.err
    kept = json.loads((tmp_path / "out.json").read_text())
    assert [[sorted(row[:2]), sorted(row[2:])] for row in kept] == [[[2, 3], [0, 1]], [[0, 2], [1, 3]]]


def test_hidden_layers_that_would_do_nothing_are_refused(evenmoe, tmp_path):
    """Neither rows that are merely counted nor a load, which no format of loads divides, needs the number."""
    (tmp_path / "list.json").write_text("[[0, 1, 1, 0], [1, 0, 0, 1]]")
    np.save(tmp_path / "load.npy", np.array([[40, 10, 30, 20]]))
    for source, kind, to in (
        (tmp_path / "list.json", "placement", "vllm-layer-map"),
        (tmp_path / "load.npy", "load", "lmdeploy"),
    ):
        done = evenmoe("convert", source, tmp_path / "out", "--to", to, "--hidden-layers", 5)
        assert (done.code, done.out) == (2, "")
        assert (
            f"`--hidden-layers` is 5: it must be left out: this {kind} is read and written to {to} without" in done.err
        )
        assert not (tmp_path / "out").exists()
    stored = evenmoe(
        "convert", tmp_path / "load.npy", tmp_path / "t.npz", "--to", "evenmoe-trace", "--hidden-layers", 5
    )
    assert stored.code == 0, stored.err


def test_a_load_loses_its_layer_numbers_with_a_word(evenmoe, tmp_path):
    np.savez(tmp_path / "l.npz", load=np.array([[40, 10], [30, 20]]), layer_ids=np.array([3, 7]))
    done = evenmoe("convert", tmp_path / "l.npz", tmp_path / "l.json", "--to", "lmdeploy")
    assert (done.code, done.err) == (0, "note: numbered layers 3, 7 from 0: the format counts MoE layers\n")


def test_the_mtp_layer_of_the_placement_in_use_is_no_part_of_the_plan_and_said(evenmoe, tmp_path):
    model = Model([], [[0, 1, 2, 1, 0, 3]], [[0, 2, 3, 3, 1, 0]])
    make("ascend-map", model, tmp_path / "map.json")
    np.save(tmp_path / "load.npy", np.array([[40, 10, 30, 20]]))
    done = evenmoe("plan", tmp_path / "load.npy", "--previous", tmp_path / "map.json")
    assert done.code == 0
    assert "note: the MTP layer of --previous is no part of the plan" in done.err
