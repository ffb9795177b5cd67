"""The plan from windows: small peaks in the loads to come, not in the ones seen."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray, peak_to_average
from evenmoe.placement import IntArray, Placement
from evenmoe.planner._soft_peak import new_layer, search
from evenmoe.planner.static import plan_static

# Random changes a layer: EFFORT / (windows × slots^1.5), so that 24 layers of 40 windows and 40 slots take 2 s and 58
# layers of 32 windows and 288 slots 7 s. Of the distance between the held-out peaks of no change at all and of four
# times as many, this number covers nine tenths on measured topics (gpt-oss-20b, 40 slots).
EFFORT = 10_000_000
# Cross-validation makes each of its plans with a twentieth of that, and looks at this many layers and folds.
TRIAL, LAYERS, FOLDS = 20, 12, 5
# exp(700) is the end of float64.
HOTTEST = 600.0


class Strength(NamedTuple):
    """How strongly a plan is kept from fitting the windows that it was made from.

    sharpness: of the soft peak, per mean rank load: at 0 all ranks of all windows count alike, at infinity only the
        busiest of each window does.
    independence: the part of every expert's variance that is taken for its own. Experts that rose and fell together
        by chance look like a risk, and opposite ones like a hedge; at 0 that is believed, at 1 nothing of it.
    """

    sharpness: float
    independence: float


# What to use unless the history clearly shows another to be better, and what to try. On gpt-oss-20b,
# DeepSeek-V2-Lite and
# Mixtral-8x7B topics and on synthetic factors, 2 to 60 windows, held-out peaks hardly change from sharpness 1.5 to 5
# and
# independence 0 to 0.5; sharpness 24 costs 2-6 % and independence 1 costs 10 % there. Loads that vary independently
# gain 1-2 % from independence 1.
USUAL = Strength(3.0, 0.2)
INDEPENDENCES = (0.6, 1.0)
SHARPNESSES = (1.5, 8.0)
# Standard errors by which another strength must win: the best of several noisy figures looks better than it is.
MARGIN = 2.0
# Below, a fold would be planned from two windows, of which any two experts look perfectly linked.
FEWEST = 4


def plan_windows(load: FloatArray, num_ranks: int, num_slots: int, seed: int = 0) -> IntArray:
    """The slots of a placement for the next window, planned from past ones, every replica taking an even share.

    Every window counts the same, whatever its total: the aim is the mean over windows of the peak-to-average load. A
    search for the smallest such mean overfits; this one smooths it and shrinks the correlations between experts, with a
    strength chosen by cross-validation over blocks of windows (`choose_strength`). A layer with one window, or of
    windows that are equal up to a factor, gets the static plan.

    Args:
        load: tokens float64 (T, L, E); a window without load in a layer says nothing about it.
        num_ranks: G.
        num_slots: S, at least E and a multiple of G.
        seed: of the random choices, 0 or more.

    Returns:
        int32 (L, S), the expert of each slot.

    Experts 0 and 1 are busy together, and so are 2 and 3. All four are equal on average, but only ranks that take one
    of each pair stay level:

    >>> slots = plan_windows(np.array([[[8.0, 8, 2, 2]], [[2, 2, 8, 8]]] * 2), num_ranks=2, num_slots=4)
    >>> [sorted(rank) for rank in (slots.reshape(2, 2) // 2).tolist()]
    [[0, 1], [0, 1]]
    """
    if len(load) == 1 or num_slots // num_ranks >= load.shape[2]:
        return plan_static(load[0], num_ranks, num_slots, seed)
    history = History(load, num_ranks)
    strength = choose_strength(history, num_slots, seed)
    effort = _tries(len(load), num_slots)
    return plan_history(history, num_slots, strength, effort, seed).astype(np.int32)


class History:
    """Windows in units of the mean rank load, and the layers in which they differ."""

    def __init__(self, load: FloatArray, num_ranks: int) -> None:
        total = load.sum(axis=2, keepdims=True)
        self.num_ranks = num_ranks
        self.seen = total[:, :, 0] > 0
        self.windows = np.divide(load * num_ranks, total, out=np.zeros_like(load), where=total > 0)

    def layer(self, layer: int) -> FloatArray:
        """(T', E): the windows in which `layer` had any load."""
        return self.windows[self.seen[:, layer], layer]

    def part(self, windows: npt.NDArray[np.bool_], layers: npt.NDArray[np.int64]) -> History:
        """The history of `windows` (T,) and `layers` alone."""
        return History(self.windows[windows][:, layers], self.num_ranks)


def plan_history(history: History, num_slots: int, strength: Strength, tries: int, seed: int) -> npt.NDArray[np.int64]:
    """Slots int64 (L, S) by local search from the static plan for every expert's mean load + standard deviation."""
    num_layers, num_experts = history.windows.shape[1:]
    mean, variance = np.zeros((num_layers, num_experts)), np.zeros((num_layers, num_experts))
    for layer in range(num_layers):
        windows = history.layer(layer)
        if len(windows):
            mean[layer] = windows.mean(axis=0)
        if len(windows) > 1:
            variance[layer] = windows.var(axis=0, ddof=1)
    # Windows that differ by rounding alone are one window.
    variance[variance.sum(axis=1) < 1e-20] = 0.0
    slots = plan_static(mean + np.sqrt(variance), history.num_ranks, num_slots, seed).astype(np.int64)
    for layer in np.flatnonzero(variance.any(axis=1)).tolist():
        noise = strength.independence * variance[layer]
        windows = mean[layer] + np.sqrt(1 - strength.independence) * (history.layer(layer) - mean[layer])
        if strength.independence == 1:
            windows = windows[:1]  # they are all the mean
        sharpness = _finite(windows, noise, strength.sharpness, num_slots // history.num_ranks)
        random = np.array([(seed * 0x9E3779B97F4A7C15 + layer * 0x2545F4914F6CDD1D + 1) % 2**64 or 1], np.uint64)
        search(new_layer(windows, noise, history.num_ranks, num_slots), sharpness, tries, random, slots[layer])
    return slots


def choose_strength(history: History, num_slots: int, seed: int = 0) -> Strength:
    """The strength whose plans did best on windows that they were not made from.

    Blocks of consecutive windows are held out in turn, since neighbours in time are alike. A strength replaces the
    usual one if its mean held-out peak, over at most twelve layers, is lower by two standard errors of the difference
    over windows.
    """
    num_windows = len(history.windows)
    if num_windows < FEWEST:
        return USUAL
    layers = np.unique(np.linspace(0, history.windows.shape[1] - 1, LAYERS).round().astype(np.int64))
    fold = np.arange(num_windows) * FOLDS // num_windows if num_windows > FOLDS else np.arange(num_windows)
    tries = _tries(num_windows, num_slots) // TRIAL

    def held_out(strength: Strength) -> FloatArray:
        peaks = np.empty((num_windows, layers.size))
        for block in range(fold[-1] + 1):
            past, rest = history.part(fold != block, layers), history.part(fold == block, layers)
            slots = plan_history(past, num_slots, strength, tries, seed)
            placement = Placement(slots, history.num_ranks, num_experts=history.windows.shape[2])
            peaks[fold == block] = peak_to_average(rest.windows, placement)
        return peaks.mean(axis=1)

    best, least = USUAL, held_out(USUAL)
    for field, values in (("independence", INDEPENDENCES), ("sharpness", SHARPNESSES)):
        for value in values:
            candidate = best._replace(**{field: value})
            peaks = held_out(candidate)
            gain = least - peaks
            if gain.mean() > MARGIN * gain.std(ddof=1) / np.sqrt(num_windows):
                best, least = candidate, peaks
    return best


def _tries(num_windows: int, num_slots: int) -> int:
    return int(EFFORT / (num_windows * num_slots**1.5))


def _finite(windows: FloatArray, noise: FloatArray, sharpness: float, width: int) -> float:
    """The given sharpness, halved until no choice of `width` experts is too hot for a rank."""
    while True:
        power = sharpness * windows + 0.5 * sharpness**2 * noise
        if np.partition(power, -width, axis=1)[:, -width:].sum(axis=1).max() < HOTTEST:
            return sharpness
        sharpness /= 2
