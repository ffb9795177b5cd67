"""What the options of all commands have in common: one word for one thing, completion, errors in flags."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from importlib import import_module

import pytest
import shellingham

from evenmoe.cli import COMMANDS
from evenmoe.cli.options import Command, in_flags
from evenmoe.errors import ConstraintError

WORDS = {"num_slots": "--slots", "num_ranks": "--ranks", "previous": "--previous", "max_copies": "--max-copies"}


def options_of(command: str) -> dict[str, list[str]]:
    """{name of the field: the words on the command line} of a command."""
    return {each.name: each.opts for each in import_module(f"evenmoe.cli.{command}").command.params}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_a_dataclass_of_its_options(command):
    (kind,) = (
        each
        for each in vars(import_module(f"evenmoe.cli.{command}")).values()
        if isinstance(each, type) and issubclass(each, Command) and each.__module__ == f"evenmoe.cli.{command}"
    )
    assert {field.name for field in fields(kind)} == options_of(command).keys() - {"help"}


def test_one_option_has_one_word():
    """A field of the same name has the same words in all commands, save for what -p stands for."""
    found: dict[str, list[str]] = {}
    for command in COMMANDS:
        for name, words in options_of(command).items():
            if all(word.startswith("-") for word in words):
                assert found.setdefault(name, words) == words, (command, name)
    assert found["out"] == ["--out", "-o"]
    assert found["from_"] == ["--from"]
    assert found["map_"] == ["--map"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ConstraintError("num_slots", 18, "must be a multiple of the 4 num_ranks", "use num_slots=16"),
            "`--slots` is 18: it must be a multiple of the 4 --ranks; use --slots=16.",
        ),
        (
            ConstraintError("max_copies", 1, "needs `previous`", "pass previous=, or leave this out"),
            "`--max-copies` is 1: it needs `--previous`; pass --previous, or leave this out.",
        ),
        (
            ConstraintError("previous.json", "a load with num_slots", "takes no num_slots (--slots)", "leave it out"),
            "`previous.json` is a load with num_slots: it takes no --slots; leave it out.",
        ),
    ],
)
def test_errors_speak_of_flags(error, text):
    found = in_flags(error, WORDS)
    assert (str(found), type(found)) == (text, ConstraintError)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("evenmoe s", ["simulate", "synthesize"]),
        ("evenmoe plan --rule o", ["occurrence"]),
        ("evenmoe plan --planner ", ["evenmoe", "greedy"]),
        ("evenmoe plan --to ascend", ["ascend-map"]),
        ("evenmoe convert --from tensorrt", ["tensorrt-llm", "tensorrt-llm-statistics"]),
        ("evenmoe simulate --policy ", ["identity", "static", "evenmoe", "greedy", "oracle"]),
        ("evenmoe synthesize --model mix", ["mixtral-8x7b"]),
        ("evenmoe check --sh", ["--shared-devices"]),
        ("evenmoe synthesise dem", ["demo"]),  # an old word is an error, but not while somebody types
    ],
)
def test_a_shell_completes(typed, offered):
    told = {"_EVENMOE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = subprocess.run(
        [sys.executable, "-m", "evenmoe"], env={**os.environ, **told}, capture_output=True, text=True, check=True
    )
    assert (done.stdout.split(), done.stderr) == (offered, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(evenmoe, monkeypatch, shell):
    monkeypatch.setattr(shellingham, "detect_shell", lambda: (shell, shell))  # CI is not started from one
    done = evenmoe("--show-completion")
    assert done.code == 0
    assert "_EVENMOE_COMPLETE" in done.out


def test_an_old_word_names_the_new(evenmoe):
    done = evenmoe("synthesise", "-o", "t.npz")
    assert (done.code, done.out) == (2, "")
    assert done.err == "evenmoe: `evenmoe` is synthesise: it is now called synthesize; write evenmoe synthesize.\n"
    assert "--out" in evenmoe("report", "a.sim", "--output", "page.html").err
