"""Damaged and hostile files for every reader: a clean error or a value, never anything else.

python tests/formats/fuzz.py --count 10000            every format, 10,000 files each
python tests/formats/fuzz.py --only sglang-stat.pt    one of them
python tests/formats/fuzz.py --seed 7                 other files
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs as a script, too

from evenmoe import formats
from evenmoe.errors import EvenmoeError
from tests.formats.samples import Content, Sample, put, samples

_SECONDS = 5  # of CPU, for one file of a few kB, which takes a millisecond
_BEYOND_BYTES = 1 << 30  # of address space beyond what the process has when it starts

NUMBERS = [
    "0", "-1", "1", "7", "-0", "2147483647", "2147483648", "-2147483649", "4294967296", "9223372036854775807",
    "9223372036854775808", "-9223372036854775809", "18446744073709551616", "1e308", "1e999", "-1e999", "NaN", "nan",
    "Infinity", "-Infinity", ".nan", ".inf", "1.5", "1e-400", "0x10", "1_000", "9" * 30, "9" * 5000, "007", "--1", "1e",
]  # fmt: skip
SHARDS = [
    "null", "true", '"x"', "[]", "{}", "[[]]", "[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]", '{"a":1}', "[1,2", "}", "]",
    '"\\ud800"', '"\\u0000"', "&a [*a]", "*a", "!!python/object/apply:os.system ['true']", "? ", "- ", "--- ", "%TAG",
    "\t",
    "<<: *a",
    ",,", "\x00", "\ufeff", "é", "[" * 2000, "{" * 2000, '{"a":' * 500, "[0," * 300, "#", "\r", "\n\n", "'",
]  # fmt: skip


def mutated(content: Content, rng: random.Random) -> Content:
    """One damaged file; of a folder, one of its files, or the folder with a file gone or under another name."""
    if isinstance(content, bytes):
        return _file(content, rng)
    files = dict(content)
    name = rng.choice(sorted(files))
    what = rng.randrange(8)
    if what == 0:
        del files[name]
    elif what == 1:
        files[rng.choice(["rank1.safetensors", "decode_1.csv", "prefill_0.csv", "model_gen_config.json"])] = files[name]
    else:
        files[name] = _file(files[name], rng)
    return files


def _file(data: bytes, rng: random.Random) -> bytes:
    ways = [_cut, _flip, _splice, _double, _header]
    if data[:2] == b"PK":
        ways += [_inside_zip] * 5
    elif data[:1] in b"{[" or not data[:64].translate(None, bytes(range(32, 127)) + b"\n"):
        ways += [_number, _shard, _number, _shard, _tree]
    else:
        ways += [_number, _little_endian, _little_endian]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = rng.choice(ways)(data, rng)
    return data


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if changed:
            changed[rng.randrange(len(changed))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    return bytes(changed)


def _splice(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.randrange(20)) + data[min(len(data), start + rng.randrange(20)) :]


def _double(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    part = data[start : start + rng.randrange(1, 200)]
    return data[:start] + part * rng.randrange(1, 50) + data[start:]


def _header(data: bytes, rng: random.Random) -> bytes:
    start = rng.choice(
        [b"", b"{", b"[", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"\x80\x02", b"\x80\x04", b"\xef\xbb\xbf", b"%"]
    )
    return start + data[rng.choice([0, len(start)]) :]


def _number(data: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(rb"-?[0-9]+", data))
    if not found:
        return _splice(data, rng)
    match = rng.choice(found)
    return data[: match.start()] + rng.choice(NUMBERS).encode() + data[match.end() :]


def _shard(data: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(rb'-?[0-9]+|"[^"]*"|[\[\]{},:\n]', data))
    place = rng.choice(found).span() if found and rng.random() < 0.7 else (rng.randrange(len(data) + 1),) * 2
    return data[: place[0]] + rng.choice(SHARDS).encode() + data[place[1] :]


def _little_endian(data: bytes, rng: random.Random) -> bytes:
    width = rng.choice([1, 2, 4, 8])
    start = rng.randrange(max(1, len(data) - width))
    value = rng.choice([0, 1, -1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), len(data), rng.randrange(256)])
    return data[:start] + (value % 256**width).to_bytes(width, "little") + data[start + width :]


def _tree(data: bytes, rng: random.Random) -> bytes:
    """A node of a JSON file replaced by a value of another type, or taken out."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return _shard(data, rng)
    node = tree
    while isinstance(node, (dict, list)) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not isinstance(node[key], (dict, list)) or rng.random() < 0.4:
            if rng.random() < 0.2:
                del node[key]
            else:
                node[key] = rng.choice([None, True, "x", [], {}, -5, 2**70, 1.5, [[1]], {"a": [1]}, [None], "9" * 100])
            break
        node = node[key]
    return json.dumps(tree).encode()


def _inside_zip(data: bytes, rng: random.Random) -> bytes:
    """An entry's bytes damaged under a correct checksum: a damaged archive hides what lies behind its checks."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # an earlier change broke the archive itself
        return _flip(data, rng)
    entries = [entry for entry in entries if rng.random() > 0.02]
    if not entries:
        return data
    named = [i for i, (name, _) in enumerate(entries) if name.endswith((".pkl", ".npy"))] or [0]
    which = rng.choice(named) if rng.random() < 0.8 else rng.randrange(len(entries))
    name, content = entries[which]
    change = rng.choice([_flip, _little_endian, _cut, _splice, _number, _opcode, _double])
    entries[which] = (rng.choice([name] * 9 + ["x/data.pkl"]), change(content, rng))
    packed = rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packed) as archive:
        for name, content in entries:
            if name not in archive.namelist():
                archive.writestr(name, content)
    return buffer.getvalue()


def _opcode(data: bytes, rng: random.Random) -> bytes:
    """A pickle's operation replaced by another, whole, so that the rest still parses."""
    code = rng.choice(
        [b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"R", b"Q", b"}", b"]", b")", b"N",
         b"h\x00", b"(", b"t", b"u", b"e", b"K\xff", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 8,
         b"r\xff\xff\xff\xff", b"0", b"."]
    )  # fmt: skip
    start = rng.randrange(len(data) + 1)
    return data[:start] + code + data[start + rng.choice([0, 0, 1, len(code)]) :]


class Broken(AssertionError):
    """A reader did something else than raise a clean error or return."""


def attempt(sample: Sample, content: Content, path: Path, act: Callable[..., Any]) -> str:
    """Read one file; "read", or the name of the clean error. Raises `Broken`."""
    source = put(content, path)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        act(source, **sample.told)
    except EvenmoeError as error:
        text = str(error)
        if len(text) > 2000 or not error.rule or not error.fix:
            raise Broken(f"{sample.name}: an error that helps nobody: {text[:200]}") from error
        return type(error).__name__
    except BaseException as error:
        raise Broken(f"{sample.name}: {type(error).__name__}: {str(error)[:200]}") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return "read"


def fuzz(sample: Sample, count: int, seed: int, folder: Path) -> Counter[str]:
    """`count` damaged files of one sample through `read`, detected and named, and through `check`."""
    rng = random.Random(f"{sample.name} {seed}")
    signal.signal(signal.SIGVTALRM, _hang)
    warnings.simplefilter("error")
    outcomes: Counter[str] = Counter()
    path = folder / f"fuzzed-{sample.name}"
    acts = [formats.read, lambda source, **told: formats.read(source, format=sample.entry.name, **told), formats.check]
    for number in range(count):
        content = mutated(sample.content, rng)
        try:
            outcomes[attempt(sample, content, path, acts[number % 3])] += 1
        except Broken:
            print(f"file {number} of {sample.name}, seed {seed}, kept in {path}", file=sys.stderr)
            raise
    return outcomes


def _hang(*_: object) -> None:
    raise TimeoutError(f"more than {_SECONDS} s of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="files of every sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="samples whose name begins so")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())  # kept, for the file that broke a reader
    import torch  # so that its address space counts as the process's own

    torch.zeros(1)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + _BEYOND_BYTES, resource.RLIM_INFINITY))
    for sample in samples(folder):
        if sample.name.startswith(options.only):
            start = time.process_time()
            outcomes = fuzz(sample, options.count, options.seed, folder)
            spent = time.process_time() - start
            print(f"{sample.name:<28} {options.count} files, {spent:.0f} s: {dict(outcomes)}", flush=True)


if __name__ == "__main__":
    main()
