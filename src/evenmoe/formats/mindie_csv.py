"""MindIE and msit: a folder of decode_<rank>.csv or prefill_<rank>.csv without header, columns = that rank's slots.

L rows a dump, and dump is appended to dump. Ranks stand side by side; beside a model_gen_config.json (split mode) they
are summed instead. Or one merged file, with the header expert_0,expert_1,…
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from evenmoe.formats.contents import Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.findings import Finding
from evenmoe.formats.source import parse_document, read_bytes
from evenmoe.formats.values import whole_counts

_FILE = re.compile(r"(decode|prefill)_([0-9]{1,6})\.csv")
_SPLIT = "model_gen_config.json"


def matches(document: Document) -> bool:
    if document.container == "folder":
        return any(_FILE.fullmatch(path.name) for path in document.value.iterdir())
    header = document.value[0]
    return not header or header[0] == "expert_0"


def read(document: Document, options: Options) -> RawLoad:
    findings: list[Finding] = []
    notes: list[str] = []
    if document.container == "folder":
        rows = _folder(document, document.value, notes, findings)
    else:
        rows = document.numbers(document.value[1], "its lines", (2,))
    layers = options.placement.num_layers if options.placement else options.num_layers
    if layers is None:
        raise document.refuse(
            f"of {len(rows)} lines, which are layers of one dump or of several",
            "must be read with the number of MoE layers",
            "pass num_layers (--num-layers)",
        )
    if len(rows) % layers:
        raise document.refuse(
            f"of {len(rows)} lines", f"must have whole dumps of {layers} layers", "check --num-layers, or cut the last"
        )
    per_slot = rows.reshape(-1, layers, rows.shape[1])
    if options.placement is None and options.num_experts != rows.shape[1]:
        raise document.refuse(
            f"with counts of {rows.shape[1]} slots",
            "must be read with their placement, or with as many experts as slots",
            f"pass placement (--map FILE); without redundant experts num_experts (--experts) {rows.shape[1]}",
        )
    return RawLoad(per_slot, notes=notes, findings=findings)


def write(value: Load, options: WriteOptions) -> bytes | dict[str, bytes]:
    rows = whole_counts(value, "mindie-csv").reshape(-1, value.shape[2])
    if options.container == "csv":
        header = ",".join(f"expert_{expert}" for expert in range(rows.shape[1]))
        return (header + "\n").encode() + _lines(rows)
    return {"decode_0.csv": _lines(rows)}


def _lines(rows: np.ndarray) -> bytes:
    return "".join(",".join(map(str, row)) + "\n" for row in rows.tolist()).encode()


def _folder(document: Document, folder: Path, notes: list[str], findings: list[Finding]) -> Load:
    named = [(match, path) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))]
    phases = sorted({match.group(1) for match, _ in named})
    if len(phases) != 1:
        raise document.refuse(
            f"a folder with files of {' and '.join(phases) or 'no phase'}",
            "must hold decode_<rank>.csv or prefill_<rank>.csv",
            "put each phase into its own folder",
        )
    files = sorted((int(match.group(2)), path) for match, path in named)
    parts = [_one_file(path) for _, path in files]
    if len({len(part) for part in parts}) != 1:
        shortest = min(range(len(parts)), key=lambda i: len(parts[i]))
        raise document.refuse(
            f"with {len(parts[shortest])} lines of rank {files[shortest][0]}, {max(map(len, parts))} of another",
            "must have as many lines of every rank",
            "cut all to the same dumps",
        )
    if [rank for rank, _ in files] != list(range(len(files))):
        text = f"ranks {files[0][0]} to {files[-1][0]}, {len(files)} of them"
        findings.append(Finding("error", "missing-rank", text, "should have a file of every rank", "add it"))
    skipped = sum(1 for path in folder.glob("*.csv")) - len(files)
    if skipped:
        notes.append(f"left out {skipped} other CSV files (_bak, topk)")
    if (folder / _SPLIT).is_file():
        if len({part.shape for part in parts}) != 1:
            raise document.refuse(f"with {_SPLIT} and ranks of different widths", "must have equal ranks", "remove it")
        notes.append(f"summed {len(files)} ranks: {_SPLIT} means split mode")
        total = np.sum(parts, axis=0)
        document.check_total(total, "its counts over all ranks")
        return total
    notes.append(f"put {len(files)} ranks side by side")
    return np.concatenate(parts, axis=1)


def _one_file(path: Path) -> Load:
    part = parse_document(str(path), read_bytes(path))
    if part.container != "csv" or part.value[0]:
        raise part.refuse("a file with a header, or no CSV", "must be numbers, separated by commas", "write it again")
    return part.numbers(part.value[1], "its lines", (2,))
