"""vLLM #41141: safetensors with one tensor {model name: float32 (L, E)} and metadata {"version": "1"}."""

from __future__ import annotations

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.formats.contents import Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.values import one_window

_EXACT = 2**24  # float32 holds every whole number up to here
_LARGEST = float(np.finfo(np.float32).max)


def matches(document: Document) -> bool:
    tensors, _ = document.value
    return bool(tensors) and all(tensor.ndim == 2 for tensor in tensors.values())


def read(document: Document, options: Options) -> RawLoad:
    tensors, metadata = document.value
    if len(tensors) != 1:
        names = ", ".join(repr(name[:40]) for name in list(tensors)[:5])
        raise document.refuse(f"with {len(tensors)} models: {names}", "must hold one model", "write one file for each")
    ((model, tensor),) = tensors.items()
    load = document.numbers(tensor, f"the tensor {model[:40]!r}", (2,))
    if load.dtype.kind == "f" and (np.abs(load) <= _EXACT).all() and (load == np.rint(load)).all():
        load = load.astype(np.int64)  # counts, in the only type that the format has
    raw = RawLoad(load[None], metadata={"model": model})
    if metadata.get("version", "1") != "1":
        raw.notes.append(f"version {metadata['version'][:20]!r}, read as version 1")
    return raw


def write(value: Load, options: WriteOptions) -> bytes:
    from safetensors.numpy import save

    load = one_window(value, options)
    if load.max() > _LARGEST:
        layer, expert = np.unravel_index(int(load.argmax()), load.shape)
        raise ConstraintError(
            "value",
            f"{load.max():.6g} in layer {layer}, expert {expert}",
            "must be at most 3.4e38 for vllm-safetensors, which holds float32",
            "divide the load by a common factor, or use another format",
        )
    rounded = load.astype(np.float32)
    if (rounded.astype(np.float64) != load).any():
        options.notes.append("rounded to float32, which the format demands")
    return save({str(options.metadata.get("model", "model")): rounded}, metadata={"version": "1"})
