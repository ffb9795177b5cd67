"""What matters in a file for one engine."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.engines import ENGINES
from evenmoe.engines.findings import check_for_engine
from evenmoe.formats.contents import ReadOptions
from evenmoe.formats.reading import check
from evenmoe.placement import Placement

#: Five replicas of expert 0 on eight ranks: Ascend's rule reaches four of them.
FIVE = Placement([[1, 0, 0, 0, 0, 0, 2, 3]], 8)


def kinds(engine: str, source, **fields) -> list[str]:
    options = ReadOptions(**fields)
    found = check_for_engine(ENGINES.get(engine), source, options, check(source, options))
    return [finding.kind for finding in found.findings]


def written(tmp_path, placement: Placement, name: str = "p.json", format: str = "ascend-map"):
    formats.write(tmp_path / name, placement, format=format, layer_ids=[3])
    return tmp_path / name


@pytest.mark.parametrize(
    ("engine", "format", "found"),
    [
        ("mindie", "ascend-map", ["engine-idle"]),
        ("vllm-ascend", "ascend-map", []),
        ("sglang", "sglang-location", []),
        ("evenmoe", "evenmoe-placement", []),
        ("tensorrt-llm", "tensorrt-llm", []),
        ("vllm", "vllm-layer-map", ["engine-file"]),
        ("vllm", "ascend-map", ["engine-format", "engine-file"]),
        ("sglang", "ascend-map", ["engine-format"]),
    ],
)
def test_five_replicas(tmp_path, engine, format, found):
    path = written(tmp_path, FIVE, format=format)
    assert kinds(engine, path, num_ranks=8, num_experts=4) == found


def test_an_idle_replica_has_its_place(tmp_path):
    path = written(tmp_path, FIVE)
    found = check_for_engine(ENGINES.get("mindie"), path, ReadOptions(), check(path))
    (finding,) = found.findings
    assert (finding.layer, finding.rank, finding.slot, finding.expert) == (0, 5, 5, 0)
    assert finding.text == "one of 5 replicas of expert 0 in layer 0, slot 5, that gets no token"
    assert finding.rule == "must be chosen by some rank; of 5 replicas mindie's ranks choose 4"
    assert not found.clean


def test_sixteen_replicas_on_eight_ranks_are_too_many_for_the_modulo_rule_too(tmp_path):
    path = written(tmp_path, Placement([[0] * 9 + [1] * 7], 8))
    assert set(kinds("vllm-ascend", path)) == {"duplicate-replica", "engine-idle"}


def test_warnings_on_another_engines_rule_are_left_out(tmp_path):
    path = written(tmp_path, FIVE, format="evenmoe-placement")
    assert [finding.kind for finding in check(path).findings] == ["unreachable"]
    assert kinds("evenmoe", path) == []


def test_names_and_kinds_of_files(tmp_path):
    path = written(tmp_path, FIVE, "p.txt", "sglang-location")
    assert kinds("sglang", path, num_ranks=8) == ["engine-suffix"]
    np.savez(tmp_path / "l.npz", load=np.ones((2, 1, 4)))
    assert kinds("sglang", tmp_path / "l.npz") == ["engine-format"]
    long = json.dumps({"physical_to_logical_map": [list(range(4000))]})
    assert kinds("sglang", long, num_ranks=8) == []


def test_ranks_of_different_sizes(tmp_path):
    uneven = Placement([[0, 1, 2, 3, 0]], 4, rank_sizes=[2, 1, 1, 1])
    path = written(tmp_path, uneven, format="evenmoe-placement")
    assert kinds("evenmoe", path) == ["engine-uneven"]  # whose operators take slot s for one of rank s // (S / G)
    assert kinds("mindie", path) == ["engine-format", "engine-uneven"]
    assert kinds("tensorrt-llm", path) == ["engine-format"]


def test_broken_files_are_reported_as_they_are(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"physical_to_logical_map": [[0, 0, 3, 3]]}))
    assert kinds("sglang", tmp_path / "p.json", num_ranks=2) == [
        "missing-expert", "missing-expert", "duplicate-replica", "duplicate-replica",
    ]  # fmt: skip
