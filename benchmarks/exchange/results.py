"""Measured figures in a file: with the machine, the versions and the load; and a comparison with an older file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.exchange.measure import Figures
from evenmoe.errors import ConstraintError, require
from evenmoe.io.output import whole_file

SCHEMA = 1
_PACKAGES = ("evenmoe", "numba", "numpy", "torch", "transformers")


def machine() -> dict[str, Any]:
    """Processor, number of cores, kernel, memory in GiB, and Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of the packages that take part; "not installed" for those that are not here."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def about(steps: int, load_before: float) -> dict[str, Any]:
    """What figures were measured on.

    Args:
        steps: of which the figures are medians.
        load_before: the machine's load average of a minute when the measurement began.
    """
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "versions": versions(),
        "load_average": {"before": round(load_before, 2), "after": round(os.getloadavg()[0], 2)},
        "steps": steps,
    }


def document(
    measured: Mapping[str, Mapping[str, Figures]], *, steps: int, load_before: float, absent: Mapping[str, str]
) -> dict[str, Any]:
    """What is written: the figures by work and contestant, and what they were measured on.

    Args:
        steps, load_before: as in `about`.
        absent: why a peer was not measured, by its name.
    """
    work = {work: {name: _rounded(one) for name, one in of_work.items()} for work, of_work in measured.items()}
    return about(steps, load_before) | {"not_measured": dict(absent), "work": work}


def write(path: Path, found: Mapping[str, Any]) -> None:
    with whole_file(path) as file:
        file.write((json.dumps(found, indent=1) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """A file that `write` wrote.

    Raises:
        ConstraintError: it is none.
    """
    found = json.loads(path.read_text("utf-8"))
    schema = found.get("schema") if isinstance(found, dict) else None
    require(schema == SCHEMA, "file", f"{path} of schema {schema!r}", f"must have schema {SCHEMA}", "measure it anew")
    return found


def regressions(now: Mapping[str, Any], then: Mapping[str, Any], baseline: str, margin: float) -> list[str]:
    """A sentence for each of evenmoe's contestants whose CPU time, as a share of the baseline's, has grown too much.

    Args:
        now, then: `document`s; only what both have measured is compared, and that must be something.
        baseline: the contestant of the same run by whose CPU time each one is divided.
        margin: the factor by which a share may grow.

    Raises:
        ConstraintError: a margin below 1, or no work of evenmoe with the baseline that both have measured.

    >>> def of(ours):
    ...     return {"work": {"T1": {"ExpertParallel, threads": {"cpu_ms": ours}, "by hand": {"cpu_ms": 10.0}}}}
    >>> regressions(of(6.0), of(4.0), "by hand", 1.2)
    ['T1, ExpertParallel, threads: 0.600 of by hand, 0.400 before: 1.50 times as much, and 1.20 is allowed']
    >>> regressions(of(4.4), of(4.0), "by hand", 1.2)
    []
    """
    require(margin >= 1, "margin", margin, "must be 1 or more", "a share may grow by 1.25, for example")
    found, compared = [], 0
    for work in now["work"].keys() & then["work"].keys():
        of_now, of_then = now["work"][work], then["work"][work]
        if baseline not in of_now.keys() & of_then.keys():
            continue
        for name in sorted(of_now.keys() & of_then.keys()):
            if not name.startswith(("ExpertParallel", "operators")):
                continue
            compared += 1
            share, before = (one[name]["cpu_ms"] / one[baseline]["cpu_ms"] for one in (of_now, of_then))
            if share > margin * before:
                found.append(
                    f"{work}, {name}: {share:.3f} of {baseline}, {before:.3f} before: {share / before:.2f} times as "
                    f"much, and {margin:.2f} is allowed"
                )
    if not compared:
        fix = "measure the same work, contestants and baseline"
        raise ConstraintError("check", f"a file that shares no work with {baseline!r}", "must share some", fix)
    return sorted(found)


def _rounded(figures: Figures) -> dict[str, float]:
    return {key: float(f"{value:.4g}") for key, value in asdict(figures).items()}
