"""The harness of the exchange's benchmarks, on tiny work: who takes part, what is checked, what a comparison says."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import expert_parallel
from benchmarks.exchange import contestants, measure, results
from benchmarks.exchange.contestants import Batch, Contestant, Work
from benchmarks.exchange.measure import Sample
from evenmoe.errors import ConstraintError

TINY = Work(3, 16, 8, top_k=2, ranks=2)


@pytest.mark.parametrize("work", [TINY, Work(0, 7, 4, top_k=4, ranks=2), Work(5, 8, 3, top_k=1, ranks=1)])
def test_every_contestant_gives_the_dense_formula_and_is_measured(work):
    found = measure.measure(work, contestants.names(), steps=1)
    assert list(found) == contestants.names()
    for name, figures in found.items():
        assert figures.cpu_ms_least == figures.cpu_ms == figures.cpu_ms_most > 0, name
        assert figures.dispatch_cpu_ms + figures.combine_cpu_ms == pytest.approx(figures.cpu_ms), name
        assert figures.wall_ms > 0, name


def test_figures_are_medians_of_all_ranks_together():
    slow = [Sample(1.0, 2.0, 10.0, 10.5), Sample(3.0, 4.0, 10.1, 11.0)]
    fast = [Sample(0.5, 0.5, 0.0, 0.1), Sample(0.5, 0.5, 0.0, 0.2)]
    figures = measure.figures_of([slow, fast, fast])
    assert asdict(figures) == {
        "dispatch_cpu_ms": 1000.0,
        "combine_cpu_ms": 1000.0,
        "cpu_ms": 2000.0,
        "cpu_ms_least": 2000.0,
        "cpu_ms_most": 10000.0,
        "wall_ms": 200.0,
    }


@pytest.mark.parametrize("harm", [lambda y: y * 1.01, lambda y: y.roll(1, dims=0), lambda y: y * float("nan")])
def test_a_wrong_result_is_found(harm):
    batch = Batch.of(TINY, 0)
    right = Contestant(lambda batch, experts: contestants.dense(batch).bfloat16())
    assert measure.problem(right, batch) == ""
    wrong = Contestant(lambda batch, experts: harm(contestants.dense(batch)).bfloat16())
    assert measure.problem(wrong, batch) == "48 of 48 values are wrong"
    short = Contestant(lambda batch, experts: torch.zeros(2, 16))
    assert measure.problem(short, batch) == "gives (2, 16), not (3, 16)"


def lazy(rank, work):
    return Contestant(lambda batch, experts: batch.x)


def test_nothing_is_timed_that_is_wrong(monkeypatch):
    monkeypatch.setitem(contestants.OTHERS, "by hand", lazy)
    with pytest.raises(AssertionError, match=r"T3 H16 E8 K2 W2: .'by hand, rank 0: 48 of 48 values are wrong', 'by"):
        measure.measure(TINY, ["copies and sum", "by hand"], steps=1)


def test_what_a_thread_raises_is_raised():
    threads = measure.Threads(2)
    assert threads.run(lambda rank: rank.index) == [0, 1]
    with pytest.raises(ZeroDivisionError):
        threads.run(lambda rank: 1 // rank.index)
    threads.close()


def test_what_is_not_measured_is_said(monkeypatch):
    monkeypatch.setattr(
        contestants, "PEERS", {"transformers": "AllToAllEP of transformers", "numpy": "", "no.such": ""}
    )
    assert contestants.absent() == {"numpy": "installed, but nothing here calls it", "no.such": "not installed"}


@pytest.fixture
def tiny_work(monkeypatch):
    monkeypatch.setattr(expert_parallel, "WORK", (TINY,))


def test_a_regression_gives_a_status(tiny_work, tmp_path, capsys):
    path, chosen = tmp_path / "figures.json", ["--contestants", "by hand", "ExpertParallel, threads", "--steps", "1"]
    assert expert_parallel.main([*chosen, "--json", str(path)]) == 0
    document = results.read(path)
    assert document["work"].keys() == {"T3 H16 E8 K2 W2"}
    assert document["machine"]["cores"] >= 1
    # Shares of CPU time differ between two runs, but not by a million.
    assert expert_parallel.main([*chosen, "--check", str(path), "--margin", "1e6"]) == 0
    document["work"]["T3 H16 E8 K2 W2"]["ExpertParallel, threads"]["cpu_ms"] *= 1e-9
    path.write_text(json.dumps(document))
    capsys.readouterr()
    assert expert_parallel.main([*chosen, "--check", str(path), "--margin", "1e6"]) == 1
    assert "T3 H16 E8 K2 W2, ExpertParallel, threads: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "T9"], "nothing is left; work: ['T3 H16 E8 K2 W2'], contestants: ["),
        (["--contestants", "copies", "--check", "x"], "--baseline must be among the contestants, ['copies and sum']"),
    ],
)
def test_options_that_fit_nothing_are_errors(tiny_work, capsys, words, said):
    with pytest.raises(SystemExit):
        expert_parallel.main(words)
    assert said in capsys.readouterr().err


def shares(ours: float, baseline: str = "by hand") -> dict:
    return {"work": {"T1": {"operators, threads": {"cpu_ms": ours}, baseline: {"cpu_ms": 2.0}}}}


def test_only_what_both_have_measured_is_compared():
    assert results.regressions(shares(3.0), shares(2.0), "by hand", 1.5) == []
    assert results.regressions(shares(3.1), shares(2.0), "by hand", 1.5) == [
        "T1, operators, threads: 1.550 of by hand, 1.000 before: 1.55 times as much, and 1.50 is allowed"
    ]
    with pytest.raises(ConstraintError) as caught:
        results.regressions(shares(1.0), shares(1.0, "raw all_to_all"), "by hand", 1.5)
    assert "a file that shares no work with 'by hand'" in str(caught.value)
    with pytest.raises(ConstraintError, match=r"`margin` is 0.5: it must be 1 or more"):
        results.regressions(shares(1.0), shares(1.0), "by hand", 0.5)


def test_a_file_of_another_kind_is_an_error(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[]")
    with pytest.raises(ConstraintError, match=r"of schema None: it must have schema 1"):
        results.read(path)
