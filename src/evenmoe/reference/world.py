"""Who sits where: the ranks of one world, their experts, and the entries that a mask lets through.

Ranks stand EP-major in every list of this room: entry d = EP rank · max(tp, 1) + TP rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


def ceil_div(a: int, b: int) -> int:
    """Smallest integer that is at least a/b, for b > 0.

    >>> ceil_div(8, 3), ceil_div(6, 3)
    (3, 2)
    """
    return -(-a // b)


@dataclass(frozen=True)
class Layout:
    """Which EP rank hosts which expert (specification §0, §2.6): shared-expert ranks first, MoE ranks after them.

    Attributes:
        ep: EP ranks.
        experts: physical MoE experts M; expert m lives on rank `shared_ranks` + m // L as local expert m % L.
        shared_experts: Sn after normalization, 0 where nobody hosts a shared expert.
        shared_ranks: Sr, R = Sr / Sn per shared expert.

    >>> layout = Layout(ep=8, experts=8, shared_experts=2, shared_ranks=4)
    >>> layout.experts_per_rank, layout.ranks_per_shared_expert
    (2, 2)
    >>> layout.home(5)  # rank 4 + 5 // 2, its local expert 5 % 2
    (6, 1)
    >>> [layout.shared_home(e, source) for e in (0, 1) for source in (6, 7)]  # e·R + source % R
    [0, 1, 2, 3]
    """

    ep: int
    experts: int
    shared_experts: int
    shared_ranks: int

    @property
    def experts_per_rank(self) -> int:
        assert self.experts % (self.ep - self.shared_ranks) == 0
        return self.experts // (self.ep - self.shared_ranks)

    @property
    def ranks_per_shared_expert(self) -> int:
        assert self.shared_experts > 0
        assert self.shared_ranks % self.shared_experts == 0
        return self.shared_ranks // self.shared_experts

    def is_shared(self, rank: int) -> bool:
        return rank < self.shared_ranks

    def num_local(self, rank: int) -> int:
        """Experts on `rank`: L, or 1 on a shared-expert rank."""
        return 1 if self.is_shared(rank) else self.experts_per_rank

    def home(self, expert: int) -> tuple[int, int]:
        """(rank, local expert) of a physical MoE expert."""
        return self.shared_ranks + expert // self.experts_per_rank, expert % self.experts_per_rank

    def shared_home(self, shared_expert: int, source: int) -> int:
        """The rank to which `source` sends its tokens for `shared_expert`."""
        return shared_expert * self.ranks_per_shared_expert + source % self.ranks_per_shared_expert


@dataclass(frozen=True)
class World:
    """All ranks of one call.

    Attributes:
        tp: TP world size as given: 0 and 1 exchange nothing, 2 does.
        original: the layout the caller named; it fixes every buffer size.
        current: the layout that routes; differs from `original` only when an elastic world is scaled down (§2.11).
        original_rank: for every EP rank of `current`, its EP rank in `original` (table2).
        elastic: an elastic vector was given, scaled down or not.
    """

    tp: int
    original: Layout
    current: Layout
    original_rank: tuple[int, ...]
    elastic: bool

    def index(self, rank: int, tp_rank: int = 0) -> int:
        """Where the lists hold EP rank `rank` of the current layout."""
        return self.original_rank[rank] * max(self.tp, 1) + tp_rank

    def ranks(self) -> list[tuple[int, int]]:
        """Every (EP rank of the current layout, TP rank) that takes part."""
        return [(rank, tp_rank) for rank in range(self.current.ep) for tp_rank in range(max(self.tp, 1))]


def make_world(
    num_lists: int,
    *,
    tp_world_size: int,
    num_experts: int,
    shared_expert_num: int,
    shared_expert_rank_num: int,
    elastic_info: torch.Tensor | Sequence[torch.Tensor | None] | None,
) -> World:
    """Read the sizes of a call, and the elastic vector if there is one (specification §0, §2.11).

    `elastic_info` is int32 (4+2·ep,): [isScaledDown, epNew, SrNew, MNew, table1 (new rank or −1), table2 (old rank)].

    >>> vector = torch.tensor([1, 2, 0, 2, 0, -1, 1, 0, 2, -1], dtype=torch.int32)  # rank 1 of 3 is gone
    >>> world = make_world(3, tp_world_size=0, num_experts=3, shared_expert_num=1, shared_expert_rank_num=0,
    ...                    elastic_info=vector)
    >>> world.current.ep, world.current.experts, world.original_rank
    (2, 2, (0, 2))
    """
    assert num_lists % max(tp_world_size, 1) == 0
    ep = num_lists // max(tp_world_size, 1)
    # the default pair (1 shared expert, no rank for it) means no shared expert at all (§0)
    shared_experts = 0 if shared_expert_num == 1 and shared_expert_rank_num == 0 else shared_expert_num
    original = Layout(ep, num_experts, shared_experts, shared_expert_rank_num)
    vectors = [vector.tolist() for vector in one_per_rank(elastic_info, num_lists) if vector is not None]
    if not vectors or vectors[0][0] == 0:
        return World(tp_world_size, original, original, tuple(range(ep)), elastic=bool(vectors))
    assert all(vector == vectors[0] for vector in vectors)
    assert tp_world_size < 2
    _, new_ep, new_shared_ranks, new_experts = vectors[0][:4]
    table1, table2 = vectors[0][4 : 4 + ep], vectors[0][4 + ep :]
    assert all(table1[table2[rank]] == rank for rank in range(new_ep))
    # With no rank left for them, shared experts are gone: dispatch would send them nothing (§2.11 is silent).
    current = Layout(new_ep, new_experts, shared_experts if new_shared_ranks else 0, new_shared_ranks)
    return World(tp_world_size, original, current, tuple(table2[:new_ep]), elastic=True)


def one_per_rank(value: torch.Tensor | Sequence[Any] | None, num_lists: int) -> list[Any]:
    """One entry per rank: a list stays, a tensor is shared by all, None becomes a None for everybody.

    >>> one_per_rank(None, 2), one_per_rank(torch.tensor(5), 2)
    ([None, None], [tensor(5), tensor(5)])
    """
    if value is None or isinstance(value, torch.Tensor):
        return [value] * num_lists
    assert len(value) == num_lists
    return list(value)


def active_entries(mask: torch.Tensor | None, num_tokens: int, top_k: int) -> list[list[bool]]:
    """Which (token, k) take part (specification §2.9); a token is active when any of its entries does.

    `mask` is None (all), bool (Bs,) of which only the number of True counts, or bool (Bs,K) entry by entry.

    >>> active_entries(torch.tensor([False, True]), 2, 3)  # one True: token 0, wherever it stands
    [[True, True, True], [False, False, False]]
    """
    if mask is None:
        return [[True] * top_k for _ in range(num_tokens)]
    if mask.dim() == 2:
        return mask.tolist()
    num_active = sum(mask.tolist())
    return [[token < num_active] * top_k for token in range(num_tokens)]
