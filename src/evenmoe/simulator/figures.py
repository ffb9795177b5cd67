"""Figures of a simulation, by name: evenmoe's own, those of packages, and yours.

A figure is a function of a `Simulation` that returns a `matplotlib.figure.Figure`; `width`, `height` (inches) and
`style` are passed to it as they are given to `Simulation.plot`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from evenmoe.errors import ConstraintError
from evenmoe.registry import Registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: evenmoe's own, those of packages (entry points `evenmoe.figures`), and the user's.
FIGURES: Registry[Callable[..., Figure]] = Registry(
    "figure",
    {name: f"evenmoe.report.pictures:{name}" for name in ("par", "load", "replicas", "traffic", "time")},
    "collections.abc:Callable",
    "a function of a simulation that returns a matplotlib Figure",
    "evenmoe.figures",
)


def find_figure(name: str) -> Callable[..., Figure]:
    """The figure of that name in `FIGURES`.

    Raises:
        ConstraintError: there is none, or matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 (the figures import it, and would only say that they failed)
    except ImportError:
        raise ConstraintError(
            "matplotlib", "not installed", "is needed for figures", "run `pip install matplotlib`"
        ) from None
    return FIGURES.get(name)
