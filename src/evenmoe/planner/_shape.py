"""The counts of a planning problem, and the checks that name the nearest counts that work."""

from __future__ import annotations

import operator
from typing import NamedTuple

from evenmoe.errors import ConstraintError


class Shape(NamedTuple):
    """Counts that fit together: what `check_shape` returns."""

    num_experts: int
    num_ranks: int
    num_slots: int
    num_nodes: int
    num_groups: int

    @property
    def is_hierarchical(self) -> bool:
        """One group has nowhere to be pinned, and one node holds every group: both mean the global problem."""
        return self.num_groups > 1 and self.num_nodes > 1


def whole_number(name: str, value: object, least: int) -> int:
    """`value` as an int of at least `least`.

    Raises:
        ConstraintError: not a whole number, or too small.

    >>> whole_number("num_ranks", 8, least=1)
    8
    """
    try:
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise ConstraintError(
            name, f"{value!r} of type {type(value).__name__}", "must be a whole number", "pass an int"
        ) from None
    if number < least:
        raise ConstraintError(name, number, f"must be at least {least}", f"use {least} or more")
    return number


def check_shape(
    num_experts: int, num_ranks: object, num_slots: object, num_nodes: object = 1, num_groups: object = 1
) -> Shape:
    """The counts as a `Shape`, if a placement of that shape exists.

    Raises:
        ConstraintError: counts that cannot work; the text names the nearest ones that do.

    >>> check_shape(256, 32, 288).is_hierarchical
    False
    >>> check_shape(256, 32, 250)
    Traceback (most recent call last):
    evenmoe.errors.ConstraintError: `num_slots` is 250: it must hold each of the 256 experts at least once and divide \
evenly over 32 ranks; the nearest that works is 256.
    """
    ranks = whole_number("num_ranks", num_ranks, 1)
    slots = whole_number("num_slots", num_slots, 1)
    nodes = whole_number("num_nodes", num_nodes, 1)
    groups = whole_number("num_groups", num_groups, 1)
    _check_slots(num_experts, ranks, slots)
    if ranks % nodes:
        raise ConstraintError(
            "num_nodes",
            nodes,
            f"must divide the {ranks} ranks evenly",
            _nearest([n for n in range(1, ranks + 1) if ranks % n == 0], nodes),
        )
    shape = Shape(num_experts, ranks, slots, nodes, groups)
    if shape.is_hierarchical and (groups % nodes or num_experts % groups):
        fitting = [n for n in range(nodes, num_experts + 1, nodes) if num_experts % n == 0]
        fix = (
            _nearest(fitting, groups)
            if fitting
            else f"{num_experts} experts have no such groups: use num_groups=1, which plans across nodes"
        )
        raise ConstraintError(
            "num_groups",
            groups,
            f"must be a multiple of the {nodes} nodes and divide the {num_experts} experts evenly",
            fix,
        )
    return shape


def _check_slots(num_experts: int, ranks: int, slots: int) -> None:
    if slots >= num_experts and slots % ranks == 0:
        return
    least = -(-num_experts // ranks) * ranks
    below = slots // ranks * ranks
    fitting = sorted({max(below, least), max(below + ranks, least)} if slots >= num_experts else {least})
    raise ConstraintError(
        "num_slots",
        slots,
        f"must hold each of the {num_experts} experts at least once and divide evenly over {ranks} ranks",
        _nearest(fitting, slots),
    )


def _nearest(fitting: list[int], value: int) -> str:
    """The closest fitting number on either side, in words."""
    below = [n for n in fitting if n < value]
    above = [n for n in fitting if n > value]
    near = below[-1:] + above[:1]
    verb = "is" if len(near) == 1 else "are"
    return f"the nearest that {'works' if len(near) == 1 else 'work'} {verb} {' and '.join(map(str, near))}"
