"""evenmoe: expert-parallel load balancing for Mixture-of-Experts models, on any hardware PyTorch runs on.

The public face is this list. A name is imported when first used, so `import evenmoe` is light: no torch, no numba.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evenmoe import errors as errors
    from evenmoe.advice.advise import Advice as Advice
    from evenmoe.advice.advise import advise as advise
    from evenmoe.dispatched import Dispatched as Dispatched
    from evenmoe.errors import ConstraintError as ConstraintError
    from evenmoe.errors import EvenmoeError as EvenmoeError
    from evenmoe.errors import FileFormatError as FileFormatError
    from evenmoe.errors import LostRankError as LostRankError
    from evenmoe.errors import MissingArgumentError as MissingArgumentError
    from evenmoe.errors import RankDisagreementError as RankDisagreementError
    from evenmoe.errors import UnsupportedTypeError as UnsupportedTypeError
    from evenmoe.formats.reading import read as read
    from evenmoe.formats.writing import convert as convert
    from evenmoe.formats.writing import save_placement as save_placement
    from evenmoe.metrics import count_copies as count_copies
    from evenmoe.metrics import peak_to_average as peak_to_average
    from evenmoe.ops.combine import combine as combine
    from evenmoe.ops.combine_add_rms_norm import combine_add_rms_norm as combine_add_rms_norm
    from evenmoe.ops.dispatch import dispatch as dispatch
    from evenmoe.ops.update_expert import update_expert as update_expert
    from evenmoe.placement import Placement as Placement
    from evenmoe.planner.bound import lower_bound as lower_bound
    from evenmoe.planner.plan import plan as plan
    from evenmoe.rules.split_batch import split_batch as split_batch
    from evenmoe.runtime.expert_parallel import ExpertParallel as ExpertParallel
    from evenmoe.simulator.costs import CostModel as CostModel
    from evenmoe.simulator.replay import simulate as simulate
    from evenmoe.simulator.result import Simulation as Simulation
    from evenmoe.simulator.store import load_simulation as load_simulation
    from evenmoe.simulator.store import save_simulation as save_simulation
    from evenmoe.traces.synthesis import synthesize as synthesize
    from evenmoe.traces.trace import Trace as Trace
    from evenmoe.traces.trace import load_trace as load_trace
    from evenmoe.traces.trace import save_trace as save_trace
    from evenmoe.transport.process_world import process_world as process_world
    from evenmoe.transport.world import local_world as local_world

__version__ = "0.1.0"

_HOME = {
    "Advice": "evenmoe.advice.advise",
    "ConstraintError": "evenmoe.errors",
    "CostModel": "evenmoe.simulator.costs",
    "Dispatched": "evenmoe.dispatched",
    "EvenmoeError": "evenmoe.errors",
    "ExpertParallel": "evenmoe.runtime.expert_parallel",
    "FileFormatError": "evenmoe.errors",
    "LostRankError": "evenmoe.errors",
    "MissingArgumentError": "evenmoe.errors",
    "Placement": "evenmoe.placement",
    "RankDisagreementError": "evenmoe.errors",
    "Simulation": "evenmoe.simulator.result",
    "Trace": "evenmoe.traces.trace",
    "UnsupportedTypeError": "evenmoe.errors",
    "advise": "evenmoe.advice.advise",
    "combine": "evenmoe.ops.combine",
    "combine_add_rms_norm": "evenmoe.ops.combine_add_rms_norm",
    "convert": "evenmoe.formats.writing",
    "count_copies": "evenmoe.metrics",
    "dispatch": "evenmoe.ops.dispatch",
    "errors": "evenmoe.errors",
    "load_simulation": "evenmoe.simulator.store",
    "load_trace": "evenmoe.traces.trace",
    "local_world": "evenmoe.transport.world",
    "lower_bound": "evenmoe.planner.bound",
    "peak_to_average": "evenmoe.metrics",
    "plan": "evenmoe.planner.plan",
    "process_world": "evenmoe.transport.process_world",
    "read": "evenmoe.formats.reading",
    "save_placement": "evenmoe.formats.writing",
    "save_simulation": "evenmoe.simulator.store",
    "save_trace": "evenmoe.traces.trace",
    "simulate": "evenmoe.simulator.replay",
    "split_batch": "evenmoe.rules.split_batch",
    "synthesize": "evenmoe.traces.synthesis",
    "update_expert": "evenmoe.ops.update_expert",
}

__all__ = [*_HOME, "__version__"]  # noqa: PLE0604  # pyright: ignore[reportUnsupportedDunderAll]


def import_name(package: str, home: Mapping[str, str], name: str) -> object:
    """A package's `__getattr__` (PEP 562): import a name from the module that `home` names, when it is first used.

    A name may also be that of a module of the package itself.

    >>> import_name("evenmoe", {"Placement": "evenmoe.placement"}, "Placement").__name__
    'Placement'
    """
    if name not in home:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module = import_module(home[name])
    value = module if home[name] == f"{package}.{name}" else getattr(module, name)
    setattr(sys.modules[package], name, value)
    return value


def known_names(package: str, home: Mapping[str, str]) -> list[str]:
    """A package's `__dir__`: what it has, and what it would import."""
    return sorted({*vars(sys.modules[package]), *home})


__getattr__, __dir__ = partial(import_name, __name__, _HOME), partial(known_names, __name__, _HOME)
