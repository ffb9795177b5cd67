"""The face of `evenmoe.formats`, and that every format is what its entry says."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

from evenmoe import formats
from evenmoe.formats.catalogue import FORMATS
from evenmoe.io.csv_text import parse_numbers


def test_no_module_hides_a_function_of_the_same_name():
    """A submodule becomes an attribute of its package when it is imported."""
    for module in pkgutil.iter_modules(formats.__path__):
        importlib.import_module(f"evenmoe.formats.{module.name}")
    fresh = importlib.reload(formats)
    for name in ("read", "write", "check", "convert", "diff"):
        assert callable(getattr(fresh, name)), name


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_has_the_three_functions(name):
    module = importlib.import_module(FORMATS[name].module)
    assert module.__doc__
    assert all(callable(getattr(module, function)) for function in ("matches", "read", "write"))


def test_reading_text_imports_no_torch():
    code = (
        "import sys; from evenmoe import formats; formats.read('{\"0\": [0, 1]}', num_ranks=1); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


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
    with pytest.raises(ValueError, match=r"which is no number|does not fit|more than 64 KiB"):
        parse_numbers(text)
