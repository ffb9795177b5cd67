"""Every format: written, read, written again; and all formats of one value say the same."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evenmoe import formats
from evenmoe.errors import ConstraintError
from evenmoe.formats.catalogue import FORMATS, Format
from evenmoe.formats.contents import Contents, ReadOptions
from evenmoe.placement import Placement
from tests.effort import effort
from tests.formats.samples import LOAD, PLACEMENT, put, samples, told_for, write_sample
from tests.placements import placements

_KEEP_ORDER = {"evenmoe-placement", "deepseek", "eplb-table"}
_ONE_WINDOW = {"sglang-csv", "vllm-ascend-load", "vllm-safetensors", "lmdeploy"}
_CASES = [
    (entry, container)
    for entry in map(FORMATS.get, FORMATS)
    for container in entry.containers
    if entry.write is not None and (entry.name, container) != ("sglang-location", "text")
]
_IDS = [f"{entry.name}.{container}" for entry, container in _CASES]
_SETTINGS = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def of_kind(kind: str) -> pytest.MarkDecorator:
    chosen = [(case, name) for case, name in zip(_CASES, _IDS, strict=True) if case[0].kind == kind]
    return pytest.mark.parametrize(("entry", "container"), [c for c, _ in chosen], ids=[name for _, name in chosen])


@st.composite
def layer_numbers(draw: st.DrawFn, count: int) -> tuple[int, ...]:
    """Ascending numbers of `count` rows, the first few layers dense, some between them left out."""
    steps = [draw(st.integers(0, 4)), *draw(st.lists(st.integers(1, 3), min_size=count - 1, max_size=count - 1))]
    return tuple(itertools.accumulate(steps))


@st.composite
def loads(draw: st.DrawFn) -> np.ndarray:
    """1 to 3 windows, 1 to 4 layers, 1 to 9 experts; some counts large, some zero, no layer without a token."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    load = rng.integers(0, draw(st.sampled_from([2, 1000, 2**22])), shape)
    load[:, :, rng.integers(shape[2])] += 1
    return load


def ascending(value: Placement) -> Placement:
    return Placement(value.slot_to_expert, value.num_ranks, num_experts=value.num_experts)


def as_kept(entry: Format, value: Placement) -> Placement:
    """The placement as a format keeps it: some sort the slots of a rank."""
    if entry.name != "omni-pattern":
        return value
    slots = np.sort(value.slot_to_expert.reshape(value.num_layers, value.num_ranks, -1), axis=2)
    return Placement(slots.reshape(value.num_layers, -1), value.num_ranks, num_experts=value.num_experts)


def has_duplicates(value: Placement) -> bool:
    per_rank = value.slot_to_expert.reshape(value.num_layers, value.num_ranks, -1)
    return any(len(set(rank)) < len(rank) for layer in per_rank.tolist() for rank in layer)


def there_and_back(target: Path, value, entry: Format, layer_ids, told) -> Contents:
    """Written, read, and what was read written again: the same bytes."""
    numbers = layer_ids if entry.model_layers or entry.name in ("evenmoe-placement", "evenmoe-trace") else None
    again = target.with_name("again" + target.suffix)
    _remove(target, again)
    formats.write(target, value, format=entry.name, layer_ids=numbers)
    contents = formats.read(target, format=entry.name, **told)
    read = contents.placement if entry.kind == "placement" else contents.load
    assert read is not None
    formats.write(again, read, format=entry.name, layer_ids=contents.layer_ids, metadata=contents.metadata)
    assert _bytes(again) == _bytes(target)
    return contents


@of_kind("placement")
@given(data=st.data())
@_SETTINGS
def test_a_placement_comes_back_as_it_was(entry, container, data, tmp_path):
    value = data.draw(placements())
    if entry.name in ("slot-map", "omni-pattern") and has_duplicates(value):
        with pytest.raises(ConstraintError, match="must hold an expert at most once on a rank"):
            formats.write(tmp_path / f"file.{container}", value, format=entry.name)
        return
    told = {} if entry.stores_ranks else {"num_ranks": value.num_ranks}
    if entry.name == "ascend-map":
        told["shared_devices"] = 0  # expert 0 alone on the first device is a question, asked below
    numbers = data.draw(layer_numbers(value.num_layers))
    contents = there_and_back(tmp_path / f"file.{container}", value, entry, numbers, told)
    expected = value if entry.name in _KEEP_ORDER else ascending(as_kept(entry, value))
    read = contents.placement
    if entry.name == "sglang-location":  # dense layers are rows like the others: chosen by --layers
        assert contents.layer_ids == tuple(range(numbers[-1] + 1))
        assert read is not None
        assert np.array_equal(read.slot_to_expert[list(numbers)], value.slot_to_expert)
        return
    assert read == expected
    if entry.model_layers or entry.name == "evenmoe-placement":
        assert contents.layer_ids == numbers


@of_kind("load")
@given(data=st.data())
@_SETTINGS
def test_a_load_comes_back_as_it_was(entry, container, data, tmp_path):
    value = data.draw(loads())
    numbers = data.draw(layer_numbers(value.shape[1]))
    told = {"num_layers": value.shape[1], "num_experts": value.shape[2]} if entry.name == "mindie-csv" else {}
    if container == "folder":
        container = "d"
    contents = there_and_back(tmp_path / f"file.{container}", value, entry, numbers, told)
    expected = value.sum(axis=0, keepdims=True) if entry.name in _ONE_WINDOW else value
    assert contents.load is not None
    assert contents.load.dtype == np.int64
    assert np.array_equal(contents.load, expected)
    if entry.model_layers or entry.name == "evenmoe-trace":
        assert contents.layer_ids == numbers


def test_all_formats_of_one_placement_agree(tmp_path):
    told = {"num_ranks": PLACEMENT.num_ranks}
    for entry, container in _CASES:
        if entry.kind == "placement":
            contents = formats.read(write_sample(entry, container, tmp_path), **told)
            assert (contents.format, contents.placement) == (entry.name, as_kept(entry, PLACEMENT))


def test_all_formats_of_one_load_agree(tmp_path):
    for entry, container in _CASES:
        if entry.kind == "load":
            contents = formats.read(write_sample(entry, container, tmp_path), **told_for(entry))
            assert contents.format == entry.name
            assert contents.load is not None
            assert np.array_equal(contents.load.sum(axis=0), LOAD.sum(axis=0))


def test_every_conversion_of_a_placement_arrives(tmp_path):
    """Each format to each other and from there to evenmoe's own."""
    every = [case for case in _CASES if case[0].kind == "placement"]
    (tmp_path / "from").mkdir()
    for (one, container), (other, into) in itertools.product(every, every):
        source = write_sample(one, container, tmp_path / "from")
        middle, end = tmp_path / f"middle.{into}", tmp_path / "end.json"
        ranks = ReadOptions(num_ranks=PLACEMENT.num_ranks)
        formats.convert(source, middle, other.name, first_layer=0, options=ranks)
        formats.convert(middle, end, "evenmoe-placement", format=other.name, first_layer=0, options=ranks)
        assert formats.read(end).placement == as_kept(one, as_kept(other, PLACEMENT)), (one.name, other.name)


def test_format_and_container_are_detected_by_content_alone(tmp_path):
    for number, sample in enumerate(samples(tmp_path)):
        path = put(sample.content, tmp_path / f"{number}.txt")  # a name that says nothing
        assert formats.read(path, **sample.told).format == sample.entry.name, sample.name


def test_a_real_dump_of_deepseek_v3_size_is_read_fast_enough(tmp_path):
    """58 of 61 layers, 256 experts, 40 steps, as the recorder writes them."""
    load = np.random.default_rng(0).integers(0, 5000, (40, 58, 256))
    formats.write(tmp_path / "stat.pt", load, format="sglang-stat", layer_ids=range(3, 61))
    # 1.2 where this was written (7 ms), busy or idle; a second would be felt.
    assert effort(lambda: formats.read(tmp_path / "stat.pt")) < 12
    contents = formats.read(tmp_path / "stat.pt")
    assert contents.layer_ids == tuple(range(3, 61))
    assert contents.load is not None
    assert np.array_equal(contents.load, load)


def _bytes(path: Path) -> object:
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        path.unlink(missing_ok=True)
