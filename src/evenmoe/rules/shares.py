"""The loads that a rule really produces: what share of an expert's tokens each of its replicas gets.

The source ranks are taken to hold equally many tokens of every expert.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.metrics import FloatArray, as_load
from evenmoe.placement import Placement
from evenmoe.rules.rank import ranks_choosing
from evenmoe.rules.split_batch import SplitPlan

RULES = ("even", "rank", "token", "occurrence", "batch")


def check_rule(rule: str) -> None:
    """Raise a ConstraintError unless `rule` is one of `RULES`."""
    if rule not in RULES:
        raise ConstraintError("rule", repr(rule), f"must be one of {', '.join(RULES)}", 'the default is "even"')


def slot_shares(placement: Placement, rule: str) -> FloatArray:
    """The share of its expert's tokens that each slot gets, float64 (L, S); the shares of an expert add up to 1.

    "even", "token" and "occurrence" share evenly: by token in the limit of many tokens per rank (with T of them, the
    first T mod count replicas get one more on every rank), by occurrence already with few. "batch" has no fixed
    shares, see `slot_loads`.

    Raises:
        ConstraintError: a rule without fixed shares.

    Three replicas on eight ranks: the first two serve three ranks each, the last one two.

    >>> placement = Placement([[0, 1, 0, 2, 0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]], num_ranks=8)
    >>> slot_shares(placement, "rank")[0, [0, 2, 4, 1]].tolist()
    [0.375, 0.375, 0.25, 1.0]
    """
    replicas = np.take_along_axis(placement.num_replicas, placement.slot_to_expert, axis=1)
    if rule == "rank":
        return ranks_choosing(replicas, placement.replica_index, placement.num_ranks) / placement.num_ranks
    if rule in ("even", "token", "occurrence"):
        return 1.0 / replicas
    raise ConstraintError(
        "rule", repr(rule), 'must be "even", "rank", "token" or "occurrence"', "use slot_loads, which takes every rule"
    )


def slot_loads(load: npt.ArrayLike, placement: Placement, rule: str) -> FloatArray:
    """Tokens that each slot gets under a rule: load (L, E) or (T, L, E) -> float64 (L, S) or (T, L, S).

    Under "batch" every window counts as one batch with its own best split.

    Raises:
        ConstraintError: an unknown rule, or a load of another model.

    Expert 0 is on both ranks. Shared evenly, rank 0 has 4 tokens and rank 1 has 6; the best split gives each 5:

    >>> placement = Placement([[0, 1, 0, 2]], num_ranks=2)
    >>> slot_loads([[6, 1, 3]], placement, "even").tolist(), slot_loads([[6, 1, 3]], placement, "batch").tolist()
    ([[3.0, 1.0, 3.0, 3.0]], [[4.0, 1.0, 2.0, 3.0]])
    """
    tokens = as_load(load)
    if tokens.shape[-2:] != (placement.num_layers, placement.num_experts):
        raise ConstraintError(
            "load",
            f"an array of shape {tokens.shape}",
            f"must end in the placement's layers and experts, ({placement.num_layers}, {placement.num_experts})",
            "pass the load of the same model",
        )
    check_rule(rule)
    if rule == "batch":
        return SplitPlan(placement.slot_to_expert, placement.num_ranks, placement.num_experts).split_load(tokens)
    index = np.broadcast_to(placement.slot_to_expert, (*tokens.shape[:-1], placement.num_slots))
    return np.take_along_axis(tokens, index, axis=-1) * slot_shares(placement, rule)


def rank_loads(load: npt.ArrayLike, placement: Placement, rule: str) -> FloatArray:
    """Tokens that each rank computes under a rule: load (L, E) or (T, L, E) -> float64 (L, G) or (T, L, G).

    The load of a layer must be far from the ends of float64 (`metrics.within_range`).

    >>> rank_loads([[6, 1, 3]], Placement([[0, 1, 0, 2]], num_ranks=2), "batch").tolist()
    [[5.0, 5.0]]
    """
    per_slot = slot_loads(load, placement, rule)
    return per_slot.reshape(*per_slot.shape[:-1], placement.num_ranks, placement.slots_per_rank).sum(axis=-1)
