"""The errors that a user can cause: each names the argument, its value, the rule and the fix.

Every class carries `.status`, the code that the Ascend operators' first stage returns for the same mistake
(specification §1.7, §2.13, §3.6): 161001 for a missing argument, 161002 for an unsupported type or an overlong
group name, 561002 for every shape, range and consistency rule.
"""

from __future__ import annotations

from operator import index


class EvenmoeError(ValueError):
    """A mistake in a call, said in one sentence: argument, value, rule, fix.

    Attributes: `argument` (its name), `value` (as text), `rule`, `fix`, `status` (int, the Ascend status code).

    >>> error = EvenmoeError("top_k", 17, "must be between 1 and 16", "route each token to at most 16 experts")
    >>> print(error, error.status)
    `top_k` is 17: it must be between 1 and 16; route each token to at most 16 experts. 561002
    """

    status = 561002

    def __init__(self, argument: str, value: object, rule: str, fix: str) -> None:
        super().__init__(argument, value, rule, fix)  # all four, so that the error survives pickling
        self.argument, self.value, self.rule, self.fix = argument, str(value), rule, fix

    def __str__(self) -> str:
        return f"`{self.argument}` is {self.value}: it {self.rule}; {self.fix}."


class MissingArgumentError(EvenmoeError):
    """A required argument was not given (status 161001)."""

    status = 161001


class UnsupportedTypeError(EvenmoeError):
    """A dtype, or the length of a group name, that the operator does not take (status 161002)."""

    status = 161002


class ConstraintError(EvenmoeError):
    """A shape, a range or the consistency of several arguments is violated (status 561002)."""


def require(holds: bool, argument: str, value: object, rule: str, fix: str) -> None:
    """Raise a `ConstraintError` of these four unless `holds`.

    >>> require(4 <= 16, "top_k", 4, "must be at most 16", "route each token to at most 16 experts")
    """
    if not holds:
        raise ConstraintError(argument, value, rule, fix)


def as_integer(argument: str, value: object, fix: str = "pass an int") -> int:
    """A whole number of Python's, NumPy's or torch's as Python's; a `ConstraintError` for anything else.

    >>> as_integer("top_k", True)
    1
    """
    try:
        return index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise ConstraintError(argument, repr(value), "must be an integer", fix) from None


class RankDisagreementError(EvenmoeError):
    """Ranks called with sizes that must be equal everywhere, or one of them was refused (status 561002)."""


class FileFormatError(EvenmoeError):
    """A file is not what it should be; the argument is its path (status 161002)."""

    status = 161002


class LostRankError(RuntimeError):
    """A rank ended, failed or stayed away while others waited for it; `ranks` (tuple of int) says which."""

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message, ranks)
        self.message, self.ranks = message, ranks

    def __str__(self) -> str:
        return self.message
