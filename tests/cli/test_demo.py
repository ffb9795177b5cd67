"""`evenmoe demo`: its numbers, from outside and recomputed by loops."""

from __future__ import annotations

import json

import numpy as np
import pytest

import evenmoe as em
from evenmoe import formats
from evenmoe.cli.demo import _fitting_ranks
from evenmoe.errors import ConstraintError
from evenmoe.traces.synthesis import small_trace
from evenmoe.traces.trace import Trace
from tests.beside import measured_names
from tests.cli.running import SMALL
from tests.traces.npz import at, npz
from tests.traces.synthetic import trace_file

PAGE_RANKS, TRACE_TOKENS = 16, SMALL["TRACE_TOKENS"]
KEYS = [
    "schema",
    "trace",
    "num_layers",
    "num_experts",
    "num_ranks",
    "num_slots",
    "assignments_per_layer",
    "par",
    "worlds",
    "within_rounding",
]


def plain_par(load: np.ndarray, slot_to_expert: list[int], ranks: int) -> float:
    """The busiest rank's tokens over the mean rank's, of one layer, every replica taking an even share."""
    per_rank, tokens = len(slot_to_expert) // ranks, [0.0] * ranks
    for slot, expert in enumerate(slot_to_expert):
        tokens[slot // per_rank] += int(load[expert]) / slot_to_expert.count(expert)
    return max(tokens) / (sum(tokens) / ranks)


def check(summary: dict, load: np.ndarray, name: str, ranks: int, top_k: int, seed: int = 0) -> None:
    assert list(summary) == KEYS
    layers, experts = load.shape[1:]
    slots = experts + ranks
    assert (summary["trace"], summary["num_layers"], summary["num_experts"]) == (name, layers, experts)
    assert (summary["num_ranks"], summary["num_slots"]) == (ranks, slots)
    total = load.sum(axis=0)
    assert summary["assignments_per_layer"] == int(total.sum()) // layers
    planned = em.plan(total, num_ranks=ranks, num_slots=slots, seed=seed).slot_to_expert.tolist()
    for key, held in (("default_placement", [list(range(experts))] * layers), ("planned", planned)):
        pars = [plain_par(total[layer], held[layer], ranks) for layer in range(layers)]
        # Sums of at most 264 slots and the mean of at most 58 layers, each sum rounded at most 2⁻⁵³ per term.
        given = summary["par"][key]
        assert given["worst"] == pytest.approx(max(pars), rel=1e-13)
        assert given["mean"] == pytest.approx(sum(pars) / layers, rel=1e-13)
        if key == "default_placement":
            worst = pars.index(max(pars))
    page, loaded, plan = summary["worlds"]
    hidden = SMALL["PAGE_HIDDEN"]
    assert page["world"] == f"published demo's world: 8 EP x 2 TP ranks, 3 tokens each, H {hidden}, K 3"
    assert page["values_compared"] == 2 * PAGE_RANKS * SMALL["PAGE_TOKENS"] * hidden  # of y and of x
    assert sum(page["rows_per_rank"]) == PAGE_RANKS * SMALL["PAGE_TOKENS"] * 3
    assert len(page["rows_per_rank"]) == 8
    title = f"{experts} experts, K {top_k}, {ranks} ranks, layer {worst}"
    for world, kind in ((loaded, "default placement"), (plan, "planned")):
        assert world["world"] == f"{title}, {kind}"
        assert world["values_compared"] == 2 * ranks * TRACE_TOKENS * SMALL["TRACE_HIDDEN"]
        assert len(world["rows_per_rank"]) == ranks
        assert sum(world["rows_per_rank"]) == ranks * TRACE_TOKENS * top_k
    for world in summary["worlds"]:
        # Rounding to bfloat16 shows, and stays below what it can explain.
        assert world["largest_difference"] > 0.0
        assert 0.05 < world["largest_difference_over_bound"] <= 1.0
        assert world["seconds"] >= 0
    assert summary["within_rounding"] is True


def test_without_a_file(small_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = small_demo("--json")
    assert done.code == 0
    check(json.loads(done.out), small_trace().load, "a small synthetic trace", ranks=8, top_k=4)
    assert done.err == ""
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_the_seed_makes_tokens_weights_and_trace(small_demo):
    first, again, other = (json.loads(small_demo("--json", "--seed", seed).out) for seed in (5, 5, 6))
    for summary in (first, again, other):
        for world in summary["worlds"]:
            del world["seconds"]
    assert first == again
    assert first["worlds"][0]["largest_difference"] != other["worlds"][0]["largest_difference"]
    check_load = small_trace(5).load.sum(axis=0)
    worst = max(plain_par(load, list(range(32)), 8) for load in check_load)
    assert first["par"]["default_placement"]["worst"] == pytest.approx(worst, rel=1e-13)


@pytest.mark.parametrize(
    ("experts", "asked", "ranks"), [(32, 5, 4), (6, 1000, 6), (7, 3, 1), (7, 7, 7), (1, 8, 1), (12, 8, 6)]
)
def test_ranks_that_do_not_divide(small_demo, tmp_path, experts, asked, ranks):
    """The most ranks that divide the experts, up to those asked for."""
    load = np.random.default_rng(experts).integers(1, 100, (2, 3, experts))
    path = at(tmp_path / "some.npz", npz(load=load))
    done = small_demo("--json", "--trace", path, "--ranks", asked)
    assert done.code == 0
    check(json.loads(done.out), load, "some", ranks, top_k=min(4, experts))


def test_processes_that_do_not_divide():
    """Threads come in any number, but a process that torchrun started cannot be left out."""
    trace = Trace("seven", np.ones((1, 2, 7), np.int64))
    assert _fitting_ranks(trace, 7, exact=True) == 7
    with pytest.raises(ConstraintError) as caught:
        _fitting_ranks(trace, 4, exact=True)
    assert str(caught.value) == "`--nproc-per-node` is 4: it must divide the 7 experts of seven; use 1."


def test_one_window_of_a_load(small_demo, tmp_path):
    load = np.random.default_rng(1).integers(0, 9, (3, 16))
    done = small_demo("--json", "--trace", at(tmp_path / "one.npz", npz(load=load)))
    assert done.code == 0
    check(json.loads(done.out), load[None], "one", ranks=8, top_k=4)


def test_recorded_tokens_are_used(small_demo, tmp_path):
    """Every recorded token of layer 1 is routed to experts 0 and 5, so their ranks compute everything."""
    load = np.array([[[9, 9, 9, 9, 9, 9], [90, 1, 1, 1, 1, 30]]])
    routing = np.array([[[1, 2], [0, 5]]] * 3)
    done = small_demo("--json", "--ranks", 3, "--trace", at(tmp_path / "hot.npz", npz(load=load, routing=routing)))
    summary = json.loads(done.out)
    check(summary, load, "hot", ranks=3, top_k=2)
    all_tokens = 3 * TRACE_TOKENS
    assert summary["worlds"][1]["rows_per_rank"] == [all_tokens, 0, all_tokens]
    # Expert 0 has most of the load, so it gets replicas, which share its tokens.
    assert max(summary["worlds"][2]["rows_per_rank"]) < 2 * all_tokens


def test_a_trace_without_load(small_demo, tmp_path):
    """Perfect by definition, and still run."""
    done = small_demo("--json", "--trace", at(tmp_path / "zero.npz", npz(load=np.zeros((1, 2, 8), int))))
    summary = json.loads(done.out)
    assert done.code == 0
    assert summary["par"]["default_placement"] == {"mean": 1.0, "worst": 1.0}
    assert summary["par"]["planned"] == {"mean": 1.0, "worst": 1.0}


def test_text(small_demo):
    done, summary = small_demo(), json.loads(small_demo("--json").out)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == "a small synthetic trace: 4 layers, 32 experts, 8,192 assignments per layer; 8 ranks"
    for name, key, slots in (("default placement", "default_placement", 32), ("planned", "planned", 40)):
        par = summary["par"][key]
        shown = next(line for line in lines if line.startswith("│ " + name))
        assert [cell.strip() for cell in shown.strip("│").split("│")] == [
            name,
            str(slots),
            f"{par['mean']:.3f}",
            f"{par['worst']:.3f}",
        ]
    for world in summary["worlds"]:
        at_line = lines.index(world["world"])
        rows = np.array(world["rows_per_rank"])
        assert lines[at_line + 1] == (
            f"  busiest rank {rows.max():,} of {rows.sum():,} rows ({rows.max() / rows.mean():.2f} x mean)"
        )
        assert lines[at_line + 2].startswith(
            f"  {world['values_compared']:,} values against the dense model: largest difference "
            f"{world['largest_difference']:.3g}, {world['largest_difference_over_bound']:.0%} of what rounding can "
            "explain ("
        )
    assert lines[-1] == "the chain equals the dense model"


@pytest.mark.parametrize("name", ["synthetic_deepseek_v2_lite", *measured_names("deepseek_v2_lite_esft_law")])
def test_a_recorded_trace(small_demo, tmp_path, name):
    """DeepSeek-V2-Lite's routing, synthetic or of legal texts by the model's own authors."""
    path = trace_file(name, tmp_path)
    done = small_demo("--json", "--trace", path)
    assert done.code == 0
    with np.load(path, allow_pickle=False) as file:
        check(json.loads(done.out), file["load"], path.stem, ranks=8, top_k=6)


def test_a_load_of_any_tool(small_demo, tmp_path):
    formats.write(tmp_path / "l.pt", np.arange(1, 17).reshape(1, 2, 8), format="sglang-stat", layer_ids=[1, 2])
    done = small_demo("--json", "--trace", tmp_path / "l.pt", "--ranks", 4)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["trace"], found["num_layers"], found["num_experts"], found["num_ranks"]) == ("l", 2, 8, 4)
    done = small_demo("--layers", "1")
    assert (done.code, done.out) == (2, "")
    assert "`--layers` is 1: it must come with --trace; leave it out, or name a file." in done.err
