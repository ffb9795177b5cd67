"""Two parts of one recording: windows to plan on, and windows to judge the plan on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError

FloatArray = npt.NDArray[np.float64]
Unit = Literal["windows", "requests", "tokens", "assignments"]

_PARTS = 24  # of a recording without windows; the last third of them, eight, are judged
_LARGEST = 2.0**53  # counts beyond are no exact integers any more, and their sampling noise is nothing

#: Judged windows, or else layers, of which a paired test can be made; with fewer of both, windows are thinned.
FEWEST_WINDOWS, FEWEST_LAYERS = 3, 4

#: How many times more the counts of one request vary than independent assignments, in the measured requests in which
#: they do so most (gpt-oss-20b, decode, 1,318 assignments a request and layer; six other recordings have 1 to 6). A
#: summed window of counts does not tell how many requests it is made of: it is taken for ones like these.
CLUSTERED = 27.0


@dataclass(frozen=True)
class HeldOut:
    """A recording in two parts.

    Attributes:
        planned: tokens to plan on, float64 (windows, L, E), earlier than the others.
        judged: tokens to judge on, float64 (windows, L, E).
        compared: the same tokens in the parts whose differences are tested, float64 (parts, L, E): the judged windows
            themselves, unless these are too few.
        unit: what was divided: "windows"; "requests" or "tokens" of a routing without windows; "assignments" of a
            single window of counts, at random.
        num_planned, num_judged: how many of these.
        variance: how many times more the parts may vary than their own spread shows.
    """

    planned: FloatArray
    judged: FloatArray
    compared: FloatArray
    unit: Unit
    num_planned: int
    num_judged: int
    variance: float = 1.0

    @property
    def words(self) -> str:
        """In a sentence: "planned on …, judged on …"."""
        if self.unit == "assignments":
            return (
                f"planned on a random two thirds of the assignments ({self.num_planned:,} per layer), judged on the "
                f"others ({self.num_judged:,}): one window of counts tells noise from load, not whether the load lasts"
            )
        first, last = f"first {self.num_planned:,}", f"last {self.num_judged:,}"
        first, last = ("first" if self.num_planned == 1 else first), ("last" if self.num_judged == 1 else last)
        name = self.unit if self.num_planned > 1 else self.unit[:-1]
        return f"planned on the {first} {name}, judged on the {last}"


def hold_out(
    load: npt.ArrayLike,
    routing: npt.NDArray[np.integer] | None = None,
    seq_start: npt.NDArray[np.integer] | None = None,
) -> HeldOut:
    """Divide a recording: the last third is for judging.

    With three windows or more, of the windows; two are one each. With fewer, but with the tokens' routing: of its
    requests, or of its tokens where there are fewer than 24 requests. A single window of counts is thinned: every
    assignment goes to one of 24 parts at random (with a fixed seed), which makes the parts independent if the
    assignments were. Where fewer than three windows of fewer than four layers are left to judge on, so are they.

    Args:
        load: tokens per logical expert, (T, L, E).
        routing: experts of every token, integers (tokens, L, K), in order of arrival; or None.
        seq_start: the first token of each request and, last, the number of tokens; or None.

    Raises:
        ConstraintError: a load of another shape.

    >>> found = hold_out(np.arange(9).reshape(9, 1, 1))
    >>> found.planned.ravel().tolist(), found.judged.ravel().tolist(), found.words
    ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0], 'planned on the first 6 windows, judged on the last 3')
    """
    tokens = np.asarray(load, np.float64)
    if tokens.ndim != 3 or not tokens.size:
        rule = "must be (windows, layers, experts), no axis empty"
        raise ConstraintError("load", f"an array of shape {tokens.shape}", rule, "pass one window as load[None]")
    if len(tokens) < 3 and routing is not None and len(routing) >= _PARTS and routing.shape[1] == tokens.shape[1]:
        return _of_tokens(routing, seq_start, tokens.shape[2])
    if len(tokens) > 1:
        last = max(1, len(tokens) // 3)
        judged = tokens[-last:]
        if last < FEWEST_WINDOWS and tokens.shape[1] < FEWEST_LAYERS:  # nothing to compare but parts of them
            compared, variance = _thin(judged.sum(axis=0), _PARTS // 3), CLUSTERED
        else:
            compared, variance = judged, 1.0
        return HeldOut(tokens[:-last], judged, compared, "windows", len(tokens) - last, last, variance)
    planned, judged, parts = _two_thirds(_thin(tokens[0], _PARTS))
    layers = max(1, np.count_nonzero(tokens[0].any(axis=1)))
    sizes = [round(float(part.sum()) / layers) for part in (planned, judged)]
    return HeldOut(planned, judged, parts, "assignments", *sizes, variance=CLUSTERED)


def _two_thirds(parts: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Of equal parts the first two thirds as one window, the others as one, and the others."""
    last = parts[-(_PARTS // 3) :]
    return parts[: -len(last)].sum(axis=0, keepdims=True), last.sum(axis=0, keepdims=True), last


def _of_tokens(routing: npt.NDArray[np.integer], starts: npt.NDArray[np.integer] | None, num_experts: int) -> HeldOut:
    tokens = len(routing)
    by_request = starts is not None and len(starts) > _PARTS and int(starts[0]) == 0 and int(starts[-1]) == tokens
    ends = np.asarray(starts if by_request else np.arange(tokens + 1), np.int64)
    # The requests, or tokens, whose ends come next after equal shares of the tokens; each part has at least one.
    wanted = np.searchsorted(ends, np.arange(1, _PARTS) * tokens / _PARTS)
    steps = np.arange(1, _PARTS)
    wanted = np.clip(np.maximum.accumulate(wanted - steps) + steps, steps, len(ends) - 1 - (_PARTS - steps))
    edges = np.r_[0, wanted, len(ends) - 1]
    parts = np.stack(
        [
            _counted(routing[first:end], num_experts)
            for first, end in zip(ends[edges[:-1]], ends[edges[1:]], strict=True)
        ]
    )
    requests = int(edges[_PARTS - _PARTS // 3])
    unit: Unit = "requests" if by_request else "tokens"
    return HeldOut(*_two_thirds(parts), unit, requests, len(ends) - 1 - requests)


def _counted(routing: npt.NDArray[np.integer], num_experts: int) -> FloatArray:
    return np.stack(
        [np.bincount(layer.ravel(), minlength=num_experts)[:num_experts] for layer in routing.transpose(1, 0, 2)]
    ).astype(np.float64)


def _thin(load: FloatArray, parts: int) -> FloatArray:
    """(L, E) as so many parts (parts, L, E): every assignment goes to one of them at random."""
    largest = load.max()
    counts = np.rint(load * (_LARGEST / largest) if largest > _LARGEST else load).astype(np.int64)
    thinned = np.random.default_rng(0).multinomial(counts, np.full(parts, 1 / parts))
    return np.moveaxis(thinned, -1, 0).astype(np.float64)
