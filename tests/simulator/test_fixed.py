"""Placements as policies: files of any format, and the layers that are replayed."""

from __future__ import annotations

import json

import numpy as np
import pytest

import evenmoe as em
from evenmoe.errors import ConstraintError, FileFormatError
from evenmoe.traces.synthesis import small_trace
from tests.simulator.test_given import placement, run, same


def test_a_file_is_a_policy_whatever_its_path(tmp_path):
    path = tmp_path / "a:b,c=1.json"
    placement().save(path)
    found = run([f"file:{path}", f"file:{path}:rule=batch", placement()]).policies[1:]
    assert [policy.name for policy in found] == [f"file:{path}", f"file:{path}:rule=batch", "placement"]
    assert found[0].description == f"The placement in {path} for ever, replicas chosen by the rank rule."
    assert found[1].rule == "batch"
    same(found[0], found[2])
    same(run({"from a path": path}).policies[1], found[0])


def test_a_format_that_does_not_know_ranks_is_read_for_those_of_the_replay(tmp_path):
    placement().save(tmp_path / "v.json", format="vllm-list")
    assert run([f"file:{tmp_path / 'v.json'}"]).policies[1].final == em.Placement(placement().slot_to_expert, 4)


def test_layers_without_a_token_are_left_out_of_the_placement_too():
    trace = small_trace()
    load = np.concatenate([np.zeros_like(trace.load[:, :1]), trace.load], axis=1)
    whole = em.Trace("gap", load, metadata={"top_k": 4})
    held = em.plan(load[0], num_ranks=4, num_slots=40)
    part = em.Placement(held.slot_to_expert[1:], 4)
    found = run({"all layers": held, "recorded ones": part}, whole).policies[1:]
    same(*found)
    assert found[0].final == part


def test_layers_are_found_by_the_numbers_of_the_model(tmp_path):
    trace = small_trace()
    loads = em.Trace("numbered", trace.load[:, :2], layer_ids=np.array([4, 3]), metadata={"top_k": 4})
    em.save_placement(placement(trace), tmp_path / "p.json", layer_ids=range(2, 2 + trace.num_layers))
    found = run([f"file:{tmp_path / 'p.json'}"], loads).policies[1].final
    np.testing.assert_array_equal(found.slot_to_expert, placement(trace).slot_to_expert[[2, 1]])


def test_a_placement_of_something_else_is_an_error(tmp_path):
    trace = small_trace()
    for wrong, words in (
        (em.plan(trace.load[0], num_ranks=8, num_slots=40), "a placement of 8 ranks: it must have the 4 of the replay"),
        (
            em.plan(trace.load[0, :, :31], num_ranks=4, num_slots=40),
            "a placement of 31 experts: it must have the 32",
        ),
        (em.plan(trace.load[0, :1], num_ranks=4, num_slots=40), "a placement of 1 layers: it must have the "),
    ):
        with pytest.raises(ConstraintError) as caught:
            run({"held": wrong})
        assert f"`policy` is 'held', {words}" in str(caught.value)
    em.plan(trace.load[0], num_ranks=8, num_slots=40).save(tmp_path / "eight.json")
    with pytest.raises(FileFormatError, match=r"eight\.json"):
        run([f"file:{tmp_path / 'eight.json'}"])
    with pytest.raises(FileFormatError, match=r"gone\.json"):
        run([f"file:{tmp_path / 'gone.json'}"])
    with pytest.raises(ConstraintError, match="names no file; write file:PATH"):
        run(["file:"])
    (tmp_path / "load.json").write_text(json.dumps({"logical_count": trace.load[0].tolist()}))
    with pytest.raises(ConstraintError, match="must be a placement"):
        run([f"file:{tmp_path / 'load.json'}"])
