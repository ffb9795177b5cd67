"""Routing traces: what they hold, the file they live in, synthetic ones, and the statistics that compare them.

A name is imported when first used.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from evenmoe import import_name, known_names

if TYPE_CHECKING:
    from evenmoe.traces.models import MODELS as MODELS
    from evenmoe.traces.models import ModelShape as ModelShape
    from evenmoe.traces.models import find_model as find_model
    from evenmoe.traces.synthesis import synthesize as synthesize
    from evenmoe.traces.trace import Trace as Trace
    from evenmoe.traces.trace import load_trace as load_trace
    from evenmoe.traces.trace import save_trace as save_trace

_HOME = {
    "MODELS": "evenmoe.traces.models",
    "ModelShape": "evenmoe.traces.models",
    "Trace": "evenmoe.traces.trace",
    "find_model": "evenmoe.traces.models",
    "load_trace": "evenmoe.traces.trace",
    "save_trace": "evenmoe.traces.trace",
    "synthesize": "evenmoe.traces.synthesis",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = partial(import_name, __name__, _HOME), partial(known_names, __name__, _HOME)
