"""A model trained over ranks against the same one on one process, and what torch does to a layer that is trained.

Shapes: T tokens of a rank, H hidden, F inner width, K experts per token, E experts, L slots of a rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

import evenmoe as em
from evenmoe.transport.world import Rank
from tests.worlds import assert_same_bits

RANKS, HIDDEN, INNER, TOP_K = 4, 3, 4, 2
PLACEMENT = em.Placement([[0, 1, 0, 2, 3, 0, 4, 1]], RANKS)
EXPERTS, PER_RANK = PLACEMENT.num_experts, PLACEMENT.num_slots // RANKS
TOKENS = (5, 0, 3, 4)
STEPS, RATE = 50, 2.0**-8
UNIT = 2.0**-53


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(TOKENS[rank], HIDDEN, seed=rank), normal(TOKENS[rank], HIDDEN, seed=10 + rank)


def new_parameters() -> list[torch.Tensor]:
    """Router (E, H), up (E, F, H), down (E, H, F)."""
    shapes = (EXPERTS, HIDDEN), (EXPERTS, INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    return [normal(*shape, seed=20 + i) for i, shape in enumerate(shapes)]


def routed(x: torch.Tensor, router: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = (x @ router.T).softmax(1).topk(TOP_K, dim=1)
    return ids, weights / weights.sum(1, keepdim=True)


def expert(rows: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return torch.tanh(rows @ up.T) @ down.T


class MoE(torch.nn.Module):
    """One layer over ranks: the router on every rank, stacked experts of this rank's slots."""

    def __init__(self, rank: Rank, rule: Any = "batch", dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layer = em.ExpertParallel(rank.ep, PLACEMENT.eplb_table(0), num_slots=PLACEMENT.num_slots, rule=rule)
        held = PLACEMENT.slot_to_expert[0][rank.index * PER_RANK :][:PER_RANK].tolist()
        router, up, down = (values.to(dtype) for values in new_parameters())
        self.router = torch.nn.Parameter(router)
        self.up, self.down = torch.nn.Parameter(up[held]), torch.nn.Parameter(down[held])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = routed(x, self.router)
        sent = self.layer.dispatch(x, ids, weights)
        of_slot = sent.rows.split(sent.num_tokens_per_expert.tolist())
        out = [expert(rows, up, down) for rows, up, down in zip(of_slot, self.up, self.down, strict=True)]
        return x + self.layer.combine(sent, torch.cat(out))


def dense(parameters: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    router, up, down = parameters
    ids, weights = routed(x, router)
    every = torch.stack([expert(x, up[e], down[e]) for e in range(EXPERTS)], dim=1)  # (T, E, H)
    return x + (weights[:, :, None] * every.gather(1, ids[:, :, None].expand(-1, -1, HIDDEN))).sum(1)


def loss_of(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (y - target).square().sum() / 2


def train_one(rank: Rank, add_up: Callable[[torch.Tensor], None]) -> list[torch.Tensor]:
    """STEPS of gradient descent; the router's gradient is added up over ranks by `add_up`, as any dense one."""
    model, (x, target) = MoE(rank), batch_of(rank.index)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model(x), target).backward()
        add_up(model.router.grad)
        model.layer.reduce_replica_gradients([model.up, model.down])
        optimizer.step()
    return [parameter.detach() for parameter in (model.router, model.up, model.down)]


def train_process(rank: Rank) -> list[torch.Tensor]:
    return train_one(rank, dist.all_reduce)


def train_threads() -> list[list[torch.Tensor]]:
    with em.local_world(RANKS, timeout_s=60.0) as world:

        def one(rank: Rank) -> list[torch.Tensor]:
            def add_up(grad: torch.Tensor) -> None:
                flat = grad.reshape(1, -1).repeat(RANKS, 1)
                grad.copy_(rank.ep.exchange_rows(flat, [1] * RANKS, [1] * RANKS).sum(0).view(grad.shape))

            return train_one(rank, add_up)

        return world.run(one)


@cache
def train_dense() -> tuple[list[torch.Tensor], float]:
    """The parameters after STEPS, and how far rounding can have moved another way to compute them.

    One step is p → p − r·g(p). With a perturbation δ of p and a rounding error ε of the gradient it moves
    δ′ ≤ (1 + r·‖h‖)·δ + r·ε, where h is the Hessian at p (δ² is 10⁻²⁵ of it) and ‖·‖ the 2-norm of all parameters. ε is
    that of both ways: 2·n·u·s, where s is the norm of the sum of what single tokens contribute, in absolute value, and
    n bounds the roundings on the way of one term: T·K·RANKS in sums over tokens, H + F + E in inner products, softmax
    and residual, twice for forward and backward, and 30 in the elementary functions. What cancels within one token's
    contribution is covered by the factor 8: no inner product here is of more than 4 terms, and no token has more than
    two experts.
    """
    torch.set_num_threads(1)  # a thread pool has nothing to share here, and its idle threads spin
    parameters = new_parameters()
    x, target = (torch.cat(both) for both in zip(*map(batch_of, range(RANKS)), strict=True))
    sizes = [values.numel() for values in parameters]
    roundings = sum(TOKENS) * TOP_K + 2 * (HIDDEN + INNER + EXPERTS + RANKS) + 30

    def by_token(flat: torch.Tensor) -> torch.Tensor:
        parts = [p.view(v.shape) for p, v in zip(flat.split(sizes), parameters, strict=True)]
        return (dense(parts, x) - target).square().sum(1) / 2

    flat, moved = torch.cat([values.flatten() for values in parameters]), 0.0
    for _ in range(STEPS):
        each = torch.autograd.functional.jacobian(by_token, flat, vectorize=True)
        hessian = torch.autograd.functional.hessian(lambda f: by_token(f).sum(), flat, vectorize=True)
        rounding = 2 * 8 * roundings * UNIT * each.abs().sum(0).norm().item()
        moved = (1 + RATE * torch.linalg.matrix_norm(hessian, 2).item()) * moved + RATE * rounding
        flat = flat - RATE * each.sum(0)
    return [part.view(v.shape) for part, v in zip(flat.split(sizes), parameters, strict=True)], moved


def check_trained(results: list[list[torch.Tensor]]) -> None:
    (router, up, down), bound = train_dense()
    assert bound < 1e-9  # else it would show nothing: parameters are of size 1
    start = new_parameters()
    assert (router - start[0]).norm() > 1e-2
    assert (up - start[1]).norm() > 1e-2
    held = PLACEMENT.slot_to_expert[0].tolist()
    for rank, (own_router, own_up, own_down) in enumerate(results):
        mine = held[rank * PER_RANK :][:PER_RANK]
        off = [(own_router - router).norm(), (own_up - up[mine]).norm(), (own_down - down[mine]).norm()]
        assert max(off) <= bound, (rank, off, bound)
    slots = [(tensors[1][i], tensors[2][i]) for tensors in results for i in range(PER_RANK)]
    for slot, other in itertools.combinations(range(len(slots)), 2):
        if held[slot] == held[other]:
            for ours, theirs in zip(slots[slot], slots[other], strict=True):
                assert_same_bits(ours, theirs, f"slots {slot} and {other}, of one expert")


def test_fifty_steps_over_threads():
    check_trained(train_threads())


def test_fifty_steps_over_processes(processes):
    check_trained(processes.run((RANKS, 1), train_process))


def test_replicas_that_are_not_added_up_are_found(monkeypatch):
    monkeypatch.setattr(em.ExpertParallel, "reduce_replica_gradients", lambda self, parameters: None)
    results = train_threads()
    with pytest.raises(AssertionError):
        check_trained(results)
