"""Fewer numbers than a picture has pixels: neighbours are drawn as one, extremes stay."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from evenmoe.report.axes import Axis

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Buckets:
    """`size` items cut into `count` runs of neighbours, all but the last of `width` items.

    >>> Buckets.of(10, 4)
    Buckets(size=10, width=3)
    >>> Buckets.of(10, 4).count
    4
    """

    size: int
    width: int

    @classmethod
    def of(cls, size: int, at_most: int) -> Buckets:
        """Runs as narrow as they can be for at most `at_most` of them."""
        return cls(size, max(1, -(-size // at_most)))

    @property
    def count(self) -> int:
        return -(-self.size // self.width)

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        return np.arange(0, self.size, self.width)

    @property
    def middles(self) -> FloatArray:
        """The middle of every run, where item i lies from i to i + 1."""
        return (self.starts + np.minimum(self.starts + self.width, self.size)) / 2

    def mean(self, values: FloatArray) -> FloatArray:
        """Mean of every run along the first axis."""
        lengths = np.diff(np.append(self.starts, self.size))
        return np.add.reduceat(values, self.starts) / lengths

    def highest(self, values: FloatArray, axis: int = 0) -> FloatArray:
        """Maximum of every run along `axis`."""
        return np.maximum.reduceat(values, self.starts, axis=axis)

    def lowest(self, values: FloatArray) -> FloatArray:
        """Minimum of every run along the first axis."""
        return np.minimum.reduceat(values, self.starts)

    def spread(self, axis: Axis) -> Axis:
        """An axis over the items that ends where the last run would end if it were full."""
        return replace(axis, high=float(self.count * self.width))
