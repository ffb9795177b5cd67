"""`FORMATS`: the name, the kind and the file types of every format; light, because `--help` shows it.

What a format does lives in the module of this package that its entry names; each has the same three functions:
    matches(document) -> bool                     is this file one of mine? By content, never by name.
    read(document, options) -> RawMap | RawLoad   FileFormatError where the file is not what it should be
    write(value, options) -> bytes | dict         a folder's files by name
Symbols: T windows, L layers, E logical experts, P slots, D ranks, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["placement", "load"]


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        name: as `--to` and `--from` take it.
        kind: what it holds, "placement" or "load".
        description: one line: whose it is, and its layout.
        containers: file types it comes in, the first is written where the target's suffix says nothing:
            "json", "jsonl", "yaml", "csv", "npy", "npz", "pt", "safetensors", "folder", "text".
        stores_ranks: whether the file says how slots divide among ranks; otherwise a reader must be told.
        model_layers: whether its rows carry the model's own layer numbers, dense layers counted. Others count MoE
            layers from 0.
        optional_layers: whether the model's own layer numbers are stored where they are known.
        dense_rows: whether every hidden layer has a row, so that a reader must be told which rows are MoE layers.
        mtp_layers: whether the layers of multi-token prediction (MTP), which follow the hidden layers, have a place.
        kept_metadata: names in `Contents.metadata` that are written; None for all texts and numbers.
        reads, writes: what evenmoe does with it.
    """

    name: str
    kind: Kind
    description: str
    containers: tuple[str, ...]
    stores_ranks: bool = False
    model_layers: bool = False
    optional_layers: bool = False
    dense_rows: bool = False
    mtp_layers: bool = False
    kept_metadata: tuple[str, ...] | None = ()
    reads: bool = True
    writes: bool = True

    @property
    def module(self) -> str:
        return f"evenmoe.formats.{self.name.replace('-', '_')}"


_ALL = (
    Format(
        "evenmoe-placement",
        "placement",
        "evenmoe: slots, ranks, replica order and layer numbers, nothing left out",
        ("json",),
        stores_ranks=True,
        optional_layers=True,
        mtp_layers=True,
    ),
    Format(
        "evenmoe-trace",
        "load",
        "evenmoe: npz with `load` (T, L, E) and, where known, routing, requests, loads by rank, layer numbers",
        ("npz",),
        optional_layers=True,
        kept_metadata=None,
    ),
    Format(
        "sglang-location",
        "placement",
        "SGLang --init-expert-location: physical_to_logical_map (L, P), every hidden layer a row; or `trivial`",
        ("json", "pt", "text"),
        model_layers=True,
        dense_rows=True,
    ),
    Format(
        "sglang-logical-count",
        "load",
        "SGLang --init-expert-location: logical_count (L, E) or (T, L, E), every hidden layer a row",
        ("json", "pt"),
        model_layers=True,
        kept_metadata=("num_hidden_layers",),
    ),
    Format(
        "sglang-stat",
        "load",
        "SGLang recorder, mode stat: logical_count (T, L, E) summed over ranks, every hidden layer a row",
        ("pt",),
        model_layers=True,
        kept_metadata=("num_hidden_layers", "average_utilization_rate_over_window"),
    ),
    Format(
        "sglang-detail",
        "load",
        "SGLang recorder, modes per_pass and per_token: one rank's records and map; a folder of all ranks' files",
        ("pt", "folder"),
        model_layers=True,
        kept_metadata=("num_hidden_layers",),
    ),
    Format(
        "sglang-csv",
        "load",
        "SGLang recorder, old: one rank's CSV of layer_id,expert_id,count; a folder of all ranks' files",
        ("csv", "folder"),
        model_layers=True,
    ),
    Format(
        "ascend-map",
        "placement",
        "vllm-ascend, MindIE, verl: expert map JSON, layers and their devices' experts",
        ("json",),
        stores_ranks=True,
        mtp_layers=True,
        kept_metadata=("strategy_version",),
    ),
    Format(
        "slot-map",
        "placement",
        "vLLM #14544 and vllm-ascend: tensor (L, D, E), slot within the rank or -1",
        ("pt", "npy"),
        stores_ranks=True,
    ),
    Format(
        "vllm-ascend-load",
        "load",
        "vllm-ascend: tensor (L, E); or per slot (L, D, P/D), (T, L, D, P/D) with its placement",
        ("pt", "npy"),
    ),
    Format(
        "mindie-csv",
        "load",
        "MindIE, msit: decode_<rank>.csv of a rank's slots, L rows a dump, appended; a folder of them, or merged",
        ("folder", "csv"),
    ),
    Format(
        "vllm-list",
        "placement",
        "vLLM #49572: JSON list of P logical experts for all layers, or L lists",
        ("json",),
    ),
    Format(
        "vllm-layer-map",
        "placement",
        "vLLM #53022, #41141: JSON object from MoE layer to its P logical experts",
        ("json",),
    ),
    Format(
        "vllm-safetensors",
        "load",
        "vLLM #41141: safetensors {model: float32 (L, E)}, version 1",
        ("safetensors",),
        kept_metadata=("model",),
    ),
    Format(
        "vllm-jsonl",
        "load",
        "vLLM #41141, earlier: JSON lines of expert_load (L, P) with p2l_map (L, P)",
        ("jsonl", "json"),
        kept_metadata=("model",),
    ),
    Format(
        "tensorrt-llm",
        "placement",
        "TensorRT-LLM: YAML or JSON with num_slots and initial_global_assignments by model layer",
        ("yaml", "json"),
        model_layers=True,
        mtp_layers=True,
        kept_metadata=("layer_updates_per_iter",),
    ),
    Format(
        "tensorrt-llm-statistics",
        "load",
        "TensorRT-LLM: folder of meta_info.json and rank<r>.safetensors, counts per iteration and layer",
        ("folder",),
        model_layers=True,
        kept_metadata=None,
    ),
    Format(
        "deepseek",
        "placement",
        "DeepSeek EPLB: phy2log (L, P), log2phy (L, E, X) padded with -1, logcnt (L, E)",
        ("pt", "npz"),
    ),
    Format(
        "eplb-table",
        "placement",
        "Ascend's operators: EPLB table int32 (L, E, F), rows [count, slots…]; one layer (E, F)",
        ("npy", "npz", "pt"),
    ),
    Format(
        "lmdeploy",
        "load",
        "LMDeploy, DLBlas: JSON list of every layer's loads (L, E)",
        ("json",),
    ),
)

FORMATS: dict[str, Format] = {entry.name: entry for entry in _ALL}
