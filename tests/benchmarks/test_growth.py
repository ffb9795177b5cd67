"""The table and the picture of growth are made of the figures that are kept, and say what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import expert_parallel_growth as growth
from benchmarks.exchange import results
from benchmarks.exchange.contestants import Work

ROOT = Path(__file__).resolve().parents[2]


def test_one_size_varies_at_a_time():
    found = growth.points(growth.GROWTH)
    assert len(found) == 14  # 17 values, of which the base point stands in four axes
    for work in found.values():
        differing = [axis for axis in growth.GROWTH if getattr(work, axis) != getattr(growth.BASE, axis)]
        assert len(differing) <= 1, work


def test_cost_per_row_counts_what_experts_compute():
    work = Work(10, 8, 4, top_k=2, ranks=5)
    found = {"work": {work.name: {"by hand": {"cpu_ms": 3.0}}}}
    assert growth.per_row(found, work, "by hand") == pytest.approx(30.0)  # 3,000 µs for 100 rows


def test_the_page_holds_the_table_and_the_picture_of_the_kept_figures():
    found = results.read(ROOT / "benchmarks" / "results" / "growth.json")
    assert growth.table(found) in (ROOT / "docs" / "exchange.md").read_text("utf-8")
    assert growth.points(growth.GROWTH).keys() <= found["work"].keys()
    picture = growth.draw(found)
    assert picture == growth.draw(found)
    for title in growth.TITLES.values():
        assert f">{title}</text>".encode() in picture


def test_a_measured_axis_is_added_to_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "BASE", Work(2, 8, 4, top_k=1, ranks=2))
    monkeypatch.setattr(growth, "GROWTH", {"tokens": (0, 2), "top_k": (1, 2)})
    path = tmp_path / "growth.json"
    assert growth.main(["--axes", "top_k", "--steps", "1", "--json", str(path)]) == 0
    assert results.read(path)["work"].keys() == {"T2 H8 E4 K1 W2", "T2 H8 E4 K2 W2"}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        growth.main(["--draw", str(tmp_path / "growth.svg")])
    assert "--draw needs --json" in capsys.readouterr().err
