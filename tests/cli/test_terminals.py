"""Any terminal, closed or hostile input: always a sentence, never a traceback."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evenmoe.cli import chain
from evenmoe.errors import ConstraintError, FileFormatError
from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.replay import simulate
from evenmoe.simulator.result import Simulation
from evenmoe.simulator.store import load_simulation, save_simulation
from evenmoe.traces.trace import Trace
from tests.cli.processes import forked
from tests.cli.running import SMALL
from tests.traces.npz import at, npz

MAP, OTHER = '{"physical_to_logical_map": [[0, 1, 0, 2]]}', '{"physical_to_logical_map": [[0, 1, 2, 0]]}'
LOAD = np.array([[[70, 10, 10, 10]], [[0, 50, 25, 25]]])
REPLAY = ["--ranks", 2, "--slots", 6, "--steps", 3, "--top-k", 2, "--hidden", 4]


def encoded(encoding: str) -> Callable[[], None]:
    """Before a process starts: what PYTHONIOENCODING, or the locale of a terminal, does to its streams."""

    def start() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding=encoding, errors="strict")  # pyright: ignore[reportAttributeAccessIssue]
        for size, value in SMALL.items():
            setattr(chain, size, value)

    return start


SIZES = {"num_ranks": 2, "tokens_per_rank": 8, "num_steps": 3, "top_k": 2, "workers": 1}


def replayed() -> Simulation:
    costs = CostModel.for_expert(4, 8, 8)
    return simulate(Trace("load", LOAD), costs=costs, **SIZES)


@pytest.fixture
def room(tmp_path) -> Path:
    """Where every input has a name that ASCII cannot write, and one that is no text at all."""
    room = tmp_path / "room"
    room.mkdir()
    for name in ("größe → 2.npz", "\udcff.npz"):
        at(room / name, npz(load=LOAD))
    save_simulation(replayed(), room / "replay.npz")
    return room


COMMANDS = [
    ["check", "{load}"],
    ["check", MAP, "--ranks", 4],
    ["convert", "{load}", "neu…", "--to", "evenmoe-trace"],
    ["convert", "--list-formats"],
    ["diff", MAP, OTHER, "--ranks", 2, "--expert-bytes", 8],
    ["plan", "{load}", "--ranks", 2, "--slots", 6, "-o", "“plan”.json"],
    ["plan", "{load}", "--ranks", 3, "--slots", 5],
    ["simulate", "{load}", *REPLAY, "--expert-bytes", 8, "--expert-flops", 8, "--out", "é.npz", "--report", "é.html"],
    ["report", "replay.npz", "-o", "{load}.html"],
    ["synthesize", "-o", "→.npz", "--windows", 2, "--num-layers", 1],
    ["demo", "--trace", "{load}", "--ranks", 2],
    ["check", "none…"],
    ["report", "{load}"],
    *([command, "--help"] for command in ("check", "convert", "diff", "plan", "simulate", "report", "demo", "cann")),
]


@pytest.mark.parametrize("name", ["größe → 2.npz", "\udcff.npz"], ids=["text", "no text"])
@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: " ".join(map(str, arguments))[:40])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_whatever_the_terminal_can_show(room, arguments, name, encoding):
    if encoding == "latin-1" and arguments[0] not in ("check", "report"):
        return  # between the two others, which every command is tried with
    done = forked(room, [str(argument).replace("{load}", name) for argument in arguments], encoded(encoding))
    assert "Traceback" not in done.err
    assert done.code in (0, 1, 2), done.err
    wrong = arguments[1] == "none…" or arguments == ["report", "{load}"] or "3" in map(str, arguments[3:4])
    assert (done.code == 2) == (wrong and arguments[0] != "simulate"), done.err
    if encoding == "ascii":
        assert done.out.isascii()
        assert done.err.isascii()


def test_what_stands_for_what_ascii_has_not(tmp_path):
    """By hand: dots, arrows and signs by what looks like them, letters without their accents, others by number."""
    text = "größe … → \u00d7 \u2212 µs é 10⁻³ ∞ \u00a0| ⠋ 中 \udcff"
    program = f"from evenmoe.cli import prepare_streams; prepare_streams(); print({text!r})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout.decode() == "gro\\xdfe ... -> x - us e 10-3 inf  | * \\u4e2d \\udcff\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "-"],
        ["convert", "-", "new.json", "--to", "vllm-list"],
        ["convert", MAP, "new.json", "--to", "vllm-list", "--map", "-"],
        ["diff", "-", MAP, "--ranks", "2"],
        ["diff", MAP, "-", "--ranks", "2"],
        ["plan", "-", "--ranks", "2", "--slots", "6"],
        ["plan", "load.npz", "--previous", "-"],
        ["plan", "load.npz", "--ranks", "2", "--slots", "6", "--map", "-"],
        ["simulate", "-", *map(str, REPLAY)],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_a_standard_input_that_is_closed(tmp_path, arguments):
    at(tmp_path / "load.npz", npz(load=LOAD))
    for close in (lambda: os.close(0), lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 0)):
        done = subprocess.run(
            [sys.executable, "-m", "evenmoe", *arguments],
            check=False,
            capture_output=True,
            text=True,
            preexec_fn=close,
            cwd=tmp_path,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "evenmoe: `-` is standard input, which is not readable (Bad file descriptor): it must be open; "
            "pipe the file in, or name it.\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["load.npz"]


# Numbers that are too large to be added up.


@pytest.mark.parametrize("field", ["par", "step_time", "copy_time"])
@pytest.mark.parametrize(
    ("value", "good"), [(1e308, False), (1.1e100, False), (1e100, True), (5e-324, True), (0.0, True)]
)
@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
def test_a_report_of_times_beyond_all_measure(tmp_path, field, value, good):
    simulation = replayed()
    policies = tuple(
        replace(policy, **{field: np.full_like(getattr(policy, field), value)}) for policy in simulation.policies
    )
    save_simulation(replace(simulation, policies=policies), tmp_path / "replay.npz")
    done = forked(tmp_path, ["report", "replay.npz", "--figures", "pngs", "--json"])
    if good:
        assert done.code == 0, done.err
        json.loads(done.out)
        return
    assert done.code == 2
    assert done.err == (
        f"evenmoe: `replay.npz` is `0/{field}` with {value}: it must hold numbers up to 1e+100; "
        "write it with `evenmoe simulate --out`.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["replay.npz"]


@pytest.mark.parametrize("largest", [2**62, 2**61])
def test_counts_that_overflow_when_they_are_added(tmp_path, largest):
    simulation = replayed()
    load = np.full_like(simulation.load, largest)  # of 4 experts: 2**64 or 2**63 together
    save_simulation(replace(simulation, load=load), tmp_path / "replay.npz")
    with pytest.raises(FileFormatError, match=r"`load` with \d+: it must hold counts, fewer than 2\*\*62 together"):
        load_simulation(tmp_path / "replay.npz")
    wide = replace(simulation.policies[0], memory_per_rank=largest * 2)
    save_simulation(replace(simulation, policies=(wide,)), tmp_path / "wide.npz")
    with pytest.raises(FileFormatError, match=r"`memory_per_rank` .* must be a whole number, 0 or more, below"):
        load_simulation(tmp_path / "wide.npz")


@pytest.mark.parametrize("value", ["1e308", "1e31", "nan", "inf", "-1"])
@pytest.mark.parametrize("option", ["--latency-us", "--expert-bytes", "--flops-per-s"])
def test_costs_beyond_all_measure(tmp_path, option, value):
    at(tmp_path / "load.npz", npz(load=LOAD))
    costs = {"--expert-bytes": 8, "--expert-flops": 8, option: value}
    arguments = [word for pair in costs.items() for word in pair]
    done = forked(tmp_path, ["simulate", "load.npz", *REPLAY, *arguments, "--report", "page.html"])
    assert done.code == 2
    rule = "more than 0, from 1e-30 to 1e+30" if option == "--flops-per-s" else "0 or more, up to 1e+30"
    assert f"it must be finite and {rule}; state it in its unit." in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_the_largest_costs_still_add_up():
    """12 tokens in 3 steps at the limits of every figure: 10^30 / 10^-30 s a byte is less than 10^100 µs."""
    largest = CostModel(1e30, 1e30, 1e30, 1e30, 1e30, 1e-30, 1e-30, 1e-30, 1e-30, 1e30)
    found = simulate(Trace("load", LOAD), costs=largest, **SIZES)
    assert all(policy.step_time.max() < 1e100 for policy in found.policies)
    with pytest.raises(ConstraintError, match="is 9e-31: it must be finite and more than 0, from 1e-30 to 1e"):
        CostModel(1.0, 1.0, 1.0, 1.0, 1.0, flops_per_s=9e-31)


# Sizes that no memory holds.


def little_memory() -> None:
    """2 GB more than what is there already: so that absurd sizes fail here as they do on any machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), used + (2 << 30)))


@pytest.mark.parametrize("experts", [2**31 - 1, 10**9])
@pytest.mark.parametrize("command", ["check", "convert", "plan"])
def test_a_number_of_experts_beyond_all_measure(tmp_path, command, experts):
    """A load per slot is turned into one per expert, of which each needs a slot."""
    from evenmoe import formats

    formats.write(tmp_path / "load.jsonl", LOAD, format="vllm-jsonl")
    more = {"convert": ["new", "--to", "evenmoe-trace"], "plan": ["--ranks", 2, "--slots", 6]}.get(command, [])
    done = forked(tmp_path, [command, "load.jsonl", *more, "--experts", experts], little_memory)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"evenmoe: `load.jsonl` is read with {experts} experts: it must have a slot for each; check --experts.\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["synthesize", "-o", "new.npz", "--windows", 10**9],
        ["plan", "load.npz", "--ranks", 2, "--slots", 2**40],
        ["simulate", "load.npz", *REPLAY, "--expert-bytes", 8, "--expert-flops", 8, "--steps", 10**12],
    ],
    ids=lambda arguments: arguments[0],
)
def test_options_that_ask_for_more_memory_than_there_is(tmp_path, arguments):
    at(tmp_path / "load.npz", npz(load=LOAD))
    done = forked(tmp_path, arguments, little_memory)
    assert done.code == 2, done.err
    assert done.err.splitlines()[-1].startswith("evenmoe: ")
    assert "Traceback" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["load.npz"]


def test_a_mistake_of_our_own_is_one_line(tmp_path):
    """With its own exit code, so that it is taken for nothing else, and what a report needs."""

    def start() -> None:
        import evenmoe.formats.reading

        def broken(*given: object, **named: object) -> None:
            raise AttributeError("no\nsuch thing")

        evenmoe.formats.reading.check = broken  # pyright: ignore[reportAttributeAccessIssue]

    done = forked(tmp_path, ["check", MAP], start)
    assert (done.code, done.out) == (70, "")
    assert done.err.startswith(
        "evenmoe: a mistake in evenmoe, please report it with the command: AttributeError: no such thing ("
    )
    assert done.err.count("\n") == 1
