"""Synthetic traces show the measured figures within the stated tolerances; the figures are those of the files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import evenmoe as em
from evenmoe.placement import default_placement
from evenmoe.traces import Trace, load_trace, save_trace, synthesize
from evenmoe.traces.sampling import MEASUREMENTS
from tests.beside import TRACES, measured_names
from tests.traces.figures import figure, mean_figures, measured_traces, synthetic


@pytest.mark.parametrize("model", MEASUREMENTS)
def test_synthetic_traces_behave_like_measured_ones(model):
    measurement = MEASUREMENTS[model]
    assert len(measurement.figures) >= 2
    again = mean_figures(model, measurement, (0, 1), measurement.figures)
    for name, (measured, made, tolerance) in measurement.figures.items():
        assert 0 < tolerance <= 0.2, name
        assert abs(again[name] - measured) <= tolerance * measured, name
        # The docstring's number: three digits of the same computation. Other processors round a few draws otherwise.
        assert again[name] == pytest.approx(made, rel=0.005, abs=0.001), name


@pytest.mark.parametrize("model", ["gpt-oss-20b", "mixtral-8x7b"])
def test_other_seeds(model):
    """One seed is off the mean of seeds 0 and 1 by up to 17 % (gpt-oss-20b, seeds 2 to 7) and 26 % (Mixtral, 2 to 9),
    both in the first factor's part; so the tolerance is 30 % more."""
    measurement = MEASUREMENTS[model]
    for name, value in mean_figures(model, measurement, (5,), measurement.figures).items():
        measured, _, tolerance = measurement.figures[name]
        assert abs(value - measured) <= (tolerance + 0.3) * measured, name


@pytest.mark.parametrize("model", ["gpt-oss-20b", "deepseek-v2-lite"])
def test_figures_of_several_files_are_those_of_all_their_requests(model, tmp_path):
    """Two files hold the requests of one trace, cut between two of them."""
    measurement = replace(MEASUREMENTS[model], windows=12, tokens=40)
    whole = synthetic(model, measurement, seed=0)
    assert whole.routing is not None
    assert whole.seq_start is not None
    token = whole.seq_start[5]
    for number, (windows, tokens, starts) in enumerate(
        [(slice(5), slice(token), whole.seq_start[:6]), (slice(5, None), slice(token, None), whole.seq_start[5:])]
    ):
        part = Trace("part", whole.load[windows], whole.routing[tokens], starts - starts[0])
        save_trace(part, tmp_path / f"{number}.npz")
    parts = measured_traces(replace(measurement, sources=("0.npz (synthesized)", "1.npz (synthesized)")), tmp_path)
    assert [trace.num_windows for trace in parts] == [5, 7]
    for name in measurement.figures:
        assert figure(name, parts) == figure(name, [whole]), name


if TRACES.is_dir():

    @pytest.mark.parametrize("model", MEASUREMENTS)
    def test_the_measured_figures_are_those_of_the_files(model):
        measurement = MEASUREMENTS[model]
        traces = measured_traces(measurement, TRACES)
        layers, experts, top_k = measurement.shape
        assert {trace.load.shape[1:] for trace in traces} == {(layers, experts)}
        assert all(trace.top_k in (None, top_k) for trace in traces)
        for name, (measured, _, _) in measurement.figures.items():
            assert figure(name, traces) == pytest.approx(measured, abs=0.0006), name  # three decimals were kept
        if model != "mixtral-8x7b":  # of its 14,042 requests 2,000 are synthesized
            assert sum(trace.num_windows for trace in traces) == measurement.windows
            tokens = sum(int(trace.load[:, 0].sum()) for trace in traces) / top_k / measurement.windows
            assert tokens == pytest.approx(measurement.tokens, rel=0.02)


HELD_OUT = {"synthesized": [2.02, 1.69], "gpt_oss_20b_mmlu_pro_and_other": [1.85, 1.63]}


@pytest.mark.parametrize("name", ["synthesized", *measured_names(*HELD_OUT)])
def test_what_the_fit_never_saw(name):
    """Held-out peak-to-average load of gpt-oss-20b: of the identity, and planned on the sum."""
    if name == "synthesized":
        load = synthesize("gpt-oss-20b", num_windows=89, tokens_per_window=330, requests=1).load
    else:
        load = load_trace(TRACES / f"{name}.npz").load
    planned = em.plan(load[::2].sum(axis=0), num_ranks=8, num_slots=40)
    found = [em.peak_to_average(load[1::2], p).mean() for p in (default_placement(24, 32, 8), planned)]
    # Two decimals were kept, and a few draws differ on other processors.
    assert np.abs(np.array(found) - HELD_OUT[name]).max() < 0.02
