"""`ExpertParallel.reduce_replica_gradients` against a loop over slots, over threads and processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.errors import EvenmoeError
from evenmoe.transport.world import Rank
from tests.placements import random_placement
from tests.worlds import assert_same_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SHAPES: tuple[tuple[int, ...], ...] = ((), (3,), (0,), (2, 5))


@dataclass(frozen=True)
class Spec:
    """Parameters of one world: `stacked`, or one tensor for every slot; a share of their gradients is `absent`."""

    seed: int
    ranks: int
    per_rank: int
    experts: int
    stacked: bool
    absent: float
    dtype: int
    shape: int


@st.composite
def specs(draw: st.DrawFn, ranks: int | None = None) -> Spec:
    ranks = draw(st.integers(1, 6)) if ranks is None else ranks
    per_rank = draw(st.integers(1, 4))
    return Spec(
        draw(st.integers(0, 2**32)),
        ranks,
        per_rank,
        draw(st.integers(1, ranks * per_rank)),
        draw(st.booleans()),
        draw(st.sampled_from([0.0, 0.5, 1.0])),
        draw(st.integers(0, len(DTYPES) - 1)),
        draw(st.integers(0, len(SHAPES) - 1)),
    )


def gradients_of(spec: Spec) -> tuple[em.Placement, list[torch.Tensor | None]]:
    """The placement, and every slot's gradient before."""
    rng = np.random.default_rng(spec.seed)
    placement = random_placement(rng, 1, spec.experts, spec.ranks, spec.per_rank)
    shape, dtype, found = SHAPES[spec.shape], DTYPES[spec.dtype], []
    for _ in range(spec.ranks):
        none = rng.random(1 if spec.stacked else spec.per_rank) < spec.absent  # stacked: for all slots, or for none
        for missing in np.broadcast_to(none, spec.per_rank):
            values = torch.from_numpy(np.asarray(rng.standard_normal(shape))).to(dtype)
            found.append(None if missing else values)
    return placement, found


def reduced(rank: Rank, spec: Spec) -> list[torch.Tensor | None]:
    """The gradients of a rank's slots afterwards; two parameters, of which the other is float32 of one element."""
    placement, before = gradients_of(spec)
    mine = before[rank.index * spec.per_rank :][: spec.per_rank]
    layer = em.ExpertParallel(rank.ep, placement.eplb_table(0), num_slots=placement.num_slots)
    shape, dtype = SHAPES[spec.shape], DTYPES[spec.dtype]
    other = torch.zeros((spec.per_rank, 1), requires_grad=True)
    other.grad = torch.ones_like(other)
    if spec.stacked:
        stacked = torch.zeros((spec.per_rank, *shape), dtype=dtype, requires_grad=True)
        given = [gradient for gradient in mine if gradient is not None]
        stacked.grad = torch.stack(given) if given else None
        layer.reduce_replica_gradients([stacked, other])
        after = [None] * spec.per_rank if stacked.grad is None else list(stacked.grad)
    else:
        experts = [torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in mine]
        for expert, gradient in zip(experts, mine, strict=True):
            expert.grad = None if gradient is None else gradient.clone()
        layer.reduce_replica_gradients(iter([tuple(experts), other]))
        after = [expert.grad for expert in experts]
    first = placement.slot_to_expert[0][rank.index * spec.per_rank :][: spec.per_rank]
    assert other.grad.flatten().tolist() == [float(placement.num_replicas[0][expert]) for expert in first]
    return after


def check(spec: Spec, results: list[list[torch.Tensor | None]]) -> None:
    placement, before = gradients_of(spec)
    after = [gradient for of_rank in results for gradient in of_rank]
    held, dtype = placement.slot_to_expert[0], DTYPES[spec.dtype]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for slot, found in enumerate(after):
        replicas = [other for other in range(len(held)) if held[other] == held[slot]]
        if all(before[other] is None for other in replicas):
            # A stacked gradient may have come into being for another slot of the rank.
            assert found is None or (spec.stacked and not found.any())
            continue
        total = torch.zeros(SHAPES[spec.shape], dtype=wide)
        for other in replicas:
            gradient = before[other]
            total = total if gradient is None else total + gradient.to(wide)
        expected = total.to(dtype) if len(replicas) > 1 else before[slot]
        assert found is not None
        assert_same_bits(found + 0.0, expected + 0.0, f"slot {slot}")


@settings(max_examples=80, deadline=None)
@given(specs())
def test_threads(spec):
    with em.local_world(spec.ranks, timeout_s=60.0) as world:
        check(spec, world.run(lambda rank: reduced(rank, spec)))


@settings(max_examples=20, deadline=None)
@given(specs(ranks=4))
def test_processes(processes, spec):
    check(spec, processes.run((4, 1), reduced, spec))


def told(call: Any) -> str:
    try:
        call()
    except EvenmoeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


ZIP = "pass stacked parameters, or zip(*(expert.parameters() for expert in experts))."
SAME = "it must be equal on every rank of a group; pass the same on all ranks."
WRONG = {
    "three slots": (
        lambda: [torch.zeros(3, 2)],
        f"ConstraintError: `parameters[0]` is of 3 slots: it must be of the 2 slots of this rank; {ZIP}",
    ),
    "a number": (
        lambda: [torch.zeros(2, 2), torch.tensor(1.0)],
        f"ConstraintError: `parameters[1]` is of 0 slots: it must be of the 2 slots of this rank; {ZIP}",
    ),
    "whole numbers": (
        lambda: [torch.zeros((2, 2), dtype=torch.int32)],
        f"UnsupportedTypeError: `parameters[0]` is torch.int32: it must be of tensors of a float dtype; {ZIP}",
    ),
    "lists": (
        lambda: [[1.0, 2.0]],
        f"UnsupportedTypeError: `parameters[0]` is a float: it must be of tensors of a float dtype; {ZIP}",
    ),
    "slots unlike": (
        lambda: [(torch.zeros(2), torch.zeros(3))],
        "ConstraintError: `parameters[0]` is of 2 kinds of tensors: it must be of tensors of one shape, dtype and "
        f"device; {ZIP}",
    ),
}
UNLIKE = {
    "more": (
        lambda: [torch.zeros(2, 2)] * 2,
        f"RankDisagreementError: `number of parameters` is 1 on rank 0 and 2 on rank 1: {SAME}",
    ),
    "another shape": (
        lambda: [torch.zeros(2, 3)],
        "RankDisagreementError: `digest of the parameters' shapes and dtypes` is ",
    ),
}


@pytest.mark.parametrize("name", [*WRONG, *UNLIKE])
def test_what_is_no_parameter_is_said_on_all_ranks(name):
    make, sentence = (WRONG | UNLIKE)[name]

    def step(rank: Rank) -> tuple[str, float]:
        layer = em.ExpertParallel(rank.ep, em.Placement([[0, 1, 0, 2]], 2).eplb_table(0), num_slots=4)
        given = make() if rank.index == 1 else [torch.zeros(2, 2)]
        text = told(lambda: layer.reduce_replica_gradients(given))
        right = torch.zeros((2, 1), requires_grad=True)
        right.grad = torch.ones(2, 1)
        layer.reduce_replica_gradients([right])  # the ranks are in step
        return text, right.grad[0].item()

    with em.local_world(2, timeout_s=60.0) as world:
        (first, one), (second, other) = world.run(step)
    assert one == other == 2.0
    assert second.startswith(sentence)
    if name in UNLIKE:
        assert first == second
    else:
        inner = second.partition(": ")[2].removesuffix(".")
        assert first.startswith(
            "RankDisagreementError: `the call of ExpertParallel.reduce_replica_gradients on rank 1` is refused there "
            f"({inner}"[:200]
        )
