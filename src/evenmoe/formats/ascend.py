"""Ascend's files: the expert map of vllm-ascend, MindIE and verl, and the loads that MindIE and msit record.

    {"moe_layer_count": L, "layer_list": [{"layer_id": i, "device_count": D,
        "device_list": [{"device_id": d, "device_expert": [logical ids in slot order]}]}]}

Layer ids count MoE layers from 0; an entry with id L is the MTP layer. Devices that hold only the shared expert come
first, with [0]. verl adds `strategy_version`.

MindIE and msit: a folder of decode_<rank>.csv or prefill_<rank>.csv without header, columns = that rank's slots. L rows
a dump, and dump is appended to dump. Ranks stand side by side; beside a model_gen_config.json (split mode) they are
summed instead. Or one merged file, with the header expert_0,expert_1,…
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.formats.catalogue import ENTRIES, Format
from evenmoe.formats.contents import Finding, IntArray, Load, RawLoad, RawPlacement, ReadOptions, WriteOptions
from evenmoe.formats.document import Document, missing_ranks, parse_document, read_bytes
from evenmoe.formats.layer_numbers import MTP_LAYERS
from evenmoe.formats.values import slots_of, whole_counts
from evenmoe.io import Value
from evenmoe.io.text import json_bytes
from evenmoe.placement import Placement

_RANK_FILE = re.compile(r"(decode|prefill)_([0-9]{1,6})\.csv")
_SPLIT = "model_gen_config.json"

_SHARED = "shared_expert_devices"


def _matches_map(document: Document) -> bool:
    return "layer_list" in document.fields


def _read_map(document: Document, options: ReadOptions) -> RawPlacement:
    entries = _objects(document, document.fields.get("layer_list"), "`layer_list`")
    findings: list[Finding] = []
    layers: dict[int, list[IntArray]] = {}
    for position, entry in enumerate(entries):
        number = document.integer(entry.get("layer_id"), f"`layer_list[{position}].layer_id`")
        if number in layers:
            raise document.error(f"with `layer_id` {number} twice", "must name every layer once", "correct the ids")
        layers[number] = _devices(document, entry, number, findings)
    count = document.integer(document.fields.get("moe_layer_count", len(layers)), "`moe_layer_count`")
    mtp = int(len(layers) > 1 and count == max(layers) and count == len(layers) - 1)
    raw = RawPlacement([], [], mtp_layers=mtp, findings=findings)
    numbers = sorted(layers)
    findings.extend(_numbering(list(layers), numbers[: len(numbers) - mtp], count))
    ordered = [layers[number] for number in numbers]
    shared = _shared_devices(document, ordered[: len(ordered) - mtp], options)
    if shared:
        raw.metadata[_SHARED] = shared
        raw.notes.append(f"left out the first {shared} devices, which hold the shared expert")
    for devices in ordered:
        raw.slots.append(np.concatenate(devices[shared:]))
        assert raw.rank_sizes is not None
        raw.rank_sizes.append([len(experts) for experts in devices[shared:]])
    if "strategy_version" in document.fields:
        raw.metadata["strategy_version"] = document.fields["strategy_version"]
    return raw


def _write_map(value: Placement, options: WriteOptions) -> bytes:
    if len(options.mtp_slots) > 1:
        raise ConstraintError(
            MTP_LAYERS,
            f"given for {len(options.mtp_slots)} layers",
            "must be one layer for ascend-map, the one whose number is `moe_layer_count`",
            "leave the others out with layers (--layers first:end), or use evenmoe-placement or tensorrt-llm",
        )
    rows = np.stack([*slots_of(value, options), *options.mtp_slots])
    shared = int(options.metadata.get(_SHARED, 0))
    layers = [[[0]] * shared + layer.tolist() for layer in rows.reshape(len(rows), value.num_ranks, -1)]
    content: dict[str, Value] = {"moe_layer_count": value.num_layers, "layer_list": []}
    if "strategy_version" in options.metadata:
        content = {"strategy_version": options.metadata["strategy_version"], **content}
    for number, devices in enumerate(layers):
        listed = [{"device_id": device, "device_expert": experts} for device, experts in enumerate(devices)]
        content["layer_list"].append({"layer_id": number, "device_count": len(devices), "device_list": listed})
    return json_bytes(content)


def _objects(document: Document, value: Value, where: str) -> list[Mapping[str, Value]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        raise document.error(f"with {where} that is no list of objects", "must be an expert map", "write it again")
    return value


def _devices(document: Document, entry: Mapping[str, Value], layer: int, findings: list[Finding]) -> list[IntArray]:
    listed = _objects(document, entry.get("device_list"), f"`device_list` of layer {layer}")
    devices: dict[int, IntArray] = {}
    for position, device in enumerate(listed):
        number = document.integer(device.get("device_id", position), f"`device_id` of layer {layer}")
        if number in devices:
            raise document.error(
                f"with device {number} twice in layer {layer}", "must name every device once", "correct the ids"
            )
        experts = device.get("device_expert")
        where = f"`device_expert` of layer {layer}, device {number}"
        if isinstance(experts, np.ndarray) and experts.shape == (0,):
            devices[number] = experts.astype(np.int64)  # a device without experts is a finding, not a damaged file
        else:
            devices[number] = document.numbers(experts, where, (1,), integers=True)
    if sorted(devices) != list(range(len(devices))):
        text = f"devices {min(devices)} to {max(devices)}, {len(devices)} of them, in layer {layer}"
        fix = "number them without gaps"
        findings.append(Finding("error", "device-numbering", text, "should number devices from 0", fix, layer=layer))
    stated = entry.get("device_count", len(devices))
    if document.integer(stated, f"`device_count` of layer {layer}") != len(devices):
        text = f"`device_count` {stated} and {len(devices)} devices in layer {layer}"
        findings.append(Finding("error", "device-count", text, "should count its devices", "correct it", layer=layer))
    return [devices[number] for number in sorted(devices)]


def _numbering(listed: list[int], numbers: list[int], count: int) -> list[Finding]:
    """What is wrong with the layers' ids, as they are listed, and in order those of the MoE layers."""
    found = []
    for number, expected in zip(listed, sorted(listed), strict=True):
        if number != expected:
            text = f"layer {number} where layer {expected} should be listed"
            rule = "must list its layers in the order of their ids, for vllm-ascend reads them by position"
            fix = "sort `layer_list` by `layer_id`"
            found.append(Finding("error", "layer-order", text, rule, fix, layer=number, fatal=True))
            break
    if count != len(numbers):
        text = f"`moe_layer_count` {count} and {len(numbers)} layers"
        found.append(Finding("error", "layer-count", text, "should count its layers", "add those missing"))
    if numbers[0] > 0 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        text = f"layers {numbers[0]} to {numbers[-1]}, which look like the model's own numbers"
        rule = "should count MoE layers only, from 0"
        fix = f"subtract {numbers[0]} from every layer_id"
        found.append(Finding("error", "layer-numbering", text, rule, fix, layer=numbers[0]))
        return found
    for expected, number in enumerate(numbers):
        if number != expected:
            text = f"layer {number} where layer {expected} should be"
            rule = "should count MoE layers from 0 without gaps"
            found.append(Finding("error", "layer-gap", text, rule, "add the layer, or renumber", layer=number))
            break
    return found


def _shared_devices(document: Document, layers: list[list[IntArray]], options: ReadOptions) -> int:
    """Devices that hold only the shared expert: the same number in every layer, first, each with [0]."""
    if options.shared_devices is not None:
        if not 0 <= options.shared_devices < min(len(devices) for devices in layers):
            raise document.error(
                f"read with {options.shared_devices} shared devices", "must have more devices", "check --shared-devices"
            )
        return options.shared_devices
    leading = min(_leading(devices) for devices in layers)
    if not leading:
        return 0
    single = all(len(experts) == 1 for devices in layers for experts in devices)
    if not single and leading < min(len(devices) for devices in layers):
        return leading
    # One expert a device: [0] first may be expert 0 itself. Only more than one of them in every layer is a question.
    if leading == 1:
        return 0
    raise document.error(
        f"with [0] on the first {leading} devices, and one expert on every device",
        "must tell devices of the shared expert from replicas of expert 0",
        f"pass shared_devices (--shared-devices), {leading} or {leading - 1}, or 0 for none",
    )


def _leading(devices: list[IntArray]) -> int:
    count = 0
    while count < len(devices) and devices[count].tolist() == [0]:
        count += 1
    return count


def _matches_mindie_csv(document: Document) -> bool:
    if document.container == "folder":
        return any(_RANK_FILE.fullmatch(path.name) for path in document.value.iterdir())
    header = document.value[0]
    return not header or header[0] == "expert_0"


def _read_mindie_csv(document: Document, options: ReadOptions) -> RawLoad:
    findings: list[Finding] = []
    notes: list[str] = []
    if document.container == "folder":
        rows = _folder(document, document.value, notes, findings)
    else:
        rows = document.numbers(document.value[1], "its lines", (2,))
    layers = options.placement.num_layers if options.placement else options.num_layers
    if layers is None:
        raise document.error(
            f"of {len(rows)} lines, which are layers of one dump or of several",
            "must be read with the number of MoE layers",
            "pass num_layers (--num-layers)",
        )
    if len(rows) % layers:
        raise document.error(
            f"of {len(rows)} lines", f"must have whole dumps of {layers} layers", "check --num-layers, or cut the last"
        )
    per_slot = rows.reshape(-1, layers, rows.shape[1])
    if options.placement is None and options.num_experts != rows.shape[1]:
        raise document.error(
            f"with counts of {rows.shape[1]} slots",
            "must be read with their placement, or with as many experts as slots",
            f"pass placement (--map FILE); without redundant experts num_experts (--experts) {rows.shape[1]}",
        )
    return RawLoad(per_slot, notes=notes, findings=findings)


def _write_mindie_csv(value: Load, options: WriteOptions) -> bytes | dict[str, bytes]:
    rows = whole_counts(value, "mindie-csv").reshape(-1, value.shape[2])
    if options.container == "csv":
        header = ",".join(f"expert_{expert}" for expert in range(rows.shape[1]))
        return (header + "\n").encode() + _csv_lines(rows)
    return {"decode_0.csv": _csv_lines(rows)}


def _csv_lines(rows: np.ndarray) -> bytes:
    return "".join(",".join(map(str, row)) + "\n" for row in rows.tolist()).encode()


def _folder(document: Document, folder: Path, notes: list[str], findings: list[Finding]) -> Load:
    named = [(match, path) for path in folder.iterdir() if (match := _RANK_FILE.fullmatch(path.name))]
    phases = sorted({match.group(1) for match, _ in named})
    if len(phases) != 1:
        raise document.error(
            f"a folder with files of {' and '.join(phases) or 'no phase'}",
            "must hold decode_<rank>.csv or prefill_<rank>.csv",
            "put each phase into its own folder",
        )
    files = sorted((int(match.group(2)), path) for match, path in named)
    parts = [_rank_lines(path) for _, path in files]
    if len({len(part) for part in parts}) != 1:
        shortest = min(range(len(parts)), key=lambda i: len(parts[i]))
        raise document.error(
            f"with {len(parts[shortest])} lines of rank {files[shortest][0]}, {max(map(len, parts))} of another",
            "must have as many lines of every rank",
            "cut all to the same dumps",
        )
    findings.extend(missing_ranks([rank for rank, _ in files]))
    skipped = sum(1 for path in folder.glob("*.csv")) - len(files)
    if skipped:
        notes.append(f"left out {skipped} other CSV files (_bak, topk)")
    if (folder / _SPLIT).is_file():
        if len({part.shape for part in parts}) != 1:
            raise document.error(f"with {_SPLIT} and ranks of different widths", "must have equal ranks", "remove it")
        notes.append(f"summed {len(files)} ranks: {_SPLIT} means split mode")
        total = np.sum(parts, axis=0)
        document.check_total(total, "its counts over all ranks")
        return total
    notes.append(f"put {len(files)} ranks side by side")
    return np.concatenate(parts, axis=1)


def _rank_lines(path: Path) -> Load:
    part = parse_document(str(path), read_bytes(path))
    if part.container != "csv" or part.value[0]:
        raise part.error("a file with a header, or no CSV", "must be numbers, separated by commas", "write it again")
    return part.numbers(part.value[1], "its lines", (2,))


MAP = Format(
    ENTRIES["ascend-map"],
    _matches_map,
    _read_map,
    _write_map,
    stores_ranks=True,
    mtp_layers=True,
    kept_metadata=("strategy_version",),
)
MINDIE_CSV = Format(ENTRIES["mindie-csv"], _matches_mindie_csv, _read_mindie_csv, _write_mindie_csv)
