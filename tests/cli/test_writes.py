"""Every command that writes × everything that can go wrong while it does: the old file is whole, or the new one is."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.replay import simulate
from evenmoe.simulator.store import save_simulation
from evenmoe.traces.trace import Trace
from tests.cli.processes import Ended, forked
from tests.traces.npz import at, npz

MAP = '{"0": [0, 1, 2, 3]}'
OLD = b"what was there before\n"
ROOM = 1024  # bytes, fewer than any of the outputs has
REPLAY = [
    "--ranks",
    2,
    "--slots",
    6,
    "--steps",
    3,
    "--expert-bytes",
    8,
    "--expert-flops",
    8,
    "--hidden",
    4,
    "--top-k",
    2,
]


@dataclass(frozen=True)
class Command:
    """A command, where `{out}` is what it writes and `{in}` the folder of its inputs."""

    arguments: tuple
    folder: bool = False  # whether it writes one

    def on(self, out: Path, inputs: Path) -> list[str]:
        return [str(a).replace("{out}", str(out)).replace("{in}", str(inputs)) for a in self.arguments]


COMMANDS = {
    "convert": Command(("convert", "{in}/wide.npz", "{out}", "--to", "evenmoe-trace")),
    "convert to a folder": Command(
        ("convert", "{in}/wide.npz", "{out}", "--to", "tensorrt-llm-statistics", "--first-layer", 0), folder=True
    ),
    "plan": Command(("plan", "{in}/wide.npz", "-o", "{out}", "--ranks", 8, "--slots", 128, "--mean")),
    "simulate": Command(("simulate", "{in}/load.npz", "--out", "{out}", *REPLAY)),
    "simulate, page": Command(("simulate", "{in}/load.npz", "--report", "{out}", *REPLAY)),
    "report": Command(("report", "{in}/replay.npz", "-o", "{out}")),
    "synthesize": Command(("synthesize", "-o", "{out}", "--windows", 4, "--num-layers", 2)),
}
FILES = [name for name, command in COMMANDS.items() if not command.folder]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    load = np.arange(1, 25).reshape(2, 3, 4)
    at(folder / "load.npz", npz(load=load))
    at(folder / "wide.npz", npz(load=np.random.default_rng(3).integers(1, 1 << 30, (3, 1, 120))))
    costs = CostModel.for_expert(4, 8, 8)
    replayed = simulate(
        Trace("load", load), num_ranks=2, tokens_per_rank=8, costs=costs, num_steps=3, top_k=2, workers=1
    )
    save_simulation(replayed, folder / "replay.npz")
    return folder


@pytest.fixture
def room(tmp_path) -> Path:
    """A folder with nothing but the outputs."""
    folder = tmp_path / "room"
    folder.mkdir()
    return folder


def prepared(room: Path, command: Command) -> Path:
    """Where the command writes, with an old file there; where it writes a folder, nothing, which must stay so."""
    out = room / "out.file"
    if not command.folder:
        out.write_bytes(OLD)
    return out


def unchanged(room: Path, command: Command) -> bool:
    """Whether everything is as it was, and nothing else is there."""
    found = {path.name: path.read_bytes() for path in room.iterdir() if path.is_file()}
    return found == ({} if command.folder else {"out.file": OLD}) and len(list(room.iterdir())) == len(found)


def refused(done: Ended, name: object, reason: str) -> None:
    """One sentence that names the file and the reason."""
    assert (done.code, "Traceback" in done.err) == (2, False), done
    last = done.err.splitlines()[-1]
    assert last.startswith("evenmoe: "), done.err
    assert str(name) in last, last
    assert reason in last, last
    assert last.endswith("."), last


def limited(most_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))


def ended_by(number: int, most_bytes: int) -> Callable[[], None]:
    """Send this process a signal in the midst of writing: when a file is about to get larger than so many bytes."""

    def start() -> None:
        limited(most_bytes)()
        if number == signal.SIGKILL:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel's own, which no program survives
        else:
            signal.signal(signal.SIGXFSZ, lambda *_: os.kill(os.getpid(), number))

    return start


@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_failure(inputs, room, name):
    """Each command writes more than `ROOM`, whole, with the mode of any new file; twice, if it replaces."""
    command = COMMANDS[name]
    out = room / "out.file"
    for _ in range(1 if command.folder else 2):
        done = forked(room, command.on(out, inputs))
        assert (done.code, "Traceback" in done.err) == (0, False), done.err
        assert [path.name for path in room.iterdir()] == ["out.file"]
    plain = room / "plain"
    if command.folder:
        plain.mkdir()
        assert max(path.stat().st_size for path in out.iterdir()) > ROOM
    else:
        plain.touch()
        assert out.stat().st_size > ROOM
    assert out.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("most_bytes", [0, 1, ROOM])
def test_a_limit_on_file_sizes(inputs, room, name, most_bytes):
    command = COMMANDS[name]
    out = prepared(room, command)

    done = forked(room, command.on(out, inputs), limited(most_bytes))
    refused(done, out, "File too large")
    assert unchanged(room, command)


@pytest.fixture
def full(room) -> Iterator[Path]:
    """A disk with next to no room."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", str(room)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine lacks the right to mount a file system")
    yield room
    subprocess.run(["umount", str(room)], check=True)


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk(inputs, full, name):
    """One page, which the old file has."""
    command = COMMANDS[name]
    out = prepared(full, command)
    done = forked(full, command.on(out, inputs))
    refused(done, out, "No space left on device")
    assert unchanged(full, command)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("most_bytes", [1, ROOM])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_the_midst_of_writing(inputs, room, name, number, most_bytes):
    command = COMMANDS[name]
    out = prepared(room, command)
    done = forked(room, command.on(out, inputs), ended_by(number, most_bytes))
    assert (done.code, done.err) == (128 + number, "")
    assert unchanged(room, command)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("most_bytes", [1, ROOM])
def test_a_kill_in_the_midst_of_writing(inputs, room, name, most_bytes):
    """Nothing can tidy up then; but the old file is whole, and what is left has a name that says what it is."""
    command = COMMANDS[name]
    out = prepared(room, command)
    done = forked(room, command.on(out, inputs), ended_by(signal.SIGKILL, most_bytes))
    assert done.code == -signal.SIGXFSZ
    for path in room.iterdir():
        if path != out:
            assert re.fullmatch(r"\.evenmoe-[0-9a-f]{16}", path.name)
            path.rename(room.parent / path.name)
    assert unchanged(room, command)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_is_not_there(inputs, room, name):
    done = forked(room, COMMANDS[name].on(room / "none" / "out.file", inputs))
    if name.startswith("simulate"):  # looked at before any time is spent
        refused(done, room / "none" / "out.file", "must be in a folder that exists")
    else:
        refused(done, room / "none" / "out.file", "No such file or directory")
    assert not list(room.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_is_a_file(inputs, room, name):
    (room / "file").write_bytes(OLD)
    done = forked(room, COMMANDS[name].on(room / "file" / "out.file", inputs))
    refused(done, room / "file" / "out.file", "folder" if name.startswith("simulate") else "Not a directory")
    assert [(path.name, path.read_bytes()) for path in room.iterdir()] == [("file", OLD)]


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_place_of_the_file(inputs, room, name):
    (room / "out.file" / "in it").mkdir(parents=True)
    done = forked(room, COMMANDS[name].on(room / "out.file", inputs))
    refused(done, room / "out.file", "Is a directory")
    assert sorted(path.name for path in room.rglob("*")) == ["in it", "out.file"]


def without_privilege() -> None:
    """Give up what lets root pass over the modes of files: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, bits 1 and 2."""
    if os.geteuid() == 0:
        library = ctypes.CDLL(None)
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert library.capget(header, sets) == 0
        sets[0] &= ~0b110
        assert library.capset(header, sets) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_may_not_be_written(inputs, room, name):
    command = COMMANDS[name]
    out = prepared(room, command)
    room.chmod(0o555)
    done = forked(room, command.on(out, inputs), without_privilege)
    room.chmod(0o755)
    refused(done, out, "Permission denied")
    assert unchanged(room, command)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_written(inputs, room, name):
    """That its folder may be would let it be replaced, which is not what its owner wants."""
    command = COMMANDS[name]
    out = prepared(room, command)
    out.chmod(0o444)
    done = forked(room, command.on(out, inputs), without_privilege)
    refused(done, out, "Permission denied")
    assert unchanged(room, command)


@pytest.mark.parametrize("name", FILES)
def test_a_link_stays_a_link_and_a_mode_stays(inputs, room, name):
    command = COMMANDS[name]
    real = room / "real"
    real.write_bytes(OLD)
    real.chmod(0o640)
    (room / "out.file").symlink_to("real")
    assert forked(room, command.on(room / "out.file", inputs)).code == 0
    assert (room / "out.file").readlink() == Path("real")
    assert real.stat().st_mode & 0o777 == 0o640
    assert real.read_bytes() != OLD


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_written_directly(inputs, room, name):
    """A named pipe stays one, and the reader gets what a file would hold."""
    command = COMMANDS[name]
    assert forked(room, command.on(room / "out.file", inputs)).code == 0
    expected = (room / "out.file").read_bytes()
    os.mkfifo(room / "pipe")
    with subprocess.Popen(["cat", str(room / "pipe")], stdout=subprocess.PIPE) as reader:
        done = forked(room, command.on(room / "pipe", inputs))
        if not (room / "pipe").is_fifo():
            reader.kill()  # else it would wait for ever
        with suppress(OSError):  # nobody waits any more; else the reader would for ever, if nobody wrote
            os.close(os.open(room / "pipe", os.O_WRONLY | os.O_NONBLOCK))
        assert reader.stdout is not None
        received = reader.stdout.read()
    assert done.code == 0, done.err
    assert (room / "pipe").is_fifo()
    if name in ("convert", "plan", "synthesize"):  # the others write down how they were called
        assert received == expected
    assert len(received) > ROOM
    assert forked(room, command.on(Path("/dev/null"), inputs)).code == 0
    refused(forked(room, command.on(Path("/dev/full"), inputs)), "/dev/full", "No space left on device")


def test_standard_output_by_name_is_appended_to(inputs, room):
    done = forked(room, ["convert", MAP, "/dev/stdout", "--to", "vllm-list"])
    assert done.code == 0
    assert done.out.startswith("[")
    assert done.out.splitlines()[-1].startswith(MAP)  # the summary, after it and not over it
    log = room / "log"
    log.write_bytes(OLD)

    def append() -> None:
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 1)

    assert forked(room, ["convert", MAP, "/dev/stdout", "--to", "vllm-list"], append).code == 0
    assert log.read_bytes().startswith(OLD + b"[")


@pytest.mark.parametrize(
    "arguments", [["check", MAP, "--ranks", 2], ["--help"], ["convert", MAP, "-", "--to", "vllm-list"]]
)
def test_a_standard_output_that_is_full_or_closed(room, arguments):
    def to_full() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    refused(forked(room, arguments, to_full), "standard output", "No space left on device")
    command = [sys.executable, "-m", "evenmoe", *map(str, arguments)]
    done = subprocess.run(command, check=False, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE, text=True)
    refused(Ended(done.returncode, "", done.stderr), "standard output", "Bad file descriptor")


def test_a_file_does_not_take_the_number_of_a_closed_stream(room):
    """Else what a C library prints to standard error would go into the file."""
    program = (
        "import os, sys; from evenmoe.cli import prepare_streams; prepare_streams(); "
        "print([os.path.realpath(f'/proc/self/fd/{n}') for n in range(3)], file=open('found', 'w'))"
    )
    close = lambda: [os.close(number) for number in range(3)]  # noqa: E731
    assert subprocess.run([sys.executable, "-c", program], check=False, preexec_fn=close, cwd=room).returncode == 0
    assert (room / "found").read_text() == "['/dev/null', '/dev/null', '/dev/null']\n"


# The input as output.


@pytest.mark.parametrize("link", [False, True])
def test_the_output_is_the_input(inputs, room, link):
    """`plan`, `simulate` and `report` would lose what they read, and refuse; `convert` replaces it by what it asked."""
    load, replay = (at(room / name, (inputs / name).read_bytes()) for name in ("load.npz", "replay.npz"))
    before = load.read_bytes(), replay.read_bytes()
    named = {path: room / f"link to {path.name}" for path in (load, replay)}
    for path, other in named.items():
        other.symlink_to(path) if link else named.update({path: path})
    for arguments, out in [
        (["plan", load, "--ranks", 2, "--slots", 6, "-o"], named[load]),
        (["simulate", load, *REPLAY, "--out"], named[load]),
        (["simulate", load, *REPLAY, "--report"], named[load]),
        (["report", replay, "-o"], named[replay]),
    ]:
        refused(
            forked(room, [*arguments, out]), out, "input" if arguments[0] != "simulate" else "must not be the trace"
        )
        assert (load.read_bytes(), replay.read_bytes()) == before
    placement = at(room / "map.json", MAP.encode())
    assert forked(room, ["convert", placement, placement, "--to", "vllm-list"]).code == 0
    assert placement.read_bytes() == b"[\n [0, 1, 2, 3]\n]\n"
    refused(
        forked(room, ["convert", placement, placement, "--to", "no-such-format"]), "no-such-format", "must be one of"
    )
    assert placement.read_bytes() == b"[\n [0, 1, 2, 3]\n]\n"


def test_a_hard_link_to_the_trace_is_the_trace(inputs, room):
    load = at(room / "load.npz", (inputs / "load.npz").read_bytes())
    (room / "other.npz").hardlink_to(load)
    for option in ("--out", "--report"):
        done = forked(room, ["simulate", load, *REPLAY, option, room / "other.npz"])
        refused(done, room / "other.npz", "must not be the trace")
    assert load.samefile(room / "other.npz")


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["simulate", "{in}/load.npz", *REPLAY, "--out", "-"], "--out"),
        (["simulate", "{in}/load.npz", *REPLAY, "--report", "-"], "--report"),
        (["report", "{in}/replay.npz", "--out", "-"], "--out"),
        (["report", "{in}/replay.npz", "--out", "page.html", "--figures", "-"], "--figures"),
        (["cann", "--out", "-"], "--out"),
    ],
)
def test_no_file_is_called_as_standard_output_is(inputs, room, arguments, flag):
    """Where the summary has standard output, `-` is an error; it was the name of a file."""
    done = forked(room, Command(tuple(arguments)).on(room, inputs))
    refused(done, flag, "must be the name of what is written, since standard output has the summary; use a name")
    assert not list(room.iterdir())


# Pictures: several files, and a folder that is made for them.


@pytest.mark.parametrize("there", [False, True])
def test_pictures_appear_together_or_not_at_all(inputs, room, there):
    """A page and five pictures; the page is smaller than the limit, some picture is not."""
    page, pngs = room / "page.html", room / "deep" / "pngs"
    assert forked(room, ["report", inputs / "replay.npz", "-o", page, "--figures", pngs]).code == 0
    sizes = [path.stat().st_size for path in pngs.iterdir()]
    assert len(sizes) == 5
    assert page.stat().st_size > 0
    page.write_bytes(OLD)
    for path in [*pngs.iterdir()]:
        path.write_bytes(OLD) if there else path.unlink()
    if not there:
        pngs.rmdir()
        pngs.parent.rmdir()
    before = {path: path.is_file() and path.read_bytes() for path in room.rglob("*")}
    arguments = ["report", inputs / "replay.npz", "-o", page, "--figures", pngs]
    for start in (limited(max(sizes) - 1), ended_by(signal.SIGINT, max(sizes) - 1)):
        done = forked(room, arguments, start)
        assert done.code in (2, 130)
        assert "Traceback" not in done.err
        if done.code == 2:
            refused(done, pngs, "File too large")
        assert {path: path.is_file() and path.read_bytes() for path in room.rglob("*")} == before
