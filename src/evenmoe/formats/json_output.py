"""JSON as evenmoe writes it: one line for a layer, so that files can be read and compared by eye."""

from __future__ import annotations

import json
from typing import Any

import numpy as np


def json_bytes(value: Any) -> bytes:
    """`value` as JSON, a row of numbers never broken, everything around it indented; whole floats keep their point.

    >>> print(json_bytes({"a": np.array([[1, 2], [3, 4]])}).decode(), end="")
    {
     "a": [
      [1, 2],
      [3, 4]
     ]
    }
    """
    return (_text(value, 0) + "\n").encode()


def _text(value: Any, depth: int) -> str:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict) and value:
        items = (f"{json.dumps(str(key))}: {_text(item, depth + 1)}" for key, item in value.items())
        return "{" + inner + ("," + inner).join(items) + outer + "}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, (dict, list, tuple, np.ndarray)) for item in value):
        return "[" + inner + ("," + inner).join(_text(item, depth + 1) for item in value) + outer + "]"
    return json.dumps(value)
