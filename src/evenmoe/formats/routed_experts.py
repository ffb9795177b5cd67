"""`routed_experts`: the experts that every token of a request chose, as vLLM and SGLang return them.

Integers (tokens, layers, K), a row for every hidden layer, zeros in dense ones; the last token of a request, which was
sampled and not computed, has none.

vLLM: `CompletionOutput.routed_experts`, uint8 up to 256 experts and uint16 beyond (int16 before), which users keep as
.npy or .npz, one a request in a folder or all joined: an .npz of `routed_experts` and `lengths` (tokens of each
request) or `seq_start`; or padded to (requests, tokens, layers, K) beside `lengths`. Over HTTP a choice's
`routed_experts` is the base64 of such an .npy.

SGLang: the base64 of int32 without a shape, in `meta_info` of a response, or in `sglext` of an OpenAI response. Layers
times K follow from the tokens that the response counts; K is the largest number of which none repeats.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evenmoe.formats.catalogue import ENTRIES, Format
from evenmoe.formats.contents import RawLoad, ReadOptions
from evenmoe.formats.document import Document, left_out, parse_document, read_bytes
from evenmoe.formats.layer_numbers import HIDDEN_LAYERS
from evenmoe.formats.tokens import distinct, raw_of_requests
from evenmoe.io import DamagedFileError, Value

_NAME = "routed_experts"
_LENGTHS = ("lengths", "seq_lens", "num_tokens")
_STARTS = ("seq_start", "cu_seqlens")
_SUFFIXES = (".npy", ".npz", ".pt", ".json", ".jsonl")
_NARROW = (np.uint8, np.int16, np.uint16)  # no recorder of loads counts in these
_NPY = b"\x93NUMPY"
_LARGEST_K = 64
_SAY_LAYERS = "pass num_layers (--num-layers), the model's hidden layers, dense ones counted: 61 for DeepSeek-V3"
_NUMBERS_TO_TELL = 1 << 18  # of ids, among which repetitions are looked for


@dataclass(frozen=True)
class _Flat:
    """Ids without a shape, and how many tokens they are of where the response says."""

    name: str
    ids: np.ndarray
    tokens: int | None


def _matches(document: Document) -> bool:
    value = document.value
    if document.container == "folder":
        files = _files(value)
        return bool(files) and _matches(parse_document(str(files[0]), read_bytes(files[0])))
    if isinstance(value, np.ndarray):
        return _looks_routed(value)
    if document.container in ("npz", "pt"):
        return isinstance(value, Mapping) and (_NAME in value or (bool(value) and _all_routed(value)))
    return any(_encoded(response) for response in _responses(value)[:100])


def _looks_routed(value: np.ndarray) -> bool:
    """Whether an array is of a narrow type and has the experts of tokens, not slots or -1 for each expert of a rank."""
    if value.ndim != 3 or value.dtype.type not in _NARROW or not value.size or value.shape[2] > _LARGEST_K:
        return False
    padded = value < 0 if value.dtype.kind == "i" else np.zeros(1, bool)
    return not padded.any() or bool((padded.all(axis=2) == padded.any(axis=2)).all())


def _all_routed(arrays: Mapping[Value, Value]) -> bool:
    three = [array for array in arrays.values() if isinstance(array, np.ndarray) and array.ndim == 3]
    return bool(three) and all(_looks_routed(array) for array in three)


def _read(document: Document, options: ReadOptions) -> RawLoad:
    notes: list[str] = []
    requests: list[tuple[str, np.ndarray]] = []
    flats: list[_Flat] = []
    for file in _documents(document, notes):
        for name, found in _requests(file, notes):
            if isinstance(found, _Flat):
                flats.append(found)
            else:
                requests.append((name, found))
    if flats:
        requests += _shaped(document, flats, options, notes)
    if not requests:
        raise document.error(f"without `{_NAME}`", "must hold it for a request", "ask the server to return it")
    raw = raw_of_requests(document, requests, options, "vLLM or SGLang")
    raw.notes[:0] = notes
    return raw


def _documents(document: Document, notes: list[str]) -> Iterator[Document]:
    if document.container != "folder":
        yield document
        return
    files = _files(document.value)
    if not files:
        raise document.error(
            f"a folder without {', '.join(_SUFFIXES)} files", "must hold one a request", "name the folder of the files"
        )
    notes += left_out(document.value, files)
    for path in files:
        yield parse_document(str(path), read_bytes(path))


def _files(folder: Path) -> list[Path]:
    """The files of requests, 2 before 10."""
    files = [p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.name[0] != "." and p.is_file()]
    return sorted(files, key=lambda p: [(int(t), "") if t.isdigit() else (-1, t) for t in re.split("([0-9]+)", p.name)])


def _requests(file: Document, notes: list[str]) -> Iterator[tuple[str, np.ndarray | _Flat]]:
    """(name, ids (tokens, layers, K)) of every request in a file."""
    value = file.value
    short = Path(file.name).name
    if isinstance(value, np.ndarray):
        yield short, _ids(file, value, "its array")
    elif file.container in ("npz", "pt") and isinstance(value, Mapping):
        yield from _of_arrays(file, value, short, notes)
    elif file.container in ("json", "jsonl"):
        yield from _of_responses(file, _responses(value), short, notes)
    else:
        raise file.error(f"a {file.container} file without arrays", f"must hold `{_NAME}`", "check how it was written")


def _ids(file: Document, value: Value, where: str) -> np.ndarray:
    """Ids of one request, of the type that they are stored in; a request may have no token."""
    if isinstance(value, np.ndarray) and value.ndim == 3 and value.dtype.kind in "iu" and not len(value):
        return value
    checked = file.numbers(value, where, (3,), integers=True)
    return value if value.dtype.itemsize <= 2 else checked


def _of_arrays(
    file: Document, arrays: Mapping[Value, Value], short: str, notes: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    lengths = next((name for name in _LENGTHS if name in arrays), None)
    starts = next((name for name in _STARTS if name in arrays), None)
    if _NAME not in arrays:
        for name, array in arrays.items():
            if isinstance(array, np.ndarray) and array.ndim == 3:
                yield f"`{name}` of {short}", _ids(file, array, f"`{name}`")
        return
    main = arrays[_NAME]
    if isinstance(main, list):
        for number, part in enumerate(main):
            yield f"request {number} of {short}", _ids(file, part, f"`{_NAME}[{number}]`")
    elif isinstance(main, np.ndarray) and main.ndim == 4:
        if lengths is None:
            raise file.error(
                f"with `{_NAME}` of shape {main.shape} and no `lengths`",
                "must say how many tokens of each request are no padding",
                "store `lengths`, one number a request",
            )
        counts = file.numbers(arrays[lengths], f"`{lengths}`", (1,), integers=True)
        if len(counts) != len(main) or counts.min() < 0 or counts.max() > main.shape[1]:
            raise file.error(
                f"with `{lengths}` {counts.min()} to {counts.max()} for {len(main)} requests of {main.shape[1]} tokens",
                "must count tokens of every request",
                "check how it was written",
            )
        for number, (part, count) in enumerate(zip(main, counts.tolist(), strict=True)):
            yield f"request {number} of {short}", _ids(file, part[:count], f"`{_NAME}[{number}]`")
    else:
        ids = _ids(file, main, f"`{_NAME}`")
        named = lengths or starts
        if named is None:
            yield short, ids
            return
        counts = file.numbers(arrays[named], f"`{named}`", (1,), integers=True)
        bounds = np.r_[0, np.cumsum(counts)] if named == lengths else counts
        if bounds[0] != 0 or bounds[-1] > len(ids) or (np.diff(bounds) < 0).any():
            raise file.error(
                f"with `{named}` that ends at {bounds[-1]}",
                f"must divide the {len(ids)} tokens of `{_NAME}` among requests",
                "check how it was written",
            )
        if bounds[-1] < len(ids):
            notes.append(f"left out {len(ids) - int(bounds[-1])} tokens of {short} beyond `{named}`")
        for number, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            yield f"request {number} of {short}", ids[start:end]


def _responses(value: Value) -> list[Value]:
    if isinstance(value, list):
        return [item for part in value for item in (part if isinstance(part, list) else [part])]
    return [value]


def _encoded(response: Value) -> list[tuple[Value, int | None]]:
    """What a response has of its tokens, and how many they are where it says."""
    if not isinstance(response, Mapping):
        return []
    meta, choices = response.get("meta_info"), response.get("choices")
    if isinstance(meta, Mapping) and meta.get(_NAME) is not None:
        return [(meta[_NAME], _computed(meta))]
    for key in ("sglext", "sgl_ext"):
        extension = response.get(key)
        if isinstance(extension, Mapping) and extension.get(_NAME) is not None:
            alone = not isinstance(choices, list) or len(choices) == 1
            usage = response.get("usage")
            return [(extension[_NAME], _computed(usage) if alone and isinstance(usage, Mapping) else None)]
    if response.get(_NAME) is not None:
        return [(response[_NAME], _computed(response))]
    found = []
    for choice in choices if isinstance(choices, list) else []:
        found += _encoded(choice)
    return found


def _computed(counts: Mapping[Value, Value]) -> int | None:
    """Tokens that were computed: all but the one that was sampled last."""
    numbers = [counts.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 40 for n in numbers):
        return None
    return sum(n for n in numbers if n is not None) - 1


def _of_responses(
    file: Document, responses: list[Value], short: str, notes: list[str]
) -> Iterator[tuple[str, np.ndarray | _Flat]]:
    empty = 0
    for number, response in enumerate(responses):
        parts = _encoded(response)
        empty += not parts
        for part, tokens in parts:
            name = f"response {number} of {short}"
            yield name, _decoded(file, part, tokens, name)
    if empty:
        notes.append(f"left out {empty} of {len(responses)} responses of {short} without `{_NAME}`")


def _decoded(file: Document, part: Value, tokens: int | None, name: str) -> np.ndarray | _Flat:
    if not isinstance(part, str):
        return _ids(file, part, f"`{_NAME}` of {name}")
    try:
        data = base64.b64decode(part, validate=True)
    except (binascii.Error, ValueError):
        raise file.error(
            f"with `{_NAME}` of {name} that is no base64", "must be base64", "keep it as it came"
        ) from None
    if data[:6] == _NPY:
        from evenmoe.io.npz import parse_npy

        try:
            return _ids(file, parse_npy(data), f"`{_NAME}` of {name}")
        except DamagedFileError as error:
            raise file.error(f"with `{_NAME}` of {name}, {error}", "must be an intact .npy", "record again") from None
    if len(data) % 4:
        raise file.error(
            f"with `{_NAME}` of {name} of {len(data)} bytes", "must be int32 numbers", "keep the text as it came"
        )
    return _Flat(name, np.frombuffer(data, "<i4"), tokens)


def _shaped(
    document: Document, flats: list[_Flat], options: ReadOptions, notes: list[str]
) -> list[tuple[str, np.ndarray]]:
    """Every request's ids in their shape, (tokens, layers, K)."""
    full = [flat for flat in flats if flat.ids.size]
    if not full:
        return [(flat.name, flat.ids.reshape(0, 1, 1)) for flat in flats]
    widths = {flat.ids.size // flat.tokens for flat in full if flat.tokens and flat.ids.size % flat.tokens == 0}
    told = all(flat.tokens and flat.ids.size % flat.tokens == 0 for flat in full) and len(widths) == 1
    width = widths.pop() if told else math.gcd(*(flat.ids.size for flat in full))
    layers = options.num_hidden_layers or options.num_layers
    if layers is not None:
        if width % layers:
            raise document.error(
                f"with {width} ids a token" if told else f"with {full[0].ids.size} ids in {full[0].name}",
                f"must have a row for each of {layers} layers",
                _SAY_LAYERS,
            )
        top_k = width // layers if told else _largest_k(document, full, width // layers)
    elif told:
        top_k = _largest_k(document, full, width)
        layers = width // top_k
        notes.append(
            f"took {width} ids a token for {layers} layers of {top_k} experts, the most of which none repeats in a "
            "layer; --num-layers says otherwise"
        )
    else:
        raise document.error(
            f"with `{_NAME}` of {len(full)} responses that do not count their tokens",
            "must be read with the number of layers",
            _SAY_LAYERS,
        )
    return [(flat.name, flat.ids.reshape(-1, layers, top_k)) for flat in flats]


def _largest_k(document: Document, flats: list[_Flat], width: int) -> int:
    """The largest divisor K of `width` for which no row of K ids, in order, repeats one; rows of zeros do not count."""
    for top_k in range(min(width, _LARGEST_K), 0, -1):
        if width % top_k == 0 and all(_is_k(flat.ids, top_k) for flat in flats):
            return top_k
    raise document.error(f"with {width} ids a token", "must have experts in rows", "keep the text as it came")


def _is_k(ids: np.ndarray, top_k: int) -> bool:
    rows = ids[: _NUMBERS_TO_TELL // top_k * top_k].reshape(-1, top_k)
    return bool((distinct(rows[:, None])[:, 0] | (rows == 0).all(axis=1) | (rows < 0).all(axis=1)).all())


ROUTED_EXPERTS = Format(
    ENTRIES[_NAME.replace("_", "-")], _matches, _read, model_layers=True, kept_metadata=(HIDDEN_LAYERS,)
)
