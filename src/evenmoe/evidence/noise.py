"""How uneven ranks look when they are not: the PAR that sampling alone makes of a balanced router."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.evidence.paired import LEVEL

FloatArray = npt.NDArray[np.float64]

_NUMBERS_DRAWN = 1 << 17  # for one size: the mean PAR is then within 2 % of its distance from 1 for up to 64 ranks
_FEWEST, _MOST = 200, 4096  # draws of one size
_EXACT = 16  # sizes up to which each has draws of its own; above there are four to an octave
_LARGEST = 1 << 50  # beyond, the distance from 1 falls as the square root, to 1 part in 10^7


@dataclass(frozen=True)
class Unevenness:
    """A measured PAR beside what a balanced router would show on as many assignments.

    Attributes:
        par: the measured one, mean of windows and layers.
        total_par: the measured one of all windows together, mean of layers.
        limit, total_limit: what a balanced router exceeds in either with half the level.
        assignments: of all windows, of a layer with any, on average.
    """

    par: float
    total_par: float
    limit: float
    total_limit: float
    assignments: float

    @property
    def is_uneven(self) -> bool:
        """Whether sampling noise of a balanced router is ruled out at the level."""
        return self.par > self.limit or self.total_par > self.total_limit


def unevenness(loads: npt.ArrayLike, *, variance: float = 1.0, level: float = LEVEL) -> Unevenness:
    """Compare the PAR of rank loads with that of a router which sends every assignment to any rank alike.

    A token's K experts differ, so that real balanced routers vary a little less than these draws: the test errs towards
    calling a load even.

    Args:
        loads: assignments of every rank, (T, L, G). Windows in which a layer has none do not count for it.
        variance: how many times more the counts vary than independent assignments do; 1 where nothing is known.
        level: chance at which a balanced router is called uneven.

    Raises:
        ConstraintError: loads of another shape.

    Sixty assignments that spread 40 : 20 over two ranks might be an accident, six thousand are none:

    >>> few, many = unevenness([[[40, 20]]]), unevenness([[[4000, 2000]]])
    >>> round(few.par, 3), few.is_uneven, many.is_uneven
    (1.333, False, True)
    """
    ranks = np.asarray(loads, np.float64)
    if ranks.ndim != 3 or not ranks.size:
        rule = "must be (windows, layers, ranks), no axis empty"
        raise ConstraintError("loads", f"an array of shape {ranks.shape}", rule, "pass the load of every rank")
    total = ranks.sum(axis=0, keepdims=True)
    par, limit = _measured_and_limit(ranks, variance, level / 2)
    total_par, total_limit = _measured_and_limit(total, variance, level / 2)
    sizes = total.sum(axis=-1)
    assignments = float(sizes[sizes > 0].mean()) if sizes.any() else 0.0
    return Unevenness(par, total_par, limit, total_limit, assignments)


def _measured_and_limit(loads: FloatArray, variance: float, level: float) -> tuple[float, float]:
    """The weighted mean PAR of (T, L, G), and what that of a balanced router exceeds with probability `level`."""
    sizes = loads.sum(axis=-1)
    seen = sizes > 0
    if not seen.any():
        return 1.0, math.inf
    per_layer = seen.sum(axis=0)
    weights = seen / np.maximum(per_layer, 1) / np.count_nonzero(per_layer)
    weights = weights[seen]
    par = float((weights * (loads.max(axis=-1)[seen] * loads.shape[-1] / sizes[seen])).sum())
    mean, deviation, skewness, error = balanced_par(sizes[seen] / variance, loads.shape[-1])
    spread = math.sqrt(float(((weights * deviation) ** 2).sum()))
    third = float((skewness * (weights * deviation) ** 3).sum())
    if not spread:
        return par, float((weights * mean).sum())
    z = NormalDist().inv_cdf(1 - level)
    # Cornish and Fisher: the largest of G is skewed to the right, and a mean of few of them still is.
    reach = (z + (z * z - 1) / 6 * third / spread**3) * spread
    return par, float((weights * mean).sum()) + math.hypot(reach, z * float((weights * error).sum()))


def balanced_par(assignments: npt.ArrayLike, num_ranks: int) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Mean, standard deviation and skewness of a balanced router's PAR, and the standard error of that mean.

    By draws with a fixed seed at four sizes to an octave, between which the distance from 1, times the square root of
    the size, is interpolated.

    Args:
        assignments: N sizes, float64, of any shape; those below 1 count as 1.
        num_ranks: G.

    Returns:
        Four float64 arrays of that shape.

    One assignment is all on one rank; of a million, the busiest of eight ranks has 0.4 % more than its share:

    >>> [round(float(balanced_par(size, 8)[0]), 4) for size in (1, 1_000_000)]
    [8.0, 1.004]
    """
    sizes = np.clip(np.asarray(assignments, np.float64), 1, None)
    inside = np.minimum(sizes, _LARGEST)
    grid = np.where(inside <= _EXACT, inside, 4 * np.log2(inside / _EXACT) + _EXACT)
    below = np.floor(grid).astype(np.int64)
    part = grid - below
    found = np.empty((4, 2, *sizes.shape))
    for number in np.unique(below):
        for side in (0, 1):
            found[:, side][:, below == number] = np.array(_drawn(int(number) + side, num_ranks))[:, None]
    scaled = found[:, 0] * (1 - part) + found[:, 1] * part
    root = np.sqrt(num_ranks / sizes)
    return 1 + scaled[0] * root, scaled[1] * root, scaled[2], scaled[3] * root


@lru_cache(maxsize=4096)
def _drawn(number: int, num_ranks: int) -> tuple[float, float, float, float]:
    """Of (PAR − 1) × √(N / G) at point `number` of the grid: mean, deviation, skewness, standard error of the mean."""
    size = number if number <= _EXACT else round(_EXACT * 2 ** ((number - _EXACT) / 4))
    draws = int(np.clip(_NUMBERS_DRAWN // num_ranks, _FEWEST, _MOST))
    random = np.random.default_rng((num_ranks, number))
    counts = random.multinomial(size, np.full(num_ranks, 1 / num_ranks), size=draws)
    values = (counts.max(axis=1) * (num_ranks / size) - 1) * math.sqrt(size / num_ranks)
    deviation = float(values.std())
    skewness = float((((values - values.mean()) / deviation) ** 3).mean()) if deviation else 0.0
    return float(values.mean()), deviation, skewness, deviation / math.sqrt(draws)
