"""What `evenmoe plan` shows: rows of peak-to-average loads, as text and as the object of --json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from evenmoe.quantities import par
from evenmoe.rules import RULES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import Console

    from evenmoe.formats.contents import Contents
    from evenmoe.metrics import FloatArray
    from evenmoe.placement import Placement

_WORST_SHOWN = 8  # layers in text; --json has them all


@dataclass(frozen=True)
class Row:
    """Peak-to-average loads of one placement: (L,) of all tokens, and the mean over windows."""

    name: str
    slots: int
    all_tokens: FloatArray
    windows: FloatArray

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

    @property
    def judged(self) -> npt.NDArray[np.bool_]:
        """(L,): the layers that enter means, which are those with tokens; all where none has any."""
        judged: npt.NDArray[np.bool_] = self.windows.any(axis=(0, 2))  # pyright: ignore[reportAssignmentType]
        return judged if judged.any() else ~judged

    @property
    def assignments(self) -> float:
        """Token–expert assignments per layer, those with tokens; infinite beyond float64."""
        import numpy as np

        assert self.contents.load is not None
        with np.errstate(over="ignore"):
            return float(self.contents.load.sum() / self.judged.sum())

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
            "num_nodes": request.num_nodes,
            "num_groups": request.num_groups,
            "planner": request.planner,
            "rule": request.rule,
            "assignments_per_layer": self.assignments if isfinite(self.assignments) else None,
            "par": {
                row.key: {
                    "all_tokens": self._rounded(row.all_tokens),
                    "mean_of_windows": self._rounded(row.windows),
                }
                for row in self.rows
            },
            "par_lower_bound": None if self.bound is None else self._rounded(self.bound),
            "replicas_per_expert": {"min": int(placement.num_replicas.min()), "max": int(placement.num_replicas.max())},
            "copies": None if copies is None else int(copies.sum()),
            "copies_per_layer": None if copies is None else copies.tolist(),
            "layer_ids": list(self.numbers),
            "par_per_layer": {row.key: row.windows.round(6).tolist() for row in self.rows},
        }

    def print_on(self, console: Console) -> None:
        """Print the same as text."""
        request, contents, placement, copies = self.request, self.contents, self.placement, self.copies
        assert contents.load is not None
        empty = f" ({contents.empty_windows} empty ones left out)" if contents.empty_windows else ""
        by = "" if request.planner == "evenmoe" else f"by {request.planner} "
        count = self.assignments
        shown = "more than 1.8e308" if not isfinite(count) else f"{count:,.0f}" if count < 1e15 else f"{count:.3g}"
        console.print(
            f"{request.source} ({contents.format}): {contents.load.shape[0]} windows{empty}, "
            f"{placement.num_layers} layers, {placement.num_experts} experts, {shown} assignments per layer\n"
            f"{placement.num_ranks} ranks, {placement.num_slots} slots, rule {request.rule}; "
            f"planned {by}on {self.num_planned} {'window' if self.num_planned == 1 else 'windows'}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        self._print_means(console)
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

    def _mean_and_worst(self, values: FloatArray) -> tuple[float, float, int]:
        """The mean of the layers with tokens, the worst of them, and its number."""
        worst = int((values * self.judged).argmax())
        return float(values[self.judged].mean()), float(values[worst]), self.numbers[worst]

    def _rounded(self, values: FloatArray) -> dict[str, float]:
        mean, worst, layer = self._mean_and_worst(values)
        return {"mean": round(mean, 6), "worst": round(worst, 6), "worst_layer": layer}

    def _cells(self, values: FloatArray) -> tuple[str, str]:
        mean, worst, layer = self._mean_and_worst(values)
        return par(mean), f"{par(worst)} (layer {layer})"

    def _print_means(self, console: Console) -> None:
        from rich.table import Table

        table = Table(
            *("placement", "slots", "all tokens", "worst layer", "mean of windows", "worst layer"),
            title="peak-to-average load (1.0 is perfect), mean of layers",
        )
        for row in self.rows:
            table.add_row(row.name, str(row.slots), *self._cells(row.all_tokens), *self._cells(row.windows))
        if self.bound is not None:
            table.add_row("no placement beats", str(self.placement.num_slots), *self._cells(self.bound), "", "")
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)

    def _print_worst(self, console: Console) -> None:
        from rich.table import Table

        console.print("layers that stay the most uneven, mean of windows:")
        table = Table("layer", *(row.name for row in self.rows))
        for column in table.columns:
            column.justify = "right"
        planned = self.rows[-1].windows * self.judged
        for layer in (-planned).argsort(kind="stable")[: min(_WORST_SHOWN, self.judged.sum())]:
            table.add_row(str(self.numbers[layer]), *(par(float(row.windows[layer])) for row in self.rows))
        console.print(table)


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


def compare(windows: FloatArray, placement: Placement, previous: Placement | None, rule: str) -> list[Row]:
    """The default placement, where the experts divide by the ranks; the previous one; the plan."""
    from evenmoe.metrics import mean_over_windows, peak_over_mean
    from evenmoe.placement import default_placement

    layers, experts = windows.shape[1:]
    compared: list[tuple[str, Placement]] = []
    if experts % placement.num_ranks == 0:
        compared.append(("default placement", default_placement(layers, experts, placement.num_ranks)))
    if previous is not None:
        compared.append(("previous", previous))
    compared.append(("planned", placement))
    total, chosen = windows.sum(axis=0), RULES.get(rule)
    return [
        Row(
            name,
            each.num_slots,
            peak_over_mean(chosen.rank_loads(total, each)),
            mean_over_windows(peak_over_mean(chosen.rank_loads(windows, each)), windows),
        )
        for name, each in compared
    ]
