"""`write_report`: the page and its pictures on disk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from evenmoe.io.output import made_folder, whole_files
from evenmoe.report.content import Content
from evenmoe.report.page import page
from evenmoe.simulator.result import Simulation


def write_report(
    simulation: Simulation,
    path: str | Path,
    command: str,
    inputs: Mapping[str, str] | None = None,
    png_dir: str | Path | None = None,
) -> list[Path]:
    """Write one self-contained HTML page about a replay and, on request, its pictures as PNGs.

    The same arguments give the same bytes. The page asks for nothing outside itself and runs no script. All files take
    their names once all are complete.

    Args:
        simulation: what was found; its first policy is the baseline.
        path: of the page; a file there is replaced.
        command: the command line that made it, shown as it is.
        inputs: SHA-256 in hexadecimal of every file that was read, by path.
        png_dir: folder for the PNGs, made if it is not there; None for none.

    Returns:
        The files written, the page first.

    Raises:
        OSError: a file cannot be written; `filename` names it, and what was there has not changed.
    """
    content = Content(simulation, command, dict(inputs or {}))
    written = {Path(path): page(content).encode("utf-8", "backslashreplace")}
    with ExitStack() as folder:
        if png_dir is not None:
            from evenmoe.report.pictures import draw_pictures  # imports matplotlib, 0.4 s that the page does not need

            written |= {Path(png_dir, name): picture for name, picture in draw_pictures(content).items()}
            folder.enter_context(made_folder(Path(png_dir)))
        with whole_files() as files:
            for target, data in written.items():
                files.write(target, data)
    return list(written)
