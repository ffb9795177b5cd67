"""Fewer points than steps, fewer cells than ranks: what is drawn still is what was found."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenmoe.report import write_report
from evenmoe.report.drawing import Buckets
from tests.report.parsed import parse
from tests.report.replays import make_replay


@given(st.integers(1, 500), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_runs_of_neighbours(size, at_most, seed):
    runs = Buckets.of(size, at_most)
    values = np.random.default_rng(seed).integers(0, 1000, (size, 2)).astype(np.float64)
    pieces = [values[start : start + runs.width] for start in range(0, size, runs.width)]
    assert runs.count == len(pieces) <= at_most
    assert runs.width == 1 or -(-size // (runs.width - 1)) > at_most  # none narrower would do
    assert runs.highest(values).tolist() == [np.max(piece, axis=0).tolist() for piece in pieces]
    assert runs.lowest(values).tolist() == [np.min(piece, axis=0).tolist() for piece in pieces]
    assert runs.mean(values[:, 0]).tolist() == pytest.approx([piece[:, 0].sum() / len(piece) for piece in pieces])
    assert runs.middles[0] == min(runs.width, size) / 2
    assert runs.middles[-1] == size - len(pieces[-1]) / 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """401 steps are drawn as 134 points, the last of 2 steps; 151 layers as 76 rows, the last of 1 layer."""
    simulation = make_replay(steps=401, layers=151, ranks=8, experts=8, policies=("a", "b"))
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_report(simulation, path, "evenmoe report a")
    return simulation, parse(path.read_text(encoding="utf-8"))


def drawing(root, key):
    return next(svg for svg in root.all("svg") if svg.attributes.get("aria-labelledby") == f"{key}-t {key}-d")


def path_of(svg, kind):
    (d,) = [p.attributes["d"] for p in svg.all("path") if (p.attributes.get("class") or "").split()[0] == kind]
    return [tuple(map(float, point.split())) for point in d[1:].removesuffix("z").split("L")]


def to_value(svg):
    ticks = [text for text in svg.all("text") if text.attributes.get("class") == "tick end"]
    (bottom, low), (top, high) = ((float(t.attributes["y"]), float(t.text)) for t in (ticks[0], ticks[-1]))
    return lambda y: low + (bottom - y) / (bottom - top) * (high - low), 0.051 / (bottom - top) * (high - low) * 1.01


def test_a_line_of_means_in_a_band_of_extremes(found):
    simulation, root = found
    svg = drawing(root, "par-1")
    value, rounding = to_value(svg)
    par = simulation.policies[1].par
    pieces = [par[start : start + 3] for start in range(0, 401, 3)]
    line, band = path_of(svg, "line"), path_of(svg, "band")
    assert len(line) == len(pieces) == 134
    assert len(band) == 268
    for i, piece in enumerate(pieces):
        medians = [statistics.median(layers.tolist()) for layers in piece]
        assert value(line[i][1]) == pytest.approx(sum(medians) / len(medians), abs=rounding)
        assert value(band[i][1]) == pytest.approx(piece.max(), abs=rounding)
        assert value(band[-1 - i][1]) == pytest.approx(piece.min(), abs=rounding)
        assert line[i][0] == pytest.approx((3 * i + len(piece) / 2) / 401 * 1000, abs=0.051)
    assert "Each point is the mean of 3 consecutive steps." in root.text


def test_the_time_saved_is_read_off_at_the_ends_of_runs(found):
    simulation, root = found
    svg = drawing(root, "saved")
    value, rounding = to_value(svg)
    unit = next(t.text for t in svg.all("text") if t.attributes.get("class") == "axis")
    size = {"(µs)": 1.0, "(ms)": 1e3, "(s)": 1e6}[unit.split()[-1]]
    first, second = simulation.policies
    saved, total = [0.0], 0.0
    begun = second.refreshes.tolist()
    once = second.copy_time[begun[0]] / 3000  # spread over the horizon
    for step in range(401):
        total += first.step_time[step] - second.step_time[step] - once
        total -= second.copy_time[step] if step in begun[1:] else 0.0
        if step % 3 == 2 or step == 400:
            saved.append(total / size)
    points = path_of(svg, "line")
    # Two running totals of 401 times each, subtracted: far below a pixel.
    assert [value(y) for _, y in points] == pytest.approx(saved, abs=rounding)
    assert points[0][0] == 0.0
    assert points[-1][0] == 1000.0


def test_a_cell_is_the_highest_of_its_layers(found):
    simulation, root = found
    svg = drawing(root, "load-before")
    drawn = {}
    for path in svg.all("path"):
        for run in path.attributes["d"][1:].split("M"):
            start, _, length = run.partition("h")
            column, row = start.split()
            for offset in range(int(length)):
                level = int(path.attributes["class"].removeprefix("cell h"))
                drawn[int(float(row)), int(column) + offset] = level
    edges = (0.5, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0, 3.0)
    loads = simulation.policies[0].rank_tokens.tolist()
    relative = [[rows / (sum(layer) / 8) for rows in layer] for layer in loads]
    for row in range(76):
        for rank in range(8):
            highest = max(layer[rank] for layer in relative[2 * row : 2 * row + 2])
            assert drawn[row, rank] == sum(highest >= edge for edge in edges)
    assert "A cell shows the highest of 2 layers beside each other." in root.text
