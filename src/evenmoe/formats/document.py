"""`Document`: a file opened and parsed, not yet understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from evenmoe.errors import FileFormatError
from evenmoe.io import ALLOWANCE_BYTES as ALLOWANCE_BYTES

_MOST_TOKENS = 2.0**53


@dataclass(frozen=True)
class Document:
    """A parsed file.

    Attributes:
        name: the path, "-" for standard input; errors begin with it.
        container: as in `Format.containers`.
        value: plain data. Lists of numbers are int64 or float64 arrays, and of as many dimensions as the lists nest
            where their lengths agree; other lists are lists, objects are mappings.
    """

    name: str
    container: str
    value: Any

    def refuse(self, value: object, rule: str, fix: str) -> FileFormatError:
        return FileFormatError(self.name, value, rule, fix)

    @property
    def fields(self) -> Mapping[Any, Any]:
        """The value as a mapping; empty for anything else, so that `matches` can ask for keys."""
        return self.value if isinstance(self.value, Mapping) else {}

    def says(self, key: str, word: str) -> bool:
        """Whether the field `key` is this word, and not an array that could be compared with it element by element."""
        value = self.fields.get(key)
        return isinstance(value, str) and value == word

    def integer(self, value: object, where: str) -> int:
        """`value`, if it is an integer that fits 63 bits."""
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not -(2**63) <= value < 2**63:
            raise self.refuse(f"with {where} {_short(value)}", "must hold an integer there", "write a whole number")
        return int(value)

    def numbers(self, value: object, where: str, ndim: tuple[int, ...], *, integers: bool = False) -> np.ndarray:
        """`value`, if it is an array of numbers of one of the dimensions `ndim`, none empty; int64 or float64."""
        axes = " or ".join(str(n) for n in ndim)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
            raise self.refuse(
                f"with {where} {_short(value)}",
                f"must hold numbers there, in {axes} dimensions, rows of one length",
                "check how the file was written",
            )
        if value.ndim not in ndim or value.size == 0:
            raise self.refuse(
                f"with {where} of shape {value.shape}",
                f"must have {axes} dimensions there, none empty",
                "check how the file was written",
            )
        if value.dtype.kind == "f":
            if integers:
                raise self.refuse(
                    f"with {where} of dtype {value.dtype}", "must hold integers there", "write whole numbers"
                )
            with np.errstate(invalid="ignore"):  # a signalling NaN warns here, and is found later like any other
                return value.astype(np.float64, copy=False)
        if value.dtype == np.uint64 and value.max() >= 2**63:
            raise self.refuse(f"with {where} up to {value.max()}", "must fit 63 bits there", "check for an overflow")
        if not integers:
            self.check_total(value, where)
        return value.astype(np.int64, copy=False)

    def check_total(self, counts: np.ndarray, where: str) -> None:
        """Refuse counts whose sums may overflow or lose digits."""
        total = counts.sum(dtype=np.float64)
        if total >= _MOST_TOKENS:
            raise self.refuse(
                f"with {where} of {total:.3g} tokens together",
                "must hold fewer than 2**53, so that sums are exact",
                "check for an overflow where it was recorded",
            )


def _short(value: object) -> str:
    """What a wrong value is, in a few words, however large it is."""
    if isinstance(value, np.ndarray):
        return f"an array of dtype {value.dtype}, shape {value.shape}"
    if isinstance(value, Mapping):
        return f"an object of {len(value)} keys"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)} items that are no equal rows of numbers"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
