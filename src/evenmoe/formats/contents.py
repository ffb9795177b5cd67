"""`Contents`: what a file held; and the raw forms that readers hand over before anything is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from evenmoe.formats.catalogue import Kind
from evenmoe.placement import Placement
from evenmoe.traces.trace import Trace

if TYPE_CHECKING:
    from evenmoe.formats.findings import Finding

Load = npt.NDArray[Any]  # int64 or float64
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
        trace: of an evenmoe-trace file everything it holds, as `write` takes it, empty windows of its load included; or
            None.
    """

    kind: Kind
    format: str
    placement: Placement | None = None
    load: Load | None = None
    layer_ids: tuple[int, ...] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    empty_windows: int = 0
    trace: Trace | None = None


@dataclass(frozen=True)
class Options:
    """What a reader is given beside the file.

    Attributes:
        num_ranks, num_experts, num_layers, num_slots, shared_devices: sizes; None where the file must say.
        placement: of the slots that a load counts.
        placement_layers: the model's own number of every row of `placement`, where known.
        first_layer: the model's first MoE layer.
        num_hidden_layers: the number from which the model's MTP layers count.
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


@dataclass
class RawMap:
    """A placement as the file has it, right or wrong.

    Attributes:
        slots: per layer, int64 (slots of that layer,): the logical expert of each slot; -1 is an empty slot.
        rank_sizes: per layer, how many of its slots each rank holds, in slot order; None where the file does not tell.
        layer_ids: as in `Contents`, with a number for every row of `mtp_layers`, too.
        replica_index: per layer, int64 like `slots`, as in `Placement`; None for ascending.
        num_experts: where the file says it.
        mtp_layers: how many of the last rows are layers of multi-token prediction.
        findings: what the reader saw that `slots` no longer shows: gaps in layer numbers, tables that disagree.
    """

    slots: list[IntArray]
    rank_sizes: list[list[int]] | None = None
    layer_ids: tuple[int, ...] | None = None
    replica_index: list[IntArray] | None = None
    num_experts: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    mtp_layers: int = 0


@dataclass
class RawLoad:
    """A load as the file has it; what is not listed is as in `RawMap` or `Contents`.

    Attributes:
        load: (T, L, E), counts per logical expert; per slot only where `Options.placement` says whose they are.
        placement: as in `Contents`.
        has_own_map: whether the file holds the map of its slots, by which they are converted to experts already.
    """

    load: Load
    layer_ids: tuple[int, ...] | None = None
    placement: Placement | None = None
    has_own_map: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    trace: Trace | None = None


Raw = RawMap | RawLoad


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
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    num_hidden_layers: int | None = None
    mtp_slots: list[IntArray] = field(default_factory=list)
    trace: Trace | None = None
