"""The options of a plan, and the checks that name the nearest counts that work."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from evenmoe.errors import ConstraintError
from evenmoe.placement import Placement
from evenmoe.rules import RULES
from evenmoe.rules.rule import Rule
from evenmoe.slot_arrays import sizes_text

#: What a plan makes small: the busiest rank's tokens, or in decode what the costliest rank reads and computes.
OBJECTIVES = ("tokens", "decode")


class Shape(NamedTuple):
    """Counts that fit together: what `check_shape` returns.

    `rank_sizes` are the slots of each rank where these differ, and None where all have as many.
    """

    num_experts: int
    num_ranks: int
    num_slots: int
    num_nodes: int
    num_groups: int
    rank_sizes: tuple[int, ...] | None = None

    @property
    def is_hierarchical(self) -> bool:
        """Whether groups are kept inside nodes."""
        return self.num_nodes > 1

    @property
    def node_ranks(self) -> int:
        return self.num_ranks // self.num_nodes

    @property
    def node_slots(self) -> int:
        return self.num_slots // self.num_nodes


@dataclass(frozen=True)
class PlanOptions:
    """What a planner is asked for, beside the load: the arguments of `evenmoe.plan`, under their names there."""

    num_ranks: int
    num_slots: int | Sequence[int]
    num_nodes: int = 1
    num_groups: int = 1
    previous: Placement | None = None
    max_copies: int | None = None
    target_par: float | None = None
    rule: str | Rule = "even"
    seed: int = 0
    dead_ranks: Collection[int] = ()
    objective: str = "tokens"
    tokens_per_step: int | None = None
    top_k: int | None = None
    weight_rows: int | None = None

    def checked(self, num_layers: int, num_experts: int) -> tuple[PlanOptions, Shape]:
        """These options with the seed and the limit as ints, and their counts.

        Dead ranks become ranks without slots: `num_slots` is a tuple then, and wherever ranks have different numbers.

        Raises:
            ConstraintError: counts that cannot work (the text names the nearest that do), or options that do not go
                together.
        """
        slots = without_dead(self.num_ranks, self.num_slots, self.dead_ranks)
        shape = check_shape(num_experts, self.num_ranks, slots, self.num_nodes, self.num_groups)
        seed = whole_number("seed", self.seed, 0)
        rule = RULES.get(self.rule)
        if shape.rank_sizes is not None and rule.plan_for != "even":
            raise ConstraintError(
                "num_slots",
                f"[{sizes_text(shape.rank_sizes)}] with rule={rule.name!r}",
                "must be one number for all ranks, none of them dead, to plan for a rule whose shares are not even",
                "give one number, or plan for the even rule",
            )
        if self.previous is not None:
            _check_previous(self.previous, num_layers, shape, rule)
        max_copies = None if self.max_copies is None else whole_number("max_copies", self.max_copies, 0)
        self._check_goals()
        self._check_objective()
        sizes = shape.rank_sizes or shape.num_slots
        return replace(self, seed=seed, max_copies=max_copies, num_slots=sizes, dead_ranks=()), shape

    def _check_goals(self) -> None:
        for name, value in (("max_copies", self.max_copies), ("target_par", self.target_par)):
            if value is not None and self.previous is None:
                raise ConstraintError(
                    name, value, "needs `previous`, the placement to start from", "pass previous=, or leave this out"
                )
        if self.target_par is None:
            return
        if not self.target_par >= 1:
            raise ConstraintError("target_par", self.target_par, "must be at least 1.0", "1.0 is perfect balance")
        if RULES.get(self.rule).plan_for in ("rank", "batch"):
            raise ConstraintError(
                "target_par",
                f"{self.target_par} with rule={self.rule!r}",
                "needs a rule whose shares are even",
                "bound the copies with max_copies instead",
            )

    def _check_objective(self) -> None:
        if self.objective not in OBJECTIVES:
            fix = f"use one of {', '.join(OBJECTIVES)}"
            raise ConstraintError("objective", repr(self.objective), "must name what is made small", fix)
        for name in ("tokens_per_step", "top_k", "weight_rows"):
            value = getattr(self, name)
            if value is not None and self.objective == "tokens":
                fix = 'pass objective="decode", or leave this out'
                raise ConstraintError(name, value, "is of a decode step, and the plan is for tokens", fix)


def without_dead(num_ranks: object, num_slots: object, dead_ranks: Collection[int]) -> object:
    """The slots, of dead ranks none: as they were given where no rank is dead.

    >>> without_dead(4, 8, [1])
    (2, 0, 2, 2)
    """
    if not dead_ranks:
        return num_slots
    ranks = whole_number("num_ranks", num_ranks, 1)
    for rank in dead_ranks:
        if not 0 <= whole_number("dead_ranks", rank, 0) < ranks:
            raise ConstraintError("dead_ranks", rank, f"must be a rank, 0 to {ranks - 1}", "leave it out")
    if not isinstance(num_slots, Sequence | np.ndarray):
        total = whole_number("num_slots", num_slots, 1)
        if total % ranks:
            fix = "give the slots of all ranks, the dead ones included"
            raise ConstraintError("num_slots", total, f"must divide evenly over {ranks} ranks, the dead included", fix)
        num_slots = (total // ranks,) * ranks
    return tuple(0 if rank in dead_ranks else size for rank, size in enumerate(num_slots))


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

    One group has nowhere to be pinned, and one node holds every group: in both cases the shape has one of either, the
    problem across nodes.

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
    sizes = _uneven_sizes(num_experts, ranks, num_slots) if isinstance(num_slots, Sequence | np.ndarray) else None
    if isinstance(num_slots, Sequence | np.ndarray):
        num_slots = sum(int(size) for size in num_slots)
    slots = whole_number("num_slots", num_slots, 1)
    nodes = whole_number("num_nodes", num_nodes, 1)
    groups = whole_number("num_groups", num_groups, 1)
    if sizes is None:
        _check_slots(num_experts, ranks, slots)
    if ranks % nodes:
        raise ConstraintError(
            "num_nodes",
            nodes,
            f"must divide the {ranks} ranks evenly",
            _nearest([n for n in range(1, ranks + 1) if ranks % n == 0], nodes),
        )
    if nodes == 1 or groups == 1:
        return Shape(num_experts, ranks, slots, 1, 1, sizes)
    if sizes is not None:
        raise ConstraintError(
            "num_slots",
            f"[{sizes_text(sizes)}] with {groups} groups on {nodes} nodes",
            "must be one number for all ranks, none of them dead, to keep groups inside nodes",
            "plan across nodes with num_groups=1",
        )
    if groups % nodes or num_experts % groups:
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
    return Shape(num_experts, ranks, slots, nodes, groups)


def _uneven_sizes(num_experts: int, ranks: int, given: object) -> tuple[int, ...] | None:
    """The slots of each rank, if they suffice for the experts; None where all ranks have as many."""
    sizes = tuple(whole_number("num_slots", size, 0) for size in given)  # pyright: ignore[reportGeneralTypeIssues]
    if len(sizes) != ranks:
        rule = f"must be one number, or one for each of the {ranks} ranks"
        raise ConstraintError("num_slots", f"[{sizes_text(sizes)}]", rule, "give the slots of every rank")
    if sum(sizes) < num_experts:
        raise ConstraintError(
            "num_slots",
            f"[{sizes_text(sizes)}], {sum(sizes)} together",
            f"must hold each of the {num_experts} experts at least once",
            f"give {num_experts - sum(sizes)} slots more, or keep more ranks",
        )
    return None if min(sizes) == max(sizes) else sizes


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


def _check_previous(previous: object, num_layers: int, shape: Shape, rule: Rule) -> None:
    """Raise a ConstraintError unless a plan can start from it: of this model, and of this world where that matters."""
    if not isinstance(previous, Placement) or (shape.rank_sizes is None and previous.rank_sizes == sizes_of(shape)):
        return check_placement(previous, num_layers, shape)
    if (previous.num_layers, previous.num_experts) != (num_layers, shape.num_experts):
        raise ConstraintError(
            "previous",
            f"a placement of {previous.num_layers} layers, {previous.num_experts} experts",
            f"must have the {num_layers} layers, {shape.num_experts} experts of this call",
            "pass the placement in use of the same model, or None to plan anew",
        )
    if shape.is_hierarchical or rule.plan_for != "even":
        what = "keep groups inside nodes" if shape.is_hierarchical else "plan for a rule whose shares are not even"
        raise ConstraintError(
            "previous",
            f"a placement of {previous.num_ranks} ranks, {sizes_text(previous.rank_sizes)} slots",
            f"must be of the same ranks and slots to {what}",
            "plan anew without previous",
        )
    return None


def sizes_of(shape: Shape) -> tuple[int, ...]:
    """The slots of each rank."""
    return shape.rank_sizes or (shape.num_slots // shape.num_ranks,) * shape.num_ranks


def check_placement(
    placement: object,
    num_layers: int,
    shape: Shape,
    argument: str = "previous",
    whose: str = "",
    fix: str = "pass the placement in use on this world, or None to plan anew",
) -> None:
    """Raise a ConstraintError about `argument` unless it is a placement of these counts, its groups inside nodes."""
    if not isinstance(placement, Placement):
        raise ConstraintError(
            argument,
            f"{whose}of type {type(placement).__name__}",
            "must be a Placement",
            "wrap the slots in Placement(slot_to_expert, num_ranks)",
        )
    theirs = (placement.num_layers, placement.num_experts, placement.num_slots, placement.num_ranks)
    ours = (num_layers, shape.num_experts, shape.num_slots, shape.num_ranks)
    if theirs == ours and placement.rank_sizes != sizes_of(shape):
        raise ConstraintError(
            argument,
            f"{whose}a placement whose ranks have {sizes_text(placement.rank_sizes)} slots",
            f"must have the {sizes_text(sizes_of(shape))} of this call",
            fix,
        )
    if theirs != ours:
        raise ConstraintError(
            argument,
            whose + "a placement of {} layers, {} experts, {} slots, {} ranks".format(*theirs),
            "must have the {} layers, {} experts, {} slots, {} ranks of this call".format(*ours),
            fix,
        )
    if not shape.is_hierarchical:
        return
    group_size, node = shape.num_experts // shape.num_groups, np.arange(shape.num_slots) // shape.node_slots
    held = np.zeros((num_layers, shape.num_groups, shape.num_nodes), bool)
    held[np.arange(num_layers)[:, None], placement.slot_to_expert // group_size, node] = True
    torn, per_node = np.argwhere(held.sum(axis=2) > 1), held.sum(axis=1)
    uneven = np.argwhere(per_node != shape.num_groups // shape.num_nodes)
    if len(torn):
        layer, group = torn[0].tolist()
        wrong = f"group {group} of layer {layer} on nodes {np.flatnonzero(held[layer, group]).tolist()}"
        rule = "must keep each group inside one node"
    elif len(uneven):
        layer, full = uneven[0].tolist()
        wrong = f"{per_node[layer, full]} groups of layer {layer} on node {full}"
        rule = f"must have {shape.num_groups // shape.num_nodes} groups on each node"
    else:
        return
    fix = "plan anew without previous, or with num_groups=1" if argument == "previous" else fix
    raise ConstraintError(argument, f"{whose}a placement with {wrong}", rule, fix)
