"""A recording holds what the routers chose for every token that counts, request by request."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import evenmoe as em
from evenmoe.errors import ConstraintError
from tests.integrations.transformers.models import EXPERTS, LAYERS, dense, et, on_ranks, parallel, prompts

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch, about themselves


def chosen(model, tokens: torch.Tensor) -> np.ndarray:
    """(tokens, layers, K) of one prompt without padding, by the routers' own logits."""
    with torch.no_grad():
        logits = model(tokens, output_router_logits=True).router_logits
    return np.stack([layer.topk(2).indices.numpy() for layer in logits], axis=1)


def generated(model, tokens: torch.Tensor, **settings) -> torch.Tensor:
    return model.generate(tokens, do_sample=False, pad_token_id=0, **settings)


def test_padding_is_left_out_and_requests_follow_each_other(tmp_path):
    model, tokens = dense(), prompts(3, rows=3, length=6)
    mask = torch.ones_like(tokens)
    mask[1, :3] = mask[2, :1] = 0
    with et.record(model, tmp_path / "trace.npz", tokens_per_window=8) as recording:
        out = model.generate(
            tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=[]
        )
        with torch.no_grad():
            model(tokens[:1])
    trace = em.load_trace(tmp_path / "trace.npz")
    assert trace.seq_start.tolist() == [0, 10, 17, 26, 32]
    assert (recording.num_tokens, recording.num_requests) == (32, 4)
    for row in range(3):
        own = out[row][mask[row].argmax() :][None, :-1]  # the last token was never fed
        tokens_of = slice(*trace.seq_start[row : row + 2])
        # Left padding shifts no position of Mixtral's, but rounding may tie: experts of a token as a set.
        assert (np.sort(trace.routing[tokens_of]) == np.sort(chosen(model, own))).all()
    assert trace.load.sum(axis=(1, 2)).tolist() == [14 * 2 * LAYERS, 9 * 2 * LAYERS, 9 * 2 * LAYERS]
    counts = np.zeros((LAYERS, EXPERTS), int)
    for token in trace.routing:
        for layer in range(LAYERS):
            counts[layer, token[layer]] += 1
    assert (trace.load.sum(axis=0) == counts).all()


def test_phases_add_up():
    model, tokens = dense(), prompts(4)
    found = {}
    for phase in ("all", "prefill", "decode"):
        with et.record(model, phase=phase) as recording:
            generated(model, tokens, max_new_tokens=4)
        found[phase] = recording.trace().load.sum(axis=0)
    assert (found["prefill"] + found["decode"] == found["all"]).all()
    assert found["decode"].sum() == 2 * 3 * 2 * LAYERS


def test_activations_computed_again_do_not_count_twice():
    model, tokens = dense().train(), prompts(5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with et.record(model) as recording:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert recording.num_tokens == tokens.numel()


def test_a_pass_that_fails_leaves_nothing(tmp_path):
    model = dense()

    def two_passes() -> None:
        with et.record(model, tmp_path / "trace.npz") as recording, torch.no_grad():
            recordings.append(recording)
            model(prompts(1))
            model.lm_head.weight = None
            model(prompts(2))

    recordings = []
    with pytest.raises(TypeError):
        two_passes()
    assert recordings[0].num_tokens == prompts(1).numel()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phase": "training"}, "`phase` is 'training': it must be one of all, prefill, decode"),
        ({"tokens_per_window": 0}, "`tokens_per_window` is 0: it must be a whole number from 1"),
        ({"named": "audio"}, "named 'audio', in which nothing holds routed experts"),
        ({}, "MixtralForCausalLM, of which no token was recorded"),
    ],
)
def test_what_cannot_be_recorded_says_why(options, message, tmp_path):
    model = dense()
    with (
        pytest.raises(ConstraintError, match=re.escape(message)),
        et.record(model, tmp_path / "MixtralForCausalLM.npz", **options),
        torch.no_grad(),
    ):
        model.model(prompts(1))  # a part: the model itself is never called
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_runs_twice_is_named():
    model = dense()
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers += 1
    message = r"calls 'model\.layers\.0\.mlp\.experts' twice in a forward pass"
    with pytest.raises(ConstraintError, match=message), et.record(model), torch.no_grad():
        model(prompts(1), use_cache=False)


def recorded(rank: int, mode: str, path: str) -> None:
    model = parallel(mode)
    with et.record(model, path), torch.no_grad():
        model(prompts(0 if mode == "tp" else rank))


@pytest.mark.parametrize("mode", ["tp", "fsdp"])
def test_ranks_record_together(mode, tmp_path):
    on_ranks(recorded, mode, str(tmp_path / "trace.npz"))
    trace, seeds = em.load_trace(tmp_path / "trace.npz"), [0] if mode == "tp" else [0, 1]
    assert len(trace.seq_start) - 1 == 2 * len(seeds)
    expected = np.concatenate([chosen(dense(), prompts(seed)) for seed in seeds])
    assert (np.sort(trace.routing) == np.sort(expected)).all()
    if mode == "fsdp":
        assert trace.load_by_rank.shape == (1, 2, LAYERS, EXPERTS)
        assert (trace.load_by_rank.sum(axis=(0, 2, 3)) == prompts(0).numel() * 2 * LAYERS).all()
