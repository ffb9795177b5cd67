"""Loads in, `Placement` out: planners, by name in `PLANNERS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from evenmoe.registry import Registry

if TYPE_CHECKING:
    from evenmoe.placement import Placement

# Called as `evenmoe.plan` is: the load, (L, E) or windows (T, L, E), `num_ranks=`, `num_slots=`, and those of the other
# options that its signature names; it returns a placement.
Planner = Callable[..., "Placement"]

#: evenmoe's own, the published greedy one, those of packages (entry points `evenmoe.planners`), and the user's.
PLANNERS: Registry[Planner] = Registry(
    "planner",
    {"evenmoe": "evenmoe.planner.plan:plan", "greedy": "evenmoe.planner.greedy:plan_greedy"},
    "collections.abc:Callable",
    "a function that is called as evenmoe.plan is",
    "evenmoe.planners",
)
