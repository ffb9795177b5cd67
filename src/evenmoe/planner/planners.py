"""Planners by name: evenmoe's own, the published greedy one, those of installed packages, and the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from inspect import Parameter, signature
from typing import TYPE_CHECKING

from evenmoe.errors import ConstraintError
from evenmoe.registry import Registry

if TYPE_CHECKING:
    import numpy.typing as npt

    from evenmoe.placement import Placement
    from evenmoe.planner.options import PlanOptions

# Called as `evenmoe.plan` is: the load, (L, E) or windows (T, L, E), `num_ranks=`, `num_slots=`, and those of the other
# options that its signature names; it returns a placement.
Planner = Callable[..., "Placement"]

PLANNERS: Registry[Planner] = Registry(
    "planner",
    {"evenmoe": "evenmoe.planner.plan:plan", "greedy": "evenmoe.planner.static:plan_greedy"},
    callable,
    "a function that is called as evenmoe.plan is",
    "evenmoe.planners",
)
# What a planner need not look at: its plan is another than it could be, but none that breaks what was asked for.
_HINTS = ("rule", "seed")


def takes(planner: Planner, option: str) -> bool:
    """Whether the planner's signature has this option of `evenmoe.plan`.

    >>> takes(PLANNERS.get("evenmoe"), "previous"), takes(PLANNERS.get("greedy"), "previous")
    (True, False)
    """
    parameters = signature(planner).parameters
    return option in parameters or any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values())


def plan_with(planner: str | Planner, load: npt.ArrayLike, options: PlanOptions) -> Placement:
    """Plan with the planner of that name, or with this function, and check what it returns.

    Args:
        planner: a name in `PLANNERS`, py:module:function, or a function that is called as `evenmoe.plan` is.
        load: tokens per logical expert, (L, E), or windows (T, L, E).
        options: all are given to the planner that it takes. One that it does not take is an error where the plan would
            break it; the rule and the seed are left out.

    Raises:
        ConstraintError: no such planner, options that cannot work or that it does not take, or a plan that is no
            placement of the counts asked for, tears a group, or makes more copies than were allowed.

    >>> from evenmoe.planner.options import PlanOptions
    >>> plan_with("greedy", [[6, 1, 1]], PlanOptions(num_ranks=2, num_slots=4)).slot_to_expert.tolist()
    [[0, 1, 0, 2]]
    """
    # Not at the top: `--help` lists the planners without numpy.
    from evenmoe.metrics import as_load, count_copies
    from evenmoe.planner.options import check_placement

    tokens = as_load(load)
    options, shape = options.checked(*tokens.shape[-2:])
    found, name = PLANNERS.get(planner), planner if isinstance(planner, str) else repr(planner)
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    for option in [option for option in given if not takes(found, option)]:
        value = given.pop(option)
        needless = not shape.is_hierarchical if option in ("num_nodes", "num_groups") else value is None
        if not needless and option not in _HINTS:
            raise ConstraintError(
                "planner", f"{name}, which takes no `{option}`", f"must take it to plan with {value}", "leave it out"
            )
    placement = found(tokens, **given)
    check_placement(placement, tokens.shape[-2], shape, "planner", f"{name}, whose plan is ", "correct the planner")
    if options.previous is not None and options.max_copies is not None:
        copies = int(count_copies(options.previous, placement).max())
        if copies > options.max_copies:
            made = f"{name}, whose plan makes {copies} copies in one layer"
            raise ConstraintError("planner", made, f"must make at most {options.max_copies}", "correct the planner")
    return placement
