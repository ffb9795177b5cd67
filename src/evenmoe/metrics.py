"""Every number that evenmoe shows is computed here, once.

Shapes: T windows, L layers, E logical experts, S slots, G ranks. Loads are tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.placement import Placement

FloatArray = npt.NDArray[np.float64]


def as_load(load: npt.ArrayLike, name: str = "load") -> FloatArray:
    """`load` as float64 (L, E) or (T, L, E), checked: finite, not negative, no axis empty.

    Raises:
        ConstraintError: naming the first entry that breaks the rule.
    """
    values = np.asarray(load, dtype=np.float64)
    if values.ndim not in (2, 3) or values.size == 0:
        raise ConstraintError(
            name,
            f"an array of shape {values.shape}",
            "must be (layers, experts) or (windows, layers, experts), no axis empty",
            "pass tokens per expert, one row per layer",
        )
    wrong = ~np.isfinite(values) | (values < 0)
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ConstraintError(
            name,
            f"{values[index]} at {index}",
            "must hold token counts, finite and not negative",
            "check how the load was recorded",
        )
    return values


def rank_loads(load: npt.ArrayLike, placement: Placement) -> FloatArray:
    """Tokens each rank computes when every replica takes an even share of its expert.

    Args:
        load: tokens per logical expert, (L, E) or (T, L, E).
        placement: of the same L and E.

    Returns:
        float64 (L, G) or (T, L, G), tokens.

    >>> rank_loads([[6, 1, 1]], Placement([[0, 1, 0, 2]], num_ranks=2)).tolist()
    [[4.0, 4.0]]
    """
    tokens = as_load(load)
    if tokens.shape[-2:] != (placement.num_layers, placement.num_experts):
        raise ConstraintError(
            "load",
            f"an array of shape {tokens.shape}",
            f"must end in the placement's layers and experts, ({placement.num_layers}, {placement.num_experts})",
            "pass the load of the same model",
        )
    share = tokens / placement.num_replicas
    index = np.broadcast_to(placement.slot_to_expert, (*share.shape[:-1], placement.num_slots))
    per_slot = np.take_along_axis(share, index, axis=-1)
    return per_slot.reshape(*share.shape[:-1], placement.num_ranks, placement.slots_per_rank).sum(axis=-1)


def peak_to_average(load: npt.ArrayLike, placement: Placement) -> FloatArray:
    """Peak-to-average load (PAR): the busiest rank's tokens over the mean rank's; 1.0 is perfect.

    Every replica takes an even share of its expert. A layer without any load counts as 1.0.

    Args:
        load: tokens per logical expert, (L, E) or (T, L, E).
        placement: of the same L and E.

    Returns:
        float64 (L,), or (T, L) for windows.

    Rank 0 holds experts 0 and 1, so it computes 7 of 8 tokens where the mean is 4:

    >>> peak_to_average([[6, 1, 1, 0]], Placement([[0, 1, 2, 3]], num_ranks=2)).tolist()
    [1.75]
    """
    return peak_over_mean(rank_loads(load, placement))


def peak_over_mean(loads: FloatArray) -> FloatArray:
    """Max over mean along the last axis; 1.0 where the mean is zero.

    >>> peak_over_mean(np.array([[7.0, 1.0], [0.0, 0.0]])).tolist()
    [1.75, 1.0]
    """
    mean = loads.mean(axis=-1)
    return np.divide(loads.max(axis=-1), mean, out=np.ones_like(mean), where=mean > 0)


def count_copies(previous: Placement, placement: Placement) -> npt.NDArray[np.int64]:
    """Experts that must be moved to get from one placement to the next: slots whose expert was not on that rank.

    Args:
        previous: the placement in use.
        placement: the one to move to, of the same layers, slots, ranks and experts.

    Returns:
        int64 (L,), copies per layer. An expert that changes its slot within a rank is not a copy.

    Expert 2 is new on rank 0 and expert 1 on rank 1; expert 0 only changes its slot:

    >>> count_copies(Placement([[0, 1, 0, 2]], 2), Placement([[2, 1, 1, 0]], 2)).tolist()
    [2]
    """
    for name in ("num_layers", "num_experts", "num_ranks"):
        if getattr(previous, name) != getattr(placement, name):
            raise ConstraintError(
                "placement",
                f"one with {name} {getattr(placement, name)}",
                f"must have the {name} of the previous placement, {getattr(previous, name)}",
                "compare placements of one model on one world",
            )
    layers = placement.num_layers
    held = np.zeros((layers, placement.num_ranks, placement.num_experts), bool)
    rows = np.arange(layers)[:, None]
    held[rows, np.arange(previous.num_slots) // previous.slots_per_rank, previous.slot_to_expert] = True
    present = held[rows, np.arange(placement.num_slots) // placement.slots_per_rank, placement.slot_to_expert]
    return (~present).sum(axis=1)
