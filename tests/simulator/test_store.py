"""Simulations in files: what comes back is what was written, and nothing else is read."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import fields, is_dataclass

import numpy as np
import pytest

from evenmoe.errors import FileFormatError
from evenmoe.placement import Placement
from evenmoe.simulator.store import load_simulation, save_simulation
from tests.simulator.simulations import make_simulation


def assert_same(left, right, place="simulation"):
    assert type(left) is type(right), place
    if is_dataclass(left):
        for field in fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name), f"{place}.{field.name}")
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype, place
        np.testing.assert_array_equal(left, right, err_msg=place)
    elif isinstance(left, tuple):
        assert len(left) == len(right), place
        for number, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{place}[{number}]")
    else:
        assert left == right, place


@pytest.mark.parametrize("details", [False, True])
def test_what_is_written_comes_back(tmp_path, details):
    simulation = make_simulation(details=details)
    save_simulation(simulation, tmp_path / "a.sim")
    assert_same(load_simulation(tmp_path / "a.sim"), simulation)


def test_a_first_plan_beyond_the_steps_comes_back(tmp_path):
    simulation = make_simulation()
    object.__setattr__(simulation, "first_plan", 70)
    save_simulation(simulation, tmp_path / "a.sim")
    assert load_simulation(tmp_path / "a.sim").first_plan == 70


def test_an_engine_comes_back(tmp_path):
    simulation = make_simulation().seen_for("tensorrt-llm")
    object.__setattr__(simulation.policies[1], "own_of", "tensorrt-llm")
    save_simulation(simulation, tmp_path / "a.sim")
    assert_same(load_simulation(tmp_path / "a.sim"), simulation)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda head: head.update(engine=3), "with `engine` 3: it must be an object"),
        (lambda head: head["engine"].pop("rule"), "with `rule` None: it must be text"),
        (lambda head: head["engine"].update(rules=[1]), "with `rules` [1]: it must be a list of texts"),
        (lambda head: head["policies"][0].update(own_of=None), "with `own_of` None: it must be text"),
    ],
)
def test_a_wrong_engine(tmp_path, change, text):
    save_simulation(make_simulation().seen_for("vllm"), tmp_path / "a")
    rewrite_head(tmp_path / "a", change)
    with pytest.raises(FileFormatError) as error:
        load_simulation(tmp_path / "a")
    assert text in str(error.value)


def test_one_of_everything_comes_back(tmp_path):
    simulation = make_simulation(1, 1, 1, 1, 1, ("identity",))
    save_simulation(simulation, tmp_path / "a")
    assert_same(load_simulation(tmp_path / "a"), simulation)


def test_the_order_of_replicas_comes_back(tmp_path):
    simulation = make_simulation()
    turned = Placement([[0, 1, 0, 1]] * 3, 4, num_experts=2, replica_index=[[1, 0, 0, 1]] * 3)
    object.__setattr__(simulation.policies[1], "final", turned)
    object.__setattr__(simulation, "num_experts", 2)
    object.__setattr__(simulation, "load", simulation.load[:, :2].copy())
    for policy in simulation.policies:
        object.__setattr__(policy, "initial", turned)
        object.__setattr__(policy, "final", turned)
    save_simulation(simulation, tmp_path / "a")
    assert load_simulation(tmp_path / "a").policies[1].final == turned


def test_the_same_simulation_gives_the_same_bytes(tmp_path):
    save_simulation(make_simulation(), tmp_path / "a")
    save_simulation(make_simulation(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def rewrite(path, change):
    """Write the arrays of `path` again after `change` of the dictionary of them."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def rewrite_head(path, change):
    def change_arrays(arrays):
        head = json.loads(arrays["simulation"].tobytes())
        change(head)
        arrays["simulation"] = np.frombuffer(json.dumps(head).encode(), np.uint8)

    rewrite(path, change_arrays)


@pytest.fixture
def saved(tmp_path):
    save_simulation(make_simulation(), tmp_path / "a.sim")
    return tmp_path / "a.sim"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays: arrays.pop("tokens"), "without `tokens`"),
        (lambda arrays: arrays.pop("1/par"), "without `1/par`"),
        (lambda arrays: arrays.pop("2/final/order"), "without `2/final/order`"),
        (lambda arrays: arrays.update({"0/par": arrays["0/par"][:-1]}), "must be (12, 3)"),
        (lambda arrays: arrays.update({"0/par": arrays["0/par"].astype(np.float32)}), "of dtype <f4"),
        (lambda arrays: arrays.update({"0/par": arrays["0/par"] * np.nan}), "not finite"),
        (lambda arrays: arrays.update({"0/copies": arrays["0/copies"] - 5}), "must not be negative"),
        (lambda arrays: arrays.update({"0/initial/slots": arrays["0/initial/slots"] * 0}), "wrong (`slot_to_expert`"),
        (lambda arrays: arrays.update({"load": arrays["load"][:0]}), "none empty"),
        (lambda arrays: arrays.update({"load": arrays["load"].astype(object)}), "of dtype |O"),
    ],
)
def test_wrong_arrays_are_named(saved, change, words):
    rewrite(saved, change)
    with pytest.raises(FileFormatError) as caught:
        load_simulation(saved)
    assert words in str(caught.value)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda head: head.update(evenmoe_simulation=1), "of another version"),
        (lambda head: head.update(num_ranks=0), "`num_ranks` 0"),
        (lambda head: head.update(num_judged_steps=10**6), "must have all steps it names"),
        (lambda head: head.update(horizon_steps=0), "`horizon_steps` 0"),
        (lambda head: head.update(num_ranks=True), "`num_ranks` True"),
        (lambda head: head.update(num_experts="8"), "`num_experts` '8'"),
        (lambda head: head.update(policies=[]), "at least one"),
        (lambda head: head.update(settings=[["a", "b"]]), "(name, value, unit)"),
        (lambda head: head.update(notes="hello"), "list of texts"),
        (lambda head: head["policies"][1].update(name="identity"), "each policy once"),
        (lambda head: head["policies"][1].update(rule=2), "must be text"),
        (lambda head: head["policies"][1].update(break_even_steps=-1), "steps or null"),
        (lambda head: head["policies"].append(head["policies"][0]), "without `3/"),
    ],
)
def test_wrong_keys_are_named(saved, change, words):
    rewrite_head(saved, change)
    with pytest.raises(FileFormatError) as caught:
        load_simulation(saved)
    assert words in str(caught.value)


def test_a_compressed_file_is_refused(saved):
    with np.load(saved) as file:
        arrays = {name: file[name] for name in file.files}
    with saved.open("wb") as file:
        np.savez_compressed(file, **arrays)
    with pytest.raises(FileFormatError, match="stored uncompressed"):
        load_simulation(saved)


def test_no_file_and_other_files_are_refused(tmp_path):
    with pytest.raises(FileFormatError, match="not readable"):
        load_simulation(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(FileFormatError, match="not an intact simulation"):
        load_simulation(tmp_path / "text")
    np.savez(tmp_path / "other.npz", load=np.ones((1, 2)))
    with pytest.raises(FileFormatError, match="without `simulation`"):
        load_simulation(tmp_path / "other.npz")


def test_damaged_bytes_are_refused_or_read_alike(saved):
    """A flipped byte in zip's padding changes nothing; anywhere else the checksum or a check sees it."""
    original = saved.read_bytes()
    whole = make_simulation()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(original)
        for place in rng.integers(0, len(damaged), rng.integers(1, 4)):
            damaged[place] ^= int(rng.integers(1, 256))
        saved.write_bytes(damaged[: rng.integers(1, len(damaged) + 1)] if rng.random() < 0.3 else damaged)
        try:
            found = load_simulation(saved)
        except FileFormatError:
            continue
        assert_same(found, whole)


def test_the_file_is_a_plain_zip_of_arrays(saved):
    with zipfile.ZipFile(io.BytesIO(saved.read_bytes())) as archive:
        assert all(name.endswith(".npy") for name in archive.namelist())
        assert archive.testzip() is None
