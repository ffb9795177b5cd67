"""Layers stay the layers they are, whatever formats a placement passes through, or the conversion is refused.

Files are made by hand and judged by what the engine that reads them would find in them; `tests.formats.engines`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from evenmoe import formats
from evenmoe.errors import ConstraintError, EvenmoeError, FileFormatError
from evenmoe.formats.catalogue import FORMATS
from evenmoe.formats.contents import ReadOptions
from evenmoe.placement import Placement
from tests.formats.engines import HOLD_MTP, NAMES, RANKS, Model, Rows, file_name, look, make, models


class Converter:
    """Conversions of one model, each made once: the new file, or the error where it is refused."""

    def __init__(self, folder: Path, model: Model, told: dict[str, Any]) -> None:
        self.folder, self.model = folder, model
        self.first = told.get("first_layer")
        self.options = ReadOptions(RANKS, **{name: value for name, value in told.items() if name != "first_layer"})
        self.done: dict[tuple[str, bytes, str], bytes | EvenmoeError] = {}
        self.found: dict[tuple[str, bytes], tuple[Rows, Rows, tuple[int, ...] | None]] = {}
        self.made: dict[str, bytes] = {}
        for name in NAMES:
            make(name, model, folder / file_name("made", name))
            self.made[name] = (folder / file_name("made", name)).read_bytes()

    def convert(self, name: str, content: bytes, to: str) -> bytes | EvenmoeError:
        key = name, content, to
        if key not in self.done:
            source, target = self.folder / file_name("a", name), self.folder / file_name("b", to)
            source.write_bytes(content)
            try:
                formats.convert(source, target, to, format=name, first_layer=self.first, options=self.options)
                self.done[key] = target.read_bytes()
            except EvenmoeError as error:
                self.done[key] = error
        return self.done[key]

    def seen(self, name: str, content: bytes) -> tuple[Rows, Rows, tuple[int, ...] | None]:
        key = name, content
        if key not in self.found:
            path = self.folder / file_name("look", name)
            path.write_bytes(content)
            self.found[key] = look(name, path, self.model)
        return self.found[key]


WORLDS = pytest.mark.parametrize(("first", "mtp"), list(itertools.product([0, 1, 3], [0, 1])))
#: An example is hundreds of conversions: a failure is shown as it was found, for shrinking would repeat them all.
FEW = settings(
    max_examples=3,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@WORLDS
@given(data=st.data())
@FEW
def test_told_of_the_model_every_pair_converts_by_way_of_every_third(first, mtp, data, tmp_path):
    """Only an MTP layer that a format has no place for is refused, at the first step or at the second."""
    model = data.draw(models(first, mtp))
    told = {"first_layer": first} | ({"num_hidden_layers": model.hidden} if mtp else {})
    converter = Converter(tmp_path, model, told)
    for a, c, b in itertools.product(NAMES, NAMES, NAMES):
        content = converter.made[a]
        held = model.mtp if a in HOLD_MTP else []
        middle, direct = converter.convert(a, content, c), converter.convert(a, content, b)
        assert isinstance(middle, EvenmoeError) == bool(held and c not in HOLD_MTP), (a, c, middle)
        if isinstance(middle, EvenmoeError):
            assert "the layer of multi-token prediction (MTP)" in str(middle)
            continue
        end = converter.convert(c, middle, b)
        if isinstance(direct, EvenmoeError):
            assert isinstance(end, EvenmoeError), (a, c, b)
            continue
        assert isinstance(end, bytes), (a, c, b, end)
        numbers = None if FORMATS.get(b).model_layers is b.startswith("evenmoe") else tuple(range(first, model.hidden))
        assert converter.seen(b, direct) == (model.moe, held, numbers), (a, b)
        assert end == direct, (a, c, b)


@WORLDS
@pytest.mark.parametrize("told", [(), ("first_layer",)], ids=["nothing", "first layer"])
@given(data=st.data())
@FEW
def test_told_less_a_third_format_changes_nothing_or_is_refused(first, mtp, told, data, tmp_path):
    """All that may be lost is the model's layer numbers, in evenmoe's own file, where the third format has none."""
    model = data.draw(models(first, mtp))
    converter = Converter(tmp_path, model, dict.fromkeys(told, first))
    for a, c, b in itertools.product(NAMES, NAMES, NAMES):
        content = converter.made[a]
        middle, direct = converter.convert(a, content, c), converter.convert(a, content, b)
        if isinstance(middle, EvenmoeError) or a == c:
            continue
        end = converter.convert(c, middle, b)
        if isinstance(end, EvenmoeError):
            continue
        assert isinstance(direct, bytes), (a, c, b, direct)
        if a == b == "sglang-location":  # rows of dense layers are of no use to anyone, and may change
            assert converter.seen(b, end) == converter.seen(b, direct)
        elif b == "evenmoe-placement" and not told:
            lost, kept = json.loads(end), json.loads(direct)
            assert lost.pop("layer_ids") in (None, kept["layer_ids"]), (a, c, b)
            assert lost == {name: value for name, value in kept.items() if name != "layer_ids"}
        else:
            assert end == direct, (a, c, b)
        if not (mtp and a == "tensorrt-llm"):  # which does not say that its last layer is one
            moe, behind, _ = converter.seen(b, end)
            assert (moe, behind) == (model.moe, model.mtp if a in HOLD_MTP else []), (a, c, b)


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_an_engine_finds_in_a_file_what_was_put_into_it(data, tmp_path_factory):
    """The two halves of this file agree with each other before they judge evenmoe."""
    model = data.draw(models(2, 1))
    for name in NAMES:
        path = tmp_path_factory.mktemp("file") / file_name("f", name)
        make(name, model, path)
        moe, mtp, _ = look(name, path, model)
        assert (moe, mtp) == (model.moe, model.mtp if name in HOLD_MTP else [])


# One by one, in words.

DENSE_FIRST = '{"physical_to_logical_map": [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]]}'
COUNTING = [name for name in NAMES if name != "evenmoe-placement" and not FORMATS.get(name).model_layers]


@pytest.mark.parametrize("to", [name for name in NAMES if name != "sglang-location"])
def test_rows_of_dense_layers_are_refused_where_nobody_says_which_they_are(to, tmp_path):
    with pytest.raises(ConstraintError) as caught:
        formats.convert(DENSE_FIRST, tmp_path / "out", to, options=ReadOptions(RANKS))
    assert str(caught.value) == (
        "`first_layer` is not given: it must say which is the model's first MoE layer: the placement has a row for "
        f"every hidden layer, dense ones too, and {to} has rows for MoE layers alone; pass first_layer "
        "(--first-layer), 3 for DeepSeek-V3 and 0 for a model without dense layers, or choose the MoE layers with "
        "layers (--layers)."
    )
    assert not (tmp_path / "out").exists()


def test_a_dense_first_row_is_no_moe_layer(tmp_path):
    done = formats.convert(DENSE_FIRST, tmp_path / "map.json", "vllm-layer-map", first_layer=1)
    assert json.loads((tmp_path / "map.json").read_text()) == {"0": [3, 2, 1, 0], "1": [2, 0, 3, 1]}
    assert done.notes == (
        "left out layers 0, which are dense: the first MoE layer is 1",
        "numbered layers 1-2 from 0: the format counts MoE layers",
    )
    assert formats.convert(DENSE_FIRST, tmp_path / "list.json", "vllm-list", layers="1:").contents.layer_ids == (1, 2)
    assert json.loads((tmp_path / "list.json").read_text()) == [[3, 2, 1, 0], [2, 0, 3, 1]]
    formats.convert(DENSE_FIRST, tmp_path / "all.json", "vllm-list", first_layer=0)
    assert json.loads((tmp_path / "all.json").read_text()) == [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]]
    done = formats.convert(
        tmp_path / "map.json", tmp_path / "own.json", "evenmoe-placement", options=ReadOptions(RANKS)
    )
    assert done.notes == ("left the layers counted from 0: the file has no numbers of the model (--first-layer)",)
    with pytest.raises(FileFormatError, match=r"of 3 layers: it must have a row for layer 3, the first MoE layer"):
        formats.convert(DENSE_FIRST, tmp_path / "none.json", "vllm-list", first_layer=3)


def test_dense_layers_in_between_are_left_out_by_a_step_and_asked_about(tmp_path):
    text = '{"physical_to_logical_map": [[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]}'
    formats.convert(text, tmp_path / "map.yaml", "tensorrt-llm", layers="1:5:2")
    assert (tmp_path / "map.yaml").read_text().endswith(":\n  1: [1, 0]\n  3: [1, 0]\n")
    done = formats.convert(text, tmp_path / "list.json", "vllm-list", first_layer=1)
    assert "took layers 2, 4 for MoE layers: they have the trivial map" in " ".join(done.notes)
    # SGLang has a row for hidden layer 4, too, which comes back though it holds no MoE layer.
    done = formats.convert(text, tmp_path / "again.json", "sglang-location", layers="1:5:2")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(text)
    assert done.notes[-1] == "filled 3 layers in as dense: 0, 2, 4"
    formats.convert(text, tmp_path / "own.json", "evenmoe-placement", layers="1:5:2", options=ReadOptions(1))
    formats.convert(tmp_path / "own.json", tmp_path / "third.json", "sglang-location")
    assert json.loads((tmp_path / "third.json").read_text()) == json.loads(text)


def test_layers_of_a_file_keep_their_places_when_they_are_numbered(tmp_path):
    """Rows 1 and 2 of three MoE layers, the first of which is layer 3, are layers 4 and 5."""
    (tmp_path / "list.json").write_text("[[0, 1], [1, 0], [0, 1]]")
    formats.convert(tmp_path / "list.json", tmp_path / "m.yaml", "tensorrt-llm", layers="1:3", first_layer=3)
    assert (tmp_path / "m.yaml").read_text().endswith(":\n  4: [1, 0]\n  5: [0, 1]\n")


@pytest.mark.parametrize("to", COUNTING)
def test_a_file_that_numbers_its_layers_is_not_numbered_again(to, tmp_path):
    text = '{"num_slots": 2, "initial_global_assignments": {"3": [0, 1], "4": [1, 0]}}'
    with pytest.raises(FileFormatError, match=r"with layer 3 as its first: it must begin with layer 1, as first_layer"):
        formats.convert(text, tmp_path / "out", to, first_layer=1, options=ReadOptions(2))
    notes = formats.convert(text, tmp_path / "out", to, first_layer=3, options=ReadOptions(2)).notes
    assert notes == (
        "took no layer for an MTP layer; --hidden-layers tells them apart",
        "numbered layers 3-4 from 0: the format counts MoE layers",
    )


def test_the_word_trivial_counts_moe_layers(tmp_path):
    sizes = ReadOptions(num_ranks=2, num_experts=2, num_layers=2)
    with pytest.raises(ConstraintError, match="must say the model's own number of each of the 2 rows"):
        formats.convert("trivial", tmp_path / "out.yaml", "tensorrt-llm", options=sizes)
    formats.convert("trivial", tmp_path / "out.yaml", "tensorrt-llm", first_layer=3, options=sizes)
    assert (tmp_path / "out.yaml").read_text().endswith(":\n  3: [0, 1]\n  4: [0, 1]\n")


# The MTP layer.

WITH_MTP = Model([[0, 1, 2, 3, 0, 1]] * 3, [[0, 1, 2, 1, 0, 3], [3, 2, 1, 2, 3, 0]], [[0, 2, 3, 3, 1, 0]])


@pytest.fixture
def ascend(tmp_path) -> Path:
    make("ascend-map", WITH_MTP, tmp_path / "ascend.json")
    return tmp_path / "ascend.json"


def test_an_mtp_layer_is_read_apart_and_said(ascend):
    contents = formats.read(ascend)
    assert contents.placement == Placement(WITH_MTP.moe, RANKS)
    assert contents.metadata == {"mtp_layers": WITH_MTP.mtp}
    assert contents.notes == ("kept the MTP layer apart from the MoE layers",)
    sizes = {"num_layers": 2, "num_slots": 6, "num_mtp_layers": 1, "num_ranks": 2, "num_experts": 4}
    assert formats.check(ascend).summary == sizes


@pytest.mark.parametrize("to", [name for name in NAMES if name not in HOLD_MTP])
def test_an_mtp_layer_is_refused_where_there_is_no_place_for_it_and_can_be_left_out(to, ascend, tmp_path):
    with pytest.raises(ConstraintError) as caught:
        formats.convert(ascend, tmp_path / "out", to, first_layer=3)
    assert str(caught.value) == (
        f"`format` is {to}: it must have a place for the layer of multi-token prediction (MTP) that the placement has; "
        "use one of evenmoe-placement, ascend-map, tensorrt-llm, or leave the MTP layer out with layers (--layers "
        "first:end)."
    )
    target = tmp_path / file_name("out", to)
    formats.convert(ascend, target, to, first_layer=3, layers="0:2")
    assert look(to, target, WITH_MTP)[0] == WITH_MTP.moe


def test_the_number_of_an_mtp_layer_is_asked_for(ascend, tmp_path):
    target = tmp_path / "out.json"
    with pytest.raises(EvenmoeError) as caught:
        formats.convert(ascend, target, "tensorrt-llm", first_layer=3)
    assert str(caught.value) == (
        "`num_hidden_layers` is not given: it must say the number of the layer of multi-token prediction (MTP), which "
        "follows the hidden layers; pass num_hidden_layers (--hidden-layers), 61 for DeepSeek-V3, or leave the MTP "
        "layer out with layers (--layers first:end)."
    )
    formats.convert(ascend, target, "tensorrt-llm", first_layer=3, options=ReadOptions(num_hidden_layers=5))
    assert look("tensorrt-llm", target, WITH_MTP) == (WITH_MTP.moe, WITH_MTP.mtp, (3, 4))
    with pytest.raises(FileFormatError, match=r"with MoE layers 3-4: it must have those below 4, the number of hidden"):
        formats.convert(ascend, target, "tensorrt-llm", first_layer=3, options=ReadOptions(num_hidden_layers=4))


def test_an_older_reader_of_evenmoes_file_would_not_pass_over_an_mtp_layer(ascend, tmp_path):
    formats.convert(ascend, tmp_path / "own.json", "evenmoe-placement")
    assert json.loads((tmp_path / "own.json").read_text())["version"] == 2
    formats.convert(ascend, tmp_path / "own.json", "evenmoe-placement", layers="0:2")
    assert json.loads((tmp_path / "own.json").read_text())["version"] == 1


def test_two_mtp_layers_are_one_too_many_for_an_ascend_map(tmp_path):
    keyed = {"3": [0, 1], "4": [1, 0], "5": [0, 1], "6": [1, 0]}
    text = json.dumps({"num_slots": 2, "initial_global_assignments": keyed})
    with pytest.raises(
        ConstraintError, match=r"`mtp_layers` is given for 2 layers: it must be one layer for ascend-map"
    ):
        formats.convert(text, tmp_path / "out.json", "ascend-map", options=ReadOptions(2, num_hidden_layers=5))
    done = formats.convert(
        text, tmp_path / "own.json", "evenmoe-placement", options=ReadOptions(2, num_hidden_layers=5)
    )
    assert done.notes == ("kept 2 MTP layers apart from the MoE layers",)
    formats.convert(tmp_path / "own.json", tmp_path / "back.json", "tensorrt-llm")
    assert json.loads((tmp_path / "back.json").read_text())["initial_global_assignments"] == keyed


def test_an_mtp_layer_alone_is_no_placement(ascend):
    with pytest.raises(FileFormatError, match=r"of a layer of multi-token prediction \(MTP\) alone: it must hold"):
        formats.read(ascend, layers="2")


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "61", 2**40])
def test_a_number_of_hidden_layers_that_is_none(wrong, tmp_path):
    with pytest.raises(ConstraintError, match=r"`num_hidden_layers` is .*: it must be a whole number from 1 to 65536"):
        formats.read("trivial", num_ranks=1, num_experts=2, num_layers=2, num_hidden_layers=wrong)
    with pytest.raises(ConstraintError, match=r"`num_hidden_layers` is .*: it must be a whole number from 1 to 65536"):
        formats.write(tmp_path / "x", Placement([[0]], 1), format="vllm-list", metadata={"num_hidden_layers": wrong})


def test_the_number_of_hidden_layers_contradicts_the_file():
    with pytest.raises(FileFormatError, match="of 3 hidden layers: it must have the 61 that num_hidden_layers"):
        formats.read(DENSE_FIRST, num_ranks=1, num_hidden_layers=61)


def test_mtp_slots_of_another_width_are_refused(tmp_path):
    with pytest.raises(ConstraintError, match="`mtp_layers` is 1 layers of 1 slots: it must have the 2 slots"):
        formats.write(tmp_path / "x", Placement([[0, 1]], 1), format="ascend-map", metadata={"mtp_layers": [[0]]})


def test_what_only_the_file_said_is_named(tmp_path):
    text = '{"num_slots": 2, "layer_updates_per_iter": 2, "initial_global_assignments": {"0": [0, 1]}}'
    done = formats.convert(text, tmp_path / "list.json", "vllm-list", options=ReadOptions(2, num_hidden_layers=1))
    assert "left out `layer_updates_per_iter`: the format has no place for it" in done.notes
    done = formats.convert(text, tmp_path / "same.yaml", "tensorrt-llm")
    assert not any("left out" in note for note in done.notes)
    assert "layer_updates_per_iter: 2" in (tmp_path / "same.yaml").read_text()


# What numbers layers wrongly.


def test_layers_listed_in_another_order_are_read_by_place_elsewhere_and_refused_here(tmp_path):
    make("ascend-map", WITH_MTP, tmp_path / "map.json")
    content = json.loads((tmp_path / "map.json").read_text())
    content["layer_list"].reverse()
    with pytest.raises(
        FileFormatError, match=r"with layer 2 where layer 0 should be listed: it must list its layers in"
    ):
        formats.read(json.dumps(content))


@pytest.mark.parametrize("keys", [(3, 4), (0, 2), (1, 0, 3)])
def test_gaps_in_a_count_of_moe_layers_are_refused(keys):
    with pytest.raises(FileFormatError, match="must count MoE layers from 0 without gaps; renumber them, or name them"):
        formats.read(json.dumps({str(key): [0, 1] for key in keys}), num_ranks=1)


@pytest.mark.parametrize(("keys", "kinds"), [((3, 7, 15), 0), ((3, 4, 6), 0), ((3, 4, 5, 7), 1), ((1, 3, 5, 7), 0)])
def test_a_gap_is_where_a_usual_step_is_not_kept(keys, kinds):
    text = json.dumps({"num_slots": 2, "initial_global_assignments": {str(key): [0, 1] for key in keys}})
    assert [finding.kind for finding in formats.check(text).findings] == ["layer-gap"] * kinds


@pytest.mark.parametrize("number", [2**16, 2**18])
def test_a_layer_number_too_large_to_have_a_row_is_refused(number, tmp_path):
    for name in ("sglang-location", "tensorrt-llm"):
        with pytest.raises(ConstraintError, match="must number every row, ascending from 0 to less than 65536"):
            formats.write(tmp_path / "x", Placement([[0]], 1), format=name, layer_ids=[number])
