"""`Layout`: every number that dispatch and combine derive from their attributes, computed in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evenmoe.errors import ConstraintError


@dataclass(frozen=True, slots=True)
class Layout:
    """Who holds which expert, and how large the buffers are, seen from one rank (specification §0, §2.4, §2.11).

    Ranks 0…shared_ranks−1 hold shared experts, the ranks after them MoE experts. All attributes are int but the last
    three; the letters are the specification's.

    Attributes:
        ep, rank: ranks of the expert-parallel group, and this one among them (ep, r).
        tp, tp_rank: ranks of the tensor-parallel group, 0 or 1 when there is none, and this one among them (tp, t).
        num_experts: physical MoE experts over all ranks (M).
        shared_experts: shared experts on ranks of their own (Sn), 0 when shared_ranks is.
        shared_ranks: ranks that hold them (Sr).
        ranks_per_shared: ranks that hold the same shared expert (R), 0 when there is none.
        experts_per_rank: MoE experts of a MoE rank (L).
        local_experts: experts of this rank, 1 on a shared rank, else L.
        num_tokens, hidden, top_k: tokens of this rank (Bs), their width (H), MoE experts per token (K).
        max_bs, global_bs: tokens of the fullest rank, and ep times that (G).
        capacity: rows that this rank must have room for (A).
        is_shared: bool, whether this rank holds a shared expert.
        active_ranks: tuple of int, after `scale_down` the world's rank of every rank that is left; else empty.
        original: the layout before `scale_down`, whose buffers stay; else None.
    """

    ep: int
    rank: int
    tp: int
    tp_rank: int
    num_experts: int
    shared_experts: int
    shared_ranks: int
    ranks_per_shared: int
    experts_per_rank: int
    local_experts: int
    num_tokens: int
    hidden: int
    top_k: int
    max_bs: int
    global_bs: int
    capacity: int
    is_shared: bool
    active_ranks: tuple[int, ...] = ()
    original: Layout | None = None

    def rank_of_expert(self, expert: int) -> int:
        """The rank that holds physical MoE expert 0…num_experts−1."""
        return self.shared_ranks + expert // self.experts_per_rank

    # Lengths of outputs that both checks and allocations need: always from the original layout (§2.11, §5).

    @property
    def expand_x_rows(self) -> int:
        return self.capacity * max(self.tp, 1)

    @property
    def ep_recv_counts_length(self) -> int:
        before = self.original or self
        return before.ep * before.local_experts * max(self.tp, 1)


def make_layout(
    *,
    ep: int,
    rank: int,
    num_experts: int,
    num_tokens: int,
    hidden: int,
    top_k: int,
    tp: int = 0,
    tp_rank: int = 0,
    shared_experts: int = 1,
    shared_ranks: int = 0,
    global_bs: int = 0,
    elastic: bool = False,
) -> Layout:
    """The layout of one rank, from arguments that have been checked.

    Args:
        ep, rank, num_experts, num_tokens, hidden, top_k, tp, tp_rank, shared_ranks: int, as in `Layout`.
        shared_experts: int. The default pair (1, 0) of shared_experts and shared_ranks means none (§0).
        global_bs: int, tokens of the fullest rank times ep. 0: every rank has num_tokens.
        elastic: bool, whether elastic_info is given. Then a rank may change its kind, so every rank has room for both.

    Four ranks, the first of them for the one shared expert, and six MoE experts, so two for each of the others:

    >>> layout = make_layout(ep=4, rank=2, num_experts=6, num_tokens=2, hidden=8, top_k=2, shared_ranks=1)
    >>> layout.experts_per_rank, [layout.rank_of_expert(expert) for expert in range(6)]
    (2, [1, 1, 2, 2, 3, 3])
    >>> layout.capacity  # 8 tokens in the world, each to at most 2 of the experts here
    16
    """
    max_bs = global_bs // ep if global_bs else num_tokens
    if shared_ranks == 0:
        shared_experts = 0
    ranks_per_shared = shared_ranks // shared_experts if shared_experts else 0
    experts_per_rank = num_experts // (ep - shared_ranks)
    is_shared = rank < shared_ranks
    moe_rows = max_bs * ep * min(experts_per_rank, top_k)
    # A shared rank serves every ranks_per_shared-th source (§2.6), hence the ceiling.
    shared_rows = max_bs * -(-ep // ranks_per_shared) if ranks_per_shared else 0
    own_rows = shared_rows if is_shared else moe_rows
    return Layout(
        ep=ep,
        rank=rank,
        tp=tp,
        tp_rank=tp_rank,
        num_experts=num_experts,
        shared_experts=shared_experts,
        shared_ranks=shared_ranks,
        ranks_per_shared=ranks_per_shared,
        experts_per_rank=experts_per_rank,
        local_experts=1 if is_shared else experts_per_rank,
        num_tokens=num_tokens,
        hidden=hidden,
        top_k=top_k,
        max_bs=max_bs,
        global_bs=max_bs * ep,
        capacity=max(moe_rows, shared_rows) if elastic else own_rows,
        is_shared=is_shared,
    )


def scale_down(layout: Layout, elastic_info: Sequence[int], smooth_scales: bool = False) -> Layout:
    """The layout of the ranks that are left, on the buffers of the original one (specification §2.11).

    Args:
        layout: of the original world, made with `elastic`.
        elastic_info: 4 + 2·ep ints: [is scaled down, epNew, SrNew, MNew, table1 (ep), table2 (ep)].
            table1[old rank] is the new rank, or −1 for a lost one; table2[new rank] is the old rank, for the first
            epNew entries. When the first int is 0, the others mean nothing and the layout is returned as it is.
        smooth_scales: bool, whether `scales` is given, which has a row for each of the original M experts and no more.

    Raises:
        ConstraintError: a length, a count or a table that contradicts the others; more experts per rank than there is
            room for; this rank is among the lost ones.

    Three of four ranks are left, rank 1 is lost. Old rank 3 is now rank 2, and holds experts 4 and 5 of six:

    >>> before = make_layout(ep=4, rank=3, num_experts=8, num_tokens=2, hidden=8, top_k=2, elastic=True)
    >>> after = scale_down(before, [1, 3, 0, 6, 0, -1, 1, 2, 0, 2, 3, -1])
    >>> after.rank, after.rank_of_expert(4), after.active_ranks
    (2, 2, (0, 2, 3))
    >>> after.ep, after.ep_recv_counts_length  # the buffer still has room for 4 ranks of 2 experts
    (3, 8)
    """
    ep, length = layout.ep, len(elastic_info)
    fix = "give both tables one entry per rank"
    _require(length == 4 + 2 * ep, f"{length} ints", f"must have 4 + 2·{ep} ints", fix)
    scaled, ep_new, shared_new, experts_new, *tables = map(int, elastic_info)
    if not scaled:
        return layout
    _check_scaled_sizes(layout, ep_new, shared_new, experts_new)
    table1, table2 = tables[:ep], tables[ep : ep + ep_new]
    # A rank that held a shared expert may become a MoE rank, so that MNew can exceed M where no scale is needed.
    rule = f"must be at most {layout.num_experts}, the MoE experts that have a row in `scales`"
    fix = f"leave at most {layout.num_experts} MoE experts, or drop `scales`"
    _require(not smooth_scales or experts_new <= layout.num_experts, f"MNew {experts_new}", rule, fix)
    _check_tables(table1, table2)
    rank = table1[layout.rank]
    fix = "let a lost rank leave the world before the others call"
    _require(rank >= 0, f"{rank} for rank {layout.rank}", "must keep the rank that calls", fix)
    is_shared = rank < shared_new
    experts_per_rank = experts_new // (ep_new - shared_new)
    local_experts = 1 if is_shared else experts_per_rank
    rule = f"must leave a rank at most the {layout.local_experts} experts that it had"
    fix = "keep the ranks of shared experts in front, or use fewer MoE experts per rank"
    value = f"rank {rank} of {ep_new} for rank {layout.rank}"
    _require(local_experts <= layout.local_experts, value, rule, fix)
    # capacity needs no check: max_bs·ep·min(L, K) of the original world covers both kinds of rank in any smaller one.
    return replace(
        layout,
        ep=ep_new,
        rank=rank,
        num_experts=experts_new,
        shared_ranks=shared_new,
        ranks_per_shared=shared_new // layout.shared_experts if shared_new else 0,
        experts_per_rank=experts_per_rank,
        local_experts=local_experts,
        is_shared=is_shared,
        active_ranks=tuple(table2),
        original=layout,
    )


def _check_scaled_sizes(layout: Layout, ep_new: int, shared_new: int, experts_new: int) -> None:
    shared, moe_ranks, most = layout.shared_experts, ep_new - shared_new, layout.experts_per_rank
    rule, fix = f"must leave 1 to {layout.ep} ranks", "count the ranks that are left"
    _require(1 <= ep_new <= layout.ep, f"epNew {ep_new}", rule, fix)
    value, rule = f"SrNew {shared_new} of epNew {ep_new}", "must leave at least one rank for MoE experts"
    _require(0 <= shared_new < ep_new, value, rule, f"use 0 to {ep_new - 1}")
    if shared == 0:
        rule = "must be 0, for there are no shared experts on ranks of their own"
        _require(shared_new == 0, f"SrNew {shared_new}", rule, "use 0")
    else:
        rule = f"must leave each of the {shared} shared experts equally many ranks, and at least one"
        fits = shared_new > 0 and shared_new % shared == 0
        _require(fits, f"SrNew {shared_new}", rule, f"use a multiple of {shared}")
    rule = f"must be at least 1 and divide by the {moe_ranks} ranks left for MoE experts"
    fits = experts_new >= 1 and experts_new % moe_ranks == 0
    _require(fits, f"MNew {experts_new}", rule, f"use a multiple of {moe_ranks}")
    rule = f"must leave at most {most} experts per rank, what the buffers have room for"
    _require(experts_new // moe_ranks <= most, f"MNew {experts_new}", rule, f"use at most {most * moe_ranks}")


def _check_tables(table1: list[int], table2: list[int]) -> None:
    # Texts are made for what is wrong alone, since this is done at every call.
    rule = "must have tables that are inverse to each other"
    for new, old in enumerate(table2):
        if not 0 <= old < len(table1):
            within = f"must name an old rank, 0 to {len(table1) - 1}"
            raise _wrong(f"table2[{new}] = {old}", within, "name one that is left")
        if table1[old] != new:
            value = f"table2[{new}] = {old} but table1[{old}] = {table1[old]}"
            raise _wrong(value, rule, f"set table1[{old}] to {new}")
    for old, new in enumerate(table1):
        if new != -1 and (not 0 <= new < len(table2) or table2[new] != old):
            rule = f"{rule}, over {len(table2)} new ranks"
            raise _wrong(f"table1[{old}] = {new}", rule, "use -1 for a lost rank")


def _require(holds: bool, value: str, rule: str, fix: str) -> None:
    if not holds:
        raise _wrong(value, rule, fix)


def _wrong(value: str, rule: str, fix: str) -> ConstraintError:
    return ConstraintError("elastic_info", value, rule, fix)
