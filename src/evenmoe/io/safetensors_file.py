"""safetensors: a JSON header of dtypes, shapes and spans, then the bytes; every span checked against the file."""

from __future__ import annotations

import numpy as np

from evenmoe.io import DamagedFileError, Value
from evenmoe.io.text import parse_json

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,  # numpy has none: see `_widened`
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
}


def parse_safetensors(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by name, views of `data` (bfloat16 as float32), and the metadata. Raises `DamagedFileError`."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise DamagedFileError(f"with a header of {length} bytes in a file of {len(data)}")
    try:
        header = parse_json(data[8 : 8 + length])
    except DamagedFileError as error:
        raise DamagedFileError(f"with a damaged header ({error})") from None
    if not isinstance(header, dict):
        raise DamagedFileError("with a header that is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise DamagedFileError("with metadata that is no object of text")
    body = memoryview(data)[8 + length :]
    spans: list[tuple[int, int]] = []
    tensors = {name: _tensor(name, entry, body, spans) for name, entry in header.items()}
    end = 0
    for start, stop in sorted(spans):  # tensors that share bytes are how a small file becomes a huge one
        if start != end:
            raise DamagedFileError(f"with a gap or an overlap at byte {start} of the data")
        end = stop
    if end != len(body):
        raise DamagedFileError(f"with {len(body)} bytes of data for tensors of {end}")
    return tensors, metadata


def _tensor(name: str, entry: Value, body: memoryview, spans: list[tuple[int, int]]) -> np.ndarray:
    fields = entry if isinstance(entry, dict) else {}
    shape: Value = fields.get("shape")
    offsets: Value = fields.get("data_offsets")
    dtype = fields.get("dtype")
    if not _integers(shape) or not _integers(offsets):
        raise DamagedFileError(f"with {name[:60]!r} without a shape and data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise DamagedFileError(f"with {name[:60]!r} of dtype {str(dtype)[:20]}; readable are {', '.join(_DTYPES)}")
    count = 1
    for size in shape.tolist():
        count *= size
    span = offsets.tolist()
    itemsize = np.dtype(_DTYPES[dtype]).itemsize
    if len(span) != 2 or not 0 <= span[0] <= span[1] <= len(body) or span[1] - span[0] != count * itemsize or count < 0:
        raise DamagedFileError(f"with {name[:60]!r} of shape {shape.tolist()} in bytes {span}, which does not fit")
    if shape.size > 8 or (shape < 0).any():
        raise DamagedFileError(f"with {name[:60]!r} of shape {shape.tolist()}")
    spans.append((span[0], span[1]))
    values = np.frombuffer(body[span[0] : span[1]], np.dtype(_DTYPES[dtype]).newbyteorder("<")).reshape(shape)
    return _widened(values) if dtype == "BF16" else values


def _widened(halves: np.ndarray) -> np.ndarray:
    """bfloat16 as float32, whose upper half it is."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _integers(value: Value) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.int64 and value.ndim == 1


def safetensors_bytes(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """What `parse_safetensors` reads."""
    from safetensors.numpy import save  # not at the top: reading needs no such package

    return save(tensors, metadata)
