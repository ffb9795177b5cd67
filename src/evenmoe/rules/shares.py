"""The loads that a rule really produces, by the rule's name."""

from __future__ import annotations

import numpy.typing as npt

from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement
from evenmoe.rules.catalogue import RULES


def rank_loads(load: npt.ArrayLike, placement: Placement, rule: str) -> FloatArray:
    """Tokens that each rank computes: load (L, E) or (T, L, E) -> float64 (L, G) or (T, L, G)."""
    return RULES.get(rule).rank_loads(load, placement)
