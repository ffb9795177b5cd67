"""`TensorSpec`: what a check may know of a tensor, its shape and dtype; and the checks that need no more."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from evenmoe.errors import ConstraintError, MissingArgumentError, UnsupportedTypeError


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one tensor, without its values.

    Attributes:
        shape: tuple of int.
        dtype: "int8", "int32", "int64", "bool", "float16", "bfloat16", "float32", …; any text, the checks judge it.

    >>> print(TensorSpec((8, 7168), "bfloat16"))
    bfloat16 (8, 7168)
    """

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Allocated(Enum):
    """The type of `ALLOCATED`."""

    ALLOCATED = "allocated"

    def __repr__(self) -> str:
        return "ALLOCATED"


ALLOCATED: Final = Allocated.ALLOCATED
"""An output that the operator allocates itself: there is nothing to check. None would be a null pointer."""

Spec = TensorSpec | Allocated | None


def join_or(words: tuple[object, ...]) -> str:
    """The words as a choice.

    >>> join_or(("int8", "float16", "bfloat16"))
    'int8, float16 or bfloat16'
    """
    *head, last = map(str, words)
    return f"{', '.join(head)} or {last}" if head else last


# Every check below passes over None and ALLOCATED: whether a tensor must be there is a question of its own.


def check_given(argument: str, spec: Spec, fix: str) -> None:
    """None is a `MissingArgumentError`."""
    if spec is None:
        raise MissingArgumentError(argument, None, "must be given", fix)


def check_absent(argument: str, spec: Spec, fix: str) -> None:
    """A tensor that this operator has no use for is a `ConstraintError`."""
    if spec is not None:
        raise ConstraintError(argument, spec, "must be None", fix)


def check_dims(argument: str, spec: Spec, dims: tuple[int, ...], meaning: str) -> None:
    """The number of dimensions must be one of `dims`: `ConstraintError`."""
    if isinstance(spec, TensorSpec) and len(spec.shape) not in dims:
        raise ConstraintError(argument, spec, f"must be {join_or(dims)}-D, {meaning}", f"reshape it to {meaning}")


def check_dtype(argument: str, spec: Spec, supported: tuple[str, ...]) -> None:
    """The dtype must be one of the operator's list: `UnsupportedTypeError`."""
    if isinstance(spec, TensorSpec) and spec.dtype not in supported:
        raise UnsupportedTypeError(argument, spec, f"must be {join_or(supported)}", f"convert it to {supported[0]}")


def check_dtype_of(argument: str, spec: Spec, dtype: str, reason: str) -> None:
    """The dtype must be the one that follows from another argument, which `reason` says: `ConstraintError`."""
    if isinstance(spec, TensorSpec) and spec.dtype != dtype:
        raise ConstraintError(argument, spec, f"must be {dtype}, {reason}", f"convert it to {dtype}")


def check_shape(argument: str, spec: Spec, shape: tuple[int, ...], meaning: str) -> None:
    """The shape must be exactly this one: `ConstraintError`."""
    if isinstance(spec, TensorSpec) and spec.shape != shape:
        raise ConstraintError(argument, spec, f"must have the shape {shape}, {meaning}", f"give it the shape {shape}")


def check_length(argument: str, spec: Spec, at_least: int, meaning: str) -> None:
    """The first dimension must have room for so many entries: `ConstraintError`."""
    if isinstance(spec, TensorSpec) and spec.shape[0] < at_least:
        raise ConstraintError(
            argument, spec, f"must have at least {at_least} entries, {meaning}", f"give it {at_least} entries or more"
        )
