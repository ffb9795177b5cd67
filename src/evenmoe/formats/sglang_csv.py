"""SGLang's old recorder: CSV with header layer_id,expert_id,count; layer ids are the model's.

Every rank writes files of its own, expert_distribution_rank<r>_timestamp<t>.csv, of its own tokens, and starts anew
after each. In a folder of them the ranks are summed; the n-th files of all ranks are a window.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from evenmoe.formats.contents import Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import ALLOWANCE_BYTES, Document
from evenmoe.formats.hidden_layers import without_dense
from evenmoe.formats.rank_files import alone, files_in, first_line, left_out, missing_ranks, summed
from evenmoe.formats.source import parse_document, read_bytes
from evenmoe.formats.values import one_window, whole_counts

_HEADER = ["layer_id", "expert_id", "count"]
_RANK = re.compile(r"rank_?([0-9]{1,6})(?![0-9])", re.IGNORECASE)
_TIME = re.compile(r"timestamp_?([0-9]{1,12}(?:\.[0-9]{1,9})?)", re.IGNORECASE)


def matches(document: Document) -> bool:
    if document.container == "folder":
        return any(_is_mine(path) for path in files_in(document.value, ".csv"))
    return document.value[0] == _HEADER


def read(document: Document, options: Options) -> RawLoad:
    notes: list[str] = []
    if document.container == "folder":
        windows, ranks, several = _folder(document, notes)
    else:
        match = _RANK.search(Path(document.name).name)
        windows, ranks, several = [[_lines(document)]], [int(match.group(1))] if match else [], False
    table = np.concatenate([lines for window in windows for lines in window])
    numbers = np.unique(table[:, 0])
    width = max(int(table[:, 1].max()) + 1, options.num_experts or 0)
    if 8 * len(windows) * len(numbers) * width > 8 * table.nbytes // 3 + ALLOWANCE_BYTES:
        raise document.refuse(
            f"with {len(table)} lines for {len(numbers)} layers of {width} experts",
            "must have a line for most experts",
            "check the expert ids",
        )
    document.check_total(table[:, 2], "its counts")
    load = np.zeros((len(windows), len(numbers), width), np.int64)
    twice = 0
    for window, parts in zip(load, windows, strict=True):
        for layers, experts, counts in (lines.T for lines in parts):
            np.add.at(window, (np.searchsorted(numbers, layers), experts), counts)
            twice += len(layers) - len(np.unique(layers * width + experts))
    raw = without_dense(document, load)
    assert raw.layer_ids is not None
    raw.layer_ids = tuple(int(numbers[row]) for row in raw.layer_ids)
    raw.metadata.clear()  # the lines do not tell the hidden layers
    raw.notes += notes
    if twice:
        raw.notes.append(f"added up {twice} lines that name a layer and an expert again")
    if several:
        raw.notes.append(summed(ranks, "counts"))
        raw.findings.extend(missing_ranks(ranks))
    else:
        raw.notes.append(alone(ranks[0] if ranks else None))
    return raw


def write(value: Load, options: WriteOptions) -> bytes:
    counts = whole_counts(one_window(value, options), "sglang-csv")
    assert options.layer_ids is not None
    lines = [
        f"{layer},{expert},{count}"
        for layer, row in zip(options.layer_ids, counts.tolist(), strict=True)
        for expert, count in enumerate(row)
    ]
    return ("\n".join([",".join(_HEADER), *lines]) + "\n").encode()


def _is_mine(path: Path) -> bool:
    line = first_line(path, 100).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    return [name.strip() for name in line.split(",")] == _HEADER


def _folder(document: Document, notes: list[str]) -> tuple[list[list[np.ndarray]], list[int], bool]:
    """The lines of every rank in every window, the ranks that the names tell, and whether there are several."""
    files = [path for path in files_in(document.value, ".csv") if _is_mine(path)]
    if not files:
        raise document.refuse(
            f"a folder without a CSV of {','.join(_HEADER)}", "must hold one a rank", "name the recorder's folder"
        )
    notes += left_out(document.value, files)
    by_rank: dict[object, list[tuple[float, str, bytes]]] = {}
    for path in files:
        rank, time = _RANK.search(path.name), _TIME.search(path.name)
        key = int(rank.group(1)) if rank else path.name
        by_rank.setdefault(key, []).append((float(time.group(1)) if time else 0.0, path.name, read_bytes(path)))
    for rank, dumps in by_rank.items():
        dumps.sort()
        _check_once(document, rank, dumps)
    counted = {rank: len(dumps) for rank, dumps in by_rank.items()}
    most = max(counted, key=lambda rank: counted[rank])
    least = min(counted, key=lambda rank: counted[rank])
    if counted[most] != counted[least]:
        raise document.refuse(
            f"a folder with {counted[most]} files of rank {most} and {counted[least]} of rank {least}",
            "must have as many of every rank",
            "put the files that belong together into a folder of their own",
        )
    windows = [
        [_lines_of(document, name, data) for _, name, data in window] for window in zip(*by_rank.values(), strict=True)
    ]
    if not any(len(lines) for window in windows for lines in window):
        raise document.refuse("without a single token", "must hold recorded counts", "record some traffic first")
    return windows, sorted(rank for rank in by_rank if isinstance(rank, int)), len(by_rank) > 1


def _check_once(document: Document, rank: object, dumps: list[tuple[float, str, bytes]]) -> None:
    names: dict[bytes, str] = {}
    for _, name, data in dumps:
        before = names.setdefault(data, name)
        if before != name:
            raise document.refuse(
                f"a folder with the same counts of rank {rank} twice, in {before} and {name}",
                "must hold each file of a rank once",
                "remove the copy",
            )


def _lines_of(document: Document, name: str, data: bytes) -> np.ndarray:
    if data.count(b"\n") <= 1 and len(data) < 100:  # a rank without a token writes the header alone
        return np.empty((0, 3), np.int64)
    return _lines(parse_document(str(Path(document.name) / name), data))


def _lines(document: Document) -> np.ndarray:
    """The lines of one file, int64 (lines, 3)."""
    header, table = document.value
    if header != _HEADER:
        raise document.refuse(f"with the header {','.join(header)[:40]!r}", f"must have {','.join(_HEADER)}", "add it")
    table = document.numbers(table, "its lines", (2,), integers=True)
    document.check_total(table[:, 2], "its counts")
    if table[:, :2].min() < 0 or table[:, :2].max() >= 2**31:
        raise document.refuse(
            f"with ids from {table[:, :2].min()} to {table[:, :2].max()}", "must have ids from 0", "correct them"
        )
    return table
