"""DeepSeek's tensors: phy2log (L, P), log2phy (L, E, X) padded with -1, logcnt (L, E); named or in this order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evenmoe.formats.catalogue import ENTRIES, Format
from evenmoe.formats.contents import Finding, IntArray, RawPlacement, ReadOptions, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.values import arrays_bytes
from evenmoe.placement import Placement

_NAMES = ("phy2log", "log2phy", "logcnt")


def _matches_tables(document: Document) -> bool:
    value = document.value
    if isinstance(value, Mapping):
        return "phy2log" in value
    shapes = [item.ndim for item in value if isinstance(item, np.ndarray)] if isinstance(value, list) else []
    return shapes == [2, 3, 2] and len(value) == 3


def _read_tables(document: Document, options: ReadOptions) -> RawPlacement:
    tensors = document.value if isinstance(document.value, Mapping) else {}
    if isinstance(document.value, list):
        tensors = dict(zip(_NAMES, document.value, strict=False))
    phy2log = document.numbers(tensors.get("phy2log"), "`phy2log`", (2,), integers=True)
    raw = RawPlacement(list(phy2log))
    experts = options.num_experts
    if "logcnt" in tensors:
        logcnt = document.numbers(tensors["logcnt"], "`logcnt`", (2,), integers=True)
        experts = raw.num_experts = logcnt.shape[1]
        _same_layers(document, "`logcnt`", logcnt, phy2log)
        raw.findings.extend(_check_counts(phy2log, logcnt))
    if "log2phy" in tensors:
        log2phy = document.numbers(tensors["log2phy"], "`log2phy`", (3,), integers=True)
        experts = raw.num_experts = log2phy.shape[1]
        _same_layers(document, "`log2phy`", log2phy, phy2log)
        if "logcnt" in tensors and tensors["logcnt"].shape[1] != experts:
            raise document.error(
                f"with {experts} experts in `log2phy`, {tensors['logcnt'].shape[1]} in `logcnt`",
                "must have the same in both",
                "write it again",
            )
        _read_order(raw, phy2log, log2phy)
    return raw


def _write_tables(value: Placement, options: WriteOptions) -> bytes:
    layers, width = value.num_layers, int(value.num_replicas.max())
    log2phy = np.full((layers, value.num_experts, width), -1, np.int64)
    rows = np.arange(layers)[:, None]
    log2phy[rows, value.slot_to_expert, value.replica_index] = np.arange(value.num_slots)
    return arrays_bytes(
        {
            "phy2log": value.slot_to_expert.astype(np.int64),
            "log2phy": log2phy,
            "logcnt": value.num_replicas.astype(np.int64),
        },
        options.container,
    )


def _same_layers(document: Document, name: str, tensor: IntArray, phy2log: IntArray) -> None:
    if len(tensor) != len(phy2log):
        raise document.error(
            f"with {len(tensor)} layers in {name}, {len(phy2log)} in `phy2log`", "must have the same", "write it again"
        )


def _check_counts(phy2log: IntArray, logcnt: IntArray) -> list[Finding]:
    found = []
    experts = logcnt.shape[1]
    for layer, row in enumerate(phy2log):
        inside = row[(row >= 0) & (row < experts)]
        for expert in np.flatnonzero(np.bincount(inside, minlength=experts) != logcnt[layer]).tolist():
            text = (
                f"{logcnt[layer, expert]} copies of expert {expert} in `logcnt`, layer {layer}, other than in `phy2log`"
            )
            found.append(_disagreement(text, layer, expert))
    return found


def _read_order(raw: RawPlacement, phy2log: IntArray, log2phy: IntArray) -> None:
    """Positions of the replicas from `log2phy`, where it is what `phy2log` says; otherwise findings."""
    order = np.zeros_like(phy2log)
    clean = True
    for layer, table in enumerate(log2phy):
        expert, position = np.nonzero(table >= 0)
        slots = table[expert, position]
        inside = slots < phy2log.shape[1]
        agrees = inside.copy()
        agrees[inside] = phy2log[layer, slots[inside]] == expert[inside]
        packed = ((table >= 0).sum(axis=1)[expert] > position) if len(expert) else np.ones(0, bool)
        missing = phy2log.shape[1] - len(np.unique(slots[agrees]))
        for where in np.flatnonzero(~(agrees & packed)).tolist():
            text = (
                f"slot {slots[where]} for expert {expert[where]} in `log2phy`, layer {layer}, other than in `phy2log`"
            )
            raw.findings.append(_disagreement(text, layer, int(expert[where])))
            clean = False
        if missing or len(slots) != phy2log.shape[1]:
            text = f"{len(slots)} slots in `log2phy`, layer {layer}, {phy2log.shape[1]} in `phy2log`"
            raw.findings.append(_disagreement(text, layer, None))
            clean = False
        if clean:
            order[layer, slots] = position
    if clean:
        raw.replica_index = list(order)


def _disagreement(text: str, layer: int, expert: int | None) -> Finding:
    rule = "should say the same in all three tensors"
    fix = "write it again; `phy2log` is what was read"
    return Finding("error", "tables-disagree", text, rule, fix, layer=layer, expert=expert)


TABLES = Format(ENTRIES["deepseek"], _matches_tables, _read_tables, _write_tables)
