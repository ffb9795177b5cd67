"""Gradients of `em.dispatch` and `em.combine` against a dense model; whole numbers, so that nothing is rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.errors import ConstraintError, RankDisagreementError
from evenmoe.transport.world import Rank
from tests.mutations import fails, mutated

HIDDEN, TOP_K = 5, 2


@dataclass(frozen=True)
class Spec:
    """A world: ranks of shared experts come first, of which there are `shared` with one or two ranks each."""

    seed: int
    moe_ranks: int = 2
    per_rank: int = 2
    shared: int = 0
    ranks_per_shared: int = 1
    zero_experts: int = 0
    mask: str = "none"
    unequal: bool = False
    shared_x: bool = False

    @property
    def shared_ranks(self) -> int:
        return self.shared * self.ranks_per_shared

    @property
    def ranks(self) -> int:
        return self.shared_ranks + self.moe_ranks

    @property
    def experts(self) -> int:
        return self.moe_ranks * self.per_rank


@st.composite
def specs(draw: st.DrawFn, ranks: int | None = None) -> Spec:
    shared = draw(st.integers(0, 2)) if ranks is None else 0
    mask = draw(st.sampled_from(["none", "tokens", "assignments"]))
    return Spec(
        seed=draw(st.integers(0, 2**32)),
        moe_ranks=draw(st.integers(1, 4)) if ranks is None else ranks,
        per_rank=draw(st.integers(2, 3)),
        shared=shared,
        ranks_per_shared=draw(st.integers(1, 2)),
        zero_experts=draw(st.integers(0, 2)),
        mask=mask,
        unequal=draw(st.booleans()) and mask == "none",  # a mask takes the same Bs on all ranks
        shared_x=draw(st.booleans()) and not shared,
    )


def matrices(spec: Spec) -> torch.Tensor:
    """(experts + shared, H, H); the shared ones last."""
    rng = np.random.default_rng(spec.seed)
    return torch.from_numpy(rng.integers(-2, 3, (spec.experts + spec.shared, HIDDEN, HIDDEN))).float()


def inputs(spec: Spec, rank: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng([spec.seed, rank])
    tokens = int(rng.integers(0, 5)) if spec.unequal else 4

    def numbers(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(-3, 4, shape)).float()

    ids = [rng.permutation(spec.experts + spec.zero_experts)[:TOP_K] for _ in range(tokens)]
    found = {
        "x": numbers(tokens, HIDDEN),
        "ids": torch.from_numpy(np.array(ids, np.int32).reshape(tokens, TOP_K)),
        "weights": numbers(tokens, TOP_K) / 2,
        "grad": numbers(tokens, HIDDEN),
        "shared_x": numbers(tokens, HIDDEN),
    }
    if spec.mask == "tokens":
        found["mask"] = torch.arange(tokens) < rng.integers(0, tokens + 1)
    elif spec.mask == "assignments":
        found["mask"] = torch.from_numpy(rng.random((tokens, TOP_K)) < 0.6)
    return found


def arguments(rank: Rank, spec: Spec, own: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "ep": rank.ep,
        "num_experts": spec.experts,
        "x_active_mask": own.get("mask"),
        "shared_expert_num": max(spec.shared, 1),
        "shared_expert_rank_num": spec.shared_ranks,
        "zero_expert_num": spec.zero_experts,
        "global_bs": 4 * spec.ranks if spec.unequal else 0,
    }


def over_ranks(rank: Rank, spec: Spec) -> list[torch.Tensor | None]:
    """Gradients of x, of the weights, of the shared expert's x and of all matrices, as far as this rank has them."""
    own = inputs(spec, rank.index)
    same = arguments(rank, spec, own)
    x, weights, shared_x = (own[name].requires_grad_() for name in ("x", "weights", "shared_x"))
    every = matrices(spec).requires_grad_()
    sent = em.dispatch(x, own["ids"], **same)
    rows, local = int(sent.expert_token_nums.sum()), torch.arange(len(sent.expert_token_nums))
    if rank.index < spec.shared_ranks:
        held = spec.experts + rank.index // spec.ranks_per_shared + local
    else:
        held = (rank.index - spec.shared_ranks) * spec.per_rank + local
    expert = held.repeat_interleave(sent.expert_token_nums)
    out = torch.cat([(sent.expand_x[:rows, None] @ every[expert])[:, 0], sent.expand_x[rows:]])
    more = {"shared_expert_x": shared_x} if spec.shared_x else {}
    y = em.combine(out, own["ids"], sent, weights, **same, **more)
    y.backward(own["grad"])
    return [x.grad, weights.grad, shared_x.grad, every.grad]


def dense(spec: Spec) -> list[list[torch.Tensor | None]]:
    """The same on one process; the matrices' gradients are those of all ranks together."""
    every = matrices(spec).double().requires_grad_()
    found: list[list[torch.Tensor | None]] = []
    for rank in range(spec.ranks):
        own = inputs(spec, rank)
        x, weights, shared_x = (own[name].double().requires_grad_() for name in ("x", "weights", "shared_x"))
        mask = own.get("mask", torch.ones(len(x), dtype=torch.bool))
        each = mask if mask.dim() == 2 else mask[:, None].expand(-1, TOP_K)
        rows = []
        for token in range(len(x)):
            total = torch.zeros(HIDDEN, dtype=torch.float64)
            for k in range(TOP_K):
                if each[token, k] and own["ids"][token, k] < spec.experts:
                    total = total + weights[token, k] * (x[token] @ every[own["ids"][token, k]])
            for number in range(spec.shared):
                total = total + x[token] @ every[spec.experts + number]
            total = total + shared_x[token] if spec.shared_x else total
            rows.append(total * bool(each[token].any()))
        if rows and torch.stack(rows).requires_grad:
            torch.stack(rows).backward(own["grad"].double())
        found.append([x.grad, weights.grad, shared_x.grad])
    return [*found, [every.grad]]


def check(spec: Spec, results: list[list[torch.Tensor | None]]) -> None:
    """Whole numbers and halves below 2^20: float32 holds every product and sum of them."""
    *expected, (of_matrices,) = dense(spec)
    for rank, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        for name, one, other in zip(("x", "weights", "shared_x"), ours, theirs, strict=False):
            other = torch.zeros_like(inputs(spec, rank)[name]) if other is None else other
            if one is None:
                assert name == "shared_x", name
                assert not other.any()
            else:
                assert torch.equal(one.double(), other), f"gradient of {name} on rank {rank}"
    total = sum(result[3].double() for result in results)
    assert torch.equal(total, torch.zeros_like(total) if of_matrices is None else of_matrices)


def in_threads(spec: Spec) -> list:
    with em.local_world(spec.ranks, timeout_s=60.0) as world:
        return world.run(lambda rank: over_ranks(rank, spec))


@settings(max_examples=80, deadline=None)
@given(specs())
def test_threads(spec):
    check(spec, in_threads(spec))


@settings(max_examples=20, deadline=None)
@given(specs(ranks=4))
def test_processes(processes, spec):
    check(spec, processes.run((4, 1), over_ranks, spec))


BUGS = {
    "weights of another k": {"weights[:count].gather(1, k.clamp": "weights[:count].gather(1, 1 - k.clamp"},
    "shared experts weighted": {"[:, 0], 1.0)": "[:, 0], 2.0)"},
    "dots in another column": {"wide[:count].scatter_(1, k.clamp": "wide[:count].scatter_(1, 1 - k.clamp"},
    "inactive tokens": {"torch.where(active[:, None], grad_y, 0.0)": "grad_y.clone()"},
}


@pytest.mark.parametrize("name", BUGS)
def test_the_dense_model_finds_a_planted_bug(name):
    worlds = [Spec(3, shared=1), Spec(4, mask="tokens", shared_x=True)]
    for spec in worlds:
        check(spec, in_threads(spec))
    with mutated("evenmoe.ops.gradients", BUGS[name]):
        assert fails(lambda: [check(spec, in_threads(spec)) for spec in worlds])


# -- ranks unlike, and what is refused ---------------------------------------------------------------------------------


def told(call: Callable[[], object]) -> str:
    try:
        call()
    except (ConstraintError, RankDisagreementError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def plain(rank: Rank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    own = inputs(Spec(7), rank.index)
    return own["x"].requires_grad_(), own["ids"], own["weights"].requires_grad_(), {"ep": rank.ep, "num_experts": 4}


def run_two(step: Callable[[Rank], Any]) -> list:
    with em.local_world(2, timeout_s=60.0) as world:
        return world.run(step)


def test_gradients_on_one_rank_alone_are_named():
    def step(rank: Rank) -> list[str]:
        x, ids, weights, same = plain(rank)
        first = told(lambda: em.dispatch(x if rank.index else x.detach(), ids, **same))
        sent = em.dispatch(x, ids, **same)
        with torch.set_grad_enabled(rank.index == 0):
            second = told(lambda: em.combine(sent.expand_x, ids, sent, weights, **same))
        return [first, second]

    rest = (
        "it must be recorded on every rank of a group or on none, as all take part in the backward pass; enable "
        "gradients on all ranks, or call under torch.no_grad() on all."
    )
    expected = [
        f"RankDisagreementError: `gradients of x` is not recorded on rank 0 and recorded on rank 1: {rest}",
        f"RankDisagreementError: `gradients of expert_out` is recorded on rank 0 and not recorded on rank 1: {rest}",
    ]
    assert run_two(step) == [expected, expected]


def test_a_rank_whose_experts_are_not_in_the_graph_takes_part():
    def step(rank: Rank) -> torch.Tensor:
        x, ids, weights, same = plain(rank)
        sent = em.dispatch(x, ids, **same)
        out = torch.ones_like(sent.expand_x) if rank.index else sent.expand_x * 2
        em.combine(out, ids, sent, weights, **same).sum().backward()
        assert x.grad is not None
        return torch.equal(x.grad, (2 * weights * (ids < 2)).sum(1, keepdim=True).expand_as(x))

    assert run_two(step) == [True, True]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "int8 rows": ("dispatch", {"quant_mode": 2}, "`quant_mode` is 2"),
    "smooth scales": ("dispatch", {"quant_mode": 2, "scales": torch.ones(4, HIDDEN)}, "`quant_mode` is 2"),
    "copy experts": ("dispatch", {"copy_expert_num": 1}, "`copy_expert_num` is 1"),
    "const experts": ("dispatch", {"const_expert_num": 1}, "`const_expert_num` is 1"),
    "int8 back": ("combine", {"comm_quant_mode": 2}, "`comm_quant_mode` is 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_without_gradients(name):
    operator, options, value = REFUSED[name]

    def step(rank: Rank) -> str:
        x, ids, weights, same = plain(rank)
        if operator == "dispatch":
            em.dispatch(x.detach(), ids, **same, **options)  # as ever
            return told(lambda: em.dispatch(x, ids, **same, **options))
        sent = em.dispatch(x, ids, **same)
        return told(lambda: em.combine(sent.expand_x, ids, sent, weights, **same, **options))

    fix = "it has no gradients; call under torch.no_grad(), or use ExpertParallel."
    assert run_two(step) == [f"ConstraintError: {value} where gradients are recorded: {fix}"] * 2


def test_the_norm_behind_combine_has_none():
    def step(rank: Rank) -> tuple[str, bool]:
        x, ids, weights, same = plain(rank)
        sent = em.dispatch(x, ids, **same)
        more = (torch.ones(4, 1, HIDDEN), torch.ones(HIDDEN))

        def call() -> Any:
            return em.combine_add_rms_norm(sent.expand_x, ids, sent, weights, *more, ep=rank.ep, num_experts=4)

        sentence = told(call)
        with torch.no_grad():
            return sentence, call()[0].requires_grad

    sentence = (
        "ConstraintError: `expert_out` is given where gradients are recorded: it has none in combine_add_rms_norm; "
        "call under torch.no_grad(), or use combine and torch.nn.functional.rms_norm."
    )
    assert run_two(step) == [(sentence, False)] * 2


def test_gradients_of_gradients_are_refused():
    def step(rank: Rank) -> str:
        x, ids, weights, same = plain(rank)
        sent = em.dispatch(x, ids, **same)
        y = em.combine(sent.expand_x, ids, sent, weights, **same)
        return told(lambda: torch.autograd.grad(y.sum(), x, create_graph=True))

    sentence = (
        "ConstraintError: `create_graph` is True: it must be False, since gradients of gradients do not cross ranks; "
        "call backward without it, or keep the layer out of what is differentiated twice."
    )
    assert run_two(step) == [sentence] * 2
