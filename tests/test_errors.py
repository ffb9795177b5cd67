"""The error classes: their status, their sentence, and that they survive the way between processes."""

from __future__ import annotations

import copy
import pickle

import pytest

from evenmoe import errors
from evenmoe.errors import (
    ConstraintError,
    EvenmoeError,
    FileFormatError,
    LostRankError,
    MissingArgumentError,
    RankDisagreementError,
    UnsupportedTypeError,
)

STATUS = {
    EvenmoeError: 561002,
    MissingArgumentError: 161001,
    UnsupportedTypeError: 161002,
    ConstraintError: 561002,
    RankDisagreementError: 561002,
    FileFormatError: 161002,
}


def test_every_class_is_here():
    found = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)}
    assert found == {*STATUS, LostRankError}


@pytest.mark.parametrize("cls", STATUS)
def test_message_and_status(cls):
    error = cls("top_k", 17, "must be between 1 and 16", "route each token to at most 16 experts")
    assert str(error) == ("`top_k` is 17: it must be between 1 and 16; route each token to at most 16 experts.")
    assert error.status == cls.status == STATUS[cls]
    assert (error.argument, error.value) == ("top_k", "17")
    assert (error.rule, error.fix) == ("must be between 1 and 16", "route each token to at most 16 experts")
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("cls", STATUS)
def test_copies(cls):
    error = cls("x", (2, 3), "must be flat", "flatten it")
    for copied in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(copied) is cls
        assert str(copied) == str(error) == "`x` is (2, 3): it must be flat; flatten it."
        assert (copied.argument, copied.value, copied.status) == ("x", "(2, 3)", STATUS[cls])


def test_a_lost_rank():
    error = LostRankError("rank 0 waits for rank 2", (2,))
    for copied in (error, pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert isinstance(copied, RuntimeError)
        assert not isinstance(copied, EvenmoeError)  # not a mistake in a call
        assert str(copied) == "rank 0 waits for rank 2"
        assert copied.ranks == (2,)
    assert LostRankError("gone").ranks == ()
