"""Planting a bug: a function's code is replaced by what it would be had the source another text in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import CodeType, FunctionType, ModuleType


@contextmanager
def mutated(module_name: str, changes: Mapping[str, str]) -> Iterator[None]:
    """Run the functions of a module as if each key of `changes` were its value in the source.

    Only the code inside functions changes, in place, so whoever imported them runs the mutant too.

    Raises:
        AssertionError: a text that is not there exactly once, or no function is changed: the mutation tests nothing.
    """
    module = import_module(module_name)
    assert module.__file__ is not None
    source = mutant = Path(module.__file__).read_text(encoding="utf-8")
    for old, new in changes.items():
        assert mutant.count(old) == 1, f"{module_name} has {mutant.count(old)} times, not once: {old}"
        mutant = mutant.replace(old, new)
    before, after = (_codes(compile(text, module.__file__, "exec")) for text in (source, mutant))
    functions = dict(_functions(module))
    changed = {path for path in before if _behaviour(before[path]) != _behaviour(after[path])}
    assert changed, f"{module_name} runs the same with {changes}"
    assert changed <= functions.keys(), f"{sorted(changed - functions.keys())} cannot be replaced"
    originals = {path: functions[path].__code__ for path in changed}
    try:
        for path in changed:
            functions[path].__code__ = after[path]
        yield
    finally:
        for path, code in originals.items():
            functions[path].__code__ = code


def fails(check: Callable[[], object]) -> bool:
    """Whether a check raises, in whatever way."""
    try:
        check()
    except Exception:
        return True
    return False


def _codes(module: CodeType, prefix: str = "") -> dict[str, CodeType]:
    """{path: code} of a module's functions and methods; what is nested in a function belongs to it."""
    found = {}
    for code in module.co_consts:
        if isinstance(code, CodeType):
            path = prefix + code.co_name
            # A class body stores its name first; everything else at this level is a function, or a lambda of one.
            if "__module__" in code.co_names and "__qualname__" in code.co_names:
                found |= _codes(code, path + ".")
            else:
                found[path] = code
    return found


def _behaviour(code: CodeType) -> tuple:
    """What a code does, whatever the lines it stands on."""
    constants = tuple(_behaviour(c) if isinstance(c, CodeType) else (type(c), c) for c in code.co_consts)
    return code.co_code, constants, code.co_names, code.co_varnames


def _functions(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            for method_name, method in vars(value).items():
                method = getattr(method, "__func__", getattr(method, "fget", method))
                if isinstance(method, FunctionType):
                    yield f"{name}.{method_name}", inspect.unwrap(method)
        elif isinstance(value, FunctionType):
            yield name, inspect.unwrap(value)
