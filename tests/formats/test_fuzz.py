"""Damaged files of every format, a fixed few; `python tests/formats/fuzz.py` makes as many as wanted."""

from __future__ import annotations

import pickle
import signal

import pytest

from evenmoe import formats
from evenmoe.errors import FileFormatError
from evenmoe.formats.catalogue import FORMATS
from tests.formats.fuzz import Broken, attempt, fuzz
from tests.formats.samples import Sample, samples

_COUNT = 300


@pytest.fixture(scope="module")
def every_sample(tmp_path_factory) -> dict[str, Sample]:
    return {sample.name: sample for sample in samples(tmp_path_factory.mktemp("samples"))}


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_damaged_file_is_refused_or_read(name, every_sample, tmp_path):
    own = [sample for sample in every_sample.values() if sample.entry.name == name]
    assert own
    previous = signal.getsignal(signal.SIGVTALRM)
    try:
        outcomes = [fuzz(sample, _COUNT // len(own), 1, tmp_path) for sample in own]
    finally:
        signal.signal(signal.SIGVTALRM, previous)
    for counter in outcomes:
        assert counter["FileFormatError"] > 0
        assert counter["read"] > 0, "damage so heavy that nothing gets past the first check tests only that check"


def test_the_fuzzer_sees_a_reader_that_breaks(every_sample, tmp_path):
    sample = every_sample["lmdeploy.json"]

    def broken(source, **told):
        return {}["missing"]

    with pytest.raises(Broken, match=r"lmdeploy\.json: KeyError"):
        attempt(sample, sample.content, tmp_path / "file", broken)


class _Code:
    """A pickle that would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_never_opened(protocol, tmp_path):
    trap = tmp_path / "trap"
    path = tmp_path / "file"
    path.write_bytes(pickle.dumps(_Code(trap), protocol))
    with pytest.raises(FileFormatError):
        formats.read(path)
    assert not trap.exists()


def test_code_in_a_pt_file_is_named_and_not_run(tmp_path):
    import torch

    trap, path = tmp_path / "trap", tmp_path / "file.pt"
    torch.save({"logical_count": _Code(trap)}, path)
    with pytest.raises(
        FileFormatError, match=r"a pickle with the name `(__builtin__|io|_io) open`, which is code, at byte"
    ):
        formats.read(path)
    assert not trap.exists()
