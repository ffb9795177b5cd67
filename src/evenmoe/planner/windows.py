"""Plans from windows for the loads to come, every replica taking an even share of its expert's load."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray
from evenmoe.planner.kernels.soft_peak import SoftPeak, search
from evenmoe.planner.slots import Padding, even_par, named, random_state, take
from evenmoe.planner.static import plan_peaks, plan_static
from evenmoe.slot_arrays import IntArray

# Random changes a layer: at most BY_SLOTS / slots, 800 on 40 slots; at most EFFORT / (windows ×
# slots^1.5), so that hundreds of windows take no longer than tens; and no more after PATIENCE × slots of them in a row
# found nothing, which is what ends tiny layers. Measured on requests of gpt-oss-20b (35 windows, 40 slots), held out:
# 1.391 after 40 changes, 1.382 after 150, 1.377 after 300, 1.374 after 1,000. On 288 slots and synthetic factors, 300
# changes gain 0.4 % over 20.
BY_SLOTS, EFFORT, PATIENCE = 32_000, 5_000_000, 10
# Cross-validation makes each of its plans with a twentieth of that, and looks at this many layers and folds.
TRIAL, LAYERS, FOLDS = 20, 8, 5
# exp(700) is the end of float64.
LARGEST_POWER = 600.0


class Regularization(NamedTuple):
    """What keeps a plan from fitting the windows that it was made from.

    beta: the inverse temperature of the soft peak, per mean rank load: at 0 all ranks of all windows count alike, at
        infinity only the busiest of each window does.
    shrinkage: the weight with which the covariance of experts is shrunk to its diagonal. Experts that rose and fell
        together by chance look like a risk, and opposite ones like a hedge; at 0 that is believed, at 1 nothing of it.
    """

    beta: float
    shrinkage: float


# What to use unless the history clearly shows another to be better, and what to try. On requests of gpt-oss-20b, topics
# of Mixtral-8x7B, samples of DeepSeek-V2-Lite and synthetic factors, held-out peaks differ by less than 1 % from
# beta 1.5 to 3 and shrinkage 0 to 0.5. Beta 40 without shrinkage costs up to 3.4 %, and shrinkage 1
# costs 8 to 20 % where experts move together; where each moves for itself, 0.8 gains 1 %.
USUAL = Regularization(3.0, 0.2)
SHRINKAGES = (0.8, 1.0)
BETAS = (1.5, 8.0)
# Standard errors by which another must win: the best of several noisy figures looks better than it is.
MARGIN = 2.0
# Below, a fold would be planned from two windows, of which any two experts look perfectly linked.
FEWEST = 4


def plan_windows(
    load: FloatArray, num_ranks: int, num_slots: int, seed: int = 0, sizes: tuple[int, ...] | None = None
) -> IntArray:
    """The slots of a placement for the next window, planned from past ones, every replica taking an even share.

    Every window counts the same, whatever its total: the aim is the mean over windows of the peak-to-average load. A
    search for the smallest such mean overfits; this one smooths it and shrinks the correlations between experts, as
    strongly as cross-validation over blocks of windows says (`choose_regularization`). A layer with one window, or of
    windows that are equal up to a factor, gets the static plan.

    Args:
        load: tokens float64 (T, L, E); a window without load in a layer says nothing about it.
        num_ranks: G.
        num_slots: S, at least E and a multiple of G.
        seed: of the random choices, 0 or more.
        sizes: slots of each rank, 1 to E, where these differ; then S is their sum.

    Returns:
        int32 (L, S), the expert of each slot.

    Experts 0 and 1 are busy together, and so are 2 and 3. All four are equal on average, but only ranks that take one
    of each pair stay even:

    >>> slots = plan_windows(np.array([[[8.0, 8, 2, 2]], [[2, 2, 8, 8]]] * 2), num_ranks=2, num_slots=4)
    >>> [sorted(rank) for rank in (slots.reshape(2, 2) // 2).tolist()]
    [[0, 1], [0, 1]]
    """
    if len(load) == 1 or min(sizes or (num_slots // num_ranks,)) >= load.shape[2]:
        return plan_static(load[0], num_ranks, num_slots, seed, sizes)
    history = History(load, num_ranks)
    order = history.sort()
    chosen = choose_regularization(history, num_slots, seed, sizes)
    slots = named(plan_history(history, num_slots, chosen, most_tries(len(load), num_slots), seed, sizes), order)
    alike = np.flatnonzero(~history.varies)
    slots[alike] = plan_static(load[history.seen.argmax(axis=0)[alike], alike], num_ranks, num_slots, seed, sizes)
    return slots


class History:
    """Windows (T, L, E) in units of the mean rank load, and what is known of them.

    A window without load in a layer is not `seen` (T, L) there. `mean` and `variance` (L, E) are of the seen ones, and
    `varies` (L,) says in which layers the windows differ at all.
    """

    def __init__(self, load: FloatArray, num_ranks: int) -> None:
        peak = load.max(axis=2, keepdims=True)
        self.seen = peak[:, :, 0] > 0
        # By the busiest expert first: the sum of loads near the end of float64 is infinite.
        shares = np.divide(load, peak, out=np.zeros_like(load), where=peak > 0)
        # Sorted, since the last bit of a sum depends on the order of the experts.
        self.windows = shares * (num_ranks / np.maximum(np.sort(shares, axis=2).sum(axis=2, keepdims=True), 1))
        self.num_ranks = num_ranks
        number = self.seen.sum(axis=0)[:, None]
        self.mean = self.windows.sum(axis=0) / np.maximum(number, 1)
        moves = np.where(self.seen[:, :, None], self.windows - self.mean, 0)
        self.variance = (moves**2).sum(axis=0) / np.maximum(number - 1, 1)
        # Windows that differ by rounding alone are one window.
        self.varies = self.variance.sum(axis=1) > 1e-20 * num_ranks**2

    def sort(self) -> npt.NDArray[np.int64]:
        """Put each layer's experts in descending order of mean load, then of load in each window; return the order.

        So a plan depends on loads alone, neither on names nor on how many tokens a window happened to count.
        """
        order = np.empty(self.mean.shape, np.int64)
        for layer in range(len(order)):
            order[layer] = np.lexsort(-np.vstack([self.windows[::-1, layer], self.mean[layer]]))
        self.windows, self.mean, self.variance = (
            take(each, order) for each in (self.windows, self.mean, self.variance)
        )
        return order

    def layer(self, layer: int) -> FloatArray:
        """(T', E): the windows in which `layer` had any load."""
        return self.windows[self.seen[:, layer], layer]

    def part(self, windows: npt.NDArray[np.bool_], layers: npt.NDArray[np.int64]) -> History:
        """The history of `windows` (T,) and `layers` alone."""
        return History(self.windows[windows][:, layers], self.num_ranks)


def plan_history(
    history: History,
    num_slots: int,
    regularization: Regularization,
    tries: int,
    seed: int,
    sizes: tuple[int, ...] | None = None,
) -> npt.NDArray[np.int64]:
    """Slots int64 (L, S) by local search, from a quick plan for every expert's mean load + standard deviation."""
    mean, variance, num_ranks, shrinkage = history.mean, history.variance, history.num_ranks, regularization.shrinkage
    risk = mean + np.sqrt(variance)
    # Any peak is enough: the search below looks at other loads than a longer search for these would.
    slots = plan_peaks(risk, num_ranks, num_slots, seed, np.full(len(risk), np.inf), sizes=sizes, caution=0.0)[0]
    slots = slots.astype(np.int64)
    padding = Padding(sizes or (num_slots // num_ranks,) * num_ranks, mean.shape[1])
    slots = padding.slots(slots)
    for layer in np.flatnonzero(history.varies).tolist():
        noise = padding.load(shrinkage * variance[layer])
        windows = padding.load(mean[layer] + np.sqrt(1 - shrinkage) * (history.layer(layer) - mean[layer]))
        if shrinkage == 1:
            windows = windows[:1]  # they are all the mean
        beta = _finite(windows, noise, regularization.beta, padding.width)
        state = soft_peak_state(windows, noise, num_ranks, padding.num_slots, padding.num_experts)
        search(state, beta, tries, PATIENCE * num_slots, random_state(seed, layer, 1), slots[layer])
    return padding.strip(slots).astype(np.int64, copy=False)


def soft_peak_state(windows: FloatArray, noise: FloatArray, num_ranks: int, num_slots: int, movable: int) -> SoftPeak:
    """A layer for `search`; not compiled, which saves a second of compiling."""
    num_windows, num_experts = windows.shape
    by_expert, by_rank, by_slot = (num_windows, num_experts), (num_windows, num_ranks), (num_windows, num_slots)
    return SoftPeak(
        windows=windows,
        noise=noise,
        slots=np.zeros(num_slots, np.int64),
        counts=np.zeros(num_experts, np.int64),
        held=np.zeros((num_ranks, num_experts), np.bool_),
        factor=np.empty(by_expert),
        more=np.empty(by_expert),
        less=np.ones(by_expert),
        exp_load=np.empty(by_rank),
        total=np.empty(num_windows),
        part=np.empty(by_rank),
        weight=np.empty(num_ranks),
        enter=np.empty(by_slot),
        leave=np.empty(by_slot),
        rest=np.empty(by_slot),
        stale=np.ones(num_ranks, np.bool_),
        movable=movable,
    )


def choose_regularization(
    history: History, num_slots: int, seed: int = 0, sizes: tuple[int, ...] | None = None
) -> Regularization:
    """The regularization whose plans did best on windows that they were not made from.

    Blocks of consecutive windows are held out in turn, since neighbors in time are alike. Another replaces the usual
    one if its mean held-out peak, over at most eight layers, is lower by two standard errors of the difference
    over windows. Where a window has no load in a layer, there is nothing to judge.
    """
    num_windows = len(history.windows)
    layers = np.unique(np.linspace(0, history.windows.shape[1] - 1, LAYERS).round().astype(np.int64))
    seen = history.seen[:, layers]
    judged = seen.any(axis=1)
    if judged.sum() < FEWEST:
        return USUAL
    fold = np.arange(num_windows) * FOLDS // num_windows if num_windows > FOLDS else np.arange(num_windows)
    tries = most_tries(num_windows, num_slots) // TRIAL

    def held_out(regularization: Regularization) -> FloatArray:
        peaks = np.empty((num_windows, layers.size))
        for block in range(fold[-1] + 1):
            past, rest = history.part(fold != block, layers), history.part(fold == block, layers)
            slots = plan_history(past, num_slots, regularization, tries, seed, sizes)
            peaks[fold == block] = even_par(rest.windows, slots, history.num_ranks, sizes)
        return peaks[judged].mean(axis=1, where=seen[judged])

    best, least = USUAL, held_out(USUAL)
    for field, values in (("shrinkage", SHRINKAGES), ("beta", BETAS)):
        for value in values:
            candidate = best._replace(**{field: value})
            peaks = held_out(candidate)
            gain = least - peaks
            if gain.mean() > MARGIN * gain.std(ddof=1) / np.sqrt(len(gain)):
                best, least = candidate, peaks
    return best


def most_tries(num_windows: int, num_slots: int) -> int:
    """Random changes that a layer may take."""
    return min(BY_SLOTS // num_slots, int(EFFORT / (num_windows * num_slots**1.5)))


def _finite(windows: FloatArray, noise: FloatArray, beta: float, width: int) -> float:
    """The given beta, halved until no choice of `width` experts overflows on a rank.

    It ends: an expert's load is at most the number of ranks, and its variance that number squared.
    """
    while True:
        power = beta * windows + 0.5 * beta**2 * noise
        if np.partition(power, -width, axis=1)[:, -width:].sum(axis=1).max() < LARGEST_POWER:
            return beta
        beta /= 2
