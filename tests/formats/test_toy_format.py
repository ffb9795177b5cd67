"""A format of one's own, named by its file or added by name, goes through every command that reads or writes files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from evenmoe import formats
from evenmoe.errors import ConstraintError, FileFormatError
from evenmoe.formats import FORMATS
from evenmoe.formats.catalogue import Entry, Format
from tests.cli.running import Run, runner
from tests.formats import toy_format

FILE = f"py:{toy_format.__file__}"
PLACED = {"toy": "placement", "ranks": 2, "rows": [[0, 1, 2, 3, 0, 1]]}
LOAD = [[[60, 20, 10, 10]], [[20, 60, 10, 10]]]
WORLD = ["--ranks", 2, "--slots", 6]


@pytest.fixture
def evenmoe(monkeypatch, capsys) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture(params=["a file", "a module", "a name"])
def names(request, monkeypatch) -> tuple[str, str]:
    """How the formats of placements and of loads are called."""
    if request.param == "a file":
        return f"{FILE}:PLACEMENT", f"{FILE}:LOAD"
    if request.param == "a module":
        return "py:tests.formats.toy_format:PLACEMENT", "py:tests.formats.toy_format:LOAD"
    monkeypatch.setattr(FORMATS, "_things", dict(FORMATS._things))  # those that were added before
    FORMATS.add("toy-placement", toy_format.PLACEMENT)
    FORMATS.add("toy-load", toy_format.LOAD)
    return "toy-placement", "toy-load"


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """A placement and a load."""
    (tmp_path / "placement").write_text(json.dumps(PLACED))
    (tmp_path / "load").write_text(json.dumps({"toy": "load", "rows": LOAD}))
    return tmp_path / "placement", tmp_path / "load"


def test_convert(evenmoe, names, files, tmp_path):
    for source, name, there in ((files[0], names[0], "ascend-map"), (files[1], names[1], "evenmoe-trace")):
        done = evenmoe("convert", source, tmp_path / "there", "--from", name, "--to", there, "--json")
        assert json.loads(done.out)["from"] == FORMATS.get(name).name
        assert evenmoe("convert", tmp_path / "there", tmp_path / "back", "--to", name).code == 0
        assert json.loads((tmp_path / "back").read_text()) == json.loads(source.read_text())


def test_plan(evenmoe, names, files, tmp_path):
    done = evenmoe("plan", files[1], "--from", names[1], *WORLD, "-o", tmp_path / "p", "--to", names[0], "--json")
    assert json.loads(done.out)["num_windows"] == 2
    written = json.loads((tmp_path / "p").read_text())
    assert written["ranks"] == 2
    assert sorted(set(written["rows"][0])) == [0, 1, 2, 3]


def test_simulate(evenmoe, names, files):
    sizes = ["--top-k", 1, "--hidden", 8, "--expert-bytes", 8, "--expert-flops", 8, "--tokens-per-rank", 16]
    done = evenmoe("simulate", files[1], "--from", names[1], *WORLD, "--steps", 2, *sizes, "--json")
    assert json.loads(done.out)["num_experts"] == 4


def test_check(evenmoe, names, files):
    done = evenmoe("check", files[0], "--from", names[0], "--json")
    assert (done.code, json.loads(done.out)["clean"]) == (0, True)
    files[0].write_text(json.dumps({**PLACED, "rows": [[0, 1, 2, 2, 0, 1]]}))
    done = evenmoe("check", files[0], "--from", names[0], "--json", "--experts", 4)
    assert (done.code, json.loads(done.out)["findings"][0]["kind"]) == (1, "missing-expert")


@pytest.mark.parametrize("names", ["a name"], indirect=True)
def test_an_added_format_is_detected_and_listed(evenmoe, names, files):
    assert [formats.read(file).format for file in files] == list(names)
    assert "a toy: rows of slots" in evenmoe("convert", "--list-formats").out


def test_an_unknown_format_is_detected_only_when_it_was_added(files):
    with pytest.raises(FileFormatError, match="a json file of no known format"):
        formats.read(files[0])


def test_a_format_that_only_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(FORMATS, "_things", dict(FORMATS._things))
    toy = toy_format.LOAD
    FORMATS.add("toy-load", formats.Format(toy.entry, toy.matches, toy.read))
    with pytest.raises(ConstraintError, match="`format` is 'toy-load': it must be one that evenmoe writes"):
        formats.write(tmp_path / "load", LOAD, format="toy-load")
    FORMATS._things["toy-load"] = formats.Format(toy.entry, toy.matches, None, toy.write)
    formats.write(tmp_path / "load", LOAD, format="toy-load")
    with pytest.raises(ConstraintError, match="`format` is 'toy-load': it must be one that evenmoe reads"):
        formats.read(tmp_path / "load", format="toy-load")


WORDS = """
from evenmoe.formats import Entry, Format, RawPlacement

def matches(document):
    return isinstance(document.value, str) and document.value.startswith("words 1 ")

def read(document, options):
    head, *rows = document.value.splitlines()
    ranks = int(head.split()[2])
    slots = [[int(word) for word in row.split()] for row in rows]
    return RawPlacement(slots, [[len(row) // ranks] * ranks for row in slots])

def write(value, options):
    rows = [" ".join(map(str, row)) for row in value.slot_to_expert.tolist()]
    return "\\n".join([f"words 1 {value.num_ranks}", *rows]).encode()

WORDS = Format(Entry("words", "placement", "words: rows of slots", ("text",)), matches, read, write)
"""


def test_a_format_of_plain_text(evenmoe, files, tmp_path):
    (tmp_path / "words.py").write_text(WORDS)
    name, text = f"py:{tmp_path}/words.py:WORDS", tmp_path / "t"
    assert evenmoe("convert", files[0], text, "--from", f"{FILE}:PLACEMENT", "--to", name).code == 0
    assert text.read_text() == "words 1 2\n0 1 2 3 0 1"
    done = evenmoe("check", text, "--from", name, "--json")
    assert (done.code, json.loads(done.out)["format"]) == (0, "words")
    # No other format takes such a text for its own, `trivial` of SGLang's least of all.
    done = evenmoe("check", text)
    assert (done.code, "a text file of no known format" in done.err) == (2, True)
    text.write_bytes(b"words 1 2\n\xff")
    done = evenmoe("check", text, "--from", name)
    assert (done.code, "text that is not UTF-8, from byte 10 on" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("made", "what"),
    [
        ("RawPlacement([[0, 0.5]])", "a row of slots is float64 of shape (2,), and must be integers of one dimension"),
        ("RawPlacement([[[0]]])", "a row of slots is int64 of shape (1, 1), and must be integers of one dimension"),
        ("RawLoad([[1, 2]])", "a load has 2 dimensions, and must have windows, layers and experts"),
    ],
)
def test_a_reader_that_gives_what_is_none_is_said_to_be_wrong(evenmoe, files, tmp_path, made, what):
    source = "from evenmoe.formats import Entry, Format, RawLoad, RawPlacement\n"
    source += f"F = Format(Entry('f', 'load', 'f', ('json',)), lambda _: True, lambda *_: {made}, None)\n"
    (tmp_path / "f.py").write_text(source)
    done = evenmoe("check", files[1], "--from", f"py:{tmp_path}/f.py:F")
    assert done.code == 2
    assert f"raised TypeError: {what}" in done.err


def test_what_is_no_format(files):
    with pytest.raises(ConstraintError, match=r"of type str: it must be an evenmoe\.formats\.Format"):
        formats.read(files[0], format=f"{FILE}:__doc__")


def _broken(*_):
    raise ValueError("no such row")


def test_a_format_that_fails_is_no_mistake_in_evenmoe(tmp_path):
    source, target = tmp_path / "load.json", tmp_path / "new.json"
    source.write_text("[[1, 2], [3, 4]]")
    entry = Entry("broken", "load", "It fails.", ("json",))
    broken = Format(entry, lambda document: True, _broken, _broken)
    empty = replace(broken, read=lambda *_: None, write=lambda *_: "text")
    for format, read, written in (
        (
            broken,
            "must not fail, and raised ValueError: no such row",
            "must not fail, and raised ValueError: no such row",
        ),
        (empty, "must read a RawLoad or a RawPlacement", "must write bytes, or a folder's files by name"),
    ):
        with pytest.raises(ConstraintError, match=f"`format` is broken: it {read}; correct it"):
            formats.read(source, format=format)
        with pytest.raises(ConstraintError, match=f"`format` is broken: it {written}; correct it"):
            formats.write(target, LOAD, format=format)
    assert not target.exists()


def _leaves(document):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("fails", "said"),
    [(_broken, "ValueError: no such row"), (_leaves, "SystemExit: 3"), (None, "TypeError: 'NoneType'")],
)
@pytest.mark.parametrize("command", ["check", "convert", "plan", "simulate"])
def test_a_format_that_fails_to_tell_its_files(evenmoe, tmp_path, monkeypatch, command, fails, said):
    """While it is only asked whether a file is its own."""
    source = tmp_path / "load.json"
    source.write_text("[[1, 2], [3, 4]]")
    monkeypatch.setattr(FORMATS, "_things", dict(FORMATS._things))
    FORMATS.add("broken", Format(Entry("broken", "load", "It fails.", ("json",)), fails, _broken))
    more = {"convert": (tmp_path / "out", "--to", "lmdeploy"), "check": ()}.get(command, ("--ranks", 2, "--slots", 4))
    done = evenmoe(command, source, *more)
    assert done.code == 2
    assert f"is broken: it must not fail, and raised {said}" in " ".join(done.err.split())
