"""A placement of the user's as a policy: never planned anew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.formats.contents import ReadOptions
from evenmoe.formats.reading import read_placement
from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement, layers_of
from evenmoe.rules.rule import Rule
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.policies import Policy
from evenmoe.simulator.policy_text import PolicyText
from evenmoe.slot_arrays import sizes_text
from evenmoe.traces.trace import Trace

FILE = "file:"


@dataclass(frozen=True)
class ReplayedTrace:
    """The trace that is replayed, and which layers of the given one it has.

    Attributes:
        trace: without layers in which nothing was recorded.
        layers: int64 (L,), the row that each of its layers had before.
        num_before: int, the layers before.
    """

    trace: Trace
    layers: npt.NDArray[np.int64]
    num_before: int

    @staticmethod
    def of(before: Trace, trace: Trace) -> ReplayedTrace:
        """What `recorded_part` made of a trace."""
        recorded = before.load.any(axis=(0, 2)) if trace.num_layers < before.num_layers else np.ones(trace.num_layers)
        return ReplayedTrace(trace, np.flatnonzero(recorded), before.num_layers)


@dataclass(frozen=True)
class Fixed(Policy):
    """One placement for ever, which is there when the first step begins.

    Attributes:
        placement: of the replayed layers.
        origin: what it is called: "The placement in p.json".
    """

    placement: Placement | None = None
    origin: str = "The given placement"

    @property
    def description(self) -> str:
        """See `Policy.description`."""
        return f"{self.origin} for ever, {self._choice}."

    def first_placement(self, cluster: Cluster, num_layers: int, num_experts: int) -> Placement:
        """See `Policy.first_placement`."""
        assert self.placement is not None
        return self.placement

    def plan(self, cluster: Cluster, past: FloatArray, previous: Placement | None, seed: int) -> Placement:
        """See `Policy.plan`; nothing is planned."""
        return self.first_placement(cluster, *past.shape[1:])


def fixed_policy(
    name: str,
    placement: Placement,
    rule: Rule,
    cluster: Cluster,
    replayed: ReplayedTrace,
    layer_ids: list[int] | None = None,
    origin: str = "The given placement",
) -> Fixed:
    """The policy of a placement of the trace's layers, or of those of them that are replayed.

    Args:
        layer_ids: the model's own number of each of the placement's layers, by which they are found where the trace has
            numbers, too; else they are taken row by row.

    Raises:
        ConstraintError: it is of another model or another number of ranks, has no slot on a rank, or as many on every
            rank only under a rule that is compiled.
    """
    trace = replayed.trace
    for what, has, wanted in (
        ("experts", placement.num_experts, trace.num_experts),
        ("ranks", placement.num_ranks, cluster.num_ranks),
    ):
        if has != wanted:
            raise ConstraintError(
                "policy", f"{name!r}, a placement of {has} {what}", f"must have the {wanted} of the replay",
                "pass the placement of this model on these ranks",
            )  # fmt: skip
    _check_ranks(name, placement, rule)
    numbers = None if trace.layer_ids is None else trace.layer_ids.tolist()
    if layer_ids is not None and numbers is not None and set(numbers) <= set(layer_ids):
        placement = layers_of(placement, [layer_ids.index(number) for number in numbers])
    elif placement.num_layers == replayed.num_before:
        placement = layers_of(placement, replayed.layers)
    elif placement.num_layers != trace.num_layers:
        raise ConstraintError(
            "policy", f"{name!r}, a placement of {placement.num_layers} layers",
            f"must have the {replayed.num_before} of the trace", "pass the placement of the layers that were recorded",
        )  # fmt: skip
    return Fixed(name, rule, placement.num_slots, placement=placement, origin=origin)


def _check_ranks(name: str, placement: Placement, rule: Rule) -> None:
    """Raise ConstraintError for ranks without a slot, and for uneven ones under a rule that cannot know them."""
    empty = [rank for rank, size in enumerate(placement.rank_sizes) if size == 0]
    if empty:
        raise ConstraintError(
            "policy", f"{name!r}, a placement without a slot on rank {empty[0]}",
            "must have a slot on every rank, each of which has tokens in a replay",
            "replay the ranks that are left: plan for that many, without dead ranks",
        )  # fmt: skip
    if not placement.is_even and rule.kernel is None:
        raise ConstraintError(
            "policy", f"{name!r}, a placement whose ranks have {sizes_text(placement.rank_sizes)} slots",
            f"must have the same number of slots on every rank for the rule {rule.name}, which is called with a table",
            "choose one of evenmoe's own rules, or slots that divide by the ranks",
        )  # fmt: skip


def placement_file(text: str) -> str | None:
    """The path in file:PATH[:rule=NAME], None of other policies.

    >>> placement_file("file:p.json:rule=token"), placement_file("evenmoe")
    ('p.json', None)
    """
    return PolicyText(text, {}).kind.removeprefix(FILE) if text.startswith(FILE) else None


def read_fixed(text: PolicyText, cluster: Cluster, replayed: ReplayedTrace) -> Fixed:
    """The policy that file:PATH[:rule=NAME] is.

    Raises:
        FileFormatError, ConstraintError: the file is no placement, or one of another model.
    """
    text.read_options(("rule",))
    path = text.kind.removeprefix(FILE)
    if not path:
        text.fail("names no file", f"write {FILE}PATH")
    sizes = ReadOptions(num_experts=replayed.trace.num_experts, num_ranks=cluster.num_ranks)
    found = read_placement(path, sizes)
    assert found.placement is not None
    return fixed_policy(
        text.whole, found.placement, text.rule("rule", "rank"), cluster, replayed,
        None if found.layer_ids is None else list(found.layer_ids), f"The placement in {path}",
    )  # fmt: skip
