"""What may be wrong with placements and loads, whatever format they came in."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from evenmoe.formats.contents import Finding, IntArray, Load, RawLoad, RawPlacement
from evenmoe.slot_arrays import share_slots

_INT32 = 2**31 - 1
_PART = 1 << 12  # slots looked at together: a file of 2 MB may claim a million, and reading it takes ten times that
_LAYERS_TO_TELL = 4  # layers times other ranks, from where on tokens of one rank's experts alone are no accident


def inspect_placement(
    raw: RawPlacement, num_ranks: int | None, num_experts: int | None, *, rank_rule: bool
) -> Iterator[Finding]:
    """Every finding of a placement, layer by layer; those of its reader first."""
    yield from raw.findings
    yield from _shapes(raw, num_ranks)
    experts = num_experts or raw.num_experts or shown_experts(raw)
    for row, slots in enumerate(raw.slots):
        layer = raw.layer_ids[row] if raw.layer_ids else row
        sizes = _rank_sizes(raw, row, num_ranks)
        ends = None if sizes is None else np.cumsum(sizes)
        yield from _ids(slots, ends, layer, experts)
        order = raw.replica_index[row] if raw.replica_index else None
        if order is not None and not _counts_up(slots, order):
            text, rule = f"the order of replicas in layer {layer}", "must number each expert's slots 0, 1, … once"
            yield _fatal("replica-order", text, rule, "leave `replica_index` as it was written", layer=layer)
            order = None
        if ends is not None:
            yield from _duplicates(slots, ends, layer)
            if rank_rule:
                yield from _unreachable(slots, ends, layer, order)


def inspect_load(raw: RawLoad) -> Iterator[Finding]:
    """Every finding of a load; those of its reader first."""
    yield from raw.findings
    load = raw.load
    wrong = ~np.isfinite(load) if load.dtype.kind == "f" else np.zeros(load.shape, bool)
    kinds = (
        (wrong, "not-a-number", "check how it was recorded"),
        (load < 0, "negative", "check for an int32 overflow"),
    )
    for places, kind, fix in kinds:
        for window, row, expert in np.argwhere(places)[:1000].tolist():
            layer = raw.layer_ids[row] if raw.layer_ids else row
            yield Finding(
                "error",
                kind,
                f"{load[window, row, expert]} in window {window}, layer {layer}, expert {expert}",
                "must hold token counts, finite and not negative",
                fix,
                layer=layer,
                expert=expert,
                fatal=True,
            )
    if wrong.any():
        return
    if not load.any():
        yield _fatal("no-tokens", "no tokens in any layer", "must hold recorded counts", "record some traffic first")
        return
    with np.errstate(over="ignore"):
        summed = load.sum(axis=0, dtype=np.float64)
    for row in np.flatnonzero(~summed.any(axis=1)).tolist():
        layer = raw.layer_ids[row] if raw.layer_ids else row
        yield Finding(
            "warning",
            "zero-layer",
            f"no tokens in layer {layer}",
            "should hold tokens in every layer",
            "leave the layer out if it is dense, with --layers",
            layer=layer,
        )
    for row, expert in np.argwhere(summed > _INT32)[:1000].tolist():
        layer = raw.layer_ids[row] if raw.layer_ids else row
        yield Finding(
            "warning",
            "int32-overflow",
            f"{_tokens(summed[row, expert])} tokens in layer {layer}, expert {expert}, over all windows",
            "should stay below 2**31 for tools that sum in int32",
            "sum fewer windows",
            layer=layer,
            expert=expert,
        )
    yield from _one_block(load)
    yield from number_gaps(raw.layer_ids)


def _one_block(load: Load) -> Iterator[Finding]:
    """A warning where all tokens are of one rank's experts, as the rank itself counts that computes them."""
    used = np.flatnonzero(load.any(axis=(0, 1)))
    if len(used) < 2:
        return
    experts, first, last = load.shape[2], int(used[0]), int(used[-1])
    width = last - first + 1
    ranks = next(
        (n for n in range(experts // width, 1, -1) if experts % n == 0 and _in_block(first, last, experts // n)), 0
    )
    if ranks < 2 or load.shape[1] * (ranks - 1) < _LAYERS_TO_TELL or 2 * ranks * len(used) < experts:
        return
    yield Finding(
        "warning",
        "one-rank",
        f"tokens for experts {first} to {last} of {experts} alone, in all {load.shape[1]} layers",
        "should hold the tokens of all ranks' experts",
        f"this looks like the counts that one of {ranks} ranks took of its own experts: put all ranks' counts together",
    )


def _in_block(first: int, last: int, size: int) -> bool:
    return first // size == last // size


def _tokens(count: float) -> str:
    if count == np.inf:
        return "more than 1.8e308"
    return f"{count:.0f}" if count < 2.0**63 else f"{count:.6g}"


def without_empty_windows(load: Load) -> tuple[Load, int]:
    """The windows (T, L, E) in which anything was recorded, and how many others there were; one is kept in any case.

    >>> load, empty = without_empty_windows(np.array([[[6, 2]], [[0, 0]]]))
    >>> load.tolist(), empty
    ([[[6, 2]]], 1)
    """
    recorded = (load != 0).any(axis=(1, 2))
    if not recorded.any():
        recorded[0] = True
    return (load, 0) if recorded.all() else (load[recorded], int((~recorded).sum()))


def number_gaps(layer_ids: tuple[int, ...] | None) -> Iterator[Finding]:
    """Warnings where the model's layer numbers skip; every second layer, as in some models, is regular.

    Numbers of which no step is the usual one, such as 0, 7, 15, were chosen, and skip nothing.
    """
    if not layer_ids or len(layer_ids) < 3:
        return
    steps = np.diff(np.array(layer_ids))
    usual = int(np.bincount(np.clip(steps, 0, 1000)).argmax())
    if 2 * (steps == usual).sum() <= len(steps):
        return
    for row in np.flatnonzero(steps != usual)[:1000].tolist():
        yield Finding(
            "warning",
            "layer-gap",
            f"layer {layer_ids[row + 1]} after layer {layer_ids[row]}",
            f"should number its layers in steps of {usual}",
            "check that no layer was left out",
            layer=layer_ids[row + 1],
        )


def shown_experts(raw: RawPlacement) -> int:
    """The experts that the slots show: every expert needs a slot, so an id beyond the slots shows no more of them."""
    widest = max(len(slots) for slots in raw.slots)
    return 1 + max((int(row.max(initial=-1, where=row < widest)) for row in raw.slots), default=-1)


def _rank_sizes(raw: RawPlacement, row: int, num_ranks: int | None) -> list[int] | None:
    if raw.rank_sizes is not None:
        return raw.rank_sizes[row]
    slots = len(raw.slots[row])
    if not num_ranks or (slots % num_ranks and not raw.may_be_uneven):
        return None
    return list(share_slots(slots, num_ranks))


def _shapes(raw: RawPlacement, num_ranks: int | None) -> Iterator[Finding]:
    widths = [len(slots) for slots in raw.slots]
    for row, width in enumerate(widths):
        layer = raw.layer_ids[row] if raw.layer_ids else row
        if width != widths[0] or not width:
            text = f"{width} slots in layer {layer}, {widths[0]} in the first"
            yield _fatal("slot-count", text, "must have equally many slots in every layer", "pad it", layer=layer)
        sizes = raw.rank_sizes[row] if raw.rank_sizes else []
        if raw.rank_sizes and len(sizes) != len(raw.rank_sizes[0]):
            text = f"{len(sizes)} devices in layer {layer}, {len(raw.rank_sizes[0])} in the first"
            yield _fatal(
                "device-count", text, "must name every device in every layer", "add those missing", layer=layer
            )
        for rank, size in enumerate(sizes):
            if raw.may_be_uneven and raw.rank_sizes:
                if len(sizes) == len(raw.rank_sizes[0]) and size != raw.rank_sizes[0][rank]:
                    text = f"{size} slots on rank {rank} in layer {layer}, {raw.rank_sizes[0][rank]} in the first"
                    rule = "must have as many slots on a rank in every layer"
                    yield _fatal("uneven-layers", text, rule, "move experts", layer=layer, rank=rank)
            elif size != sizes[0]:
                text = f"{size} slots on rank {rank} in layer {layer}, {sizes[0]} on rank 0"
                rule = "must have equally many slots on every rank"
                yield _fatal("uneven-ranks", text, rule, "move or add experts", layer=layer, rank=rank)
    if raw.rank_sizes is not None:
        if num_ranks is not None and num_ranks != len(raw.rank_sizes[0]):
            text = f"{len(raw.rank_sizes[0])} ranks"
            yield _fatal("device-count", text, f"must have the {num_ranks} that were asked for", "leave --ranks out")
    elif num_ranks is not None and widths[0] % num_ranks and not raw.may_be_uneven:
        text = f"{widths[0]} slots"
        rule = f"must have a number of slots that divides by {num_ranks} ranks"
        yield _fatal("divisibility", text, rule, "add redundant experts, or check --ranks")


def _rank_of(slot: int, ends: IntArray) -> int:
    return int(np.searchsorted(ends, slot, side="right"))


def _ids(slots: IntArray, ends: IntArray | None, layer: int, experts: int) -> Iterator[Finding]:
    for slot in np.flatnonzero((slots < 0) | (slots >= experts))[:1000].tolist():
        rank = None if ends is None else _rank_of(slot, ends)
        where = f"layer {layer}, {'' if rank is None else f'rank {rank}, '}slot {slot}"
        value = int(slots[slot])
        if value == -1:
            yield _fatal(
                "empty-slot",
                f"an empty slot in {where}",
                "must give every slot an expert",
                "put an expert into it",
                layer=layer,
                rank=rank,
                slot=slot,
            )
            continue
        yield _fatal(
            "int-overflow" if abs(value) > _INT32 else "expert-range",
            f"expert {value} in {where}",
            f"must hold experts 0 to {experts - 1}, a slot for each",
            "correct the id; with more experts than the file shows, pass --experts",
            layer=layer,
            rank=rank,
            slot=slot,
            expert=value,
        )
    if experts > 4 * len(slots) + 1000:  # a wrong --experts: one finding, not a million
        text, rule = f"{len(slots)} slots for {experts} experts in layer {layer}", "must have a slot for every expert"
        yield _fatal("missing-expert", text, rule, "check --experts", layer=layer)
        return
    held = np.zeros(experts, bool)
    for begin in range(0, len(slots), _PART):
        part = slots[begin : begin + _PART]
        held[part[(part >= 0) & (part < experts)]] = True
    for expert in np.flatnonzero(~held).tolist():
        yield _fatal(
            "missing-expert",
            f"no slot for expert {expert} in layer {layer}",
            "must give every expert a slot",
            "a token routed to it has nowhere to go: add a slot for it",
            layer=layer,
            expert=expert,
        )


def _counts_up(slots: IntArray, order: IntArray) -> bool:
    by_expert = np.lexsort((order, slots))
    first = np.flatnonzero(np.r_[True, np.diff(slots[by_expert]) != 0])
    position = np.arange(len(slots)) - np.repeat(first, np.diff(np.r_[first, len(slots)]))
    return np.array_equal(order[by_expert], position)


def _duplicates(slots: IntArray, ends: IntArray, layer: int) -> Iterator[Finding]:
    for rank, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
        for expert, first, second in _twice(slots[begin:end], begin):
            yield Finding(
                "error",
                "duplicate-replica",
                f"expert {expert} in slots {first} and {second} of rank {rank} in layer {layer}",
                "should hold an expert once on a rank",
                "one of the slots balances nothing: give it to another expert",
                layer=layer,
                rank=rank,
                slot=second,
                expert=expert,
            )


def _twice(slots: IntArray, begin: int) -> Iterator[tuple[int, int, int]]:
    """Expert, slot and next slot that holds it, in that order, of one rank's slots from number `begin` on.

    In one array, sorted where it stands: a small file may claim a million slots.
    """
    if slots.max(initial=0) > _INT32:  # no expert's id, and each takes ten bytes of the file
        order = np.argsort(slots, kind="stable")
        experts = slots[order]
    else:
        order = np.maximum(slots, -1)
        order <<= 32
        for first in range(0, len(order), _PART):
            order[first : first + _PART] |= np.arange(first, min(first + _PART, len(order)))
        order.sort()
        experts = None
    for first in range(0, len(order) - 1, _PART):
        part = order[first : first + _PART + 1]
        expert = part >> 32 if experts is None else experts[first : first + _PART + 1]
        slot = (part & 0xFFFFFFFF if experts is None else part) + begin
        again = np.flatnonzero((expert[1:] == expert[:-1]) & (expert[1:] >= 0))
        yield from zip(expert[again].tolist(), slot[again].tolist(), slot[again + 1].tolist(), strict=True)


def _unreachable(slots: IntArray, ends: IntArray, layer: int, replica_index: IntArray | None) -> Iterator[Finding]:
    """Replicas that Ascend's mode 0 never chooses: source rank r goes to replica r // ceil(W / c) of c."""
    num_ranks = len(ends)
    experts, counts = np.unique(slots, return_counts=True)
    for which in np.flatnonzero(counts > 1).tolist():
        count = int(counts[which])
        reached = -(-num_ranks // -(-num_ranks // count))
        if reached == count or experts[which] < 0:
            continue
        held = np.flatnonzero(slots == experts[which])
        idle = held[reached:] if replica_index is None else held[replica_index[held] >= reached]
        slot, rank = int(idle[0]), _rank_of(int(idle[0]), ends)
        yield Finding(
            "warning",
            "unreachable",
            f"{count} replicas of expert {experts[which]} in layer {layer}: slot {slot} of rank {rank}"
            + (f" and {len(idle) - 1} more" if len(idle) > 1 else ""),
            f"should have no replica that the rank rule leaves idle; over {num_ranks} ranks it reaches {reached}",
            f"use {reached} replicas, or another rule",
            layer=layer,
            rank=rank,
            slot=slot,
            expert=int(experts[which]),
        )


def _fatal(kind: str, text: str, rule: str, fix: str, **place: int | None) -> Finding:
    return Finding("error", kind, text, rule, fix, fatal=True, **place)
