"""What a load counts, as the commands say it: empty windows left out, slots by their map, all ranks of a folder."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from evenmoe import formats
from evenmoe.io.torch_file import torch_bytes
from evenmoe.placement import Placement
from evenmoe.traces import Trace, save_trace
from tests.cli.running import Run

WORLD = ("--ranks", 2, "--slots", 4)
SIMULATED = (
    "--ranks", 2, "--tokens-per-rank", 64, "--top-k", 1, "--steps", 12, "--hidden", 8, "--expert-flops", 1000,
    "--expert-bytes", 1000, "-p", "identity", "-p", "evenmoe:slots=6,refresh=3",
)  # fmt: skip


def ring(path: Path) -> Path:
    """Four places of SGLang's ring, one of them used."""
    counts = np.zeros((4, 1, 4), np.int32)
    counts[0, 0] = [6, 2, 0, 0]
    dump = {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}
    path.write_bytes(torch_bytes(dump))
    return path


def npz(path: Path, load: object) -> Path:
    np.savez(path, load=np.array(load))
    return path


# Windows in which nothing was recorded.


def test_plan_leaves_unused_places_out_and_says_so(evenmoe: Run, tmp_path):
    """Ranks of 8 and 0 tokens: 2.0 in the one window that there is."""
    source = ring(tmp_path / "ring.pt")
    said = json.loads(evenmoe("plan", source, *WORLD, "--json").out)
    assert said["par"]["default_placement"]["mean_of_windows"]["mean"] == 2.0
    assert (said["num_windows"], said["num_empty_windows"], said["num_planned_windows"]) == (1, 3, 1)
    assert "left out 3 of 4 windows, in which nothing was recorded" in said["notes"]
    text = evenmoe("plan", source, *WORLD)
    assert "1 windows (3 empty ones left out), 1 layers, 4 experts, 8 assignments per layer" in text.out
    assert "note: left out 3 of 4 windows, in which nothing was recorded\n" in text.err


def test_the_plan_of_a_ring_is_that_of_its_passes(evenmoe: Run, tmp_path):
    rng = np.random.default_rng(3)
    passes = rng.integers(1, 50, (6, 2, 8))
    whole = np.zeros((40, 2, 8), np.int64)
    whole[17:23] = passes
    for name, load in (("passes", passes), ("ring", whole)):
        done = evenmoe("plan", npz(tmp_path / f"{name}.npz", load), "--ranks", 2, "--slots", 12,
                       "-o", tmp_path / f"{name}.json")  # fmt: skip
        assert done.code == 0, done.err
    assert formats.read(tmp_path / "ring.json").placement == formats.read(tmp_path / "passes.json").placement


def test_a_layer_without_tokens_in_a_window_does_not_enter_its_mean(evenmoe: Run, tmp_path):
    """Either layer is at 2.0 wherever it has tokens; 1.75 would be the mean with an even window put in its place."""
    hot = [6, 2, 0, 0]
    said = json.loads(evenmoe("plan", npz(tmp_path / "l.npz", [[hot, [0] * 4], [hot, hot]]), *WORLD, "--json").out)
    assert said["par"]["default_placement"]["mean_of_windows"] == {
        "mean": 2.0, "worst": 2.0, "worst_layer": 0,
    }  # fmt: skip
    assert said["par_per_layer"]["default_placement"] == [2.0, 2.0]
    assert said["notes"] == ["layers without tokens in some windows, which do not count for them: 1"]
    assert said["num_empty_windows"] == 0


def test_a_layer_without_any_token_does_not_enter_the_mean_of_layers(evenmoe: Run, tmp_path):
    source = npz(tmp_path / "l.npz", [[[0] * 4, [6, 2, 0, 0], [6, 0, 2, 0]]])
    said = json.loads(evenmoe("plan", source, *WORLD, "--json").out)
    found = said["par"]["default_placement"]
    assert found["mean_of_windows"] == {"mean": 1.75, "worst": 2.0, "worst_layer": 1}
    assert found["all_tokens"] == {"mean": 1.75, "worst": 2.0, "worst_layer": 1}
    assert said["assignments_per_layer"] == 8
    assert said["notes"] == ["layers without tokens, placed but left out of the means: 0"]
    assert "1.750" in evenmoe("plan", source, *WORLD).out


def test_convert_and_check_say_how_many(evenmoe: Run, tmp_path):
    source = ring(tmp_path / "ring.pt")
    said = json.loads(evenmoe("check", source, "--json").out)
    assert (said["num_windows"], said["num_empty_windows"], said["clean"]) == (1, 3, True)
    assert evenmoe("check", source).out.startswith(
        f"{source}: sglang-stat, 1 windows, 1 layers, 4 experts, 3 empty windows\n"
    )
    done = evenmoe("convert", source, tmp_path / "l.npz", "--to", "evenmoe-trace", "--json")
    said = json.loads(done.out)
    assert (said["num_windows"], said["num_empty_windows"]) == (1, 3)
    assert formats.read(tmp_path / "l.npz").load.tolist() == [[[6, 2, 0, 0]]]  # type: ignore[union-attr]
    assert "empty windows" not in evenmoe("check", tmp_path / "l.npz").out


def simulated(evenmoe: Run, source: Path, *more: object) -> dict:
    done = evenmoe("simulate", source, *SIMULATED, *more, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_simulate_replays_no_empty_window(evenmoe: Run, tmp_path):
    """The same draws as from the windows alone, whether the ring is a trace file or another tool's."""
    passes = np.random.default_rng(1).integers(1, 90, (4, 2, 4))
    whole = np.zeros((9, 2, 4), np.int64)
    whole[3:7] = passes
    save_trace(Trace("", passes), tmp_path / "passes.npz")
    save_trace(Trace("", whole), tmp_path / "ring.npz")
    formats.write(tmp_path / "ring.pt", whole, format="sglang-stat", layer_ids=[0, 1])
    right = simulated(evenmoe, tmp_path / "passes.npz")
    for name in ("ring.npz", "ring.pt"):
        found = simulated(evenmoe, tmp_path / name)
        assert found["policies"] == right["policies"], name
        assert found["num_empty_windows"] == 5
        assert any("5 of 9 windows" in note for note in found["notes"])
    assert right["num_empty_windows"] == 0
    assert "; 5 empty windows left out\n" in evenmoe("simulate", tmp_path / "ring.npz", *SIMULATED).out


def test_report_says_how_many(evenmoe: Run, tmp_path):
    simulated(evenmoe, ring(tmp_path / "ring.pt"), "--out", tmp_path / "s.npz")
    done = evenmoe("report", tmp_path / "s.npz", "-o", tmp_path / "r.html", "--json")
    assert json.loads(done.out)["num_empty_windows"] == 3
    assert (
        "3 empty windows of the trace left out\n"
        in evenmoe("report", tmp_path / "s.npz", "-o", tmp_path / "r.html").out
    )
    assert "left out 3 of 4 windows" in (tmp_path / "r.html").read_text()


def test_a_step_draws_a_layer_from_the_window_that_knows_it(evenmoe: Run, tmp_path):
    """Every token passes through every layer, so a window without tokens in one does not say that it rests."""
    load = np.random.default_rng(2).integers(1, 90, (6, 2, 4))
    filled = load.copy()
    load[[0, 4, 5], 1] = 0
    filled[0, 1], filled[4, 1], filled[5, 1] = filled[1, 1], filled[3, 1], filled[3, 1]
    save_trace(Trace("", load), tmp_path / "gaps.npz")
    save_trace(Trace("", filled), tmp_path / "filled.npz")
    found = simulated(evenmoe, tmp_path / "gaps.npz")
    assert found["policies"] == simulated(evenmoe, tmp_path / "filled.npz")["policies"]
    assert any("1 of 2 layers have no token in some windows" in note for note in found["notes"])


def test_a_layer_without_any_token_is_no_layer_of_a_simulation(evenmoe: Run, tmp_path):
    load = np.random.default_rng(2).integers(1, 90, (4, 1, 4))
    save_trace(Trace("", load), tmp_path / "one.npz")
    save_trace(Trace("", np.concatenate([load, np.zeros_like(load)], axis=1)), tmp_path / "dense.npz")
    found = simulated(evenmoe, tmp_path / "dense.npz")
    assert found["policies"] == simulated(evenmoe, tmp_path / "one.npz")["policies"]
    assert (found["num_layers"], "1 of 2 layers were left out, without a token: 1." in found["notes"]) == (1, True)


# Counts of slots.


@pytest.fixture
def placement(tmp_path: Path) -> Path:
    path = tmp_path / "map.json"
    formats.write(path, Placement([[0, 1, 0, 2]], 2), format="evenmoe-placement", layer_ids=[3])
    return path


@pytest.fixture
def statistics(tmp_path: Path) -> Path:
    folder = tmp_path / "statistics"
    folder.mkdir()
    (folder / "meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 2}')
    for rank, row in enumerate(([4, 3, 5, 0], [0, 1, 1, 2])):
        (folder / f"rank{rank}.safetensors").write_bytes(save({"7_3": np.array(row, np.int32)}))
    return folder


def test_the_map_brings_slots_to_experts_in_every_command(evenmoe: Run, tmp_path, statistics, placement):
    done = evenmoe("convert", statistics, tmp_path / "l.json", "--to", "lmdeploy", "--map", placement)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "l.json").read_text()) == [[10, 4, 2]]
    assert json.loads(evenmoe("check", statistics, "--map", placement, "--json").out)["num_experts"] == 3
    # A world of another size than the one whose slots were counted.
    said = json.loads(evenmoe("plan", statistics, "--map", placement, "--ranks", 3, "--slots", 3, "--json").out)
    assert (said["num_experts"], said["par"]["default_placement"]["all_tokens"]["worst"]) == (3, 1.875)
    plain = evenmoe("plan", statistics, *WORLD)
    assert "they are of slots, which the files do not tell; then pass its placement (--map FILE)" in plain.err


def test_simulate_takes_the_map_too(evenmoe: Run, tmp_path, statistics, placement):
    """The same draws as from the experts' own counts; a trace file keeps what else it says."""
    save_trace(Trace("", np.array([[[4, 4, 6, 2]]]), layer_ids=np.array([3])), tmp_path / "slots.npz")
    save_trace(Trace("", np.array([[[10, 4, 2]]])), tmp_path / "right.npz")
    right = simulated(evenmoe, tmp_path / "right.npz")
    for source in (statistics, tmp_path / "slots.npz"):
        assert simulated(evenmoe, source, "--map", placement)["policies"] == right["policies"]
    routing = np.zeros((2, 1, 1), np.uint16)
    save_trace(Trace("", np.array([[[2, 0, 0, 0]]]), routing), tmp_path / "routed.npz")
    for source, text in (
        (tmp_path / "routed.npz", "which name experts: it must count slots alone to take a --map; leave --map"),
        (tmp_path / "right.npz", "a load with 3 counts per layer: it must have one for each of the 4 slots"),
        (
            "synthetic:olmoe",
            "`--map` is MAP: it must come with a file; leave it out: a synthetic trace is read from none".replace(
                "MAP", str(placement)
            ),
        ),
    ):
        done = evenmoe("simulate", source, *SIMULATED, "--map", placement)
        assert (done.code, done.out) == (2, "")
        assert text in done.err


@pytest.mark.parametrize("mapped", [False, True])
def test_a_trace_is_replayed_from_a_pipe_as_from_its_file(evenmoe: Run, tmp_path, monkeypatch, mapped):
    """Empty windows are counted once, and the trace's own top-k is found."""
    load = np.array([[[4, 4, 6, 2]], [[0, 0, 0, 0]], [[4, 2, 6, 4]]])
    save_trace(Trace("", load, metadata={"top_k": 2}), tmp_path / "l.npz")
    formats.write(tmp_path / "map.json", Placement([[0, 1, 3, 2]], 2), format="evenmoe-placement")
    without_top_k = [item for item in SIMULATED if item not in ("--top-k", 1)]
    options = (*without_top_k, "--json", *(("--map", tmp_path / "map.json") if mapped else ()))
    of_file = json.loads(evenmoe("simulate", tmp_path / "l.npz", *options).out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "l.npz").read_bytes())))
    of_pipe = json.loads(evenmoe("simulate", "-", *options).out)
    for found in (of_file, of_pipe):
        assert (found["num_empty_windows"], found["top_k"]) == (1, 2)
    assert of_pipe["policies"] == of_file["policies"]
    assert of_pipe["notes"] == of_file["notes"]


def test_a_map_without_ranks_needs_none(evenmoe: Run, tmp_path):
    source = npz(tmp_path / "l.npz", [[1, 2, 4, 8]])
    done = evenmoe("convert", source, tmp_path / "l.json", "--to", "lmdeploy", "--map", '{"0": [0, 1, 2, 0]}')
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "l.json").read_text()) == [[9, 2, 4]]


def test_options_that_would_do_nothing_are_refused(evenmoe: Run, tmp_path, placement):
    experts = npz(tmp_path / "l.npz", [[1, 2, 4]])
    out = ("convert", experts, tmp_path / "out", "--to", "lmdeploy")
    for arguments, text in (
        ((*out, "--map", placement), "a load with 3 counts per layer: it must have one for each of the 4 slots of its"),
        (("check", experts, "--map", placement), "leave --map out if it counts logical experts"),
        (("plan", experts, "--ranks", 1, "--slots", 3, "--map", placement), "a load with 3 counts per layer"),
        (("check", placement, "--map", placement), "it takes no --map; leave that out"),
        ((*out, "--ranks", 2), "it takes no --ranks; leave that out"),
        ((*out, "--slots", 4), "it takes no --slots; leave"),
        ((*out, "--shared-devices", 1), "it takes no --shared-devices; leave"),
        (("check", experts, "--num-layers", 4), "a load with 1 layers: it must have the 4 that were asked for; leave"),
        ((*out, "--experts", 4), "a load with 3 experts: it must have the 4 that were asked for; leave --experts"),
        (("check", experts, "--map", experts), "`--map` is "),
        (("diff", experts, placement, "--ranks", 2), "is a load: it must be a placement"),
    ):
        done = evenmoe(*arguments)
        assert (done.code, done.out) == (2, ""), (arguments, done)
        assert text in done.err, (text, done.err)
        assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# Counts of one rank.


def dump(path: Path, rank: int, row: list[int]) -> None:
    path.parent.mkdir(exist_ok=True)
    counts = np.array([row], np.int32)
    record = {"forward_pass_id": 7, "rank": rank, "gatherer_key": "primary", "global_physical_count": counts}
    path.write_bytes(torch_bytes({"records": [record], "last_physical_to_logical_map": np.array([[0, 1, 2, 3]])}))


def test_a_folder_sums_its_ranks_and_a_file_is_said_to_be_alone(evenmoe: Run, tmp_path):
    dump(tmp_path / "dumps" / "a_0.pt", 0, [3, 0, 0, 0])
    dump(tmp_path / "dumps" / "a_1.pt", 1, [0, 0, 0, 5])
    done = evenmoe("convert", tmp_path / "dumps", tmp_path / "l.json", "--to", "lmdeploy")
    assert (done.code, done.err) == (0, "note: summed the passes of 2 ranks\n")
    assert json.loads((tmp_path / "l.json").read_text()) == [[3, 0, 0, 5]]
    for arguments in (
        ("plan", tmp_path / "dumps" / "a_0.pt", *WORLD),
        ("check", tmp_path / "dumps" / "a_0.pt"),
        ("simulate", tmp_path / "dumps" / "a_0.pt", *SIMULATED),
    ):
        done = evenmoe(*arguments)
        assert done.code == 0, done.err
        assert "rank 0 alone: the recorder counts each rank's own tokens" in " ".join(done.err.split())
    dump(tmp_path / "dumps" / "b.pt", 1, [0, 0, 0, 5])
    done = evenmoe("check", tmp_path / "dumps")
    assert done.code == 2
    assert (
        "a recording with pass 7 of rank 1 twice, in a_1.pt and b.pt: it must hold each pass of a rank once" in done.err
    )


# Loads at the ends of what numbers hold.


def test_float32_never_becomes_infinite(evenmoe: Run, tmp_path):
    for load in ([[1e39, 1.0]], [[[3e38, 1.0]], [[1e38, 1.0]]]):
        done = evenmoe(
            "convert", npz(tmp_path / "l.npz", load), tmp_path / "out.safetensors", "--to", "vllm-safetensors"
        )
        assert done.code == 2
        assert "in layer 0, expert 0: it must be at most 3.4e38 for vllm-safetensors, which holds float32" in done.err
        assert not (tmp_path / "out.safetensors").exists()
    done = evenmoe("convert", npz(tmp_path / "l.npz", [[3.4e38, 0.1]]), tmp_path / "out", "--to", "vllm-safetensors")
    assert (done.code, done.err) == (0, "note: rounded to float32, which the format demands\n")


def test_sums_of_windows_never_become_infinite_or_negative(evenmoe: Run, tmp_path):
    for load in ([[[1e308, 1.0]], [[1e308, 1.0]]], np.full((1025, 1, 1), 1e306)):
        done = evenmoe("convert", npz(tmp_path / "l.npz", load), tmp_path / "out", "--to", "lmdeploy")
        assert done.code == 2
        assert "windows that add up to 1.8e308 or more tokens in layer 0, expert 0: it must have sums that" in done.err
        assert not (tmp_path / "out").exists()
    done = evenmoe(
        "convert", npz(tmp_path / "l.npz", [[1e300]]), tmp_path / "o", "--to", "sglang-stat", "--first-layer", 0
    )
    assert "`value` is 1e+300 at (0, 0, 0): it must be below 2**63 for sglang-stat" in done.err


@pytest.mark.parametrize("unit", [1.0, 2.0**-7, 1e300, 1e-300])
def test_figures_do_not_depend_on_the_unit_of_a_load(evenmoe: Run, tmp_path, unit):
    """Tokens, shares, or numbers near the ends of float64; 1 and 3 of 4 tokens are 1.5."""
    source = npz(tmp_path / "l.npz", np.array([[[3.0, 1.0], [1.0, 1.0]], [[1.0, 3.0], [3.0, 1.0]]]) * unit)
    for rule in ("even", "batch"):
        done = evenmoe("plan", source, "--ranks", 2, "--slots", 2, "--rule", rule, "--json")
        assert done.code == 0, done.err
        said = json.loads(done.out)
        assert said["par"]["default_placement"]["mean_of_windows"]["mean"] == 1.375
        assert said["assignments_per_layer"] == pytest.approx(7 * unit)
    formats.write(tmp_path / "u.json", np.array([[3.0, 1.0]]) * unit, format="lmdeploy")
    formats.write(tmp_path / "t.json", np.array([[3, 1]]), format="lmdeploy")
    # One step: steps that share a window take its assignments one by one, so that whole tokens differ from shares.
    sizes = ("--ranks", 2, "--top-k", 1, "--hidden", 8, "--expert-flops", 1, "--expert-bytes", 1)
    few = (*sizes, "--steps", 1, "-p", "identity")
    for name in ("u", "t"):
        done = evenmoe("simulate", tmp_path / f"{name}.json", *few, "--json")
        assert done.code == 0, done.err
    right = json.loads(done.out)
    assert json.loads(evenmoe("simulate", tmp_path / "u.json", *few, "--json").out)["policies"] == right["policies"]


def test_loads_whose_layers_alone_are_beyond_float64_pass_through_every_command(evenmoe: Run, tmp_path):
    """Every expert's tokens are a float64, but the two of the layer together are none."""
    source = tmp_path / "l.json"
    source.write_text("[[1.7e308, 1.7e308]]")
    for command in (("check",), ("plan", "--ranks", 2, "--slots", 2), ("simulate", *SIMULATED)):
        done = evenmoe(command[0], source, *command[1:])
        assert done.code == 0, done.err


def test_the_largest_loads_pass_through_every_command(evenmoe: Run, tmp_path):
    source = npz(tmp_path / "l.npz", [[[1e308, 1e308, 1e308, 0.0]], [[1e308, 1e308, 1e308, 0.0]]])
    done = evenmoe("check", source)
    assert done.code == 0, done.err
    assert "more than 1.8e308 tokens in layer 0, expert 0, over all windows" in done.out
    said = evenmoe("plan", source, *WORLD, "--json")
    found = json.loads(said.out, parse_constant=pytest.fail)
    assert found["par"]["default_placement"]["all_tokens"]["worst"] == 1.333333
    assert found["assignments_per_layer"] is None
    assert "more than 1.8e308 assignments per layer" in evenmoe("plan", source, *WORLD).out
