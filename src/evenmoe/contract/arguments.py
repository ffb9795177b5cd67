"""What every call object goes through: from keyword arguments to its fields, and whole numbers among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from operator import index
from typing import ParamSpec, TypeVar

from evenmoe.errors import ConstraintError

_Call = TypeVar("_Call")
_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


def takes(
    call_type: Callable[_Arguments, _Call],
) -> Callable[[Callable[[_Call], _Result]], Callable[_Arguments, _Result]]:
    """Turns a function of one call object into a function of that object's fields, so that they are listed once."""

    def decorate(check: Callable[[_Call], _Result]) -> Callable[_Arguments, _Result]:
        @wraps(check)
        def check_fields(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            return check(call_type(*args, **kwargs))

        setattr(check_fields, "__signature__", inspect.signature(call_type))  # noqa: B010  what help() shows
        return check_fields

    return decorate


def check_integers(call: object, names: tuple[str, ...]) -> None:
    """Refuses attributes that are no whole numbers, None included: `ConstraintError`. NumPy's become Python's."""
    for name in names:
        value = getattr(call, name)
        if type(value) is not int:
            try:
                setattr(call, name, index(value))
            except TypeError:
                raise ConstraintError(name, repr(value), "must be an integer", "pass an int") from None
