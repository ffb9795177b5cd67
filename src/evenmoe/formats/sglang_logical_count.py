"""SGLang's --init-expert-location with loads: {"logical_count": (L, E) or (T, L, E)}, every hidden layer a row."""

from __future__ import annotations

from evenmoe.formats.contents import Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.hidden_layers import load_with_dense, without_dense
from evenmoe.io.json_text import json_bytes
from evenmoe.io.torch_file import torch_bytes

_COUNT = "logical_count"


def matches(document: Document) -> bool:
    fields = document.fields
    return _COUNT in fields and "physical_to_logical_map" not in fields and "rank" not in fields


def read(document: Document, options: Options) -> RawLoad:
    load = document.numbers(document.fields.get(_COUNT), f"`{_COUNT}`", (2, 3))
    return without_dense(document, load[None] if load.ndim == 2 else load)


def write(value: Load, options: WriteOptions) -> bytes:
    content = {_COUNT: load_with_dense(value, options)}
    return torch_bytes(content) if options.container == "pt" else json_bytes(content)
