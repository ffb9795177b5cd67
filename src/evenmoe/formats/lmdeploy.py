"""LMDeploy and DLBlas: a JSON list of every layer's loads (L, E)."""

from __future__ import annotations

import numpy as np

from evenmoe.formats import vllm_list
from evenmoe.formats.contents import Load, Options, RawLoad, WriteOptions
from evenmoe.formats.document import Document
from evenmoe.formats.values import one_window
from evenmoe.io.json_text import json_bytes


def matches(document: Document) -> bool:
    value = document.value
    return isinstance(value, np.ndarray) and value.ndim == 2 and vllm_list.fits(value) is not True


def read(document: Document, options: Options) -> RawLoad:
    return RawLoad(document.numbers(document.value, "its list", (2,))[None])


def write(value: Load, options: WriteOptions) -> bytes:
    return json_bytes(one_window(value, options))
