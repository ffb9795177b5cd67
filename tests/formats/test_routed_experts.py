"""`routed_experts` of vLLM and SGLang: every file and response by hand, and what is wrong with a capture."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evenmoe import formats
from evenmoe.io.torch_file import torch_bytes
from evenmoe.placement import Placement
from evenmoe.traces.trace import load_trace
from tests.beside import TRACES
from tests.formats.files import read_error, written

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def drawn(tokens: int, seed: int = 0, layers: int = LAYERS, experts: int = EXPERTS, top_k: int = TOP_K) -> np.ndarray:
    """Distinct experts (tokens, layers, K); the last expert is chosen by the first token."""
    ids = np.argsort(np.random.default_rng(seed).random((tokens, layers, experts)), axis=2)[:, :, :top_k]
    ids[0, :, 0] = experts - 1
    ids[0, :, 1:] = np.arange(top_k - 1)
    return ids


def with_dense(ids: np.ndarray, dtype=np.uint8) -> np.ndarray:
    """A row for every hidden layer, the first of zeros, as the servers have them."""
    return np.concatenate([np.zeros_like(ids[:, :1]), ids], axis=1).astype(dtype)


REQUESTS = [drawn(3, 1), drawn(5, 2)]
JOINED = np.concatenate(REQUESTS)
WHOLE = [with_dense(ids) for ids in REQUESTS]


def text_of_npy(ids: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, ids)
    return base64.b64encode(buffer.getvalue()).decode()


def text_of_numbers(ids: np.ndarray) -> str:
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def counted(ids: np.ndarray) -> dict[str, int]:
    """What SGLang says of a request whose last token was not computed."""
    return {"prompt_tokens": 1, "completion_tokens": len(ids)}


def generate(ids: np.ndarray) -> dict:
    return {"text": "x", "meta_info": {"id": "1", **counted(ids), "routed_experts": text_of_numbers(ids)}}


def chat(ids: np.ndarray, key: str = "sglext") -> dict:
    return {"choices": [{"index": 0}], "usage": counted(ids), key: {"routed_experts": text_of_numbers(ids)}}


def vllm(*ids: np.ndarray) -> dict:
    return {"request_id": "1", "choices": [{"index": 0, "routed_experts": text_of_npy(one)} for one in ids]}


def lines(*responses: dict) -> bytes:
    return b"\n".join(json.dumps(response).encode() for response in responses)


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


PADDED = np.full((2, 6, LAYERS + 1, TOP_K), 7, np.int16)
for _number, _ids in enumerate(WHOLE):
    PADDED[_number, : len(_ids)] = _ids

FILES = {
    "npz, lengths": npz(routed_experts=np.concatenate(WHOLE), lengths=np.array([3, 5])),
    "npz, seq_lens": npz(routed_experts=np.concatenate(WHOLE).astype(np.int64), seq_lens=np.array([3, 5])),
    "npz, seq_start": npz(routed_experts=np.concatenate(WHOLE), seq_start=np.array([0, 3, 8])),
    "npz, padded": npz(routed_experts=PADDED, lengths=np.array([3, 5])),
    "npz, an array a request": npz(arr_0=WHOLE[0], arr_1=WHOLE[1], prompt_token_ids=np.arange(4)),
    "pt, a list": torch_bytes({"routed_experts": [ids.astype(np.int32) for ids in WHOLE]}),
    "jsonl, SGLang's generate": lines(*map(generate, WHOLE)),
    "json, SGLang's generate of a batch": json.dumps([generate(ids) for ids in WHOLE]).encode(),
    "jsonl, SGLang's chat": lines(*map(chat, WHOLE)),
    "jsonl, sgl_ext": lines(*(chat(ids, "sgl_ext") for ids in WHOLE)),
    "json, vLLM": lines(vllm(*WHOLE)),
    "jsonl, vLLM": lines(*map(vllm, WHOLE)),
    "jsonl, ids and nothing else": lines(*({"routed_experts": text_of_npy(ids)} for ids in WHOLE)),
    "jsonl, lists of numbers": lines(*({"routed_experts": ids.tolist()} for ids in WHOLE)),
}


def is_whole(contents: formats.Contents) -> None:
    """What every way of storing the two requests says: every number by plain loops."""
    load = np.zeros((2, LAYERS, EXPERTS), np.int64)
    for window, ids in enumerate(REQUESTS):
        for token in ids:
            for layer, chosen in enumerate(token):
                for expert in chosen:
                    load[window, layer, expert] += 1
    assert contents.format == "routed-experts"
    assert contents.layer_ids == (1, 2, 3)
    assert contents.metadata == {"num_hidden_layers": LAYERS + 1}
    assert contents.load is not None
    assert contents.load.tolist() == load.tolist()
    trace = contents.trace
    assert trace is not None
    assert trace.routing is not None
    assert trace.seq_start is not None
    assert trace.routing.tolist() == JOINED.tolist()
    assert trace.seq_start.tolist() == [0, 3, 8]
    assert "left out 1 layers with zeros alone, taken for dense ones: 0" in contents.notes
    assert "took 8 experts for all: 7 is the largest id that a token chose (--experts)" in contents.notes


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_every_way_of_storing_requests_gives_the_same_tokens(content, tmp_path):
    is_whole(formats.read(written(tmp_path, content)))


@pytest.mark.parametrize("suffix", ["npy", "npz", "json"])
def test_a_folder_has_a_file_of_every_request(suffix, tmp_path):
    for number, ids in zip((2, 10), WHOLE, strict=True):  # by number, not by name
        content = {"npy": npy(ids), "npz": npz(routed_experts=ids), "json": lines(generate(ids))}[suffix]
        (tmp_path / f"request_{number}.{suffix}").write_bytes(content)
    is_whole(formats.read(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    assert "left out 1 other files of the folder" in formats.read(tmp_path).notes


def test_a_trace_file_keeps_tokens_requests_and_layers(tmp_path):
    formats.convert(written(tmp_path, FILES["npz, lengths"]), tmp_path / "t.npz", "evenmoe-trace")
    trace = load_trace(tmp_path / "t.npz")
    assert trace.routing is not None
    assert trace.seq_start is not None
    assert trace.layer_ids is not None
    assert (trace.routing.tolist(), trace.seq_start.tolist()) == (JOINED.tolist(), [0, 3, 8])
    assert trace.layer_ids.tolist() == [1, 2, 3]


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_comes_through_both_programs_responses(data, tmp_path):
    layers, experts = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([2, 9, 256, 300]))
    top_k = data.draw(st.integers(2, min(8, experts)))
    requests = [
        drawn(data.draw(st.integers(1, 9)), seed, layers, experts, top_k)
        for seed in range(data.draw(st.integers(1, 4)))
    ]
    whole = [with_dense(ids, np.uint16) for ids in requests]
    hidden = {"num_layers": layers + 1}
    for responses, told in ((map(generate, whole), hidden), (map(vllm, whole), {})):
        trace = formats.read(written(tmp_path, lines(*responses)), **told).trace
        assert trace is not None
        assert trace.routing is not None
        assert trace.seq_start is not None
        assert trace.routing.tolist() == np.concatenate(requests).tolist()
        assert np.diff(trace.seq_start).tolist() == list(map(len, requests))


# SGLang's ids have no shape.


def test_the_shape_of_sglangs_ids_is_inferred_and_said(tmp_path):
    path = written(tmp_path, lines(generate(with_dense(drawn(40, 3, 6, 64, 6)))))
    contents = formats.read(path)
    assert contents.notes[0] == (
        "took 42 ids a token for 7 layers of 6 experts, the most of which none repeats in a layer; --num-layers says "
        "otherwise"
    )
    assert formats.read(path, num_layers=7).notes[0].startswith("left out 1 layers")


def test_sglangs_ids_of_uncounted_tokens_need_the_number_of_layers(tmp_path):
    part = {"meta_info": {"routed_experts": text_of_numbers(WHOLE[1])}}
    path = written(tmp_path, lines(part))
    assert (
        "with `routed_experts` of 1 responses that do not count their tokens: it must be read with the number of "
        "layers; pass num_layers (--num-layers), the model's hidden layers, dense ones counted: 61 for DeepSeek-V3"
    ) in read_error(path)
    trace = formats.read(path, num_layers=4).trace
    assert trace is not None
    assert trace.routing is not None
    assert trace.routing.tolist() == REQUESTS[1].tolist()
    assert "with 40 ids in response 0 of file: it must have a row for each of 7" in read_error(path, num_layers=7)
    counted = written(tmp_path, lines(generate(WHOLE[1])))
    assert "with 8 ids a token: it must have a row for each of 3 layers" in read_error(counted, num_layers=3)


# What is wrong with a capture.


def findings(path: Path, **told) -> list[tuple[str, str]]:
    return [(finding.kind, finding.text) for finding in formats.check(path, **told).findings]


def test_a_capture_of_zeros_is_read_error(tmp_path):
    path = written(tmp_path, npy(np.zeros((5, 4, 2), np.uint8)))
    assert (
        "with zeros alone for 5 tokens: it must hold the experts that tokens chose; the capture of vLLM or SGLang was "
        "not active"
    ) in read_error(path)


def test_tokens_and_requests_of_zeros_are_left_out_and_said(tmp_path):
    holes = WHOLE[1].copy()
    holes[[0, 3]] = 0
    path = written(tmp_path, npz(arr_0=np.zeros_like(WHOLE[0]), arr_1=holes))
    assert findings(path, num_experts=8) == [
        ("empty-capture", "zeros alone for 5 of 8 tokens, among them all of 1 requests")
    ]
    contents = formats.read(path, num_experts=8)
    assert contents.trace is not None
    assert contents.trace.routing is not None
    assert contents.trace.seq_start is not None
    assert contents.trace.routing.tolist() == REQUESTS[1][[1, 2, 4]].tolist()
    assert contents.trace.seq_start.tolist() == [0, 3]
    assert "left out 1 of 2 requests, which have no token left" in contents.notes


def test_padding_is_left_out_and_said(tmp_path):
    padded = np.full((9, LAYERS + 1, TOP_K), -1, np.int16)
    padded[:5] = WHOLE[1]
    contents = formats.read(written(tmp_path, npy(padded)))
    assert contents.trace is not None
    assert contents.trace.routing is not None
    assert contents.trace.routing.tolist() == REQUESTS[1].tolist()
    assert "left out 4 of 9 tokens, padded with -1" in contents.notes


def test_rows_beyond_the_lengths_are_left_out_and_said(tmp_path):
    path = written(tmp_path, npz(routed_experts=np.concatenate([*WHOLE, WHOLE[0]]), lengths=np.array([3, 5])))
    contents = formats.read(path)
    assert contents.trace is not None
    assert contents.trace.routing is not None
    assert contents.trace.routing.tolist() == JOINED.tolist()
    assert "left out 3 tokens of file beyond `lengths`" in contents.notes


def test_an_expert_twice_is_found(tmp_path):
    """300 experts in 8 bits: 256 + 1 and 1 are the same."""
    wrong = WHOLE[1].copy()
    wrong[2, 1] = [1, 1]
    path = written(tmp_path, npy(wrong))
    assert findings(path) == [("repeated-expert", "an expert twice for 1 of 5 tokens, the first token 2 in layer 1")]
    assert "ids were cut off, as 8 bits do beyond expert 255" in formats.check(path).findings[0].fix


def test_ids_of_8_bits_cannot_name_300_experts(tmp_path):
    message = read_error(written(tmp_path, npy(WHOLE[0])), num_experts=300)
    assert "with ids of 8 bits for 300 experts: it must hold ids of a type that counts to the last expert" in message


def test_slots_instead_of_experts_are_named_and_become_experts_by_their_map(tmp_path):
    slots = Placement([[0, 1, 2, 3, 4, 5, 6, 7, 0, 3]] * LAYERS, 2)
    physical = np.where((JOINED == 0) & (np.arange(len(JOINED)) % 2 == 0)[:, None, None], 8, JOINED)
    path = written(tmp_path, npy(with_dense(physical)))
    message = read_error(path, num_experts=8)
    assert "with id 8: it must hold ids below 8, the experts; if these are slots (physical experts)" in message
    contents = formats.read(path, placement=slots)
    assert contents.trace is not None
    assert contents.trace.routing is not None
    assert contents.load is not None
    assert contents.trace.routing.tolist() == JOINED.tolist()
    assert contents.load.shape == (1, LAYERS, EXPERTS)
    assert contents.load.sum(axis=0).tolist() == [np.bincount(ids.ravel()).tolist() for ids in JOINED.swapaxes(0, 1)]
    other = Placement([[0, 0, 1, 2, 3, 4, 5, 6, 7, 3]] * LAYERS, 2)
    assert "twice for token" in read_error(path, placement=other)
    few = Placement([[0, 1, 2, 3, 4, 5, 6, 7]] * LAYERS, 2)
    assert "with id 8: it must hold ids below 8, the slots of its placement; pass the placement" in read_error(
        path, placement=few
    )


@pytest.mark.parametrize("rule", ["random", "in turn", "one replica alone"])
def test_slots_are_recognized_by_what_replicas_have_in_common(rule, tmp_path):
    """Two replicas of the busiest expert: never together, and otherwise with the same others."""
    rng = np.random.default_rng(4)
    tokens, experts = 4000, 16
    chances = np.r_[4.0, np.ones(experts - 1)] / (experts + 3)
    ids = np.argsort(rng.gumbel(size=(tokens, 2, experts)) + np.log(chances), axis=2)[:, :, -4:]
    second = {"random": rng.random(tokens) < 0.5, "in turn": np.arange(tokens) % 2 == 0}.get(
        rule, np.zeros(tokens, bool)
    )
    physical = np.where((ids == 0) & second[:, None, None], experts, ids)
    found = findings(written(tmp_path, npy(physical.astype(np.uint8))))
    assert [kind for kind, _ in found] == ([] if rule == "one replica alone" else ["physical-ids"])
    for _, text in found:
        assert (
            text == "ids 0 and 16 of layer 0, never together and with the same others, and such pairs in 2 of 2 layers"
        )


def test_experts_of_different_topics_are_no_slots(tmp_path):
    """Two halves of the experts, each of which has a topic of its own, exclude each other."""
    rng = np.random.default_rng(5)
    topic = rng.random(4000) < 0.5
    ids = np.argsort(rng.random((4000, 2, 8)), axis=2)[:, :, :4] + 8 * topic[:, None, None]
    assert findings(written(tmp_path, npy(ids.astype(np.uint8)))) == []


# Sizes and layers.


def test_many_requests_share_windows(tmp_path):
    ids = drawn(1500, 6)
    path = written(tmp_path, npz(routed_experts=ids, lengths=np.ones(1500, int)))
    contents = formats.read(path)
    assert contents.load is not None
    assert contents.load.shape == (512, LAYERS, EXPERTS)
    assert contents.load.sum() == ids.size
    assert "counted 1500 requests in 512 windows" in contents.notes


def test_rows_of_moe_layers_alone_are_numbered_by_the_first(tmp_path):
    path = written(tmp_path, npy(JOINED.astype(np.uint8)))
    assert formats.read(path).layer_ids == (0, 1, 2)
    contents = formats.read(path, first_layer=3)
    assert (contents.layer_ids, contents.metadata) == ((3, 4, 5), {})
    whole = written(tmp_path, npy(np.concatenate(WHOLE)))
    assert formats.read(whole, first_layer=1).layer_ids == (1, 2, 3)
    assert "with layer 1 as its first: it must begin with layer 3" in read_error(whole, first_layer=3)


def test_layers_are_chosen_of_the_tokens_too(tmp_path):
    contents = formats.read(written(tmp_path, FILES["npz, lengths"]), layers="2:")
    assert contents.trace is not None
    assert contents.trace.routing is not None
    assert contents.trace.routing.tolist() == JOINED[:, 1:].tolist()
    assert contents.layer_ids == (2, 3)


WRONG = {
    "two models": (
        npz(arr_0=WHOLE[0], arr_1=WHOLE[1][:, :3]),
        "with 4 layers and 2 experts per token in `arr_0` of file, 3 and 2 in `arr_1` of file: it must hold requests",
    ),
    "padded, but how far?": (
        npz(routed_experts=PADDED),
        "of shape (2, 6, 4, 2) and no `lengths`: it must say how many",
    ),
    "lengths of other requests": (
        npz(routed_experts=PADDED, lengths=np.array([3, 7])),
        "with `lengths` 3 to 7 for 2 requests of 6 tokens: it must count tokens of every request",
    ),
    "lengths beyond the tokens": (
        npz(routed_experts=WHOLE[0], lengths=np.array([3, 5])),
        "with `lengths` that ends at 8: it must divide the 3 tokens of `routed_experts` among requests",
    ),
    "floats": (npz(routed_experts=WHOLE[0].astype(float)), "`routed_experts` of dtype float64: it must hold integers"),
    "no base64": (lines({"routed_experts": "?"}), "of response 0 of file that is no base64: it must be base64"),
    "bytes that are no int32": (
        lines({"routed_experts": base64.b64encode(b"12345").decode()}),
        "of response 0 of file of 5 bytes: it must be int32 numbers",
    ),
    "half an npy": (
        lines({"routed_experts": base64.b64encode(npy(WHOLE[0])[:140]).decode()}),
        "of response 0 of file, `the array` of shape (3, 4, 2) in 140 bytes, which is another size: it must be",
    ),
    "no choice of a token": (npy(np.ones((4, 2, 2), np.uint8)), "with 4 tokens, none of which has 2 different experts"),
    "overflow": (
        npz(routed_experts=np.array([[[1, 2], [-7, 2]]], np.int8)),
        "with id -7 of dtype int8: it must hold experts",
    ),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(content, message, tmp_path):
    assert message in read_error(written(tmp_path, content), format="routed-experts")


def test_responses_without_tokens_are_left_out_and_said(tmp_path):
    path = written(tmp_path, lines(generate(WHOLE[0]), {"error": "busy"}, generate(WHOLE[1])))
    assert formats.read(path).notes[0] == "left out 1 of 3 responses of file without `routed_experts`"
    assert "without `routed_experts`: it must hold it for a request; ask the server to return it" in read_error(
        written(tmp_path, b'{"choices": []}'), format="routed-experts"
    )


def test_a_slot_map_of_16_bits_is_no_routing(tmp_path):
    """Rows of -1 and slots; rows of a padded routing are -1 as a whole."""
    np.save(tmp_path / "map.npy", np.array([[[0, 1, -1], [-1, 0, 1]]], np.int16))
    assert formats.read(tmp_path / "map.npy").format == "slot-map"


def test_every_token_of_measured_traffic_comes_through(tmp_path):
    """Where measured traces are present: no false alarm, and the tokens as they were."""
    if not TRACES.is_dir():
        pytest.skip("this machine lacks the measured traces")
    for source in sorted(TRACES.glob("*.npz")):
        with np.load(source) as arrays:
            if "routing" not in arrays:
                continue
            routing, starts = arrays["routing"], arrays["seq_start"]
        path = written(tmp_path, npz(routed_experts=with_dense(routing, np.uint16), seq_start=starts))
        contents = formats.read(path)
        assert contents.trace is not None
        assert np.array_equal(contents.trace.routing, routing)
        assert np.array_equal(contents.trace.seq_start, starts)
        assert formats.check(path).findings == (), source.name
