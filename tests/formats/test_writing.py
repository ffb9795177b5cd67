"""`write`: a failure leaves the old file whole, links and modes stay, and no folder in use is touched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import evenmoe as em
from evenmoe import formats
from evenmoe.errors import ConstraintError, UnsupportedTypeError
from evenmoe.placement import Placement


def test_a_failure_leaves_the_old_file_as_it_was(tmp_path, monkeypatch):
    """Opening the map for writing to see whether it can be opened empties it: that is how maps were lost."""
    target = tmp_path / "map.json"
    target.write_text("old")
    with pytest.raises(ConstraintError):
        formats.write(target, np.ones((1, 2)), format="ascend-map")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        formats.write(target, Placement([[0]], 1), format="ascend-map")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]


def test_a_link_stays_a_link_and_a_mode_stays(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    formats.write(link, Placement([[0]], 1), format="vllm-list")
    assert link.is_symlink()
    assert json.loads(real.read_text()) == [[0]]
    assert real.stat().st_mode & 0o777 == 0o600


def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "precious").write_text("1")
    with pytest.raises(ConstraintError, match="must be a new or an empty folder"):
        formats.write(tmp_path / "old", np.ones((1, 1, 2), int), format="tensorrt-llm-statistics", layer_ids=[0])
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "precious"]


def test_a_placement_saves_itself(tmp_path):
    placement = Placement([[0, 1, 0, 2]], 2)
    placement.save(tmp_path / "p.json")
    placement.save(tmp_path / "v.json", format="vllm-list")
    assert em.read(tmp_path / "p.json").placement == placement
    assert json.loads((tmp_path / "v.json").read_text()) == [[0, 1, 0, 2]]
    assert em.save_placement(placement, tmp_path / "p.json") == ()
    with pytest.raises(UnsupportedTypeError) as caught:
        em.save_placement(tmp_path / "p.json", placement)
    assert str(caught.value) == (
        f"`placement` is of type {type(tmp_path).__name__}: it must be a Placement; "
        "call save_placement(placement, path), the placement first."
    )
    with pytest.raises(ConstraintError, match="must be one of"):
        placement.save(tmp_path / "x.json", format="parquet")
