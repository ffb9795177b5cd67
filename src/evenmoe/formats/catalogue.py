"""`Format`, and `FORMATS`, where formats are found by name; light, because `--help` lists them.

A format is one object in the module of its tool, with what it does and the layers that it has a place for. Its entry
here says what can be known without that module: `--help` shows it, and only files that look like it lead there.
Symbols: T windows, L layers, E logical experts, P slots, D ranks, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from evenmoe.registry import Registry

if TYPE_CHECKING:
    from evenmoe.formats.contents import Kind, Raw, ReadOptions
    from evenmoe.formats.document import Document


@dataclass(frozen=True)
class Entry:
    """What is known of a format at a glance.

    Attributes:
        name: as `--to` and `--from` take it.
        kind: what it holds, "placement" or "load".
        description: one line: whose it is, and its layout.
        containers: file types it comes in, the first is written where the target's suffix says nothing:
            "json", "jsonl", "yaml", "csv", "npy", "npz", "pt", "safetensors", "folder", "text".
        object: "module:attribute" of its `Format`; for evenmoe's own.
        keys: regular expression that one of the names fits where its file is an object, or a dictionary of tensors.
        arrays: whether its file may be a single array.
    """

    name: str
    kind: Kind
    description: str
    containers: tuple[str, ...]
    object: str = ""
    keys: str = ""
    arrays: bool = False


@dataclass(frozen=True)
class Format:
    """One file format: what it is, what it does, and which layers it has a place for.

    Attributes:
        entry: name, kind, description and file types.
        matches: (document) -> whether it is of this format, by its content and never by its name.
        read: (document, options) -> `RawPlacement` or `RawLoad`; raises FileFormatError where the document is not what
            it should be. None where evenmoe does not read the format.
        write: (placement or load, options) -> bytes, or of a folder its files by name. None where it is only read.
        stores_ranks: whether the file says how slots divide among ranks; otherwise a reader must be told.
        model_layers: whether its rows carry the model's own layer numbers, dense layers counted. Others count MoE
            layers from 0.
        optional_layers: whether the model's own layer numbers are stored where they are known.
        dense_rows: whether every hidden layer has a row, so that a reader must be told which rows are MoE layers.
        mtp_layers: whether the layers of multi-token prediction (MTP), which follow the hidden layers, have a place.
        rank_rule: whether tokens of its placements may choose replicas by the rank rule, which leaves some idle; the
            programs behind other formats have rules of their own, which reach every replica.
        whole_traces: whether it holds a `Trace` with routing, requests and loads by rank, and checks it itself.
        kept_metadata: names in `Contents.metadata` that are written; None for all texts and numbers.
        uneven_ranks: which placements with other numbers of slots on other ranks it holds: "none", "any", or "first",
            those whose first ranks have one more than the others.
    """

    entry: Entry
    matches: Callable[[Document], bool]
    read: Callable[[Document, ReadOptions], Raw] | None = None
    write: Callable[..., bytes | dict[str, bytes]] | None = None
    stores_ranks: bool = False
    model_layers: bool = False
    optional_layers: bool = False
    dense_rows: bool = False
    mtp_layers: bool = False
    rank_rule: bool = False
    whole_traces: bool = False
    kept_metadata: tuple[str, ...] | None = ()
    uneven_ranks: Literal["none", "first", "any"] = "none"

    @property
    def name(self) -> str:
        """As `--to` and `--from` take it."""
        return self.entry.name

    @property
    def kind(self) -> Kind:
        """What it holds, "placement" or "load"."""
        return self.entry.kind

    @property
    def containers(self) -> tuple[str, ...]:
        """File types it comes in."""
        return self.entry.containers


_SGLANG, _VLLM, _ASCEND = "evenmoe.formats.sglang", "evenmoe.formats.vllm", "evenmoe.formats.ascend"
_OWN = (
    Entry(
        "evenmoe-placement",
        "placement",
        "evenmoe: slots, ranks, replica order and layer numbers, nothing left out",
        ("json",),
        "evenmoe.formats.own:PLACEMENT",
        "format",
    ),
    Entry(
        "evenmoe-trace",
        "load",
        "evenmoe: npz with `load` (T, L, E) and, where known, routing, requests, loads by rank, layer numbers",
        ("npz",),
        "evenmoe.formats.own:TRACE",
        "load",
    ),
    Entry(
        "sglang-location",
        "placement",
        "SGLang --init-expert-location: physical_to_logical_map (L, P), every hidden layer a row; or `trivial`",
        ("json", "pt", "text"),
        f"{_SGLANG}:LOCATION",
        "physical_to_logical_map",
    ),
    Entry(
        "sglang-logical-count",
        "load",
        "SGLang --init-expert-location: logical_count (L, E) or (T, L, E), every hidden layer a row",
        ("json", "pt"),
        f"{_SGLANG}:LOGICAL_COUNT",
        "logical_count",
    ),
    Entry(
        "sglang-stat",
        "load",
        "SGLang recorder, mode stat: logical_count (T, L, E) summed over ranks, every hidden layer a row",
        ("pt",),
        f"{_SGLANG}:STAT",
        "logical_count",
    ),
    Entry(
        "sglang-detail",
        "load",
        "SGLang recorder, modes per_pass and per_token: one rank's records and map; a folder of all ranks' files",
        ("pt", "folder"),
        f"{_SGLANG}_recorder:DETAIL",
        "records",
    ),
    Entry(
        "sglang-csv",
        "load",
        "SGLang recorder, old: one rank's CSV of layer_id,expert_id,count; a folder of all ranks' files",
        ("csv", "folder"),
        f"{_SGLANG}_recorder:CSV",
    ),
    Entry(
        "ascend-map",
        "placement",
        "vllm-ascend, MindIE, verl: expert map JSON, layers and their devices' experts",
        ("json",),
        f"{_ASCEND}:MAP",
        "layer_list",
    ),
    Entry(
        "slot-map",
        "placement",
        "vLLM #14544 and vllm-ascend: tensor (L, D, E), slot within the rank or -1",
        ("pt", "npy"),
        f"{_ASCEND}_tensors:SLOT_MAP",
        arrays=True,
    ),
    Entry(
        "vllm-ascend-load",
        "load",
        "vllm-ascend: tensor (L, E); or per slot (L, D, P/D), (T, L, D, P/D) with its placement",
        ("pt", "npy"),
        f"{_ASCEND}_tensors:LOAD",
        arrays=True,
    ),
    Entry(
        "mindie-csv",
        "load",
        "MindIE, msit: decode_<rank>.csv of a rank's slots, L rows a dump, appended; a folder of them, or merged",
        ("folder", "csv"),
        f"{_ASCEND}:MINDIE_CSV",
    ),
    Entry(
        "omni-pattern",
        "placement",
        "omni-infer: 0 or 1 for each (device, MoE layer, expert), as .npy, or as text behind the header `D L E`",
        ("npy", "text"),
        "evenmoe.formats.omni:PATTERN",
        arrays=True,
    ),
    Entry(
        "vllm-list",
        "placement",
        "vLLM #49572: JSON list of P logical experts for all layers, or L lists",
        ("json",),
        f"{_VLLM}:LIST",
        arrays=True,
    ),
    Entry(
        "vllm-layer-map",
        "placement",
        "vLLM #53022, #41141: JSON object from MoE layer to its P logical experts",
        ("json",),
        f"{_VLLM}:LAYER_MAP",
        r"record_type|[0-9]+|(.*\.)?layers\.[0-9]+(\..*)?",
    ),
    Entry(
        "vllm-safetensors",
        "load",
        "vLLM #41141: safetensors {model: float32 (L, E)}, version 1",
        ("safetensors",),
        f"{_VLLM}:SAFETENSORS",
    ),
    Entry(
        "vllm-jsonl",
        "load",
        "vLLM #41141, earlier: JSON lines of expert_load (L, P) with p2l_map (L, P)",
        ("jsonl", "json"),
        f"{_VLLM}:JSONL",
        "record_type",
    ),
    Entry(
        "vllm-payload",
        "load",
        "vLLM's profiling marks: expert_load_pass and physical_to_logical_map of a step; a folder of all ranks' files",
        ("json", "jsonl", "folder"),
        "evenmoe.formats.vllm_payload:PAYLOAD",
        "expert_load_pass",
    ),
    Entry(
        "routed-experts",
        "load",
        "vLLM, SGLang: `routed_experts` of requests, every token's experts: arrays (tokens, layers, K) or responses",
        ("npz", "npy", "pt", "json", "jsonl", "folder"),
        "evenmoe.formats.routed_experts:ROUTED_EXPERTS",
        r"routed_experts|arr_\d+|meta_info|choices|sgl_?ext",
        arrays=True,
    ),
    Entry(
        "tensorrt-llm",
        "placement",
        "TensorRT-LLM: YAML or JSON with num_slots and initial_global_assignments by model layer",
        ("yaml", "json"),
        "evenmoe.formats.tensorrt_llm:PLACEMENT",
        "initial_global_assignments|num_slots",
    ),
    Entry(
        "tensorrt-llm-statistics",
        "load",
        "TensorRT-LLM: folder of meta_info.json and rank<r>.safetensors, counts per iteration and layer",
        ("folder",),
        "evenmoe.formats.tensorrt_llm:STATISTICS",
    ),
    Entry(
        "deepseek",
        "placement",
        "DeepSeek EPLB: phy2log (L, P), log2phy (L, E, X) padded with -1, logcnt (L, E)",
        ("pt", "npz"),
        "evenmoe.formats.deepseek:TABLES",
        "phy2log",
    ),
    Entry(
        "eplb-table",
        "placement",
        "Ascend's operators: EPLB table int32 (L, E, F), rows [count, slots…]; one layer (E, F)",
        ("npy", "npz", "pt"),
        f"{_ASCEND}_tensors:EPLB_TABLE",
        r"(?s).*(table.*|\d)",
        arrays=True,
    ),
    Entry(
        "lmdeploy",
        "load",
        "LMDeploy, DLBlas: JSON list of every layer's loads (L, E)",
        ("json",),
        f"{_VLLM}:LMDEPLOY",
        arrays=True,
    ),
    Entry(
        "dlblas-load",
        "load",
        "DLBlas: expert_load_rank<r>.json, one rank's counts by model layer; a folder of all ranks' files",
        ("json", "folder"),
        "evenmoe.formats.dlblas:LOAD",
        "layer_[0-9]+",
    ),
    Entry(
        "megatron-load",
        "load",
        "Megatron-Core's recorder: one rank's .npz of loads (L, forwards, E); a folder of all ranks' files",
        ("npz", "folder"),
        "evenmoe.formats.megatron:LOAD",
        "loads",
    ),
)

#: evenmoe's own formats at a glance, by name.
ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _OWN}

#: Every format by name: evenmoe's own, those that were added, and those of packages.
FORMATS: Registry[Format] = Registry(
    "format",
    {entry.name: entry.object for entry in _OWN},
    "evenmoe.formats.catalogue:Format",
    "an evenmoe.formats.Format",
    "evenmoe.formats",
)
