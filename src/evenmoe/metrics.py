"""Every number that evenmoe shows is computed here, once.

Shapes: T windows, L layers, E logical experts, S slots, G ranks. Loads are tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.placement import Placement

FloatArray = npt.NDArray[np.float64]

# The square of 2^500 is still far enough from the end of float64, 2^1024, for a million of them to be added.
_FARTHEST = 500


def as_load(load: npt.ArrayLike, name: str = "load") -> FloatArray:
    """`load` as float64 (L, E) or (T, L, E), checked: finite, not negative, no axis empty.

    Any real numbers are taken: lists, arrays, and tensors of every device and type, with gradients or without.

    Raises:
        ConstraintError: no array of numbers; or it names the first entry that breaks the rule.

    >>> as_load([[6, 1, 1]]).tolist()
    [[6.0, 1.0, 1.0]]
    """
    values = _as_numbers(load, name)
    if values.ndim not in (2, 3) or values.size == 0:
        raise ConstraintError(
            name,
            f"an array of shape {values.shape}",
            "must be (layers, experts) or (windows, layers, experts), no axis empty",
            "pass tokens per expert, one row per layer",
        )
    check_counts(values, name, "check how the load was recorded")
    return values


def check_counts(values: np.ndarray, name: str, fix: str) -> None:
    """Raise a ConstraintError that names the first number that is no token count: not finite, or negative."""
    wrong = ~np.isfinite(values) | (values < 0)
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        rule = "must hold token counts, finite and not negative"
        raise ConstraintError(name, f"{values[index]} at {index}", rule, fix)


def as_array(values: object) -> np.ndarray:
    """`values` as numpy holds them; a torch tensor is detached and brought to the CPU, bfloat16 and float8 as float64.

    Raises what numpy or torch raise where that is not possible.
    """
    if isinstance(values, list | tuple) and values and hasattr(values[0], "detach"):
        return np.stack([as_array(value) for value in values])
    if not hasattr(values, "detach"):  # no torch tensor; torch is not imported here
        return np.asarray(values)
    tensor: Any = values.detach().cpu()  # pyright: ignore[reportAttributeAccessIssue]
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def _as_numbers(load: object, name: str) -> FloatArray:
    rule, fix = "must be an array of real numbers, rows of one length", "pass tokens per expert, one row per layer"
    try:
        array = as_array(load)
        if array.dtype.kind == "O":  # Python's own big integers
            array = np.asarray(load, np.float64)
    except Exception as error:  # what torch and numpy raise for what has no numbers: five types at least
        reason = " ".join(str(error).split())[:80]
        raise ConstraintError(name, f"a {type(load).__name__} that is no such array ({reason})", rule, fix) from None
    if array.dtype.kind not in "biuf":
        raise ConstraintError(name, f"an array of dtype {array.dtype}", rule, fix)
    with np.errstate(over="ignore"):  # a longdouble beyond float64 becomes infinite, and is found as such
        return array.astype(np.float64, copy=False)


def within_range(load: FloatArray) -> FloatArray:
    """The load (L, E) or (T, L, E) with layers near the ends of float64 moved inwards, so that nothing overflows.

    A layer whose largest load is beyond 2^±500 is multiplied by a power of two, which leaves every ratio as it is;
    other layers stay as they are.

    >>> within_range(np.array([[6.0, 3.0], [2.0**1000, 2.0**999]])).tolist() == [[6.0, 3.0], [2.0**499, 2.0**498]]
    True
    """
    largest = load.max(axis=tuple(axis for axis in range(load.ndim) if axis != load.ndim - 2), keepdims=True)
    exponent = np.frexp(largest)[1]
    shift = np.clip(exponent, -_FARTHEST, _FARTHEST) - exponent
    return np.ldexp(load, shift) if shift.any() else load


def mean_over_windows(values: FloatArray, load: FloatArray) -> FloatArray:
    """The mean (L,) of a figure (T, L) over the windows in which the layer had any load (T, L, E).

    A window without tokens in a layer says nothing about it; a layer without any in all windows gets the plain mean.

    >>> mean_over_windows(np.array([[2.0], [1.0]]), np.array([[[6.0, 2.0]], [[0.0, 0.0]]])).tolist()
    [2.0]
    """
    seen = load.any(axis=-1)
    seen |= ~seen.any(axis=0)
    return (values * seen).sum(axis=0) / seen.sum(axis=0)


def even_rank_loads(load: npt.ArrayLike, placement: Placement) -> FloatArray:
    """Tokens each rank computes when every replica takes an even share of its expert.

    Args:
        load: tokens per logical expert, (L, E) or (T, L, E).
        placement: of the same L and E.

    Returns:
        float64 (L, G) or (T, L, G), tokens.

    Raises:
        ConstraintError: a load of another model, or of more tokens on a rank than float64 can hold.

    >>> even_rank_loads([[6, 1, 1]], Placement([[0, 1, 0, 2]], num_ranks=2)).tolist()
    [[4.0, 4.0]]
    """
    with np.errstate(over="ignore"):
        loads = _shared_evenly(as_load_of(load, placement), placement)
    if not np.isfinite(loads).all():
        raise ConstraintError(
            "load",
            "of more tokens on one rank than the largest float64, 1.8e308",
            "must be small enough to be added up",
            "divide it by its largest entry",
        )
    return loads


def peak_to_average(load: npt.ArrayLike, placement: Placement) -> FloatArray:
    """Peak-to-average load (PAR): the busiest rank's tokens over the mean rank's; 1.0 is perfect.

    Every replica takes an even share of its expert, and ranks without a slot are left out of the mean. A layer without
    any load counts as 1.0; `mean_over_windows` leaves such windows out of a mean.

    Args:
        load: tokens per logical expert, (L, E) or (T, L, E).
        placement: of the same L and E.

    Returns:
        float64 (L,), or (T, L) for windows.

    Raises:
        ConstraintError: a load that is no array of token counts, or of another model.

    Rank 0 holds experts 0 and 1, so it computes 7 of 8 tokens where the mean is 4:

    >>> peak_to_average([[6, 1, 1, 0]], Placement([[0, 1, 2, 3]], num_ranks=2)).tolist()
    [1.75]
    """
    tokens = as_load_of(load, placement)
    tokens = within_range(tokens.reshape(-1, tokens.shape[-1])).reshape(tokens.shape)
    return peak_over_mean(of_holders(_shared_evenly(tokens, placement), placement))


def of_holders(loads: FloatArray, placement: Placement) -> FloatArray:
    """The loads (…, G) of the ranks that have a slot; where all have one, as they are.

    A rank that holds no expert computes nothing under any plan, so it is no part of the mean that a plan is measured
    by.

    >>> of_holders(np.array([[4.0, 0.0, 4.0]]), Placement([[0, 1]], 3, rank_sizes=[1, 0, 1])).tolist()
    [[4.0, 4.0]]
    """
    sizes = placement.rank_sizes
    return loads if min(sizes) else loads[..., np.flatnonzero(sizes)]


def as_load_of(load: npt.ArrayLike, placement: Placement) -> FloatArray:
    """`as_load`, and of the placement's layers and experts; a ConstraintError otherwise."""
    tokens = as_load(load)
    if tokens.shape[-2:] != (placement.num_layers, placement.num_experts):
        raise ConstraintError(
            "load",
            f"an array of shape {tokens.shape}",
            f"must end in the placement's layers and experts, ({placement.num_layers}, {placement.num_experts})",
            "pass the load of the same model",
        )
    return tokens


def _shared_evenly(tokens: FloatArray, placement: Placement) -> FloatArray:
    return sum_by_rank(tokens / placement.num_replicas, placement.slot_to_expert, placement.rank_sizes)


def sum_by_rank(share: FloatArray, slots: npt.NDArray[np.integer], rank_sizes: Sequence[int]) -> FloatArray:
    """Tokens of each rank, (…, L, G), where every slot (L, S) of an expert gets its `share` (…, L, E).

    >>> sum_by_rank(np.array([[3.0, 1.0, 1.0]]), np.array([[0, 1, 0, 2]]), (2, 2)).tolist()
    [[4.0, 4.0]]
    """
    per_slot = np.take_along_axis(share, np.broadcast_to(slots, (*share.shape[:-1], slots.shape[1])), axis=-1)
    return slots_by_rank(per_slot, rank_sizes)


def slots_by_rank(per_slot: FloatArray, rank_sizes: Sequence[int]) -> FloatArray:
    """Sums over the slots of each rank: (…, S) -> (…, G).

    >>> slots_by_rank(np.array([1.0, 2.0, 4.0]), (2, 0, 1)).tolist()
    [3.0, 0.0, 4.0]
    """
    if min(rank_sizes) == max(rank_sizes):
        return per_slot.reshape(*per_slot.shape[:-1], len(rank_sizes), -1).sum(axis=-1)
    parts = np.split(per_slot, np.cumsum(rank_sizes)[:-1], axis=-1)
    return np.stack([part.sum(axis=-1) for part in parts], axis=-1)


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
        placement: the one to move to, of the same layers and experts. Ranks and slots may be others: rank r is the same
            rank in both, a rank that only `placement` has held nothing, and one that only `previous` has is left out.

    Returns:
        int64 (L,), copies per layer. An expert that changes its slot within a rank is not a copy.

    Expert 2 is new on rank 0 and expert 1 on rank 1; expert 0 only changes its slot:

    >>> count_copies(Placement([[0, 1, 0, 2]], 2), Placement([[2, 1, 1, 0]], 2)).tolist()
    [2]

    A third rank joins, and receives both of its experts:

    >>> count_copies(Placement([[0, 1, 2, 3]], 2), Placement([[0, 1, 2, 3, 0, 2]], 3)).tolist()
    [2]
    """
    check_same_model(previous, placement)
    return arrivals(held_on(previous, placement.num_ranks), placement).sum(axis=1)


def check_same_model(previous: Placement, placement: Placement) -> None:
    """Raise a ConstraintError unless the placements have the same layers and experts."""
    for name in ("num_layers", "num_experts"):
        if getattr(previous, name) != getattr(placement, name):
            raise ConstraintError(
                "placement",
                f"one with {name} {getattr(placement, name)}",
                f"must have the {name} of the previous placement, {getattr(previous, name)}",
                "compare placements of one model",
            )


def arrivals(held: npt.NDArray[np.bool_], placement: Placement) -> npt.NDArray[np.bool_]:
    """Which slots get an expert that their rank does not have among those that it `held` (L, G, E); bool (L, S)."""
    return ~held[np.arange(placement.num_layers)[:, None], placement.slot_to_rank, placement.slot_to_expert]


def held_on(placement: Placement, num_ranks: int) -> npt.NDArray[np.bool_]:
    """Which experts the first `num_ranks` ranks hold, bool (L, num_ranks, E); ranks that it does not have hold none."""
    held = placement.held[:, :num_ranks]
    more = num_ranks - held.shape[1]
    return np.pad(held, ((0, 0), (0, more), (0, 0))) if more else held


def count_arrivals(held: npt.NDArray[np.bool_], slots: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Arrivals among slots (L, S) that the ranks share evenly: int64 (L,), of `held` (L, G, E)."""
    num_layers, num_ranks, _ = held.shape
    ranks = np.arange(slots.shape[1]) * num_ranks // slots.shape[1]
    return (~held[np.arange(num_layers)[:, None], ranks, slots]).sum(axis=1)
