"""`check`: every finding with its place, also where no placement can be made."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.formats import findings
from evenmoe.formats.catalogue import FORMATS
from evenmoe.io.torch_file import torch_bytes
from evenmoe.placement import Placement


def places(text: str, **told) -> list[tuple]:
    return [(f.kind, f.layer, f.rank, f.slot, f.expert) for f in formats.check(text, **told).findings]


def sglang(*rows: list[int]) -> str:
    return json.dumps({"physical_to_logical_map": rows})


def test_a_clean_placement_has_no_finding():
    checked = formats.check(sglang([0, 1, 2, 0], [2, 1, 0, 1]), num_ranks=2)
    assert checked.findings == ()
    assert checked.clean
    assert checked.summary == {"num_layers": 2, "num_slots": 4, "num_ranks": 2, "num_experts": 3}


def test_all_findings_come_not_only_the_first():
    found = places(sglang([0, 0, 1, 3], [0, 1, 1, 9]), num_ranks=2)
    assert found == [
        ("missing-expert", 0, None, None, 2),
        ("duplicate-replica", 0, 0, 1, 0),
        ("expert-range", 1, 1, 3, 9),
        ("missing-expert", 1, None, None, 2),
        ("missing-expert", 1, None, None, 3),
    ]


def test_a_missing_last_expert_needs_the_number_of_experts():
    assert places(sglang([0, 1, 0, 1]), num_ranks=2) == []
    assert places(sglang([0, 1, 0, 1]), num_ranks=2, num_experts=3) == [("missing-expert", 0, None, None, 2)]


def test_duplicate_replicas_name_both_slots_and_do_not_stop_reading():
    text = sglang([0, 1, 2, 2])
    finding = formats.check(text, num_ranks=2).findings[0]
    assert finding.text == "expert 2 in slots 2 and 3 of rank 1 in layer 0"
    assert formats.read(text, num_ranks=2).placement is not None


@pytest.mark.parametrize(
    ("ranks", "replicas", "reached"),
    [(8, 5, 4), (8, 6, 4), (8, 7, 4), (16, 5, 4), (16, 9, 8), (32, 12, 11), (8, 4, 4), (8, 8, 8), (16, 4, 4)],
)
def test_replicas_that_the_rank_rule_leaves_idle(ranks, replicas, reached, tmp_path):
    """ceil(W / ceil(W / c)): the published table of the rule, runtime reference §1.3."""
    row = [0] * replicas + list(range(1, 2 * ranks - replicas + 1))
    per_rank = np.array(row).reshape(2, ranks).T.reshape(-1).tolist()  # two slots a rank, no duplicate replicas
    own = tmp_path / "p.json"
    formats.write(own, Placement([per_rank], ranks), format="evenmoe-placement")
    idle = [f for f in formats.check(own).findings if f.kind == "unreachable"]
    assert len(idle) == (reached < replicas)
    if idle:
        assert f"over {ranks} ranks it reaches {reached}" in idle[0].rule
        slots = [slot for slot, expert in enumerate(per_rank) if expert == 0]
        assert (idle[0].slot, idle[0].rank, idle[0].severity) == (slots[reached], slots[reached] // 2, "warning")


@pytest.mark.parametrize("entry", [e for e in map(FORMATS.get, FORMATS) if e.kind == "placement" and e.write])
def test_idle_replicas_are_found_only_where_the_rank_rule_may_be_in_use(entry, tmp_path):
    """5 replicas over 8 ranks, of which it reaches 4; the rules of SGLang, vLLM and vllm-ascend reach every one."""
    row = np.array([0] * 5 + list(range(1, 12))).reshape(2, 8).T.reshape(-1)
    target = tmp_path / f"p.{entry.containers[0]}"
    formats.write(target, Placement([row], 8), format=entry.name, layer_ids=[0] if entry.model_layers else None)
    kinds = [f.kind for f in formats.check(target, format=entry.name, num_ranks=8).findings]
    assert ("unreachable" in kinds) == (entry.name in ("evenmoe-placement", "eplb-table"))


def test_check_says_how_many_experts_it_took():
    """The last expert of an 8-expert model is missing, which the file alone cannot tell."""
    checked = formats.check(sglang([0, 1, 2, 3, 4, 5, 6, 0]), num_ranks=2)
    assert (checked.findings, checked.summary["num_experts"]) == ((), 7)
    assert checked.notes[-1] == (
        "took 7 experts for all, which the slots show: with more, the last would be missing (--experts)"
    )
    told = formats.check(sglang([0, 1, 2, 3, 4, 5, 6, 0]), num_ranks=2, num_experts=8)
    assert (told.summary["num_experts"], [f.kind for f in told.findings], told.notes) == (8, ["missing-expert"], ())


def block(first: int, last: int, experts: int, layers: int = 4) -> np.ndarray:
    load = np.zeros((1, layers, experts), np.int64)
    load[:, :, first:last] = np.arange(1, last - first + 1)
    return load


@pytest.mark.parametrize(
    ("load", "ranks"),
    [
        (block(8, 16, 32), 4),
        (block(0, 16, 32), 2),
        (block(9, 16, 32), 4),  # an expert without a token
        (block(4, 12, 32), 2),  # of the first half
        (block(12, 20, 32), 0),  # of two ranks at any number of them
        (block(8, 16, 32, layers=1), 0),  # 3 other ranks in one layer: too little to say
        (block(0, 32, 32), 0),
        (block(5, 6, 32), 0),  # one hot expert
        (block(0, 2, 2), 0),
    ],
)
def test_tokens_of_one_ranks_experts_alone_are_found(load, ranks, tmp_path):
    np.savez(tmp_path / "l.npz", load=load)
    found = [f for f in formats.check(tmp_path / "l.npz").findings if f.kind == "one-rank"]
    assert len(found) == (ranks > 0)
    for finding in found:
        assert finding.severity == "warning"
        assert finding.text.endswith(f"of {load.shape[2]} alone, in all 4 layers")
        assert f"the counts that one of {ranks} ranks took of its own experts" in finding.fix


def test_slots_that_do_not_divide():
    assert places(sglang([0, 1, 2]), num_ranks=2) == [("divisibility", None, None, None, None)]


def test_without_ranks_nothing_is_said_about_them():
    checked = formats.check(sglang([0, 0, 1]))
    assert checked.findings == ()
    assert "--ranks" in checked.notes[0]


def test_layers_of_different_widths():
    assert places(sglang([0, 1], [0, 1, 1])) == [("slot-count", 1, None, None, None)]


def test_an_empty_slot_and_a_huge_id():
    found = places(sglang([0, 1, -1, 2**40], [0, 1, 0, 1]))
    assert found == [("empty-slot", 0, None, 2, None), ("int-overflow", 0, None, 3, 2**40)]


def devices(*layers: list[list[int]], counts: list[int] | None = None) -> str:
    listed = [
        {
            "layer_id": number,
            "device_count": counts[number] if counts else len(held),
            "device_list": [{"device_id": d, "device_expert": e} for d, e in enumerate(held)],
        }
        for number, held in enumerate(layers)
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": listed})


def test_devices_of_different_sizes_and_numbers():
    found = places(devices([[0, 1], [2]], [[0, 1], [2], [0]]))
    assert ("uneven-ranks", 0, 1, None, None) in found
    assert ("device-count", 1, None, None, None) in found
    assert ("slot-count", 1, None, None, None) in found


def test_a_device_count_that_is_wrong():
    assert places(devices([[0, 1], [2, 0]], counts=[3])) == [("device-count", 0, None, None, None)]


def test_another_number_of_ranks_than_the_file_says():
    assert places(devices([[0, 1], [2, 0]]), num_ranks=4) == [("device-count", None, None, None, None)]


def test_tables_that_disagree(tmp_path):
    tensors = {
        "phy2log": np.array([[0, 1, 0]]),
        "log2phy": np.array([[[0, 2], [2, -1]]]),
        "logcnt": np.array([[1, 1]]),
    }
    (tmp_path / "d.pt").write_bytes(torch_bytes(tensors))
    found = formats.check(tmp_path / "d.pt").findings
    assert {f.kind for f in found} == {"tables-disagree"}
    assert {(f.layer, f.expert) for f in found} == {(0, 0), (0, 1), (0, None)}


def test_a_slot_given_to_two_experts(tmp_path):
    np.save(tmp_path / "t.npy", np.array([[2, 0, 1], [1, 1, 0]], np.int32))
    found = formats.check(tmp_path / "t.npy", format="eplb-table").findings
    assert [(f.kind, f.slot) for f in found] == [("slot-conflict", 1), ("empty-slot", 2)]


def test_loads_that_are_no_counts(tmp_path):
    np.savez(tmp_path / "t.npz", load=np.array([[[1.0, np.nan], [0, 0]], [[-1.0, 2], [0, 0]]]))
    found = formats.check(tmp_path / "t.npz").findings
    assert [(f.kind, f.layer, f.expert) for f in found] == [("not-a-number", 0, 1), ("negative", 0, 0)]


def test_a_layer_without_tokens_is_a_warning(tmp_path):
    np.savez(tmp_path / "t.npz", load=np.array([[[1, 2], [0, 0]]]))
    checked = formats.check(tmp_path / "t.npz")
    assert [(f.kind, f.layer) for f in checked.findings] == [("zero-layer", 1)]
    assert checked.clean


@pytest.mark.parametrize("far", [0, 2**31, 2**40], ids=["ids", "beyond int32", "far beyond"])
@pytest.mark.parametrize("part", [1, 2, 7, 1000])
def test_duplicates_are_those_of_plain_loops_wherever_parts_end(far, part, monkeypatch):
    monkeypatch.setattr(findings, "_PART", part)
    slots = np.random.default_rng(part).integers(-1, 5, 40)
    slots[3] += far
    expected = []
    for rank, (begin, end) in enumerate(((0, 0), (0, 13), (13, 40))):
        for expert in sorted(set(slots[begin:end].tolist()) - {-1}):
            held = [slot for slot in range(begin, end) if slots[slot] == expert]
            expected += [(rank, expert, second, f"slots {first} and {second}") for first, second in pairwise(held)]
    found = list(findings._duplicates(slots, np.array([0, 13, 40]), layer=0))
    assert [(f.rank, f.expert, f.slot) for f in found] == [case[:3] for case in expected]
    assert all(words in f.text for f, (*_, words) in zip(found, expected, strict=True))
