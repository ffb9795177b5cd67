"""Gain, no gain, or too little to judge: one rule for all that claim something."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from evenmoe.evidence.hold_out import FEWEST_LAYERS, FEWEST_WINDOWS
from evenmoe.evidence.noise import Unevenness
from evenmoe.evidence.paired import PairedGain, paired_gain
from evenmoe.metrics import peak_over_mean

#: A gain of so many per cent is worth a longer recording; a smaller one that could not be shown is called none.
WORTH_PERCENT = 2.0

Kind = Literal["gain", "no gain", "too little to judge"]
Reason = Literal[
    "", "already balanced", "nothing moves", "does not last", "sampling noise", "too few windows", "varies too much"
]


@dataclass(frozen=True)
class Verdict:
    """What the evidence allows to be said.

    Attributes:
        kind: "gain" where a balanced router is ruled out *and* the paired gain is above 0, each at its level.
            Otherwise "no gain" where a gain of 2 % would have been seen, else "too little to judge".
        reason: why there is none, "" for a gain: "already balanced" (a balanced router looks like this), "nothing
            moves" (not a single difference), "does not last" (what was learned from the first part does not help in the
            second); "sampling noise", "too few windows", "varies too much" (what hides a gain of 2 %).
        gain: the paired gain.
        unevenness: of what is in use, beside a balanced router.
        more: how many times the recording must be, to show a gain of 2 % or the one measured; 1 where it is enough.
    """

    kind: Kind
    reason: Reason
    gain: PairedGain
    unevenness: Unevenness
    more: float = 1.0

    @property
    def more_assignments(self) -> float:
        """Assignments per layer to record beside those that there are."""
        return (self.more - 1) * self.unevenness.assignments


def judge(gain: PairedGain, uneven: Unevenness) -> Verdict:
    """Say what a paired gain on data that was not planned on, and the unevenness before, come to.

    >>> from evenmoe.evidence import unevenness
    >>> skewed, balanced = unevenness([[[400, 200]]] * 8), unevenness([[[20_001, 19_999]]] * 8)
    >>> less = paired_gain([1.3, 1.4, 1.3], [1.1, 1.2, 1.1])
    >>> judge(less, skewed).kind, judge(less, balanced).kind, judge(less, unevenness([[[4, 2]]])).kind
    ('gain', 'no gain', 'too little to judge')
    """
    if not uneven.is_uneven:
        reach = 100 * (uneven.total_limit - 1)
        if reach <= WORTH_PERCENT:
            return Verdict("no gain", "already balanced", gain, uneven)
        # Noise falls as the square root of the size.
        return Verdict("too little to judge", "sampling noise", gain, uneven, (reach / WORTH_PERCENT) ** 2)
    if gain.is_significant:
        return Verdict("gain", "", gain, uneven)
    if gain.lower == gain.upper == 0:
        return Verdict("no gain", "nothing moves", gain, uneven)
    if gain.upper < WORTH_PERCENT:
        return Verdict("no gain", "does not last", gain, uneven)
    if not math.isfinite(gain.upper):
        return Verdict("too little to judge", "too few windows", gain, uneven, 3.0 * FEWEST_WINDOWS)
    reach, shown = gain.upper - gain.percent, max(gain.percent, WORTH_PERCENT)
    return Verdict("too little to judge", "varies too much", gain, uneven, max(2.0, (reach / shown) ** 2))


def par_gain(before: npt.ArrayLike, after: npt.ArrayLike, *, comparisons: int = 1, variance: float = 1.0) -> PairedGain:
    """By how much the mean PAR of rank loads falls, over windows that were not planned on.

    Windows are compared, each the mean of its layers; with one or two windows, layers, each the mean of its windows.
    A layer without tokens in a window does not count there.

    Args:
        before, after: assignments of every rank, float64 (T, L, G), under either placement.
        comparisons, variance: as in `paired_gain`.

    >>> loads = np.array([[[3.0, 1.0]], [[5.0, 3.0]], [[2.0, 1.0]]])
    >>> round(par_gain(loads, np.full((3, 1, 2), 2.0)).percent, 1)
    26.5
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    seen: npt.NDArray[np.bool_] = np.asarray(first.any(axis=-1))
    windows, layers = int(np.any(seen, axis=1).sum()), int(np.any(seen, axis=0).sum())
    if not windows:
        return PairedGain(0.0, -math.inf, math.inf, 0, 0.01 / comparisons)
    axis = 0 if windows < FEWEST_WINDOWS and layers >= FEWEST_LAYERS else 1
    kept = np.any(seen, axis=axis)
    pairs = [
        ((peak_over_mean(loads) * seen).sum(axis=axis)[kept] / seen.sum(axis=axis)[kept]) for loads in (first, second)
    ]
    return paired_gain(*pairs, comparisons=comparisons, variance=variance)


def centered_on(gain: PairedGain, percent: float) -> PairedGain:
    """The same limits around another estimate: that of whole windows, where only parts of them could be compared.

    >>> centered_on(PairedGain(8.0, 5.0, 11.0, 8, 0.01), 10.0)
    PairedGain(percent=10.0, lower=7.0, upper=13.0, blocks=8, level=0.01)
    """
    shift = percent - gain.percent
    return replace(gain, percent=percent, lower=gain.lower + shift, upper=gain.upper + shift)
