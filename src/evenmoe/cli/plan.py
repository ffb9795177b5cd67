"""`evenmoe plan`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from typer import Argument, Option

from evenmoe.cli.options import (
    FileOptions,
    Rule,
    WorldOptions,
    completed,
    find_engine,
    find_format,
    for_option,
    make_command,
    numbers_of,
    out_option,
    print_json,
    print_notes,
    table_console,
)
from evenmoe.cli.plan_for import check_for, engine_outcome
from evenmoe.cli.plan_outcome import Outcome, Request, compare, compared_with, gaps, merged
from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.formats.catalogue import ENTRIES
from evenmoe.planner import PLANNERS
from evenmoe.rules import RULES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from evenmoe.engines.engine import Engine
    from evenmoe.formats.contents import Contents
    from evenmoe.metrics import FloatArray
    from evenmoe.placement import Placement
    from evenmoe.planner.judging import JudgedPlan
    from evenmoe.planner.options import PlanOptions

_PLACEMENT_FORMATS = tuple(name for name, entry in ENTRIES.items() if entry.kind == "placement")


@dataclass(frozen=True, kw_only=True)
class PlanCommand(FileOptions, WorldOptions):
    """Plan a placement for a recorded load.

    Reads loads and traces of any tool, writes the placement in any tool's format, and shows how even the ranks are
    before and after: the peak-to-average load (PAR), 1.0 being perfect. The placement that is written is planned on
    everything; what it is worth is judged by planning on the first two thirds alone and looking at the last third. With
    `-` as output the summary goes to standard error. Exit codes: 0 done; 2 a file or an option is wrong.
    """

    words: ClassVar = {"dead_ranks": "--dead"}
    epilog: ClassVar = "Formats of placements: " + ", ".join(_PLACEMENT_FORMATS)

    source: Annotated[str, Argument(help="Load or trace in any format, a folder, or `-` for standard input.")]
    out: Annotated[str | None, out_option("Placement to write, `-` for standard output. Default: none.")] = None
    ranks: Annotated[
        int | None, Option(help="Expert-parallel ranks. Default of --ranks and --slots: those of --previous.", min=1)
    ] = None
    slots: Annotated[
        str | None, Option(help="Total slots, over all ranks; or the slots of each rank: 9,9,8,8.", metavar="NUMBERS")
    ] = None
    dead: Annotated[
        str | None, Option(help="Ranks that get no expert, 3,7 or 8-15: their slots are lost, the others keep theirs.")
    ] = None
    planner: Annotated[
        str,
        Option(
            "--planner",
            "-p",
            help=f"{', '.join(PLANNERS)}; or py:module:function, or py:file.py:function, called as evenmoe.plan is.",
            autocompletion=completed(PLANNERS),
        ),
    ] = "evenmoe"
    rule: Rule = "even"
    for_: Annotated[str | None, for_option("Plan for an engine: its format, rule and launch options")] = None
    mean: Annotated[
        bool, Option("--mean/--windows", help="Balance the sum of the recording, or its single windows.")
    ] = False
    most_windows: Annotated[int, Option(help="Windows beyond so many are merged with their neighbors.", min=1)] = 64
    all_: Annotated[
        bool, Option("--all", help="Do not judge the plan on windows that it was not made from: half the time.")
    ] = False
    previous: Annotated[Path | None, Option(help="Placement in use, in any format: start from it.")] = None
    max_copies: Annotated[int | None, Option(help="At most so many copies per layer.", min=0)] = None
    target_par: Annotated[float | None, Option(help="Stop copying in a layer once it is this even.")] = None
    objective: Annotated[
        str,
        Option(
            help="What is made small: tokens, of the busiest rank; or decode, what the costliest rank reads and "
            "computes in a step. For decode, spare slots need --rule batch, with weights.",
            metavar="NAME",
        ),
    ] = "tokens"
    tokens_per_step: Annotated[int | None, Option(help="Of decode: tokens of a step, over all ranks.", min=1)] = None
    top_k: Annotated[
        int | None, Option(help="Of decode: experts that a token picks. Default: taken from the trace.", min=1)
    ] = None
    weight_rows: Annotated[
        int | None, Option(help="Of decode: rows that one expert's weights are worth. Default: 150, an H100's.", min=0)
    ] = None
    seed: Annotated[int, Option(help="Of the search's random choices.", min=0)] = 0
    to: Annotated[
        str, Option(help="Format to write.", metavar="FORMAT", autocompletion=completed(_PLACEMENT_FORMATS))
    ] = "evenmoe-placement"

    def run(self) -> int:
        """Read, plan, write, show."""
        from evenmoe.formats.reading import read_load
        from evenmoe.formats.writing import check_numbers, write
        from evenmoe.metrics import as_load, within_range
        from evenmoe.planner.bound import lower_bound
        from evenmoe.planner.judging import judge_plan, without_order
        from evenmoe.planner.options import PlanOptions, sizes_of, without_dead
        from evenmoe.planner.plan import plan_with

        engine = self._check_target()
        rule, to = (self.rule, self.to) if engine is None else (engine.rule, engine.format)
        contents = read_load(self.source, self.read_options())
        contents, notes_on_layers = self._numbered(contents)
        previous, notes_on_previous = self._read_previous(contents, are_certain=not notes_on_layers)
        if self.out is not None:
            check_numbers(to, contents)
        ranks, given = self._sizes(previous)
        slots = without_dead(ranks, given, numbers_of("--dead", self.dead))
        world = {"num_ranks": ranks, "num_slots": slots, "num_nodes": self.num_nodes(ranks), "num_groups": self.groups}
        assert contents.load is not None
        load = within_range(as_load(contents.load))
        windows = merged(load, self.most_windows)
        goal = windows.sum(axis=0, keepdims=True) if self.mean else windows
        options = PlanOptions(
            previous=previous,
            max_copies=self.max_copies,
            target_par=self.target_par,
            rule=rule,
            seed=self.seed,
            objective=self.objective,
            tokens_per_step=self.tokens_per_step,
            top_k=self._top_k(contents),
            weight_rows=self.weight_rows,
            **world,
        )
        in_slot_order = engine is not None and not engine.keeps_order
        sizes, runnable = sizes_of(options.checked(*windows.shape[-2:])[1]), previous
        if previous is not None and previous.rank_sizes != sizes:
            from evenmoe.planner.elastic import carry_over

            runnable = carry_over(previous, windows, sizes)
        others = compared_with(windows, ranks, runnable)
        if not min(sizes):
            others.pop("default placement", None)
        judgement = None
        with table_console(sys.stderr).status(f"planning {windows.shape[1]} layers for {len(goal)} windows …"):
            placement = plan_with(self.planner, goal[0] if len(goal) == 1 else goal, options)
            if in_slot_order:
                placement = without_order(placement)
            if not self.all_:
                in_use = list(others.values())[-1] if others else None
                judgement = judge_plan(
                    windows,
                    options,
                    in_use,
                    planner=self.planner,
                    mean=self.mean,
                    in_slot_order=in_slot_order,
                    **_tokens(contents),
                )
        numbers = contents.layer_ids or tuple(range(windows.shape[1]))
        notes = [*contents.notes, *notes_on_layers, *notes_on_previous]
        if contents.trace is not None and contents.trace.routing is not None:
            divided = judgement is not None and judgement.held_out.unit in ("requests", "tokens")
            used = "only judged by `routing`" if divided else "left `routing` unused"
            notes.append(f"{used}: a plan is made from loads")
        if len(windows) < len(load):
            notes.append(f"merged {len(load)} windows into {len(windows)} (--most-windows)")
        if self.objective == "decode":
            notes.append(self._decode_note(windows, options, placement, others, judgement))
        notes += gaps(windows, numbers)
        if previous is not runnable:
            notes.append("compared with the placement of --previous as the fewest copies carry it over to this world")
        if self.out is not None:
            metadata = dict(contents.metadata)
            notes += write(self.out, placement, format=to, layer_ids=contents.layer_ids, metadata=metadata)
        bound = lower_bound(load.sum(axis=0), **world) if RULES.get(rule).shares_evenly else None
        rows = compare(windows, {**others, "planned": placement}, rule, judgement)
        name = RULES.get(rule).name
        request = Request(self.source, self.out, to, world["num_nodes"], self.groups, self.planner, name)
        shown_engine = None
        if engine is not None and self.out is not None:
            shown_engine = engine_outcome(engine, self.out, placement, options, judgement)
        found = Outcome(
            request, contents, windows, len(goal), numbers, placement, previous, rows, bound, judgement, shown_engine
        )
        file = sys.stderr if self.out == "-" else sys.stdout
        if self.json:
            print_json({**found.summary(), "notes": notes}, file)
        else:
            found.print_on(table_console(file, width=120))
            print_notes(notes)
        return 0

    def _check_target(self) -> Engine | None:
        """Before anything is read: planning may take minutes."""
        with suppress(OSError):  # one of them is no file, or not yet
            if self.out is not None and Path(self.out).samefile(self.source) and Path(self.out).is_file():
                raise ConstraintError("--out", self.out, "must not be the input", "name another file")
        if self.to not in _PLACEMENT_FORMATS and find_format("--to", self.to).kind != "placement":
            fitting = ", ".join(_PLACEMENT_FORMATS)
            raise ConstraintError("--to", repr(self.to), "must be a format of placements", f"use one of {fitting}")
        engine = find_engine(self.for_)
        if engine is not None:
            check_for(engine, self.out, self.rule, self.to, (PlanCommand.rule, PlanCommand.to))
        return engine

    def _numbered(self, contents: Contents) -> tuple[Contents, list[str]]:
        """The load with its layers numbered as in the known model that has its sizes, if it does not number them."""
        from evenmoe.formats.layer_numbers import ranges
        from evenmoe.traces.models import layers_of_model

        if contents.layer_ids is not None or self.layers is not None:
            return contents, []
        assert contents.load is not None
        trace, (layers, experts) = contents.trace, contents.load.shape[1:]
        found = layers_of_model(
            layers,
            experts,
            top_k=None if trace is None else trace.top_k,
            title=Path(self.source).stem,
            model=contents.metadata.get("model"),
        )
        if found is None:
            return contents, []
        name, numbers = found
        note = (
            f"layers are numbered {ranges(numbers)} as in {name}, {layers} layers of {experts} experts (--first-layer)"
        )
        return replace(contents, layer_ids=numbers), [note]

    def _top_k(self, contents: Contents) -> int | None:
        """Of decode: as given, or else as in the trace."""
        if self.top_k is not None or self.objective != "decode" or contents.trace is None:
            return self.top_k
        return contents.trace.top_k

    def _decode_note(
        self,
        windows: FloatArray,
        options: PlanOptions,
        placement: Placement,
        others: Mapping[str, Placement],
        judgement: JudgedPlan | None,
    ) -> str:
        """What steps cost under the plan and what it is compared with, since PAR says only how even tokens are."""
        from evenmoe.planner.decode import mean_step_costs

        unseen = judgement is not None
        judged, planned = (judgement.held_out.judged, judgement.placement) if unseen else (windows, placement)
        cost = float(mean_step_costs(judged, planned, options).mean())
        text = f"decode: the costliest rank of a step costs {cost:.0f} rows"
        for name, other in others.items():
            ratio = cost / float(mean_step_costs(judged, other, options).mean())
            text += f", {ratio:.3f} of the {name}'s"
        drawn = "windows that the plan was not made from" if unseen else "the windows that the plan was made from"
        return f"{text} (steps drawn from {drawn})"

    def _read_previous(self, contents: Contents, *, are_certain: bool) -> tuple[Placement | None, list[str]]:
        """The placement in use, row by row the load's layers; and what of it is no part of the plan.

        Rows are matched by the layers' numbers, unless these are not certain and those of the placement contradict.
        """
        if self.previous is None:
            return None, []
        from evenmoe.formats.contents import ReadOptions
        from evenmoe.formats.layer_numbers import MTP_LAYERS, ranges
        from evenmoe.formats.reading import read_placement
        from evenmoe.placement import layers_of

        assert contents.load is not None
        known = ReadOptions(num_ranks=self.ranks, num_experts=contents.load.shape[-1])
        found = read_placement(self.previous, known, argument="--previous", own_ranks=True)
        assert found.placement is not None
        notes = ["the MTP layer of --previous is no part of the plan"] if MTP_LAYERS in found.metadata else []
        ours, theirs = contents.layer_ids, found.layer_ids
        if ours is None or theirs is None or ours == theirs:
            return found.placement, notes
        if not set(ours) <= set(theirs):
            if not are_certain:
                return found.placement, notes
            raise ConstraintError(
                "--previous",
                f"a placement of the layers {ranges(theirs)}",
                f"must hold the load's layers, {ranges(ours)}",
                "choose the layers of the load with --layers, or the placement of the same model",
            )
        # Dense layers have rows in some formats, and a load may be of some layers only.
        return layers_of(found.placement, [theirs.index(number) for number in ours]), notes

    def _sizes(self, previous: Placement | None) -> tuple[int, int | list[int]]:
        ranks = self.ranks or (None if previous is None else previous.num_ranks)
        slots = None if self.slots is None else _slots(self.slots)
        if slots is None and previous is not None:
            slots = _slots_like(previous, ranks or 1)
        if ranks is None or slots is None:
            name = "--ranks" if ranks is None else "--slots"
            raise MissingArgumentError(
                name,
                "not given",
                "must say how large the world is",
                f"pass {name}, or --previous with the placement in use",
            )
        return ranks, slots


def _slots(text: str) -> int | list[int]:
    """The number of all slots, or those of each rank, that --slots gives.

    >>> _slots("72"), _slots("9,9,8,8")
    (72, [9, 9, 8, 8])
    """
    numbers = text.split(",")
    if not all(re.fullmatch(r"\s*\d{1,9}\s*", number) for number in numbers):
        rule, fix = "must be a number, or one for each rank", "write 72, or 9,9,8,8"
        raise ConstraintError("--slots", repr(text), rule, fix)
    return int(text) if len(numbers) == 1 else [int(number) for number in numbers]


def _slots_like(previous: Placement, ranks: int) -> int | list[int]:
    """The slots of the placement in use; on more or fewer ranks, as many on each as the widest had there."""
    if ranks == previous.num_ranks:
        return previous.num_slots if previous.is_even else list(previous.rank_sizes)
    return max(previous.rank_sizes) * ranks


def _tokens(contents: Contents) -> dict[str, npt.NDArray[np.integer] | None]:
    """The tokens of a trace, which can be divided where there is one window."""
    trace = contents.trace
    return {} if trace is None else {"routing": trace.routing, "seq_start": trace.seq_start}


command = make_command("plan", PlanCommand)
