"""A model with replicas computes what it does without, and saves what it wat first from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import evenmoe as em
from evenmoe.errors import ConstraintError, RankDisagreementError, UnsupportedTypeError
from tests.integrations.transformers.models import (
    EXPERTS,
    LAYERS,
    MODES,
    RANKS,
    SAME,
    dense,
    et,
    on_ranks,
    parallel,
    prompts,
    whole,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch, about themselves


def planned(slots: int, seed: int = 1, ranks: int = RANKS) -> em.Placement:
    load = np.random.default_rng(seed).integers(1, 100, (LAYERS, EXPERTS))
    return em.plan(load, num_ranks=ranks, num_slots=slots)


def outputs(rank: int, mode: str) -> dict[str, float]:
    """The largest difference of logits from one process, by placement; and what is saved and generated."""
    model, alone = parallel(mode), dense()
    tokens = prompts(0 if mode == "tp" else rank)
    with torch.no_grad():
        wanted = alone(tokens).logits
        found = {"at first": float((whole(model(tokens).logits) - wanted).abs().max())}
        for slots in (12, 16, EXPERTS):
            et.place(model, planned(slots))
            assert et.placement_of(model) == em.Placement(planned(slots).slot_to_expert, RANKS)
            found[f"{slots} slots"] = float((whole(model(tokens).logits) - wanted).abs().max())
        et.place(model, planned(12, seed=2))
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
        padded = torch.ones_like(tokens)
        padded[1, :4] = 0
        for name, mask in {"generated": torch.ones_like(tokens), "padded left": padded}.items():
            same = model.generate(tokens, attention_mask=mask, **settings).equal(
                alone.generate(tokens, attention_mask=mask, **settings)
            )
            found[name] = 0.0 if same else np.inf
    return found


@pytest.mark.parametrize("mode", MODES)
def test_outputs_do_not_depend_on_ranks_slots_and_placements(mode):
    for found in on_ranks(outputs, mode):
        assert max(found.values()) <= SAME, found


def with_and_without_gradients(rank: int) -> list[bool]:
    """Whether logits have the same bits where every rank adds up the whole batch, and where each has its part."""
    model, same = parallel("tp"), []
    for slots in (EXPERTS, 12):
        et.place(model, planned(slots))
        for length in (1, 2, 9):
            tokens = prompts(0, rows=1, length=length)
            split = whole(model(tokens).logits)
            with torch.no_grad():
                same.append(bool(split.requires_grad and whole(model(tokens).logits).equal(split)))
    return same


def test_a_batch_that_all_ranks_hold_gives_the_bits_of_its_parts():
    for found in on_ranks(with_and_without_gradients):
        assert found == [True] * 6


def states(rank: int, mode: str, folder: str) -> list[str]:
    """Names of what differs from the model of one process after a placement: in the state dict, saved, loaded."""
    model, alone = parallel(mode), dense().state_dict()
    et.place(model, planned(12))
    state = model.state_dict()
    wrong = [f"state dict: {name}" for name, value in alone.items() if not whole(state[name]).equal(value)]
    wrong += [f"state dict has {name}" for name in state.keys() ^ alone.keys()]
    model.save_pretrained(folder)
    torch.distributed.barrier()
    again = type(dense()).from_pretrained(folder).state_dict()
    wrong += [f"saved: {name}" for name, value in alone.items() if not again[name].equal(value)]
    with torch.no_grad():
        before = whole(model(prompts(0)).logits)
        state = {name: value.clone() for name, value in state.items()}
        for parameter in model.parameters():
            parameter.zero_()
        model.load_state_dict(state)
        if not whole(model(prompts(0)).logits).equal(before):
            wrong.append("loaded from DTensors")
        experts = {name: value for name, value in alone.items() if ".experts." in name}
        for name, parameter in model.named_parameters():
            if name in experts:
                parameter.zero_()
        model.load_state_dict(experts, strict=False)
        if not whole(model(prompts(0)).logits).equal(before):
            wrong.append("loaded from whole tensors")
    return wrong


@pytest.mark.parametrize("mode", MODES)
def test_a_state_dict_is_the_models_own_whatever_the_placement(mode, tmp_path):
    assert on_ranks(states, mode, str(tmp_path)) == [[], []]


def what_is_refused(rank: int) -> list[str]:
    model, texts = parallel("tp"), []
    few = em.Placement(np.arange(EXPERTS)[None], num_ranks=RANKS)
    uneven = em.Placement(np.tile(np.arange(EXPERTS), (LAYERS, 1)), num_ranks=RANKS, rank_sizes=[3, 5])
    for wrong in ("placement.json", few, planned(8, ranks=4), uneven, em.Placement([[0, 1]] * LAYERS, num_ranks=RANKS)):
        with pytest.raises((ConstraintError, UnsupportedTypeError)) as caught:
            et.place(model, wrong)  # pyright: ignore[reportArgumentType]
        texts.append(str(caught.value))
    with pytest.raises(RankDisagreementError) as differ:
        et.place(model, planned(8, seed=rank))
    texts.append(str(differ.value))
    with pytest.raises(ConstraintError if rank else RankDisagreementError) as refused:
        et.place(model, few if rank else planned(8))
    texts.append(str(refused.value))
    et.place(model, planned(12))  # nothing hangs, nothing is half done
    return texts


def test_a_placement_that_does_not_fit_is_refused_on_every_rank():
    first, second = on_ranks(what_is_refused)
    assert first[:5] == second[:5]
    assert first[0] == ("`placement` is a str: it must be a Placement; make one with evenmoe.plan.")
    assert first[1] == (
        "`placement` is 1 layers: it must have one layer for each of the model's 2; plan for the model's own layers."
    )
    assert "over 4 ranks: it must be over the 2 ranks of the model's ep_size" in first[2]
    assert "[3, 5] slots on the ranks: it must give all ranks equally many" in first[3]
    assert "of 2 experts: it must place the 8 experts of 'model.layers.0.mlp.experts'" in first[4]
    assert first[5] == second[5]
    assert "another on rank 1 than on rank 0" in first[5]
    assert "refused on rank 1 (" in first[6]


def test_a_model_without_evenmoe_is_refused():
    with pytest.raises(ConstraintError, match="run without evenmoe: it must be loaded with evenmoe"):
        et.place(dense(), planned(8))


def skewed(rank: int) -> tuple[float, float]:
    """PAR of the ranks' rows in the first layer, at first and with replicas under the batch rule."""
    model = parallel("fsdp")
    router = dict(model.named_modules())["model.layers.0.mlp.gate"]
    found = et.experts_of(model)[0].module._evenmoe

    def favor(module, args, output):
        logits, weights, ids = output
        favored = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(rank)) < 0.7, ids % 4, ids)
        favored[:, 1] = torch.where(favored[:, 1] == favored[:, 0], (favored[:, 0] + 1) % 4, favored[:, 1])
        return logits, weights, favored

    router.register_forward_hook(favor)
    tokens = prompts(rank, rows=16, length=32)

    def par() -> float:
        sent: list[int] = []
        inner = found.layer.dispatch
        found.layer.dispatch = lambda *given: (
            sent.append(int((out := inner(*given)).num_tokens_per_expert.sum())) or out
        )
        with torch.no_grad():
            model(tokens)
        rows = [None] * RANKS
        torch.distributed.all_gather_object(rows, sent[0])
        return max(rows) * RANKS / sum(rows)

    before = par()
    with et.record(model, together=True) as recording, torch.no_grad():
        model(tokens)
    loads = [None] * RANKS
    torch.distributed.all_gather_object(loads, recording.trace().load.sum(axis=0))
    et.place(model, em.plan(sum(loads), num_ranks=RANKS, num_slots=12))
    return before, par()


def test_replicas_and_the_batch_rule_balance_a_skewed_router():
    (before, after), _ = on_ranks(skewed)
    assert before >= 1.4
    assert after <= 1.02
