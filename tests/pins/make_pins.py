"""Writes the pins beside this file: `python -m tests.pins.make_pins [NAME…]`, from the root of the repository.

Run it only where a pin is meant to change, look at what `git diff` shows of the numbers, and say why in the commit.
With names (plans, operators, commands), only those files are written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.pins import commands, operators, plans
from tests.pins.cases import Cases, Pin

AREAS: dict[str, Cases] = {"plans": plans.cases, "operators": operators.cases, "commands": commands.cases}


def path_of(area: str) -> Path:
    return Path(__file__).with_name(f"{area}.json")


def stored_pins(area: str) -> dict[str, Pin]:
    return json.loads(path_of(area).read_text("utf-8"))


def computed(area: str, name: str) -> Pin:
    """The pin as it comes back from JSON, whose floats are exact and whose tuples are lists."""
    return json.loads(json.dumps(AREAS[area][name]()))


def _lines(pins: dict[str, Pin]) -> str:
    """JSON with a line for every entry of a pin, and for every one of its numbers."""

    def entry(key: str, value: Any) -> str:
        if key != "numbers":
            return f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
        rows = ",\n".join(f"   {json.dumps(row, ensure_ascii=False)}" for row in value)
        return f"  {json.dumps(key)}: [\n{rows}\n  ]"

    blocks = [
        f" {json.dumps(name, ensure_ascii=False)}: {{\n" + ",\n".join(entry(*item) for item in pin.items()) + "\n }"
        for name, pin in pins.items()
    ]
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def write_pins(areas: list[str]) -> None:
    for area in areas:
        pins = {name: computed(area, name) for name in AREAS[area]}
        path_of(area).write_text(_lines(pins), "utf-8")
        print(f"{path_of(area).name}: {len(pins)} pins")


if __name__ == "__main__":
    write_pins(sys.argv[1:] or list(AREAS))
