"""A small valid file of every format and file type, as bytes, or as a folder's files; what the fuzzer starts from."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evenmoe import formats
from evenmoe.formats.catalogue import FORMATS, Format
from evenmoe.io.npz import npy_bytes, npz_bytes
from evenmoe.io.torch_file import torch_bytes
from evenmoe.placement import Placement

LAYERS, EXPERTS, RANKS, WINDOWS = 3, 6, 4, 2
#: No expert twice on a rank, every expert somewhere, not the identity in any layer.
PLACEMENT = Placement(
    [[1, 0, 2, 3, 4, 5, 0, 1], [5, 4, 3, 2, 1, 0, 5, 4], [2, 3, 0, 1, 4, 5, 3, 2]], RANKS, num_experts=EXPERTS
)
LOAD = np.random.default_rng(5).integers(100, 1000, (WINDOWS, LAYERS, EXPERTS))

Content = bytes | dict[str, bytes]


@dataclass(frozen=True)
class Sample:
    """A file: its format, its content, and what `read` must be told beside it."""

    name: str
    entry: Format
    content: Content
    told: dict[str, Any] = field(default_factory=dict)


def put(content: Content, path: Path) -> Path:
    """Write a file or a folder."""
    if isinstance(content, bytes):
        path.write_bytes(content)
        return path
    path.mkdir(exist_ok=True)
    for old in path.iterdir():
        old.unlink()
    for name, data in content.items():
        (path / name).write_bytes(data)
    return path


def told_for(entry: Format) -> dict[str, Any]:
    """What a file of this format does not say itself."""
    if entry.name == "mindie-csv":
        return {"num_layers": LAYERS, "num_experts": EXPERTS}
    return {"num_ranks": RANKS} if entry.kind == "placement" and not entry.stores_ranks else {}


def write_sample(entry: Format, container: str, folder: Path) -> Path:
    """The placement or the load above, in this format and file type."""
    target = folder / (entry.name + {"folder": "", "text": ".txt"}.get(container, f".{container}"))
    numbers = range(LAYERS) if entry.model_layers else None
    formats.write(target, PLACEMENT if entry.kind == "placement" else LOAD, format=entry.name, layer_ids=numbers)
    return target


def samples(folder: Path) -> list[Sample]:
    """Every format in every file type, and the variants that evenmoe reads but does not write."""
    found = []
    for entry in map(FORMATS.get, FORMATS):
        for container in entry.containers:
            if entry.write is None or (entry.name, container) == ("sglang-location", "text"):
                continue
            path = write_sample(entry, container, folder)
            files = {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {}
            found.append(Sample(f"{entry.name}.{container}", entry, files or path.read_bytes(), told_for(entry)))
    return found + _variants()


def _variants() -> list[Sample]:
    slots = PLACEMENT.slot_to_expert.astype(np.int64)
    per_slot = np.random.default_rng(6).integers(1, 100, (LAYERS, RANKS, 2))
    tokens = np.random.default_rng(7).integers(-1, 8, (LAYERS, 5, 8), dtype=np.int32)
    record = {"forward_pass_id": 1, "rank": 2, "gatherer_key": "primary", "topk_ids_of_layer": tokens, "input_ids": [1]}
    devices = [{"device_id": d, "device_expert": e} for d, e in enumerate([[0], [0, 1], [2, 3]])]
    layer = {"layer_id": 0, "device_count": 3, "device_list": devices}
    table = np.array([[2, 0, 2], [1, 1, 0], [1, 3, 0]], np.int32)
    ranks = {
        f"decode_{rank}.csv": b"".join(b"%d,%d\n" % tuple(row) for row in per_slot[:, rank]) for rank in range(RANKS)
    }
    lines = b"layer_id,expert_id,count\n"
    return [
        Sample(
            "sglang-detail.ranks", FORMATS.get("sglang-detail"), {f"{rank}.pt": _one_rank(rank) for rank in range(2)}
        ),
        Sample(
            "sglang-csv.ranks",
            FORMATS.get("sglang-csv"),
            {f"x_rank{rank}_timestamp{rank}.5.csv": lines + b"3,0,%d\n3,1,5\n" % rank for rank in range(3)},
        ),
        Sample(
            "sglang-detail.tokens",
            FORMATS.get("sglang-detail"),
            torch_bytes({"records": [record], "last_physical_to_logical_map": slots}),
        ),
        Sample(
            "ascend-map.shared",
            FORMATS.get("ascend-map"),
            json.dumps({"strategy_version": 3, "moe_layer_count": 1, "layer_list": [layer]}).encode(),
        ),
        Sample(
            "vllm-ascend-load.per-slot",
            FORMATS.get("vllm-ascend-load"),
            torch_bytes(per_slot + 100),
            {"placement": PLACEMENT},
        ),
        Sample("mindie-csv.ranks", FORMATS.get("mindie-csv"), ranks, {"placement": PLACEMENT}),
        Sample("eplb-table.layers", FORMATS.get("eplb-table"), torch_bytes([table, table]), {"num_ranks": 2}),
        Sample("deepseek.list", FORMATS.get("deepseek"), _deepseek_list(), {"num_ranks": RANKS}),
        *_read_only(),
        Sample("vllm-list.one", FORMATS.get("vllm-list"), b"[0, 1, 2, 3, 0, 1]", {"num_ranks": 2, "num_layers": 3}),
    ]


def _read_only() -> list[Sample]:
    """What other programs write and evenmoe only reads."""
    rng = np.random.default_rng(8)
    ids = np.argsort(rng.random((9, LAYERS + 1, EXPERTS)), axis=2)[:, :, :2].astype(np.uint8)
    ids[:, 0] = 0  # a dense layer
    npy, flat = base64.b64encode(npy_bytes(ids)).decode(), base64.b64encode(ids.astype("<i4").tobytes()).decode()
    joined = {"routed_experts": ids, "lengths": np.array([4, 5])}
    counts = {"prompt_tokens": 4, "completion_tokens": 6}
    dump = {
        "loads": rng.integers(1, 9, (LAYERS, 3, EXPERTS), dtype=np.int32),
        "layer_numbers": np.arange(1, LAYERS + 1, dtype=np.int32),
        "forward_counts": np.array([3, 2, 3], np.int32),
        "ep_group_ranks": np.array([0, 1], np.int32),
    }
    tensor = {"shape": [2, 4], "dtype": "torch.int32", "value": [1, 2, 3, 4, 5, 6, 7, 8]}
    slots = {"shape": [2, 4], "dtype": "torch.int64", "value": [0, 1, 2, 0, 2, 1, 0, 1]}
    payload = [
        {"step_idx": n, "ep_size": 2, "expert_load_pass": tensor, "physical_to_logical_map": slots} for n in (0, 1)
    ]
    layers = json.dumps({"layer_3": [5, 6, 7, 8], "layer_4": [1, 2, 3, 4]}).encode()
    routed, megatron = FORMATS.get("routed-experts"), FORMATS.get("megatron-load")
    return [
        Sample("routed-experts.npy", routed, npy_bytes(ids)),
        Sample("routed-experts.npz", routed, npz_bytes(joined, compress=False)),
        Sample("routed-experts.requests", routed, {f"{n}.npy": npy_bytes(ids[:n]) for n in (3, 9)}),
        Sample("routed-experts.vllm", routed, json.dumps({"choices": [{"index": 0, "routed_experts": npy}]}).encode()),
        Sample(
            "routed-experts.sglang",
            routed,
            json.dumps({"text": "word " * 99, "meta_info": {**counts, "routed_experts": flat}}).encode(),
        ),
        Sample("vllm-payload.json", FORMATS.get("vllm-payload"), json.dumps(payload[0]).encode()),
        Sample("vllm-payload.jsonl", FORMATS.get("vllm-payload"), "\n".join(map(json.dumps, payload)).encode()),
        Sample("dlblas-load.json", FORMATS.get("dlblas-load"), layers),
        Sample(
            "dlblas-load.ranks", FORMATS.get("dlblas-load"), {f"expert_load_rank{rank}.json": layers for rank in (0, 1)}
        ),
        Sample("megatron-load.npz", megatron, npz_bytes({**dump, "global_rank": np.int32(1)}, compress=False)),
        Sample(
            "megatron-load.ranks",
            megatron,
            {f"{n}.npz": npz_bytes({**dump, "global_rank": np.int32(n)}, compress=False) for n in (0, 1)},
        ),
    ]


def _one_rank(rank: int) -> bytes:
    counts = np.random.default_rng(rank).integers(1, 9, (2, LAYERS, 4), dtype=np.int32)
    records = [
        {"forward_pass_id": 7 + i, "rank": rank, "gatherer_key": "primary", "global_physical_count": row}
        for i, row in enumerate(counts)
    ]
    return torch_bytes({"records": records, "last_physical_to_logical_map": np.tile(np.arange(4), (LAYERS, 1))})


def _deepseek_list() -> bytes:
    log2phy = np.full((LAYERS, EXPERTS, 2), -1, np.int64)
    rows = np.arange(LAYERS)[:, None]
    log2phy[rows, PLACEMENT.slot_to_expert, PLACEMENT.replica_index] = np.arange(PLACEMENT.num_slots)
    return torch_bytes([PLACEMENT.slot_to_expert.astype(np.int64), log2phy, PLACEMENT.num_replicas.astype(np.int64)])
