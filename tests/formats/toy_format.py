"""A format of one's own in one file: lines of numbers behind a word, for a placement or for a load.

The placement of two ranks with three slots each, in one layer:

    {"toy": "placement", "ranks": 2, "rows": [[0, 1, 2, 3, 0, 1]]}

and the load of one window and layer:

    {"toy": "load", "rows": [[[60, 20, 10, 10]]]}
"""

from __future__ import annotations

import json

import numpy as np

from evenmoe.formats import Document, Entry, Format, RawLoad, RawPlacement, ReadOptions, WriteOptions
from evenmoe.placement import Placement


def _read_placement(document: Document, options: ReadOptions) -> RawPlacement:
    rows = document.numbers(document.fields.get("rows"), "`rows`", (2,), integers=True)
    ranks = document.integer(document.fields.get("ranks"), "`ranks`")
    if ranks < 1 or rows.shape[1] % ranks:
        raise document.error(f"with {ranks} ranks for {rows.shape[1]} slots", "must share them evenly", "correct it")
    return RawPlacement(list(rows), [[rows.shape[1] // ranks] * ranks] * len(rows))


def _write_placement(value: Placement, options: WriteOptions) -> bytes:
    return json.dumps({"toy": "placement", "ranks": value.num_ranks, "rows": value.slot_to_expert.tolist()}).encode()


def _read_load(document: Document, options: ReadOptions) -> RawLoad:
    return RawLoad(document.numbers(document.fields.get("rows"), "`rows`", (3,)))


def _write_load(value: np.ndarray, options: WriteOptions) -> bytes:
    return json.dumps({"toy": "load", "rows": value.tolist()}).encode()


PLACEMENT = Format(
    Entry("toy-placement", "placement", "a toy: rows of slots", ("json",)),
    lambda document: document.says("toy", "placement"),
    _read_placement,
    _write_placement,
    stores_ranks=True,
)
LOAD = Format(
    Entry("toy-load", "load", "a toy: rows of loads", ("json",)),
    lambda document: document.says("toy", "load"),
    _read_load,
    _write_load,
)
