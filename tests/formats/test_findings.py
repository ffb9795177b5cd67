"""`check`: every finding with its place, also where no placement can be made; and what `read` says instead."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evenmoe import formats
from evenmoe.errors import ConstraintError, FileFormatError
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


# Error texts: file, place, rule and fix.


def refused(text, **told) -> str:
    with pytest.raises((FileFormatError, ConstraintError)) as caught:
        formats.read(text, **told)
    return str(caught.value)


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
    text = refused(path, **told)
    assert any(part.format(path) in text for part in message.split("|")), text
    if "format" not in told and "num_ranks" not in told:
        assert text.startswith(f"`{path}` is ")


def test_a_file_that_is_not_there(tmp_path):
    assert "not readable (No such file or directory): it must be an existing file" in refused(tmp_path / "none")


def test_an_empty_folder(tmp_path):
    assert "is a folder file of no known format" in refused(tmp_path)


def test_several_models_in_one_safetensors(tmp_path):
    from safetensors.numpy import save

    (tmp_path / "s").write_bytes(save({"a": np.ones((1, 2), np.float32), "b": np.ones((1, 2), np.float32)}))
    assert "with 2 models: 'a', 'b': it must hold one model" in refused(tmp_path / "s")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"m": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 4]}}, b"1234", "shape [1, 2] in bytes [0, 4]"),
        (
            {"m": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 8]}},
            b"1234",
            "in bytes [0, 8], which does not fit",
        ),
        ({"m": {"dtype": "Q", "shape": [1, 1], "data_offsets": [0, 4]}}, b"1234", "of dtype Q"),
        (
            {n: {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]} for n in "ab"},
            b"1234",
            "a gap or an overlap at byte 0",
        ),
        (
            {"m": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}},
            b"12345678",
            "8 bytes of data for tensors of 4",
        ),
    ],
)
def test_a_safetensors_header_that_lies(header, data, message, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "s").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert message in refused(tmp_path / "s")


def test_a_signalling_nan_is_a_nan(tmp_path):
    from safetensors.numpy import save

    load = np.array([[0x7F800001, 0x3F800000]], np.uint32).view(np.float32)
    (tmp_path / "s").write_bytes(save({"m": load}))
    assert [f.kind for f in formats.check(tmp_path / "s").findings] == ["not-a-number"]
