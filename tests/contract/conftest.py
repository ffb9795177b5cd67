"""Violations as data: a call is a dict of keyword arguments, a violation a dict of changes to it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.errors import EvenmoeError

Call = dict[str, Any]


Violation = tuple[Call, int, str, str]  # changes, and the error's status, argument and text (a regular expression)


def apply(valid: Call, *all_changes: Call) -> Call:
    """A key "x.0" changes dimension 0 of x, "x.dtype" its dtype, any other key the whole argument; the last one wins.

    Where an earlier change took the tensor away, a change of a part starts from the valid one again.
    """
    call = dict(valid)
    for changes in all_changes:
        for key, value in changes.items():
            name, _, part = key.partition(".")
            spec = valid[name] if part and call[name] is None else call.get(name)
            if not part:
                call[name] = value
            elif part == "dtype":
                call[name] = TensorSpec(spec.shape, value)
            elif int(part) < len(spec.shape):
                call[name] = TensorSpec((*spec.shape[: int(part)], value, *spec.shape[int(part) + 1 :]), spec.dtype)
    return call


def first_error(check: Callable[..., object], call: Call) -> EvenmoeError | None:
    try:
        check(**call)
    except EvenmoeError as error:
        return error
    return None


@pytest.fixture(scope="session")
def refuses():
    """Asserts that a call with the changes of one violation is refused as it says."""

    def prove(check: Callable[..., object], valid: Call, violation: Violation) -> None:
        changes, status, argument, text = violation
        with pytest.raises(EvenmoeError, match=text) as caught:
            check(**apply(valid, changes))
        assert (caught.value.status, caught.value.argument) == (status, argument), str(caught.value)

    return prove


@pytest.fixture(scope="session")
def accepts():
    """Asserts that a call with some changes is taken."""

    def prove(check: Callable[..., object], valid: Call, changes: Call) -> None:
        assert first_error(check, apply(valid, changes)) is None

    return prove


@pytest.fixture(scope="session")
def earlier_wins():
    """Asserts for every pair of violations, listed in the documented order, that the earlier one is raised."""

    def prove(check: Callable[..., object], valid: Call, violations: list[Violation]) -> None:
        wrong = []
        for i, earlier in enumerate(violations):
            changes, status, argument, text = earlier
            for later in violations[i + 1 :]:
                # The earlier one's changes go on top, so they still break its rule where both touch one argument.
                error = first_error(check, apply(valid, later[0], changes))
                found = error and (error.status, error.argument) == (status, argument) and re.search(text, str(error))
                if not found:
                    wrong.append((changes, later[0], str(error)))
        assert not wrong, f"{len(wrong)} pairs in the wrong order, first {wrong[:3]}"

    return prove
