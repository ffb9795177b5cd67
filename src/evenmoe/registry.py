"""Things that go by a name: evenmoe's own, those of installed packages, and the user's."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module, util
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

from evenmoe.errors import ConstraintError, EvenmoeError

Thing = TypeVar("Thing")
_importing = threading.RLock()  # ranks that are threads ask for one file at once


class Registry(Generic[Thing]):
    """Finds things of one kind by name, and imports them when they are asked for.

    A name is one of evenmoe's own, one that was added, one that an installed package declares as an entry point, or
    `py:module:attribute` with a module, or a file that ends in .py, of the user's.

    Args:
        kind: what the things are, in the singular, as arguments and options call them: "rule".
        own: {name: "module:attribute"}, in the order in which they are listed.
        type: "module:class" of which they are instances; imported with the first of them.
        wanted: what such an object is, for messages: "an evenmoe.rules.rule.Rule".
        group: of the entry points.

    >>> from math import pi
    >>> numbers = Registry("number", {"pi": "math:pi"}, "builtins:float", "a float", "no.group")
    >>> numbers.get("pi") == numbers.get("py:math:pi") == numbers.get(pi)
    True
    >>> numbers.add("half", 0.5)
    >>> list(numbers)
    ['pi', 'half']
    >>> numbers.get("third")
    Traceback (most recent call last):
    evenmoe.errors.ConstraintError: `number` is 'third': it must be one of pi, half, or py:module:attribute; choose \
one of them.
    """

    def __init__(self, kind: str, own: Mapping[str, str], type: str, wanted: str, group: str) -> None:
        self._kind, self._type_name, self._wanted, self._group = kind, type, wanted, group
        self._own = tuple(own)
        self._places = dict(own)
        self._things: dict[str, Thing] = {}
        self._looked_for_packages = False

    def __iter__(self) -> Iterator[str]:
        self._look_for_packages()
        return iter({**self._places, **self._things})

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def add(self, name: str, thing: Thing) -> None:
        """Let `thing` be found by `name` in this process.

        Raises:
            ConstraintError: the name is taken by another thing, or the thing is of another kind.
        """
        if name in self and self.get(name) is not thing:
            raise ConstraintError("name", repr(name), f"must not be taken by another {self._kind}", "choose another")
        self._things[name] = self._checked(name, thing)

    def get(self, name: str | Thing) -> Thing:
        """The thing of that name; a thing itself is returned as it is.

        Raises:
            ConstraintError: there is none, it cannot be imported, or it is of another kind.
        """
        if not isinstance(name, str):
            return self._checked(repr(name), name)
        if name not in self._things:
            if name in self._places or name in self:
                self._things[name] = self._checked(name, import_attribute(self._kind, name, self._places[name]))
            elif name.startswith("py:"):
                return self._checked(
                    name, import_attribute(self._kind, name, name[3:])
                )  # a path means the folder of now
            else:
                raise ConstraintError(
                    self._kind,
                    repr(name),
                    f"must be one of {', '.join(self)}, or py:module:attribute",
                    "choose one of them",
                )
        return self._things[name]

    def is_own(self, thing: Thing) -> bool:
        """Whether it is one of evenmoe's own, that were asked for by name."""
        return any(self._things.get(own) is thing for own in self._own)

    def _look_for_packages(self) -> None:
        if not self._looked_for_packages:
            self._looked_for_packages = True
            for entry in entry_points(group=self._group):
                self._places.setdefault(entry.name, f"{entry.module}:{entry.attr}")

    @cached_property
    def _type(self) -> type:
        module, _, name = self._type_name.partition(":")
        return getattr(import_module(module), name)

    def _checked(self, name: str, thing: object) -> Thing:
        if not isinstance(thing, self._type):
            what = f"{name}, of type {type(thing).__name__}"
            raise ConstraintError(self._kind, what, f"must be {self._wanted}", "pass one, or its name")
        return thing  # pyright: ignore[reportReturnType]


@contextmanager
def blaming(kind: str, name: str, own: bool, *passing: type[Exception]) -> Iterator[None]:
    """Let what fails in a user's thing be said to be that thing's, by a ConstraintError, and not a mistake in evenmoe.

    What fails in one of evenmoe's `own` stays as it is. So do errors of evenmoe, since a thing may raise them for what
    is wrong with the call, those of the types `passing`, and a lack of memory.
    """
    try:
        yield
    except (EvenmoeError, MemoryError, *passing):
        raise
    except (Exception, SystemExit) as error:  # a user's code may leave by sys.exit
        if own:
            raise
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise ConstraintError(kind, name, f"must not fail, and raised {what}", "correct it") from error


def import_attribute(kind: str, name: str, place: str) -> object:
    """What `place`, module:attribute or file.py:attribute, holds.

    Raises:
        ConstraintError: it cannot be imported; the message calls it `name`, which is to be a `kind`.
    """
    module, _, attribute = place.rpartition(":")
    if not module or not attribute:
        raise ConstraintError(
            kind, repr(name), "must be py:module:attribute or py:file.py:attribute", "name a module and what it holds"
        )
    try:
        return getattr(_file(module) if module.endswith(".py") else import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever a user's module does when it is imported
        problem = f"{type(error).__name__}: {error}"
        raise ConstraintError(kind, repr(name), f"must be importable, and is not ({problem})", "mend it") from error


def _file(path: str) -> ModuleType:
    """A file is imported once, under its whole path, whatever other files are called."""
    whole = str(Path(path).resolve())
    with _importing:
        if whole not in sys.modules:
            spec = util.spec_from_file_location(whole, whole)
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[whole] = util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:  # whatever the file does: half a module must not be found the next time
                del sys.modules[whole]
                raise
        return sys.modules[whole]
