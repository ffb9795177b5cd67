"""`read`: its errors name file, place, rule and fix, and sums keep every digit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.errors import FileFormatError
from tests.formats.files import read_error, written


@pytest.mark.parametrize(
    ("content", "told", "message"),
    [
        (
            b"",
            {},
            "`{}` is an empty file: it must be an intact file of a format that evenmoe reads; write or",
        ),
        (b'{"a": [1, 2', {}, "`{}` is `,` or `]` is missing, line 1 column 12"),
        (b'{"layer_list": [1,\n 2,,\n 3]}', {}, "is '', which is no number, line 1 column 17"),
        (b'{"a": [NaN]}', {}, "is no JSON value at 'NaN]"),
        (b'{"a": 1, "a": 2}', {}, "is the key 'a' twice in one object, line 1 column"),
        (b"[[1, 99999999999999999999]]", {}, "is 99999999999999999999, which does not fit 64 bits, line 1 column 3"),
        (b"a: &x [1]\nb: *x\n", {}, "is an anchor or alias, which none of these files needs, line 1 column 4"),
        (b"a: [1\n", {}, "line 2 column 1"),
        (b"a: !!python/object:os.system x\n", {}, "is a tag, which none of these files needs, line 1 column 4"),
        (b"1,2\n3\n", {"num_layers": 1}, "is 1 columns in line 2, where the first line has 2"),
        (b"1,x\n3,y\n", {}, "is '3,y' in line 2, where numbers should be"),
        (b"layer_id,expert_id,count\n0,0,nan\n", {}, "'0,0,nan' in line 2"),
        (b"[[0, 1], [0, 0]]", {"num_ranks": 1}, "fits vllm-list, lmdeploy: it must be of one format; say which"),
        (b'{"a": 1}', {}, "is a json file of no known format"),
        (b"[0, 1]", {}, "which says nothing of ranks: it must be read with their number; pass num_ranks (--ranks)"),
        (b"[0, 1]", {"format": "ascend-map"}, "without `layer_list`|`layer_list` that is no list of objects"),
        (b"[0, 1]", {"format": "deepseek"}, "is a json file: it must be pt or npz to be deepseek"),
        (b"[0, 1]", {"format": "x"}, "`format` is 'x': it must be one of evenmoe-placement, "),
        (b"[0, 1]", {"num_ranks": 0}, "`num_ranks` is 0: it must be at least 1 and fit int32"),
        (b"[0, 1]", {"num_ranks": 3}, "with 2 slots: it must have a number of slots that divides by 3 ranks"),
        (b"[0, 2, 2]", {"num_ranks": 3}, "with no slot for expert 1 in layer 0: it must give every expert a slot"),
        (b"\x80\x04N.", {}, "is a pickle, which runs code when it is read and is therefore never opened"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", {}, "is a .pt file of torch before 1.6, a bare pickle; save"),
        (b"\0\1\2", {}, "is binary data of no known kind"),
        (b"PK\x03\x04", {}, "is a damaged zip (File is not a zip file)"),
    ],
)  # fmt: skip
def test_an_error_names_file_place_and_fix(content, told, message, tmp_path):
    path = tmp_path / "some.file"
    path.write_bytes(content)
    text = read_error(path, **told)
    assert any(part.format(path) in text for part in message.split("|")), text
    if "format" not in told and "num_ranks" not in told:
        assert text.startswith(f"`{path}` is ")


def test_a_file_that_is_not_there(tmp_path):
    assert "not readable (No such file or directory): it must be an existing file" in read_error(tmp_path / "none")


def test_an_empty_folder(tmp_path):
    assert "is a folder file of no known format" in read_error(tmp_path)


def test_several_models_in_one_safetensors(tmp_path):
    from safetensors.numpy import save

    (tmp_path / "s").write_bytes(save({"a": np.ones((1, 2), np.float32), "b": np.ones((1, 2), np.float32)}))
    assert "with 2 models: 'a', 'b': it must hold one model" in read_error(tmp_path / "s")


@pytest.mark.parametrize("name", ["sglang-detail", "sglang-csv", "tensorrt-llm-statistics", "mindie-csv"])
def test_an_empty_folder_is_refused_in_words(name, tmp_path):
    (tmp_path / "none").mkdir()
    assert "of no known format" in read_error(tmp_path / "none")
    assert "must hold" in read_error(tmp_path / "none", format=name)


def test_sums_that_would_lose_digits_are_refused(tmp_path):
    path = written(tmp_path, json.dumps([[2**52, 2**52 + 1, 70]]))
    with pytest.raises(FileFormatError, match=r"9.01e\+15 tokens together: it must hold fewer than 2\*\*53"):
        formats.read(path)
