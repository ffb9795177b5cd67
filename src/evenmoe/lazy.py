"""Names of a package that are imported when first used, so that importing the package is light."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for the package whose names `home` maps to their modules (PEP 562).

    A name may also be that of a module of the package itself.

    >>> getattr_, _ = lazy_names("evenmoe", {"Placement": "evenmoe.placement"})
    >>> getattr_("Placement").__name__
    'Placement'
    """
    names = vars(sys.modules[package])

    def find(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(home[name])
        value = names[name] = module if home[name] == f"{package}.{name}" else getattr(module, name)
        return value

    def known() -> list[str]:
        return sorted({*names, *home})

    return find, known
