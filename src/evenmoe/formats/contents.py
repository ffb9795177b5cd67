"""What goes into reading and writing, and what comes out: options, contents, findings, and the raw forms of readers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from evenmoe.io import Value
from evenmoe.placement import Placement
from evenmoe.traces.trace import Trace

Kind = Literal["placement", "load"]
Load = npt.NDArray[Value]  # int64 or float64
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Contents:
    """What a file held.

    Attributes:
        kind: "placement" or "load".
        format: name in `FORMATS`.
        placement: of a placement file; of a load file the one it was recorded under, where the file tells; or None.
        load: tokens, int64 or float64 (T, L, E), of a load file; or None.
        layer_ids: the model's own number of every row, dense layers counted, where the file tells them; or None where
            rows merely count MoE layers. `write` takes them.
        metadata: what else the file says and `write` puts back: SGLang's num_hidden_layers, verl's strategy_version, …
            "mtp_layers" are the slots of the layers of multi-token prediction, which are no rows of `placement`;
            "has_dense_rows" is there where `placement` has rows of dense layers that the file does not tell apart.
        notes: one sentence for everything that was dropped or assumed.
        empty_windows: windows of a load file that were dropped because nothing at all was recorded in them.
        trace: of a file that is a trace or holds tokens everything it holds, as `write` takes it, empty windows of its
            load included; or None.
    """

    kind: Kind
    format: str
    placement: Placement | None = None
    load: Load | None = None
    layer_ids: tuple[int, ...] | None = None
    metadata: dict[str, Value] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    empty_windows: int = 0
    trace: Trace | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What a reader is given beside the file; None where the file must say.

    Attributes:
        num_ranks: ranks that share the slots, where the file does not say (`Format.stores_ranks`).
        num_experts: logical experts; default: the largest id + 1. Needed where the last experts may be missing.
        num_layers: MoE layers, where a file appends dump after dump or keeps one list for all layers; hidden layers,
            dense ones counted, of SGLang's `routed_experts`, which have no shape.
        num_slots: slots of "trivial"; default: one per expert.
        shared_devices: devices of an Ascend map that hold only the shared expert; default: detected automatically.
        placement: the one in use when a load per slot was recorded, where the file does not hold it. The counts of an
            expert's slots are added up.
        placement_layers: the model's own number of every row of `placement`, as `Contents.layer_ids` has them. Without,
            its rows are the load's layers in order.
        first_layer: the model's number of its first MoE layer. It numbers the rows of a file that counts MoE layers
            from 0, and of a file with a row for every hidden layer it leaves out those before it, which are dense. All
            later rows are taken for MoE layers; `layers` chooses them where some are dense.
        num_hidden_layers: the model's hidden layers, dense ones counted, 61 for DeepSeek-V3. Layers that a file numbers
            from there on are layers of multi-token prediction (MTP): they go to `Contents.metadata`.
        layers: "first:end", "first:end:step" or a number: only these layers, in the file's numbering, `end` left out.
        format: name in `FORMATS`; None to detect it automatically.
    """

    num_ranks: int | None = None
    num_experts: int | None = None
    num_layers: int | None = None
    num_slots: int | None = None
    shared_devices: int | None = None
    placement: Placement | None = None
    placement_layers: tuple[int, ...] | None = None
    first_layer: int | None = None
    num_hidden_layers: int | None = None
    layers: str | None = None
    format: str | None = None


@dataclass(frozen=True)
class Finding:
    """One thing wrong, or worth knowing, about a file.

    Attributes:
        severity: "error", or "warning" for what may be meant so.
        kind: short name of the rule, such as "missing-expert".
        text: what is there, with its place.
        rule, fix: what should be there, and what to do.
        layer, rank, slot, expert: the place; None where the finding has none. `layer` is the model's number where the
            file has it, otherwise the row.
        fatal: whether no `Placement` or load can be made of the file.
    """

    severity: Literal["error", "warning"]
    kind: str
    text: str
    rule: str
    fix: str
    layer: int | None = None
    rank: int | None = None
    slot: int | None = None
    expert: int | None = None
    fatal: bool = False


@dataclass
class RawPlacement:
    """A placement as the file has it, right or wrong.

    Attributes:
        slots: per layer, int64 (slots of that layer,): the logical expert of each slot; -1 is an empty slot.
        rank_sizes: per layer, how many of its slots each rank holds, in slot order; None where the file does not tell.
        layer_ids: as in `Contents`, with a number for every row of `mtp_layers`, too.
        replica_index: per layer, int64 like `slots`, as in `Placement`; None for ascending.
        num_experts: where the file says it.
        mtp_layers: how many of the last rows are layers of multi-token prediction.
        may_be_uneven: whether the program whose file it is lets ranks have different numbers of slots. Where the file
            has no `rank_sizes`, the first ranks then have one more.
        findings: what the reader saw that `slots` no longer shows: gaps in layer numbers, tables that disagree.
    """

    slots: list[IntArray]
    rank_sizes: list[list[int]] | None = None
    layer_ids: tuple[int, ...] | None = None
    replica_index: list[IntArray] | None = None
    num_experts: int | None = None
    metadata: dict[str, Value] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    mtp_layers: int = 0
    may_be_uneven: bool = False

    def __post_init__(self) -> None:
        # A user's reader may give lists, or what is none: that must fail in the reader, which is then said to be wrong.
        self.slots = [_row(row) for row in self.slots]
        self.replica_index = None if self.replica_index is None else [_row(row) for row in self.replica_index]


def _row(values: npt.ArrayLike) -> IntArray:
    row = np.asarray(values)
    if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
        raise TypeError(f"a row of slots is {row.dtype} of shape {row.shape}, and must be integers of one dimension")
    return row.astype(np.int64, copy=False)


@dataclass
class RawLoad:
    """A load as the file has it; what is not listed is as in `RawPlacement` or `Contents`.

    Attributes:
        load: (T, L, E), counts per logical expert; per slot only where `ReadOptions.placement` says whose they are.
        placement: as in `Contents`.
        has_own_map: whether the file holds the map of its slots, by which they are converted to experts already.
        ids_may_be_slots: whether the routing in `trace` names slots where `ReadOptions.placement` is given.
    """

    load: Load
    layer_ids: tuple[int, ...] | None = None
    placement: Placement | None = None
    has_own_map: bool = False
    ids_may_be_slots: bool = False
    metadata: dict[str, Value] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    trace: Trace | None = None

    def __post_init__(self) -> None:
        if np.ndim(self.load) != 3:
            raise TypeError(f"a load has {np.ndim(self.load)} dimensions, and must have windows, layers and experts")
        self.load = np.asarray(self.load)


Raw = RawPlacement | RawLoad


@dataclass
class WriteOptions:
    """What a writer is told beside the value; to `notes` it adds what it left out or rounded.

    Attributes:
        num_hidden_layers: of the model, where known; beyond every number in `layer_ids`.
        mtp_slots: per MTP layer, int64 (P,), its logical experts; only for formats that have a place for them.
        trace: what the value is a part of, for evenmoe's trace file.
    """

    container: str
    layer_ids: tuple[int, ...] | None = None
    metadata: dict[str, Value] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    num_hidden_layers: int | None = None
    mtp_slots: list[IntArray] = field(default_factory=list)
    trace: Trace | None = None
