"""What `evenmoe plan` shows: rows of peak-to-average loads, as text and as the object of --json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from evenmoe.quantities import count, par, percent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import Console

    from evenmoe.cli.plan_for import EngineOutcome
    from evenmoe.formats.contents import Contents
    from evenmoe.metrics import FloatArray
    from evenmoe.placement import Placement
    from evenmoe.planner.judging import JudgedPlan
    from evenmoe.rules.rule import Rule

_WORST_SHOWN = 8  # layers in text; --json has them all


@dataclass(frozen=True)
class Row:
    """Peak-to-average loads (L,) of one placement.

    Attributes:
        all_tokens: of all windows together, which the plan was made from.
        windows: the mean over these windows.
        unseen: the mean over windows that were judged; of the plan, under that of the other windows. None without any.
    """

    name: str
    slots: int
    all_tokens: FloatArray
    windows: FloatArray
    unseen: FloatArray | None

    @property
    def key(self) -> str:
        return self.name.replace(" ", "_")


@dataclass(frozen=True)
class Request:
    """What the command was asked for, as far as it is shown.

    Attributes:
        source: the load that was read.
        target: the file that is written, "-" for standard output, or None.
        to: its format.
        num_nodes, num_groups: of the world.
        planner, rule: as they were named.
    """

    source: str
    target: str | None
    to: str
    num_nodes: int
    num_groups: int
    planner: str
    rule: str


@dataclass(frozen=True)
class Outcome:
    """What is shown of a plan."""

    request: Request
    contents: Contents
    windows: FloatArray
    num_planned: int
    numbers: Sequence[int]
    placement: Placement
    previous: Placement | None
    rows: list[Row]
    bound: FloatArray | None
    judgement: JudgedPlan | None
    engine: EngineOutcome | None = None

    @property
    def _recorded(self) -> npt.NDArray[np.bool_]:
        """(L,): the layers that enter means, which are those with tokens; all where none has any."""
        return _layers_with_tokens(self.windows)

    @property
    def _unseen(self) -> npt.NDArray[np.bool_]:
        """The same, of the windows that are judged."""
        return self._recorded if self.judgement is None else _layers_with_tokens(self.judgement.held_out.judged)

    @property
    def assignments(self) -> float:
        """Token–expert assignments per layer, those with tokens; infinite beyond float64."""
        import numpy as np

        assert self.contents.load is not None
        with np.errstate(over="ignore"):
            return float(self.contents.load.sum() / self._recorded.sum())

    @property
    def copies(self) -> npt.NDArray[np.int64] | None:
        """(L,): experts that ranks receive, where a placement is in use."""
        from evenmoe.metrics import count_copies

        return None if self.previous is None else count_copies(self.previous, self.placement)

    def summary(self) -> dict[str, object]:
        """The object of --json."""
        request, contents, placement, copies = self.request, self.contents, self.placement, self.copies
        assert contents.load is not None
        return {
            "source": request.source,
            "target": request.target,
            "from": contents.format,
            "to": None if request.target is None else request.to,
            "num_windows": int(contents.load.shape[0]),
            "num_empty_windows": contents.empty_windows,
            "num_planned_windows": self.num_planned,
            "num_layers": placement.num_layers,
            "num_experts": placement.num_experts,
            "num_ranks": placement.num_ranks,
            "num_slots": placement.num_slots,
            "rank_sizes": None if placement.is_even else list(placement.rank_sizes),
            "num_nodes": request.num_nodes,
            "num_groups": request.num_groups,
            "planner": request.planner,
            "rule": request.rule,
            "assignments_per_layer": self.assignments if isfinite(self.assignments) else None,
            "held_out": None if self.judgement is None else self._held_out(self.judgement),
            "verdict": None if self.judgement is None else self._verdict(self.judgement),
            "engine": None if self.engine is None else self.engine.summary(),
            "par": {
                row.key: {
                    "held_out": None if row.unseen is None else self._rounded(row.unseen, self._unseen),
                    "all_tokens": self._rounded(row.all_tokens, self._recorded),
                    "mean_of_windows": self._rounded(row.windows, self._recorded),
                }
                for row in self.rows
            },
            "par_lower_bound": None if self.bound is None else self._rounded(self.bound, self._recorded),
            "replicas_per_expert": {"min": int(placement.num_replicas.min()), "max": int(placement.num_replicas.max())},
            "copies": None if copies is None else int(copies.sum()),
            "copies_per_layer": None if copies is None else copies.tolist(),
            "layer_ids": list(self.numbers),
            "par_per_layer": {row.key: row.windows.round(6).tolist() for row in self.rows},
        }

    def print_on(self, console: Console) -> None:
        """Print the same as text."""
        request, contents, placement, copies = self.request, self.contents, self.placement, self.copies
        from evenmoe.slot_arrays import sizes_text

        assert contents.load is not None
        empty = f" ({contents.empty_windows} empty ones left out)" if contents.empty_windows else ""
        by = "" if request.planner == "evenmoe" else f"by {request.planner} "
        count = self.assignments
        shown = "more than 1.8e308" if not isfinite(count) else f"{count:,.0f}" if count < 1e15 else f"{count:.3g}"
        uneven = "" if placement.is_even else f" ({sizes_text(placement.rank_sizes)})"
        console.print(
            f"{request.source} ({contents.format}): {contents.load.shape[0]} windows{empty}, "
            f"{placement.num_layers} layers, {placement.num_experts} experts, {shown} assignments per layer\n"
            f"{placement.num_ranks} ranks, {placement.num_slots} slots{uneven}, rule {request.rule}; "
            f"planned {by}on {self.num_planned} {'window' if self.num_planned == 1 else 'windows'}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        self._print_means(console)
        console.print(self._judged_words, highlight=False, markup=False, soft_wrap=True)
        self._print_worst(console)
        replicas = placement.num_replicas
        console.print(f"replicas per expert: {replicas.min()} to {replicas.max()}", highlight=False)
        if copies is not None:
            console.print(
                f"copies from the previous placement: {copies.sum()} ({copies.min()} to {copies.max()} per layer)",
                highlight=False,
            )
        if request.target not in (None, "-"):
            console.print(f"written: {request.target} ({request.to})", highlight=False, markup=False, soft_wrap=True)
        if self.engine is not None:
            console.print(self.engine.words(), highlight=False, markup=False, soft_wrap=True)

    @property
    def _judged_words(self) -> str:
        """What "unseen" is, and the verdict."""
        if self.judgement is None:
            return "in-sample only (--all): what the plan does to other tokens was not looked at"
        unseen = f"unseen: {self.judgement.held_out.words}; in-sample, summed: planned and measured on everything"
        return f"{unseen}\n{verdict_sentence(self.judgement, self._in_use)}"

    @property
    def _in_use(self) -> str:
        return self.rows[-2].name if len(self.rows) > 1 else ""

    def _held_out(self, judgement: JudgedPlan) -> dict[str, object]:
        held = judgement.held_out
        return {"unit": held.unit, "planned": held.num_planned, "judged": held.num_judged, "description": held.words}

    def _verdict(self, judgement: JudgedPlan) -> dict[str, object] | None:
        verdict = judgement.verdict
        if verdict is None:
            return None
        return {
            "kind": verdict.kind,
            "reason": verdict.reason or None,
            "sentence": verdict_sentence(judgement, self._in_use),
            "in_use": self.rows[-2].key,
            "held_out_gain_percent": round(verdict.gain.percent, 6),
            "held_out_gain_lower_percent": round(verdict.gain.lower, 6),
            "held_out_gain_upper_percent": round(verdict.gain.upper, 6),
            "blocks": verdict.gain.blocks,
            "noise_par": round(verdict.unevenness.limit, 6),
            "noise_par_all_tokens": round(verdict.unevenness.total_limit, 6),
            "more_assignments": round(verdict.more_assignments, 6),
        }

    def _mean_and_worst(self, values: FloatArray, layers: npt.NDArray[np.bool_]) -> tuple[float, float, int]:
        """The mean of the layers with tokens, the worst of them, and its number."""
        worst = int((values * layers).argmax())
        return float(values[layers].mean()), float(values[worst]), self.numbers[worst]

    def _rounded(self, values: FloatArray, layers: npt.NDArray[np.bool_]) -> dict[str, float]:
        mean, worst, layer = self._mean_and_worst(values, layers)
        return {"mean": round(mean, 6), "worst": round(worst, 6), "worst_layer": layer}

    def _mean(self, values: FloatArray) -> str:
        return par(self._mean_and_worst(values, self._recorded)[0])

    def _print_means(self, console: Console) -> None:
        from rich.table import Table

        title = "peak-to-average load (1.0 is perfect), mean of layers"
        heads = () if self.judgement is None else ("unseen", "worst layer")
        table = Table("placement", "slots", *heads, "in-sample", "summed", title=title)
        for row in self.rows:
            cells = []
            if row.unseen is not None:
                mean, worst, layer = self._mean_and_worst(row.unseen, self._unseen)
                cells = [par(mean), f"{par(worst)} (layer {layer})"]
            table.add_row(row.name, str(row.slots), *cells, self._mean(row.windows), self._mean(row.all_tokens))
        if self.bound is not None:
            table.add_row(
                "no placement beats", str(self.placement.num_slots), *("" for _ in heads), "", self._mean(self.bound)
            )
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)

    def _print_worst(self, console: Console) -> None:
        from rich.table import Table

        unseen = self.judgement is not None
        console.print(f"layers that stay the most uneven, mean of {'unseen ' if unseen else ''}windows:")
        table = Table("layer", *(row.name for row in self.rows))
        for column in table.columns:
            column.justify = "right"
        shown = [row.unseen if row.unseen is not None else row.windows for row in self.rows]
        layers = self._unseen
        for layer in (-shown[-1] * layers).argsort(kind="stable")[: min(_WORST_SHOWN, layers.sum())]:
            table.add_row(str(self.numbers[layer]), *(par(float(values[layer])) for values in shown))
        console.print(table)


def verdict_sentence(judgement: JudgedPlan, in_use: str) -> str:
    """What the evidence allows to be said, and what to do about it."""
    verdict = judgement.verdict
    if verdict is None:
        return "no verdict: the experts do not divide by the ranks, so there is no default placement to compare with"
    gain, uneven = verdict.gain, verdict.unevenness
    shown = f"{percent(gain.percent)} ({percent(gain.lower)} to {percent(gain.upper)}, at 1 % each)"
    sampling = f"sampling alone makes up to {par(uneven.total_limit)} of {count(round(uneven.assignments))} assignments"
    record = f"record about {verdict.more:,.1f} times as much"
    single = " as single windows" if judgement.held_out.unit == "assignments" else ""
    texts = {
        "": f"gain on unseen {judgement.held_out.unit}: the busiest rank does {gain.percent:.1f} % less than under the "
        f"{in_use} (at least {gain.lower:.1f} %, at 1 %)",
        "already balanced": f"no gain: the {in_use} is as even as a balanced router makes it (PAR "
        f"{par(uneven.total_par)} of all tokens; {sampling})",
        "nothing moves": f"no gain: the ranks' loads are those of the {in_use}; more slots could change them (--slots)",
        "does not last": f"no gain on unseen {judgement.held_out.unit}: it is {shown}; "
        "what the first part showed does not last",
        "sampling noise": f"too little to judge: the {in_use} has a PAR of {par(uneven.total_par)} over all tokens, "
        f"and {sampling} per layer; record about {count(round(verdict.more_assignments))} more{single}",
        "too few windows": f"too little to judge: too few windows to compare; {record}",
        "varies too much": f"too little to judge: on unseen {judgement.held_out.unit} the gain is {shown}; {record}",
    }
    return texts[verdict.reason]


def _layers_with_tokens(windows: FloatArray) -> npt.NDArray[np.bool_]:
    """(L,): layers with tokens; all where none has any."""
    found: npt.NDArray[np.bool_] = windows.any(axis=(0, 2))  # pyright: ignore[reportAssignmentType]
    return found if found.any() else ~found


def merged(load: FloatArray, most: int) -> FloatArray:
    """At most so many windows, neighbors summed; each of the merged ones covers nearly as many."""
    import numpy as np

    return load if len(load) <= most else np.add.reduceat(load, np.arange(most) * len(load) // most, axis=0)


def gaps(windows: FloatArray, numbers: Sequence[int]) -> list[str]:
    """Notes on layers without tokens in all windows, or in some."""
    from evenmoe.formats.layer_numbers import ranges

    recorded = windows.any(axis=2).T.tolist()
    never = [number for number, found in zip(numbers, recorded, strict=True) if not any(found)]
    partly = [number for number, found in zip(numbers, recorded, strict=True) if any(found) and not all(found)]
    notes = []
    if never:
        notes.append(f"layers without tokens, placed but left out of the means: {ranges(never)}")
    if partly:
        notes.append(f"layers without tokens in some windows, which do not count for them: {ranges(partly)}")
    return notes


def compare(
    windows: FloatArray, placements: dict[str, Placement], rule: str | Rule, judgement: JudgedPlan | None
) -> list[Row]:
    """One row for each placement, the plan being the last."""
    from evenmoe.metrics import mean_over_windows, peak_over_mean
    from evenmoe.planner.judging import rank_loads_of

    total = windows.sum(axis=0, keepdims=True)
    rows = []
    for name, each in placements.items():
        unseen = None
        if judgement is not None:
            judged = judgement.held_out.judged
            tried = judgement.placement if name == "planned" else each
            unseen = mean_over_windows(peak_over_mean(rank_loads_of(judged, tried, rule)), judged)
        of_windows = mean_over_windows(peak_over_mean(rank_loads_of(windows, each, rule)), windows)
        rows.append(Row(name, each.num_slots, peak_over_mean(rank_loads_of(total, each, rule))[0], of_windows, unseen))
    return rows


def compared_with(load: FloatArray, num_ranks: int, previous: Placement | None) -> dict[str, Placement]:
    """By name: the default placement, where the experts divide by the ranks; and the previous one."""
    from evenmoe.placement import default_placement

    layers, experts = load.shape[1:]
    found = {"default placement": default_placement(layers, experts, num_ranks)} if experts % num_ranks == 0 else {}
    return found if previous is None else {**found, "previous": previous}
