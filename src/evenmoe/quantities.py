"""The vocabulary of results: every figure that evenmoe shows has one name, one unit, one definition and one look.

A figure of `QUANTITIES` has its name as its key in `--json` and as its attribute in Python; tables, the page and
docs/json.md take label, unit and definition from here. `metrics` and `simulator.result` compute the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

NOTHING = "\u2013"  # a value that does not exist, such as a gain over a time of zero
MINUS = "\u2212"  # not a hyphen, which lines break after
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Unit:
    """A unit as shown, and how many base units it holds."""

    name: str
    size: float


TIMES = (Unit("µs", 1.0), Unit("ms", 1e3), Unit("s", 1e6))
BYTES = (Unit("B", 1), Unit("KiB", 2**10), Unit("MiB", 2**20), Unit("GiB", 2**30), Unit("TiB", 2**40))
ROWS = (Unit("rows", 1), Unit("thousand rows", 1e3), Unit("million rows", 1e6))


@dataclass(frozen=True)
class Quantity:
    """One figure.

    Attributes:
        name: its key in JSON and its attribute in Python.
        label: the head of its column.
        unit: what the number counts; "" for a plain ratio of two numbers of one unit.
        better: "lower" or "higher", "" where neither is.
        definition: what it is, in one sentence.
        text: how a number is written.
        scale: the units it is written in, the first being `unit`'s; () for that unit alone.
        family: figures of one family are written in one unit; "" for a figure on its own.
    """

    name: str
    label: str
    unit: str
    better: str
    definition: str
    text: Callable[[float], str]
    scale: tuple[Unit, ...] = ()
    family: str = ""

    def shown(self, values: Sequence[float], family: Iterable[float] = ()) -> Shown:
        """The values as they are written, in one unit, which suits the largest of them and of `family`."""
        if not self.scale:
            return Shown(self.unit, tuple(self.text(value) for value in values))
        unit = common_unit([*values, *family], self.scale)
        name = self.unit.replace(self.scale[0].name, unit.name, 1)
        return Shown(name, tuple(self.text(value / unit.size) for value in values), unit.size)


@dataclass(frozen=True)
class Shown:
    """Numbers as they are written.

    Attributes:
        unit: of all of them.
        texts: one per number, without the unit.
        size: base units in one of `unit`.
    """

    unit: str
    texts: tuple[str, ...]
    size: float = 1.0


def common_unit(values: Iterable[float], units: tuple[Unit, ...]) -> Unit:
    """The largest of ascending `units` that does not exceed the largest finite value, the smallest if all are less.

    >>> common_unit([3.0, 4500.0], TIMES).name
    'ms'
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return next((unit for unit in reversed(units) if unit.size <= largest), units[0])


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits; never in exponent form between 0.0001 and 10^9.

    >>> [significant(x) for x in (0, 1234.5, 0.012345, -9.999, 2.5e-7)]
    ['0', '1,230', '0.0123', '−10.0', '2.50 × 10⁻⁷']
    """
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if value == 0:
        return "0"
    mantissa, exponent = f"{abs(value):.{digits - 1}e}".split("e")
    power = int(exponent)
    if -5 < power < 9:
        text = f"{float(f'{mantissa}e{power}'):,.{max(0, digits - 1 - power)}f}"
    else:
        text = f"{mantissa} \u00d7 10{str(power).translate(_SUPERSCRIPT)}"
    return f"{MINUS}{text}" if value < 0 else text


def par(value: float) -> str:
    """A peak-to-average load: three decimals below 10, for what matters is how far it is above 1.

    >>> par(1.00349), par(12.345)
    ('1.003', '12.3')
    """
    return f"{value:.3f}" if value < 9.9995 else significant(value)


def percent(value: float) -> str:
    """With one decimal, a sign, and a space that does not break; `–` for a value that does not exist.

    >>> print(percent(12.34), percent(-0.04), percent(float("nan")), sep=", ")
    +12.3 %, 0.0 %, –
    """
    if not math.isfinite(value):
        return NOTHING
    text = f"{abs(value):,.1f}\u00a0%"
    if text == "0.0\u00a0%":
        return text
    return f"+{text}" if value > 0 else f"{MINUS}{text}"


def share(value: float) -> str:
    """Per cent of a whole, with three significant digits and a space that does not break.

    >>> share(12.345).replace("\\u00a0", " ")
    '12.3 %'
    """
    return f"{significant(value)}\u00a0%"


def count(value: float) -> str:
    """A whole number with thousands separators.

    >>> count(1234567)
    '1,234,567'
    """
    return f"{value:,}"


def counted(value: int, thing: str, things: str = "") -> str:
    """A whole number of things.

    >>> counted(1, "step"), counted(1000, "step"), counted(2, "refresh", "refreshes")
    ('1 step', '1,000 steps', '2 refreshes')
    """
    return f"{count(value)} {thing if value == 1 else things or thing + 's'}"


def steps(value: float) -> str:
    """A number of steps until copies have paid: "never" if they do not.

    >>> steps(float("inf")), steps(0.0), steps(41.26)
    ('never', '0', '41.3')
    """
    return "never" if math.isinf(value) else significant(value)


_RATIO, _STEP, _ROWS, _MEMORY = "max ÷ mean", "µs per step", "rows per step", "B per rank"
_SENT = "Token rows communicated on the way to the experts, to another rank of the same node"
_FAR = "Token rows communicated on the way to the experts, to another node"

#: Every figure of a policy in a simulation, by name.
QUANTITIES = {
    quantity.name: quantity
    for quantity in (
        Quantity("mean_par", "Mean PAR", _RATIO, "lower",
                 "PAR averaged over the judged steps and all layers; a layer without load counts as 1.", par),
        Quantity("worst_par", "Worst PAR", _RATIO, "lower", "The highest PAR of any judged step and layer.", par),
        Quantity("mean_par_per_layer", "Mean PAR of a layer", _RATIO, "lower",
                 "PAR of each layer averaged over the judged steps.", par),
        Quantity("step_time_us", "Step", _STEP, "lower",
                 "Modeled time of a step, averaged over the judged steps: for every layer the busiest rank's experts "
                 "and the exchange of rows; neither copying nor time outside the expert layers is included.",
                 significant, TIMES, "time"),
        Quantity("copy_time_us", "Copying", _STEP, "lower",
                 "Modeled time of copying expert weights per step: that of the first plan spread over the horizon, "
                 "later ones over the judged steps.",
                 significant, TIMES, "time"),
        Quantity("net_time_us", "Step and copying", _STEP, "lower",
                 "Modeled time of a step with its share of copying, averaged over the judged steps: copies between "
                 "steps add their time, the first plan's spread over the horizon; while experts are copied beside the "
                 "steps, the old placement serves, the default one as many steps of the horizon as the first plan's "
                 "copies take.",
                 significant, TIMES, "time"),
        Quantity("total_copy_time_us", "Copying in all", "µs", "lower",
                 "Modeled time of copying expert weights, all steps together.", significant, TIMES),
        Quantity("refresh_copy_time_us", "Copying", "µs per refresh", "lower",
                 "Modeled time of copying expert weights, averaged over refreshes; 0 without one.",
                 significant, TIMES),
        Quantity("gain_percent", "Gain", "%", "higher",
                 "100 % minus step time ÷ step time of the first policy, copying not included; null where that is 0.",
                 percent),
        Quantity("net_gain_percent", "Net gain", "%", "higher",
                 "100 % minus step and copying ÷ step and copying of the first policy; null where that is 0.", percent),
        Quantity("copies", "Copies", "experts", "lower",
                 "How often one expert's weights are moved to a rank that did not hold them, all steps and layers "
                 "together; the first placement is not counted.", count),
        Quantity("refreshes", "Refreshes", "times", "",
                 "How often copies for another placement begin, in all steps; the first placement is not counted.",
                 count),
        Quantity("copies_per_refresh", "Copies", "experts per refresh", "lower",
                 "Copies averaged over refreshes; 0 without one.", significant),
        Quantity("break_even_steps", "Break-even", "steps", "lower",
                 "Steps after which a mean refresh has paid for its copies if steps wait for them: copying time of a "
                 "refresh ÷ step time saved per judged step; never (null) where no time is saved, 0 where copying "
                 "takes none.", steps),
        Quantity("rows_within_node", "Within nodes, per expert", _ROWS, "lower",
                 f"{_SENT}: one for each token and expert; as many come back.", significant, ROWS, "rows"),
        Quantity("rows_between_nodes", "Between nodes, per expert", _ROWS, "lower",
                 f"{_FAR}: one for each token and expert; as many come back.", significant, ROWS, "rows"),
        Quantity("deduplicated_rows_within_node", "Within nodes, per rank", _ROWS, "lower",
                 f"{_SENT}: one for each token and destination rank, however many of its experts are there.",
                 significant, ROWS, "rows"),
        Quantity("deduplicated_rows_between_nodes", "Between nodes, per rank", _ROWS, "lower",
                 f"{_FAR}: one for each token and destination rank, however many of its experts are there.",
                 significant, ROWS, "rows"),
        Quantity("deduplication_percent", "Saved by one row per rank", "%", "higher",
                 "100 % minus rows with one per token and destination rank ÷ rows with one per token and expert; 0 "
                 "where no row leaves its rank.", share),
        Quantity("memory_bytes_per_rank", "Memory", _MEMORY, "lower",
                 "Bytes of expert weights on one rank, all layers.", significant, BYTES),
        Quantity("extra_memory_bytes_per_rank", "Extra memory", _MEMORY, "lower",
                 "What a rank holds beyond the first policy's memory.", significant, BYTES),
        Quantity("extra_memory_percent", "Extra memory", "% per rank", "lower",
                 "Extra memory in per cent of the first policy's memory; null where that is 0.", percent),
    )
}  # fmt: skip

#: Every figure of a policy beside an engine's own balancer, by name; `simulator.beside_own` computes them.
BESIDE_OWN = {
    quantity.name: quantity
    for quantity in (
        Quantity("own_balancer_net_gain_percent", "Own balancer", "%", "higher",
                 "Net gain of the engine's own balancer over the first policy.", percent),
        Quantity("gain_over_own_percent", "Gain over the own balancer", "%", "higher",
                 "100 % minus step and copying under the policy ÷ step and copying under the engine's own balancer; "
                 "null without a policy.", percent),
        Quantity("gain_over_own_lower_percent", "At least", "%", "higher",
                 "Lower limit of that gain, one-sided, which together with those of the other policies that could have "
                 "been taken is wrong in one case of a hundred; null where it cannot be said.", percent),
        Quantity("gain_over_own_upper_percent", "At most", "%", "higher",
                 "Upper limit of that gain over the own balancer, likewise.", percent),
    )
}  # fmt: skip

#: Every figure of a verdict, by name; `evenmoe.evidence` computes them.
EVIDENCE = {
    quantity.name: quantity
    for quantity in (
        Quantity("held_out_gain_percent", "Gain on unseen windows", "%", "higher",
                 "By how much the mean PAR of the placement in use falls under a plan of the first part of the "
                 "recording, in the windows of the last part, which it was not planned on.", percent),
        Quantity("held_out_gain_lower_percent", "At least", "%", "higher",
                 "Lower limit of that gain, one-sided at 1 %, by Student's t over blocks of windows; null with fewer "
                 "than two blocks.", percent),
        Quantity("held_out_gain_upper_percent", "At most", "%", "higher",
                 "Upper limit of that gain, likewise.", percent),
        Quantity("noise_par", "PAR of noise", _RATIO, "",
                 "PAR, averaged over windows and layers, that a balanced router exceeds with a chance of 0.5 % on as "
                 "many assignments.", par),
        Quantity("noise_par_all_tokens", "PAR of noise, summed", _RATIO, "",
                 "The same for all windows together.", par),
        Quantity("more_assignments", "To record", "assignments per layer", "lower",
                 "Assignments to record beside those that there are, so that a gain of 2 % shows; 0 where there are "
                 "enough.", significant),
    )
}  # fmt: skip
