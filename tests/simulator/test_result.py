"""A simulation as other programs see it: data frames, HTML, dicts, files, and one line."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

import evenmoe as em
from evenmoe.errors import ConstraintError
from tests.report.parsed import parse
from tests.report.replays import make_replay


def has_pandas() -> bool:
    try:
        import pandas  # noqa: F401
    except ImportError:
        return False
    return True


needs_pandas = pytest.mark.skipif(not has_pandas(), reason="this machine lacks pandas")


@needs_pandas
def test_a_row_of_the_frame_is_a_policy_of_the_json():
    simulation = make_replay(steps=9)
    frame = simulation.to_dataframe()
    assert list(frame.index) == [policy.name for policy in simulation.policies]
    for policy in simulation.to_dict()["policies"]:
        row = frame.loc[policy["name"]]
        assert set(frame.columns) == policy.keys() - {"name"}
        for key in frame.columns:
            value, expected = row[key], policy[key]
            assert value == expected or (math.isnan(value) and math.isnan(expected)), key


@needs_pandas
def test_frames_of_steps_and_layers_are_the_arrays():
    simulation = make_replay(steps=9, layers=2)
    steps, layers = simulation.to_dataframe("step"), simulation.to_dataframe("layer")
    for policy in simulation.policies:
        of_steps = steps.loc[policy.name]
        assert of_steps["step"].tolist() == list(range(9))
        np.testing.assert_array_equal(of_steps["worst_par"], policy.par.max(axis=1))
        np.testing.assert_array_equal(of_steps["mean_par"], policy.par.mean(axis=1))
        np.testing.assert_array_equal(of_steps["step_time_us"], policy.step_time)
        np.testing.assert_array_equal(of_steps["copy_time_us"], policy.copy_time)
        np.testing.assert_array_equal(of_steps["copies"], policy.copies.sum(axis=1))
        assert layers.loc[policy.name]["layer"].tolist() == [0, 1]
    means = [policy.mean_par_per_layer for policy in simulation.summary.policies]
    np.testing.assert_array_equal(layers["mean_par"], np.concatenate(means))
    with pytest.raises(ConstraintError, match="`per` is 'rank': it must be policy, step or layer; use one of them"):
        simulation.to_dataframe("rank")


def test_without_pandas_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConstraintError) as caught:
        make_replay(steps=2).to_dataframe()
    assert str(caught.value) == (
        "`pandas` is not installed: it is needed for data frames; run `pip install pandas`, or use to_dict()."
    )


def test_a_notebook_shows_the_headline_and_every_policy():
    simulation = make_replay(steps=9)
    html = simulation._repr_html_()
    parse(f"<!DOCTYPE html><html><body>{html}</body></html>")  # well-formed
    assert html.count("<tr>") == 1 + len(simulation.policies)
    assert all(text in html for text in simulation.summary.shown("mean_par").texts)
    assert len(repr(simulation)) < 400
    assert repr(simulation).startswith(f"Simulation({simulation.trace!r}, steps=9, ranks={simulation.num_ranks}, ")


def test_it_saves_itself(tmp_path):
    simulation = make_replay(steps=9)
    simulation.save(tmp_path / "a.sim")
    again = em.load_simulation(tmp_path / "a.sim")
    em.save_simulation(again, tmp_path / "b.sim")
    assert (tmp_path / "a.sim").read_bytes() == (tmp_path / "b.sim").read_bytes()
    assert repr(again) == repr(simulation)
