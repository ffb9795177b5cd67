"""The page as a document: well-formed, without anything foreign, the same bytes each time, at every size."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from evenmoe.placement import default_placement
from evenmoe.report import write_report
from evenmoe.simulator.policy_result import PolicyResult, Traffic
from evenmoe.simulator.result import Simulation
from tests.effort import effort
from tests.report.parsed import parse, table
from tests.report.replays import make_replay

NASTY = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title><h1>",
    "a\x00b\x1b[31m\ud800\ufffe",
    "\u202egnirts",
    "&lt;&amp;#39;",
    "$x_1$ %s {0} \\frac",
    "_underscore",
    "漢字 🙂",
    " ",
)
PICTURES = ("par.png", "load.png", "replicas.png", "traffic.png", "time.png")
SIZES = {
    "one of everything": {"steps": 1, "layers": 1, "ranks": 1, "experts": 1, "policies": ("identity",), "nodes": 1},
    "two policies, one step": {"steps": 1, "layers": 2, "ranks": 2, "experts": 3 * 2, "policies": ("a", "b")},
    "more buckets than fit": {"steps": 401, "layers": 151, "ranks": 8, "experts": 8, "policies": ("a", "b")},
    "many ranks": {"steps": 3, "layers": 1, "ranks": 401, "experts": 401, "policies": ("a", "b"), "nodes": 1},
    "many policies": {"steps": 5, "layers": 2, "policies": tuple(f"p{i}" for i in range(12))},
}


def write(tmp_path, simulation, **options):
    write_report(simulation, tmp_path / "page.html", options.pop("command", "evenmoe report a"), **options)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def idle(steps=2, layers=2, ranks=2, names=("identity", "other")):
    """No tokens at all, no time, no memory: every ratio is 0 / 0."""
    none = np.zeros(steps, np.int64)
    placement = default_placement(layers, ranks, ranks)
    policies = tuple(
        PolicyResult(
            name, "does nothing", "rank", np.ones((steps, layers)), np.zeros((layers, ranks), np.int64),
            np.zeros((steps, layers), np.int64), np.zeros(0, np.int64), Traffic(none, none, none, none),
            np.zeros(steps), np.zeros(steps), placement, placement, 0, math.inf,
        )
        for name in names
    )  # fmt: skip
    return Simulation("idle", (), ranks, 1, ranks, 1, none, np.zeros((layers, ranks), np.int64), policies)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_well_formed(tmp_path, size):
    page = write(tmp_path, make_replay(**SIZES[size]))
    check_document(parse(page), page)


def test_no_load_at_all(tmp_path):
    root = parse(write(tmp_path, idle(), figures_dir=tmp_path))
    row = table(root, "All policies on the same steps")[1]
    assert [cell.shown for cell in row[1:3]] == ["\u2013", "\u2013"]  # of nothing, nothing is saved
    costs = table(root, "Costs by the model in the settings")[1]
    assert costs[6].shown == "never"
    assert "Blank: layers without load" in root.text
    assert "nan" not in root.one("main").text.lower()
    text = "".join(node.text for node in root.all("body"))
    assert "inf" not in text.replace("information", "")


def check_document(root, page):
    assert root.one("html").attributes["lang"] == "en"
    assert root.one("title").text
    levels = [int(node.tag[1]) for node in root.all() if node.tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [node.attributes["id"] for node in root.all() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for link in root.all("a"):
        assert link.attributes["href"].startswith("#")
        assert link.attributes["href"][1:] in ids
    for figure in root.all("figure"):
        assert len(list(figure.all("figcaption"))) == 1
        (svg,) = [svg for svg in figure.all("svg") if svg.attributes.get("role") == "img"]
        title, description = svg.attributes["aria-labelledby"].split()
        assert svg.one("title").attributes["id"] == title
        assert svg.one("desc").attributes["id"] == description
        assert svg.one("title").text
        assert svg.one("desc").text
    for svg in root.all("svg"):
        if "role" not in svg.attributes and "swatch" in svg.attributes.get("class", ""):
            assert svg.attributes["aria-hidden"] == "true"
    for head in root.all("th"):
        assert head.attributes["scope"] in ("row", "col")
    assert all(list(found.all("caption")) for found in root.all("table"))
    check_harmless(root, page)


def check_harmless(root, page):
    """Nothing that runs or fetches."""
    allowed = {
        "html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section", "h1", "h2", "h3", "p",
        "ul", "li", "dl", "dt", "dd", "div", "span", "strong", "a", "bdi", "data", "figure", "figcaption", "details",
        "summary", "table", "caption", "thead", "tbody", "tr", "th", "td", "pre", "code", "br",
        "svg", "desc", "path", "line", "rect", "text",
    }  # fmt: skip
    assert {node.tag for node in root.all()} <= allowed
    names = {name for node in root.all() for name in node.attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "srcset", "xlink:href", "action")]
    style = root.one("style").text
    assert "url(" not in style
    assert "@import" not in style
    policy = next(m for m in root.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert "http://" not in page.replace("http-equiv", "")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("nasty", NASTY)
def test_names_are_text_and_nothing_else(tmp_path, nasty):
    simulation = make_replay(steps=3, layers=2, policies=(nasty, nasty + "2", "oracle"), trace=nasty)
    for policy in simulation.policies:
        object.__setattr__(policy, "description", nasty)
    object.__setattr__(simulation, "settings", ((nasty, nasty, nasty),))
    object.__setattr__(simulation, "notes", (nasty,))
    page = write(tmp_path, simulation, command=nasty, inputs={nasty: nasty})
    root = parse(page)
    check_document(root, page)
    shown = (
        nasty.replace("\x00", "\ufffd")
        .replace("\x1b", "\ufffd")
        .replace("\ud800", "\ufffd")
        .replace("\ufffe", "\ufffd")
    )
    assert root.one("h1").text == shown
    assert root.one("pre").text == shown
    assert [cell.shown for cell in table(root, "Everything that was chosen")[0]] == [shown] * 3
    assert table(root, "All policies on the same steps")[1][0].shown == shown + "2"


@pytest.mark.filterwarnings("error")
def test_pictures_of_such_names(tmp_path):
    simulation = make_replay(steps=3, layers=2, policies=NASTY, trace=NASTY[6])
    write(tmp_path, simulation, figures_dir=tmp_path)
    for name in PICTURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_well_formed_check_can_fail():
    for page in ("<p><b></p></b>", "<p>", "</p>", '<p id="a" id="b"></p>'):
        with pytest.raises(AssertionError):
            parse(page)


def test_same_input_same_bytes(tmp_path):
    """Page and pictures, in this process and in one with other hashes of strings and another time zone."""
    script = (
        "import sys, pathlib; from tests.report.replays import make_replay; from evenmoe.report import write_report;"
        "out = pathlib.Path(sys.argv[1]); out.mkdir();"
        "write_report(make_replay(steps=9), out / 'page.html', 'evenmoe report a', {'a': '00'}, out)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "TZ": "UTC-9", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).resolve().parents[2], timeout=120)
    write_report(make_replay(steps=9), tmp_path / "page.html", "evenmoe report a", {"a": "00"}, tmp_path)
    for name in ("page.html", *PICTURES):
        first = (tmp_path / "a" / name).read_bytes()
        assert first == (tmp_path / name).read_bytes(), name
        assert b"Software" not in first or name.endswith("html")


def test_pictures_do_not_depend_on_the_users_matplotlib(tmp_path):
    import matplotlib

    simulation = make_replay(steps=9)
    write_report(simulation, tmp_path / "page.html", "a", figures_dir=tmp_path / "plain")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "lines.linewidth": 9, "savefig.dpi": 30}):
        write_report(simulation, tmp_path / "page.html", "a", figures_dir=tmp_path / "other")
        assert matplotlib.rcParams["font.size"] == 30  # and leave it as it was
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


def test_a_large_replay_gives_a_small_page_quickly(tmp_path):
    """DeepSeek-V3 on 320 ranks, 1,000 steps, 6 policies: random, so that no run of equal cells makes it smaller."""
    rng = np.random.default_rng(0)
    steps, layers, ranks, experts = 1000, 58, 320, 320
    placement = default_placement(layers, experts, ranks)
    wire = rng.integers(0, 9_000_000, (4, steps))
    policies = tuple(
        PolicyResult(
            name, "synthetic", "rank", 1 + rng.random((steps, layers)) * 9, rng.integers(0, 90_000, (layers, ranks)),
            rng.integers(0, 300, (steps, layers)), np.arange(10, steps, 10), Traffic(*wire),
            rng.random(steps) * 9000, rng.random(steps) * 900, placement, placement, 10**10, 12.0,
        )
        for name in ("identity", "static", "greedy", "evenmoe:rule=rank", "evenmoe:rule=batch", "oracle")
    )  # fmt: skip
    load = rng.integers(0, 9000, (layers, experts))
    simulation = Simulation("large", (), ranks, 40, experts, 8, np.full(steps, 40960), load, policies)
    pages = []
    # 12 where this was written (70 ms), busy or idle; anything quadratic takes far more than the bound.
    assert effort(lambda: pages.append(write(tmp_path, simulation))) < 120
    page = pages[-1]
    assert len(page.encode()) < 2_000_000
    root = parse(page)
    captions = [node.text for node in root.all("figcaption")]
    assert sum("Each point is the mean of 5 consecutive steps." in caption for caption in captions) == 1
