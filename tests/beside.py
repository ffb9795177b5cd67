"""What lies beside this checkout where it does: measured traces, and the operators' published pages.

A test of it also runs on data that the project makes, and takes what lies here as further parameters. Where it is
absent these are not made, so that nothing is skipped for want of what a clone cannot have.
"""

from __future__ import annotations

from pathlib import Path

BESIDE = Path(__file__).resolve().parents[1].parent / "shared"
REFERENCE = BESIDE / "reference"
TRACES = BESIDE / "data" / "traces"


def measured_names(*names: str) -> list[str]:
    """Those of the measured traces that are there, by name."""
    return [name for name in names if (TRACES / f"{name}.npz").is_file()]
