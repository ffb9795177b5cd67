"""Is `after` less than `before`, beyond what their differences leave open? Paired, in blocks, by Student's t."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError

#: Chance at which a gain is claimed that is none.
LEVEL = 0.01

#: Neighbors are alike, so runs of them are averaged to so many blocks before they count as independent: twelve leave
#: the quantile at 2.72 where the normal one is 2.33, and each is as long as the recording allows.
MOST_BLOCKS = 12


@dataclass(frozen=True)
class PairedGain:
    """A relative gain, and how sure it is.

    Attributes:
        percent: 100 × (1 − mean of after ÷ mean of before); 0 where the latter is 0.
        lower, upper: one-sided limits of `percent`, each at the level of the test; infinite with fewer than two blocks.
        blocks: independent differences that entered.
        level: chance at which `lower` is above a true gain.
    """

    percent: float
    lower: float
    upper: float
    blocks: int
    level: float

    @property
    def is_significant(self) -> bool:
        """Whether the gain is above 0 at its level."""
        return self.lower > 0


def paired_gain(
    before: npt.ArrayLike, after: npt.ArrayLike, *, comparisons: int = 1, variance: float = 1.0, level: float = LEVEL
) -> PairedGain:
    """The gain from `before` to `after`, which were measured in the same windows, steps or layers.

    Args:
        before, after: (N,), finite and not negative, in the order of time.
        comparisons: of how many candidates this one was chosen by the same numbers; the level is divided by it
            (Bonferroni).
        variance: how many times more the differences vary than their spread here shows.
        level: chance at which a gain is called significant that is none.

    Returns:
        The gain in per cent, with one-sided limits by Student's t on the means of at most 12 blocks of neighbors.

    Raises:
        ConstraintError: arrays of different or no length.

    >>> found = paired_gain([2.0, 2.2, 1.8, 2.0], [1.5, 1.8, 1.3, 1.6])
    >>> round(found.percent, 1), round(found.lower, 1), found.is_significant
    (22.5, 15.9, True)
    >>> paired_gain([2.0, 1.0], [1.0, 1.9]).is_significant
    False
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ConstraintError(
            "after", f"an array of shape {second.shape}", f"must pair with `before`, {first.shape}, and not be empty",
            "measure both in the same windows",
        )  # fmt: skip
    level = level / comparisons
    scale = float(first.mean())
    differences = block_means(first - second)
    blocks = len(differences)
    percent = 100 * float((first - second).mean()) / scale if scale else 0.0
    if blocks < 2:
        return PairedGain(percent, -math.inf, math.inf, blocks, level)
    error = math.sqrt(variance) * float(differences.std(ddof=1)) / math.sqrt(blocks)
    reach = 100 * t_quantile(1 - level, blocks - 1) * error / scale if scale else 0.0
    return PairedGain(percent, percent - reach, percent + reach, blocks, level)


def block_means(values: npt.NDArray[np.float64], most: int = MOST_BLOCKS) -> npt.NDArray[np.float64]:
    """Means of at most `most` runs of neighbors, which differ in length by one at most.

    >>> block_means(np.arange(6.0), most=3).tolist()
    [0.5, 2.5, 4.5]
    """
    if len(values) <= most:
        return values
    edges = np.arange(most + 1) * len(values) // most
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t with so many whole degrees of freedom exceeds with 1 − `probability`.

    Found by bisection of the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4, within 1e-9; more than 10,000
    degrees count as 10,000, which is 0.0004 too much at 0.99.

    >>> [round(t_quantile(0.99, degrees), 3) for degrees in (1, 2, 11, 100_000)]
    [31.821, 6.965, 2.718, 2.327]
    """
    if not 0.5 <= probability < 1:
        raise ConstraintError("probability", probability, "must be from 0.5 up to 1, 1 left out", "pass 0.99 for 1 %")
    if degrees < 1:
        raise ConstraintError("degrees", degrees, "must be at least 1", "two values leave one degree of freedom")
    degrees = min(degrees, 10_000)
    low, high = 0.0, 1.0
    while _within(high, degrees) < 2 * probability - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 2 * probability - 1 else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """The chance of |T| < t."""
    angle = math.atan2(t, math.sqrt(degrees))
    square = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for number in range(2 + odd, degrees - 1, 2):
        term *= square * (number - 1) / number
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
