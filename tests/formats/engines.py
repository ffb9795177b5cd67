"""Placements in every format as their engines read them, made and looked into without evenmoe.

SGLang's row n is hidden layer n, TensorRT-LLM's key n is layer n of the model, the others count MoE layers from 0. The
model: dense layers, then MoE layers, then perhaps layers of multi-token prediction (MTP).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from evenmoe.formats.catalogue import FORMATS

Rows = list[list[int]]

RANKS, EXPERTS, SLOTS = 2, 4, 6
SUFFIX = {"slot-map": "npy", "eplb-table": "npy", "deepseek": "npz"}
#: omni-infer's file is left out, which does not keep the order of a rank's slots: `test_omni`.
NAMES = [name for name in FORMATS if FORMATS.get(name).kind == "placement" and name != "omni-pattern"]
HOLD_MTP = {"ascend-map", "evenmoe-placement", "tensorrt-llm"}


@dataclass(frozen=True)
class Model:
    """A placement of a whole model: rows of dense layers as SGLang may hold them, MoE rows, MTP rows."""

    dense: Rows
    moe: Rows
    mtp: Rows

    @property
    def first(self) -> int:
        return len(self.dense)

    @property
    def hidden(self) -> int:
        return len(self.dense) + len(self.moe)


@st.composite
def rows(draw: st.DrawFn, count: int) -> Rows:
    """Every expert somewhere and none twice on a rank; now and then the trivial map, which a MoE layer may have."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    made = []
    for _ in range(count):
        if rng.random() < 0.25:
            made.append([0, 1, 2, 3, 0, 1])
            continue
        doubles = rng.choice(EXPERTS, 2, replace=False)  # these on both ranks, each of the others on one
        others = rng.permutation(np.setdiff1d(range(EXPERTS), doubles))
        made.append([int(e) for one in others for e in rng.permutation([*doubles, one])])
    return made


@st.composite
def models(draw: st.DrawFn, first: int, mtp: int) -> Model:
    return Model(draw(rows(first)), draw(rows(draw(st.integers(1, 4)))), draw(rows(mtp)))


def file_name(stem: str, format: str) -> str:
    return f"{stem}.{SUFFIX.get(format, 'json')}"


def table_of(row: list[int]) -> list[list[int]]:
    held = [[slot for slot, expert in enumerate(row) if expert == e] for e in range(EXPERTS)]
    return [[len(slots), *slots, 0][:3] for slots in held]  # two replicas at most


def per_rank(row: list[int]) -> Rows:
    return [row[: SLOTS // 2], row[SLOTS // 2 :]]


def make(name: str, model: Model, path: Path) -> None:
    """The file of this format, by hand."""
    moe, numbers = model.moe, list(range(model.first, model.hidden))
    if name == "slot-map":
        maps = [[[rank.index(e) if e in rank else -1 for e in range(EXPERTS)] for rank in per_rank(row)] for row in moe]
        np.save(path, np.array(maps, np.int32))
    elif name == "eplb-table":
        np.save(path, np.array([table_of(row) for row in moe], np.int32))
    elif name == "deepseek":
        np.savez(path, phy2log=np.array(moe))
    else:
        path.write_text(json.dumps(_json(name, model, numbers)))


def _json(name: str, model: Model, numbers: list[int]) -> Any:
    moe, mtp = model.moe, model.mtp
    if name == "vllm-list":
        return moe
    if name == "vllm-layer-map":
        return {str(layer): row for layer, row in enumerate(moe)}
    if name == "tensorrt-llm":
        keyed = {str(number): row for number, row in zip([*numbers, model.hidden], [*moe, *mtp], strict=False)}
        return {"num_slots": SLOTS, "layer_updates_per_iter": 0, "initial_global_assignments": keyed}
    if name == "sglang-location":
        return {"physical_to_logical_map": [*model.dense, *moe]}
    if name == "ascend-map":
        layers = [
            {
                "layer_id": number,
                "device_count": RANKS,
                "device_list": [{"device_id": d, "device_expert": part} for d, part in enumerate(per_rank(row))],
            }
            for number, row in enumerate([*moe, *mtp])
        ]
        return {"moe_layer_count": len(moe), "layer_list": layers}
    order = [[row[:slot].count(row[slot]) for slot in range(SLOTS)] for row in moe]
    return {
        "format": "evenmoe-placement",
        "version": 2 if mtp else 1,
        "num_ranks": RANKS,
        "num_experts": EXPERTS,
        "layer_ids": numbers,
        "slot_to_expert": moe,
        "replica_index": order,
        **({"mtp_layers": mtp} if mtp else {}),
    }


def look(name: str, path: Path, model: Model) -> tuple[Rows, Rows, tuple[int, ...] | None]:
    """What the engine finds: slots of its MoE layers, of its MTP layers, the model's numbers if the file has them."""
    if name == "slot-map":
        found = np.load(path)
        slots = np.full((len(found), RANKS, SLOTS // RANKS), -1)
        for layer, rank, expert in np.argwhere(found >= 0):
            slots[layer, rank, found[layer, rank, expert]] = expert
        return slots.reshape(len(found), -1).tolist(), [], None
    if name == "eplb-table":
        slots = np.full((len(np.load(path)), SLOTS), -1)
        for layer, table in enumerate(np.load(path)):
            for expert, line in enumerate(table):
                slots[layer, line[1 : 1 + line[0]]] = expert
        return slots.tolist(), [], None
    if name == "deepseek":
        return np.load(path)["phy2log"].tolist(), [], None
    found = json.loads(path.read_text())
    if name == "vllm-list":
        return found, [], None
    if name == "vllm-layer-map":
        return [found[str(layer)] for layer in range(len(found))], [], None
    if name == "tensorrt-llm":
        keyed = {int(number): row for number, row in found["initial_global_assignments"].items()}
        moe = {number: row for number, row in keyed.items() if not model.mtp or number != model.hidden}
        return list(moe.values()), [keyed[n] for n in keyed if n not in moe], tuple(moe)
    if name == "sglang-location":
        every = found["physical_to_logical_map"]
        assert len(every) == model.hidden
        return every[model.first :], [], tuple(range(model.first, len(every)))
    if name == "ascend-map":
        count = found["moe_layer_count"]
        assert [layer["layer_id"] for layer in found["layer_list"]] == list(range(len(found["layer_list"])))
        every = [[e for d in layer["device_list"] for e in d["device_expert"]] for layer in found["layer_list"]]
        return every[:count], every[count:], None
    numbers = found["layer_ids"]
    return found["slot_to_expert"], found.get("mtp_layers", []), None if numbers is None else tuple(numbers)
