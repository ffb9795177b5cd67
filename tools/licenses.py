"""The licenses of evenmoe's dependencies, as their packages state them: `python tools/licenses.py [EXTRA ...]`.

It lists what is installed here, of the dependencies and of those of the extras, each with what it depends on in turn;
without extras, what `pip install evenmoe` brings. One that states none is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(name: str, extras: Iterable[str] = ()) -> dict[str, Distribution]:
    """The package and all that it needs here, by canonical name; what is not installed is left out."""
    found: dict[str, Distribution] = {}
    asked, waiting = set(), [(name, frozenset(extras))]
    while waiting:
        one = waiting.pop()
        if one in asked:
            continue
        asked.add(one)
        package, wanted = one
        try:
            here = distribution(package)
        except PackageNotFoundError:
            continue
        found[canonicalize_name(package)] = here
        for text in here.requires or ():
            needs = Requirement(text)
            if needs.marker is None or any(needs.marker.evaluate({"extra": extra}) for extra in {"", *wanted}):
                waiting.append((canonicalize_name(needs.name), frozenset(needs.extras)))
    return found


def license_of(here: Distribution) -> str | None:
    """A package's SPDX expression, or else its classifiers, or else the first line of its license; None without."""
    metadata = here.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = metadata.get_all("Classifier") or []
    names = [one.rpartition(" :: ")[2] for one in classifiers if one.startswith("License ::")]
    if names := [one for one in names if one != "OSI Approved"]:
        return ", ".join(names)
    text = (metadata.get("License") or "").strip()
    return text.splitlines()[0] if text else None


def main(extras: list[str]) -> int:
    found = closure("evenmoe", extras)
    del found["evenmoe"]
    missing = [name for name, here in found.items() if license_of(here) is None]
    for name, here in sorted(found.items()):
        print(f"{name:<28} {here.version:<14} {license_of(here) or 'states none'}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
