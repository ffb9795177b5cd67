"""How numbers are written: three significant digits, thousands separators, one unit for a whole column."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

NOTHING = "\u2013"  # a value that does not exist, such as a gain over a time of zero
_MINUS = "\u2212"  # not a hyphen, which lines break after
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Unit:
    """A unit as shown, and how many base units it holds."""

    name: str
    size: float


TIMES = (Unit("µs", 1.0), Unit("ms", 1e3), Unit("s", 1e6))
BYTES = (Unit("B", 1), Unit("KiB", 2**10), Unit("MiB", 2**20), Unit("GiB", 2**30), Unit("TiB", 2**40))
ROWS = (Unit("rows", 1), Unit("thousand rows", 1e3), Unit("million rows", 1e6))


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
        return "∞" if value > 0 else f"{_MINUS}∞"
    if value == 0:
        return "0"
    mantissa, exponent = f"{abs(value):.{digits - 1}e}".split("e")
    power = int(exponent)
    if -5 < power < 9:
        text = f"{float(f'{mantissa}e{power}'):,.{max(0, digits - 1 - power)}f}"
    else:
        text = f"{mantissa} \u00d7 10{str(power).translate(_SUPERSCRIPT)}"
    return f"{_MINUS}{text}" if value < 0 else text


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
    return f"+{text}" if value > 0 else f"{_MINUS}{text}"


def count(value: int) -> str:
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
