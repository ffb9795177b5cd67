"""Tokens with the experts that each of them chose: of what is recorded of them, a trace and the findings.

A recording has a row for every token, layer and one of the K experts. What is no choice of a token is found by its
values: zeros everywhere where a layer is dense or nothing was captured, -1 where a row was padded, an expert twice
where ids overflowed. Such tokens are left out, and said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from evenmoe.formats.contents import Finding, RawLoad, ReadOptions
from evenmoe.formats.document import Document
from evenmoe.formats.layer_numbers import HIDDEN_LAYERS, ranges
from evenmoe.io import ALLOWANCE_BYTES
from evenmoe.traces.trace import checked_trace

_MOST_EXPERTS = 1 << 15
_MOST_WINDOWS = 512
_TOKENS_AT_ONCE = 1 << 12
_LAYERS_TO_TELL = 8  # in as many, no token of one expert a layer chooses expert 0 everywhere
_SAMPLE = 20_000  # tokens among which choices made together are counted
_EXPECTED = 40.0  # of two experts together, where none at all means that they exclude each other: e^-40 by chance
_MOST_PAIRS = 500  # of a layer, the most frequent ones
_FEWEST_OTHERS, _FEWEST_TOGETHER = 3, 5  # experts that are chosen beside two slots, so often that they can be compared
_ALIKE = 2.0  # chi-square per degree of freedom, 1.0 where a coin decides which of two slots a token takes


def raw_of_requests(
    document: Document, requests: Sequence[tuple[str, np.ndarray]], options: ReadOptions, origin: str
) -> RawLoad:
    """The load, with its trace, of requests' tokens.

    Args:
        document: named in errors.
        requests: (name, integers (tokens, rows, K)) of every request, a row for every hidden layer; names are for
            errors.
        options: `num_experts`, `placement` and `first_layer` are looked at.
        origin: what recorded them, for the advice.
    """
    shapes = {ids.shape[1:]: name for name, ids in requests}
    if len(shapes) > 1:
        (one, first), (other, second) = list(shapes.items())[:2]
        raise document.error(
            f"with {one[0]} layers and {one[1]} experts per token in {first}, {other[0]} and {other[1]} in {second}",
            "must hold requests to one model",
            "put each model's requests into a file or folder of their own",
        )
    ids = np.concatenate([ids for _, ids in requests])
    lengths = np.array([len(ids) for _, ids in requests])
    used = np.flatnonzero((ids > 0).any(axis=(0, 2)))
    if not len(ids) or not len(used):
        raise document.error(
            f"with zeros alone for {len(ids)} tokens",
            "must hold the experts that tokens chose",
            f"the capture of {origin} was not active: check that it is switched on and supported, and record again",
        )
    chosen = ids[:, used]
    experts = _num_experts(document, chosen, options)
    raw = RawLoad(np.zeros((0, 0, 0), np.int64), _layer_ids(used, ids.shape[1], options))
    if raw.layer_ids is not None:
        raw.metadata[HIDDEN_LAYERS] = ids.shape[1]
    if raw.layer_ids is not None and len(used) < ids.shape[1]:
        dense = sorted(set(range(ids.shape[1])) - set(used.tolist()))
        raw.notes.append(f"left out {len(dense)} layers with zeros alone, taken for dense ones: {ranges(dense)}")
    kept = _kept(document, raw, chosen, lengths)
    routing = chosen[kept].astype(np.int32)
    lengths = np.add.reduceat(np.r_[kept.astype(np.int64), 0], np.r_[0, np.cumsum(lengths)[:-1]]) * (lengths > 0)
    raw.findings.extend(_physical(routing, raw.layer_ids) if options.placement is None else ())
    if options.num_experts is None and options.placement is None:
        raw.notes.append(
            f"took {experts} experts for all: {experts - 1} is the largest id that a token chose (--experts)"
        )
    if (lengths == 0).any():
        raw.notes.append(f"left out {int((lengths == 0).sum())} of {len(lengths)} requests, which have no token left")
    add_trace(document, raw, routing, lengths[lengths > 0], experts)
    raw.ids_may_be_slots = True
    return raw


def add_trace(document: Document, raw: RawLoad, routing: np.ndarray, lengths: np.ndarray, experts: int) -> None:
    """Give `raw` the load of these tokens, a window a request, and their trace."""
    starts = np.r_[0, np.cumsum(lengths)]
    windows = np.arange(len(lengths)) * min(_MOST_WINDOWS, len(lengths)) // len(lengths)
    first = starts[np.r_[0, np.flatnonzero(np.diff(windows)) + 1]]
    if len(first) < len(lengths):
        raw.notes.append(f"counted {len(lengths)} requests in {len(first)} windows")
    layers = routing.shape[1]
    if 8 * len(first) * layers * experts > 64 * routing.nbytes + ALLOWANCE_BYTES:
        raise document.error(
            f"with {len(routing)} tokens for {layers} layers of {experts} experts",
            "must have tokens for most experts",
            "check --experts",
        )
    places = np.arange(layers)[:, None] * experts
    raw.load = np.stack(
        [
            np.bincount((part + places).reshape(-1), minlength=layers * experts).reshape(layers, experts)
            for part in np.split(routing, first[1:])
        ]
    )
    arrays = {"load": raw.load, "routing": routing, "seq_start": starts}
    if raw.layer_ids is not None:
        arrays["layer_ids"] = np.array(raw.layer_ids)
    raw.trace = checked_trace(Path(document.name).stem, arrays, {}, document.error)


def distinct(ids: np.ndarray) -> np.ndarray:
    """bool (tokens, layers): whether the K experts (tokens, layers, K) of a token are different ones.

    >>> distinct(np.array([[[0, 1], [2, 2]]])).tolist()
    [[True, False]]
    """
    found = np.ones(ids.shape[:2], bool)
    for start in range(0, len(ids), _TOKENS_AT_ONCE):
        ordered = np.sort(ids[start : start + _TOKENS_AT_ONCE], axis=2)
        found[start : start + _TOKENS_AT_ONCE] = (ordered[:, :, 1:] != ordered[:, :, :-1]).all(axis=2)
    return found


def _layer_ids(used: np.ndarray, rows: int, options: ReadOptions) -> tuple[int, ...] | None:
    """The model's number of each used row: itself, unless the first MoE layer says that no dense one is there."""
    if options.first_layer and len(used) == rows:
        return None  # `first_layer` numbers them
    return tuple(used.tolist())


def _num_experts(document: Document, chosen: np.ndarray, options: ReadOptions) -> int:
    """E, or the slots of the placement. Raises FileFormatError for ids that cannot be such."""
    largest, smallest = int(chosen.max()), int(chosen.min())
    if smallest < -1:
        raise document.error(
            f"with id {smallest} of dtype {chosen.dtype}",
            "must hold experts from 0, or -1 for none",
            "ids overflowed where they were stored: keep them in a wider type",
        )
    if options.placement is not None:
        known, what = options.placement.num_slots, "slots of its placement"
        fix = "pass the placement that was in use when it was recorded, or leave placement (--map) out"
    elif options.num_experts is not None:
        known, what = options.num_experts, "experts"
        fix = (
            "if these are slots (physical experts), as some versions record them, pass their placement (--map FILE); "
            "else check num_experts (--experts)"
        )
    else:
        known, what, fix = _MOST_EXPERTS, "experts", "check how it was recorded"
    if largest >= known:
        raise document.error(f"with id {largest}", f"must hold ids below {known}, the {what}", fix)
    if options.num_experts is not None and chosen.dtype == np.uint8 and options.num_experts > 256:
        raise document.error(
            f"with ids of 8 bits for {options.num_experts} experts",
            "must hold ids of a type that counts to the last expert",
            "store them as uint16 and record again: those beyond 255 have become others",
        )
    return known if what != "experts" or options.num_experts is not None else largest + 1


def _kept(document: Document, raw: RawLoad, chosen: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """bool (tokens,): those whose experts are known in every layer; notes and findings say which are not."""
    tokens, layers, top_k = chosen.shape
    padded = (chosen < 0).any(axis=(1, 2))
    zeros = (chosen == 0).all(axis=(1, 2)) & (top_k > 1 or layers >= _LAYERS_TO_TELL)
    different = distinct(chosen)
    twice = ~different.all(axis=1) & ~padded & ~zeros
    rule = "should have every token's experts in every layer"
    if padded.any():
        raw.notes.append(f"left out {int(padded.sum())} of {tokens} tokens, padded with -1")
    if zeros.any():
        requests = np.repeat(np.arange(len(lengths)), lengths)
        whole = int((np.bincount(requests[zeros], minlength=len(lengths)) == lengths)[lengths > 0].sum())
        text = f"zeros alone for {int(zeros.sum())} of {tokens} tokens"
        text += f", among them all of {whole} requests" if whole else ""
        fix = "they were left out; the capture missed them (a cached prefix, a captured graph): record again"
        raw.findings.append(Finding("warning", "empty-capture", text, rule, fix))
    if twice.any():
        token = int(twice.argmax())
        row = int((~different[token]).argmax())
        layer = raw.layer_ids[row] if raw.layer_ids else row
        text = f"an expert twice for {int(twice.sum())} of {tokens} tokens, the first token {token} in layer {layer}"
        fix = "they were left out; rows were padded by repetition, or ids were cut off"
        fix += ", as 8 bits do beyond expert 255" if chosen.dtype.itemsize == 1 else ""
        raw.findings.append(Finding("warning", "repeated-expert", text, rule, fix, layer=layer))
    kept = ~(padded | zeros | twice)
    if not kept.any():
        raise document.error(
            f"with {tokens} tokens, none of which has {top_k} different experts in every layer",
            "must hold the experts that tokens chose",
            "check the shape, (tokens, layers, K), and how it was recorded",
        )
    return kept


def _physical(routing: np.ndarray, layer_ids: tuple[int, ...] | None) -> Iterator[Finding]:
    """A warning where ids look like slots: in most layers two ids exclude each other and are otherwise alike.

    A token never chooses two replicas of one expert, and what else it chooses does not depend on which of them it has.
    Experts for different topics exclude each other, too, but go with others. Where a rank always takes the same
    replica, slots are not found so.
    """
    sample = routing[:: max(1, -(-len(routing) // _SAMPLE))]
    tokens, layers, top_k = sample.shape
    if top_k < 2:
        return
    found = []
    for row in range(layers):
        wide = int(sample[:, row].max()) + 1
        if tokens * wide > 1 << 25:
            return
        chose = np.zeros((tokens, wide), np.float32)
        chose[np.arange(tokens)[:, None], sample[:, row]] = 1
        counts = chose.sum(axis=0)
        together = chose.T @ chose
        expected = np.outer(counts, counts) / tokens * (top_k - 1) / top_k
        np.fill_diagonal(together, 0)
        pairs = np.argwhere(np.triu((together == 0) & (expected >= _EXPECTED), 1))
        pairs = pairs[np.argsort(-expected[tuple(pairs.T)], kind="stable")[:_MOST_PAIRS]]
        alike = next((pair for pair in pairs.tolist() if _alike(*together[pair], *counts[pair])), None)
        if alike is not None:
            found.append((row, *alike))
    if 2 * len(found) > layers:
        row, one, other = found[0]
        layer = layer_ids[row] if layer_ids else row
        text = f"ids {one} and {other} of layer {layer}, never together and with the same others, and such pairs in "
        text += f"{len(found)} of {layers} layers"
        fix = "these look like two slots of one expert: pass the placement that was in use (--map FILE)"
        yield Finding("warning", "physical-ids", text, "should hold logical experts", fix, layer=layer)


def _alike(one: np.ndarray, other: np.ndarray, count: float, other_count: float) -> bool:
    """Whether two ids are chosen with the same others, each so often (E,), in proportion to their own counts."""
    both = one + other
    compared = both >= _FEWEST_TOGETHER
    share = count / (count + other_count)
    deviation = (one - share * both)[compared] ** 2 / (share * (1 - share) * both[compared])
    return int(compared.sum()) >= _FEWEST_OTHERS and float(deviation.mean()) <= _ALIKE
