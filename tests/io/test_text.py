"""Numbers in text: read in blocks, and anything else refused."""

from __future__ import annotations

import pytest

from evenmoe.io import DamagedFileError
from evenmoe.io.text import parse_numbers


@pytest.mark.parametrize("count", [1, 2, 20_000, 100_000])
def test_numbers_are_parsed_in_blocks_as_in_one(count):
    """Blocks end after 64 KiB of text, wherever a comma is."""
    numbers = [pow(7, i, 10 ** (i % 12 + 1)) - 5 for i in range(count)]
    assert parse_numbers(",".join(map(str, numbers)).encode()).tolist() == numbers
    assert parse_numbers(b" , ".join(b"%d.5" % n for n in numbers)).tolist() == [float(f"{n}.5") for n in numbers]


@pytest.mark.parametrize(
    "text", [b"", b",", b"1,", b",1", b"1,,2", b"1 2", b"01", b"1.", b"-", b"1e", b"+1", b"9" * 200_000]
)
def test_what_is_no_number_is_refused(text):
    with pytest.raises(DamagedFileError, match=r"which is no number|does not fit|more than 64 KiB"):
        parse_numbers(text)
