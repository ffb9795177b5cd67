"""Who carries the rows of one MoE layer to its experts and back: evenmoe, what one writes without it, and limits.

A contestant is made for one rank and one size of work; a step of it takes this rank's batch and the experts, and gives
what `Contestant.expected` says. All but the limits bring each (token, expert) pair to the expert's rank, and the
weighted sum back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import evenmoe as em
from evenmoe.placement import default_placement
from evenmoe.transport.world import Rank

TRANSPORTS = ("shared_memory", "process_group")
#: Other libraries that carry tokens to experts on a CPU, and what of them is measured here.
PEERS = {"transformers": "AllToAllEP of transformers", "torchtitan": "", "megatron.core": ""}


@dataclass(frozen=True)
class Work:
    """The sizes of one layer's step: T tokens a rank, H hidden, E experts, K of them per token, W ranks."""

    tokens: int
    hidden: int
    experts: int
    top_k: int = 8
    ranks: int = 4

    @property
    def name(self) -> str:
        return f"T{self.tokens} H{self.hidden} E{self.experts} K{self.top_k} W{self.ranks}"


@dataclass(frozen=True)
class Batch:
    """What one rank's router gives: x bfloat16 (T, H), ids int32 (T, K), weights float32 (T, K)."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    @staticmethod
    def of(work: Work, rank: int) -> Batch:
        """Random tokens and uniform routing; weights that a bfloat16 holds, since some kernels take no others."""
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn((work.tokens, work.hidden), generator=generator).bfloat16()
        scores = torch.rand((work.tokens, work.experts), generator=generator)
        ids = scores.topk(work.top_k, dim=1).indices.int()
        weights = torch.rand((work.tokens, work.top_k), generator=generator) / work.top_k
        return Batch(x, ids, weights.bfloat16().float())


#: The experts of a rank: rows (R, H), and a function that gives the logical expert of each, to their outputs (R, H).
Experts = Callable[[torch.Tensor, Callable[[], torch.Tensor]], torch.Tensor]
Step = Callable[[Batch, Experts], torch.Tensor]


def factor(ids: torch.Tensor) -> torch.Tensor:
    """By what expert `ids` multiplies in a check: powers of two, which round nothing, and differ between neighbors."""
    return 2.0 ** (ids.double() % 5)


def multiplied(rows: torch.Tensor, ids: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The experts of a check."""
    return rows * factor(ids())[:, None].to(rows.dtype)


def dense(batch: Batch) -> torch.Tensor:
    """(T, H) in float64: the sum over k of weight · factor · x, without any exchange."""
    return batch.x.double() * (batch.weights.double() * factor(batch.ids)).sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Contestant:
    """A step, what it gives when the experts are `multiplied`, in float64, and how often it rounds to bfloat16."""

    step: Step
    expected: Callable[[Batch], torch.Tensor] = dense
    roundings: int = 1


def expert_parallel(rank: Rank, work: Work, combine: str = "exact") -> Contestant:
    """`ExpertParallel`, each expert in one slot."""
    table = default_placement(1, work.experts, work.ranks).eplb_table(0)
    layer = em.ExpertParallel(rank.ep, table, num_slots=work.experts, combine=combine)

    def step(batch: Batch, experts: Experts) -> torch.Tensor:
        sent = layer.dispatch(batch.x, batch.ids, batch.weights)
        out = experts(sent.rows, lambda: _by_expert(sent.num_tokens_per_expert, rank.ep.rank))
        return layer.combine(sent, out)

    return Contestant(step, roundings=1 if combine == "exact" else 2)


def reduced_sums(rank: Rank, work: Work) -> Contestant:
    """`ExpertParallel` with one row for each (token, rank) on its way back."""
    return expert_parallel(rank, work, "reduced")


def operators(rank: Rank, work: Work) -> Contestant:
    """`em.dispatch` and `em.combine`, whose outputs have room for every row that could come."""

    def step(batch: Batch, experts: Experts) -> torch.Tensor:
        given = {"ep": rank.ep, "num_experts": work.experts, "limits": "unlimited"}
        sent = em.dispatch(batch.x, batch.ids, **given)

        def of_rows() -> torch.Tensor:
            known = _by_expert(sent.expert_token_nums, rank.ep.rank)
            return torch.cat([known, known.new_zeros(len(sent.expand_x) - len(known))])

        return em.combine(experts(sent.expand_x, of_rows), batch.ids, sent, batch.weights, **given)

    return Contestant(step)


def by_hand(rank: Rank, work: Work) -> Contestant:
    """What one writes over torch.distributed: a row for each pair, a sort at the receiver, index_add_ in float32."""
    each = work.experts // work.ranks

    def step(batch: Batch, experts: Experts) -> torch.Tensor:
        x, flat = batch.x, batch.ids.flatten()
        order = flat.argsort(stable=True)
        token = order // work.top_k
        counts = torch.bincount(flat // each, minlength=work.ranks)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        send, recv = counts.tolist(), theirs.tolist()
        rows = x.new_empty((sum(recv), x.shape[1]))
        dist.all_to_all_single(rows, x[token], recv, send)
        chosen = flat.new_empty(sum(recv))
        dist.all_to_all_single(chosen, flat[order], recv, send)
        by_expert = chosen.argsort(stable=True)
        out = experts(rows[by_expert], lambda: chosen[by_expert])
        back = torch.empty_like(out)
        back[by_expert] = out
        returned = x.new_empty((len(flat), x.shape[1]))
        dist.all_to_all_single(returned, back, send, recv)
        y = torch.zeros(x.shape, dtype=torch.float32)
        y.index_add_(0, token, returned.float() * batch.weights.flatten()[order, None])
        return y.to(x.dtype)

    return Contestant(step)


def raw_all_to_all(rank: Rank, work: Work) -> Contestant:
    """A limit of gloo: one row per (token, rank) there and back, sorted and counted beforehand, added up by nobody."""
    given = Batch.of(work, rank.index)
    goes = torch.zeros((work.tokens, work.ranks), dtype=torch.bool)
    goes.scatter_(1, given.ids.long() // (work.experts // work.ranks), True)
    counts = goes.sum(dim=0)
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts)
    send, recv = counts.tolist(), theirs.tolist()
    rows = given.x[goes.T.nonzero()[:, 1]]
    received, returned = rows.new_empty((sum(recv), work.hidden)), torch.empty_like(rows)

    def step(batch: Batch, experts: Experts) -> torch.Tensor:
        dist.all_to_all_single(received, rows, recv, send)
        out = experts(received, lambda: torch.zeros(len(received)))
        dist.all_to_all_single(returned, out, send, recv)
        return returned

    return Contestant(step, lambda batch: rows.double())


def copies(rank: Rank, work: Work) -> Contestant:
    """A limit of memory: each row copied once into the order of experts, and one pass that adds up, on its own rank."""
    given = Batch.of(work, rank.index)
    chosen, order = given.ids.flatten().long().sort(stable=True)
    token, rows = order // work.top_k, given.x.new_empty((len(order), work.hidden))
    positions = order.argsort().reshape(work.tokens, work.top_k)
    weights = given.weights.bfloat16()

    def step(batch: Batch, experts: Experts) -> torch.Tensor:
        torch.index_select(batch.x, 0, token, out=rows)
        out = experts(rows, lambda: chosen)
        return nn.functional.embedding_bag(positions, out, per_sample_weights=weights, mode="sum")

    return Contestant(step)


class _ForwardOfExperts(nn.Module):
    """A module of experts as transformers' implementations call it."""

    def __init__(self, rank: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts, self._first = num_experts, rank * num_experts
        self.experts: Experts | None = None

    def forward(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert self.experts is not None
        return self.experts(rows, lambda: ids.flatten() + self._first)


def all_to_all_of_transformers(rank: Rank, work: Work) -> Contestant:
    """transformers' own: a row for each pair, which stay in the order in which they came; the sum in float32."""
    from transformers.distributed.expert_parallel import AllToAllEP

    mesh = init_device_mesh("cpu", (work.ranks, 1), mesh_dim_names=("ep", "tp"))
    module = _ForwardOfExperts(rank.index, work.experts // work.ranks)
    carry = AllToAllEP(module, mesh["ep"], mesh["tp"])

    def step(batch: Batch, experts: Experts) -> torch.Tensor:
        module.experts = experts
        return carry(batch.x, batch.ids.long(), batch.weights).to(batch.x.dtype)

    return Contestant(step)


Make = Callable[[Rank, Work], Contestant]
#: Over one transport of evenmoe each, or over threads.
OURS: dict[str, Make] = {"ExpertParallel": expert_parallel, "reduced sums": reduced_sums, "operators": operators}
#: In processes, by what torch.distributed has.
OTHERS: dict[str, Make] = {
    "by hand": by_hand,
    "raw all_to_all": raw_all_to_all,
    "copies and sum": copies,
    PEERS["transformers"]: all_to_all_of_transformers,
}


def absent() -> dict[str, str]:
    """Why a peer is not measured, by its name."""
    found = {}
    for peer, measured in PEERS.items():
        if not _is_here(peer):
            found[peer] = "not installed"
        elif not measured:
            found[peer] = "installed, but nothing here calls it"
    return found


def names() -> list[str]:
    """All contestants that can be measured here."""
    ours = [f"{name}, {kind}" for kind in ("threads", *TRANSPORTS) for name in OURS]
    return ours + [name for name in OTHERS if name != PEERS["transformers"] or "transformers" not in absent()]


def _is_here(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def _by_expert(counts: torch.Tensor, rank: int) -> torch.Tensor:
    """The logical expert of each row, which lie expert by expert."""
    return torch.repeat_interleave(counts.cpu()) + rank * len(counts)
