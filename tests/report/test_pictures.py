"""Figures for papers and notebooks: kinds of file, sizes, styles, and what is said where they cannot be drawn."""

from __future__ import annotations

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from evenmoe.errors import ConstraintError
from evenmoe.report import Look, write_report
from evenmoe.report.content import Content
from evenmoe.report.pictures import MUTED
from evenmoe.simulator.figures import FIGURES
from tests.report.replays import make_replay

BEGINS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.mark.parametrize("name", list(FIGURES))
def test_a_figure_has_the_size_and_the_style_that_were_asked_for(name):
    simulation = make_replay(steps=9)
    plain, dark = simulation.plot(name), simulation.plot(name, width=3.4, height=3, style="dark_background")
    assert isinstance(plain, Figure)
    assert plain.get_figwidth() == 9
    assert dark.get_size_inches().tolist() == [3.4, 3]
    assert plain.get_facecolor() == (1, 1, 1, 1)
    assert dark.get_facecolor() == (0, 0, 0, 1)
    assert plain._repr_png_().startswith(BEGINS["png"])
    assert matplotlib.rcParams["figure.facecolor"] == matplotlib.rcParamsDefault["figure.facecolor"]


def test_the_methods_draw_the_figures_of_their_names():
    simulation = make_replay(steps=9)
    titles = {
        "plot_par": "Peak-to-average load", "plot_loads": "Before: ", "plot_replicas": "Replicas of every expert",
        "plot_traffic": "Rows that leave", "plot_time": "Mean time per step",
    }  # fmt: skip
    for method, title in titles.items():
        assert getattr(simulation, method)().axes[0].get_title(loc="left").startswith(title)


@pytest.mark.parametrize("format", list(BEGINS))
def test_files_of_every_format_are_the_same_each_time(tmp_path, format):
    for folder in ("one", "two"):
        look = Look(format, width=5)
        write_report(make_replay(steps=9), tmp_path / "p.html", "a", figures_dir=tmp_path / folder, look=look)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(f"{name}.{format}" for name in FIGURES)
    for name in names:
        data = (tmp_path / "one" / name).read_bytes()
        assert data.startswith(BEGINS[format])
        assert data == (tmp_path / "two" / name).read_bytes(), name


def test_lines_are_bold_for_the_policies_to_look_at_and_thin_and_gray_for_the_others():
    simulation = make_replay(steps=9, policies=("identity", "a", "b", "c", "d"))
    content = Content(simulation, "", {})
    figure = simulation.plot("par")
    lines = figure.axes[0].get_lines()
    assert len(lines) == 5
    for index, line in enumerate(lines):
        assert np.array_equal(line.get_ydata(), np.median(simulation.policies[index].par, axis=1))
        bold = index in content.focus
        assert (line.get_linewidth() > 1, line.get_color() != MUTED) == (bold, bold)
    named = [text.get_text().strip("\u200b") for text in figure.legends[0].get_texts()]
    wanted = [simulation.policies[index].name for index in sorted(content.focus)]
    assert sorted(named) == sorted([*wanted, "other policies"])


def test_a_figure_of_an_installed_package(tmp_path, monkeypatch):
    info = tmp_path / "figures-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: figures\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[evenmoe.figures]\nsteps = their_figures:steps\n")
    (tmp_path / "their_figures.py").write_text(
        "from matplotlib.figure import Figure\n"
        "def steps(simulation, **look):\n"
        "    figure = Figure()\n"
        "    figure.suptitle(f'{len(simulation.tokens)} steps')\n"
        "    return figure\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(FIGURES, "_looked_for_packages", False)  # as in a process that begins
    monkeypatch.setattr(FIGURES, "_places", dict(FIGURES._places))
    monkeypatch.setattr(FIGURES, "_things", dict(FIGURES._things))
    assert list(FIGURES)[-1] == "steps"
    assert make_replay(steps=9).plot("steps").get_suptitle() == "9 steps"


def test_your_own_figure_is_drawn(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from matplotlib.figure import Figure\n"
        "def steps(simulation, **look):\n"
        "    figure = Figure()\n"
        "    figure.suptitle(f'{len(simulation.tokens)} steps, {look}')\n"
        "    return figure\n"
    )
    monkeypatch.chdir(tmp_path)
    figure = make_replay(steps=9).plot("py:mine.py:steps", width=4)
    assert figure.get_suptitle() == "9 steps, {'width': 4}"


@pytest.mark.parametrize(
    ("look", "words"),
    [
        (
            {"style": "nope"},
            "`style` is 'nope': it must be a style that matplotlib finds; name one of",
        ),
        ({"width": 1}, "`width` is 1: it must be from 2 to 40 inches; use 3.3 for a column."),
        ({"height": float("nan")}, "`height` is nan: it must be from 2 to 40 inches"),
        ({"dpi": 300}, "`dpi` is 300: it must be width, height or style; use savefig for the file's format."),
    ],
)
def test_a_look_that_cannot_be_is_said(look, words):
    with pytest.raises(ConstraintError) as caught:
        make_replay(steps=2).plot_par(**look)
    assert words in str(caught.value)


def test_what_is_missing_is_said(monkeypatch):
    simulation = make_replay(steps=2)
    with pytest.raises(ConstraintError, match="`figure` is 'pie': it must be one of par, load, replicas, traffic"):
        simulation.plot("pie")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConstraintError) as caught:
        simulation.plot_par()
    assert str(caught.value) == (
        "`matplotlib` is not installed: it is needed for figures; run `pip install matplotlib`."
    )
    with pytest.raises(ConstraintError, match="`format` is 'gif': it must be one of png, svg, pdf; use one"):
        Look("gif")
