"""`lower_bound`: how well any placement could balance a load."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import FloatArray, as_load, within_range
from evenmoe.planner.hierarchical import MOST_PACKINGS, all_packings, best_packings, count_packings, group_members
from evenmoe.planner.kernels.bound import lower_bounds, search_exhaustively
from evenmoe.planner.options import Shape, check_shape, sizes_of
from evenmoe.planner.slots import Padding

# The exhaustive search sharpens the bound of layers up to this size, for a millisecond each: it proves the optimum
# of Mixtral's shape (8 experts, 16 slots) in about 3,000 nodes.
SMALL_SLOTS, NODES = 24, 20_000
# Two sums of the same tokens in different order differ by less, in parts of the sum.
ROUNDING = 1e-9


def lower_bound(
    load: npt.ArrayLike, *, num_ranks: int, num_slots: int | Sequence[int], num_nodes: int = 1, num_groups: int = 1
) -> FloatArray:
    """A peak-to-average load that no placement can beat when every replica takes an even share of its expert.

    Args:
        load: tokens per logical expert, (L, E) or (T, L, E); every window is bounded by itself.
        num_ranks: G.
        num_slots: S, at least E and a multiple of G; w = S / G slots per rank. Or the slots of each rank: the bound is
            then that of ranks as wide as the widest, with an expert without load for each slot more, wherever it is.
            Ranks without slots are left out of the mean.
        num_nodes: nodes that share the ranks evenly.
        num_groups: groups of experts, each kept inside a node where there are several of both.

    Returns:
        float64 (L,) or (T, L); 1.0 where perfect balance cannot be excluded, and for a layer without load.

    Raises:
        ConstraintError: counts that cannot work; the text names the nearest that do.

    Proof sketch. Suppose that a placement keeps every rank within T tokens; each test derives a contradiction, and the
    bound is the largest T (to 1e-10) for which one of them succeeds. Let b be counts that each expert must have at
    least, s = S − Σ b the replicas to spare, and x the shares at b.

    1. *Mean.* The busiest rank has at least the mean: T ≥ Σ load / G.
    2. *Lightest co-located experts.* A replica shares its rank with w − 1 other experts. With t replicas more, an
       expert weighs at least x / (1 + t) there, so these weigh at least λ, the least of Σ x / (1 + t) over w − 1
       experts and Σ t ≤ s: the lightest x (exchange), each spare replica where it saves most (x / (1 + t) is convex in
       t). Hence each replica is within T − λ, which gives new b ≥ load / (T − λ). Repeat; contradiction when b > G or
       s < 0.
    3. *Lightest replicas.* Any n replicas weigh at least as much as the n − s lightest at b: p replicas of an expert
       with b + t weigh q x, where q = b p / (b + t) ≤ b and q ≥ p − t; and Σ t ≤ s. An expert with c replicas is on c
       ranks, beside c (w − 1) other replicas: load + their weight ≤ c T, else c is excluded and b rises.
    4. *Too many for the ranks.* Spare replicas make at most s experts lighter. Leave out the experts with most
       replicas, and n of the m heaviest replicas remain as they were. If two of these cannot share a rank (2 × the
       lightest > T), they need n ranks, so n ≤ G, and with the lightest beside them (3) they weigh at most n T. With
       two slots a rank, also the heaviest of the n beside them, with at least the lightest of the n, is within T.
       At most Σ b of these s experts plus s replicas are lighter: the u ranks that have none of them hold u w replicas
       as they were, so the u w lightest weigh at most u T.
    5. *Exclusion.* With c replicas the heaviest expert leaves T − load / c − the lightest w − 2 beside it. An expert
       too heavy for that even when split by spare replicas is altogether on the other G − c ranks, which take
       (G − c) T; what s spare replicas can free of that is at most what the best of them free, taken in fractions.
    6. *Everywhere.* An expert with b = G is on every rank: what is left is the problem without it, with w − 1 slots and
       T − load / G tokens per rank.
    7. *Exhaustion.* Up to 24 slots, caps just above the bound are searched exhaustively; one without a placement
       is a bound, and the best placement below a cap is the optimum.
    8. *Nodes.* Each node is a problem of its own, with its groups, G / nodes ranks and S / nodes slots. The bound is
       the least over all packings of groups into nodes of the largest bound of a node. Where there are more than 20,000
       packings: the heaviest group has the lightest others beside it, and the bound across nodes holds as well.

    Two ranks of two slots: expert 0 alone has 6 of 8 tokens, but two ranks can halve it; without a spare slot it cannot
    be split, and shares its rank with the lightest:

    >>> lower_bound([[6, 1, 1]], num_ranks=2, num_slots=4).tolist()
    [1.0]
    >>> lower_bound([[6, 1, 1, 2]], num_ranks=2, num_slots=4).round(6).tolist()
    [1.4]
    """
    tokens = as_load(load)
    shape = check_shape(tokens.shape[-1], num_ranks, num_slots, num_nodes, num_groups)
    rows = within_range(tokens.reshape(-1, shape.num_experts))
    padding = Padding(tuple(size for size in sizes_of(shape) if size), shape.num_experts)
    num_ranks = len(padding.rank_sizes)
    mean = rows.sum(axis=1) / num_ranks
    # On a rank with more slots than experts replicas repeat, of which the conditions say nothing.
    narrow = shape.rank_sizes is None or padding.width <= shape.num_experts
    peaks = _floors(padding.load(rows), num_ranks, padding.num_slots) if narrow else mean
    if shape.is_hierarchical:
        peaks = np.maximum(peaks, _node_floors(rows, shape))
    bound = np.divide(peaks * (1 - ROUNDING), mean, out=np.ones_like(mean), where=mean > 0)
    return np.maximum(bound, 1.0).reshape(tokens.shape[:-1])


def _floors(load: FloatArray, num_ranks: int, num_slots: int) -> FloatArray:
    """Tokens (n,) that the busiest rank of each row cannot undercut."""
    width = num_slots // num_ranks
    loads = -np.sort(-load, axis=1)
    floors = np.full(len(loads), np.inf)
    lower_bounds(loads, num_ranks, width, floors)
    if num_slots <= SMALL_SLOTS and 1 < width < load.shape[1]:
        slots = np.empty((num_ranks, width), np.int64)
        for row in np.flatnonzero(floors > 0):
            _, floors[row] = search_exhaustively(loads[row], floors[row], np.inf, NODES, slots)
    return floors


def _node_floors(load: FloatArray, shape: Shape) -> FloatArray:
    """As `_floors`, with groups kept inside nodes."""
    node_ranks, node_slots = shape.node_ranks, shape.node_slots
    totals = load.reshape(len(load), shape.num_groups, -1).sum(axis=2)
    if count_packings(shape.num_groups, shape.num_nodes) > MOST_PACKINGS:
        lightest = np.sort(totals, axis=1)[:, : shape.num_groups // shape.num_nodes - 1].sum(axis=1)
        return (totals.max(axis=1) + lightest) / node_ranks
    sets, packings = all_packings(shape.num_groups, shape.num_nodes)
    experts = group_members(sets, shape.num_experts // shape.num_groups)
    floors = totals[:, sets].sum(axis=2) / node_ranks
    chosen = best_packings(
        floors,
        packings,
        lambda rows, numbers, _: _floors(load[rows[:, None], experts[numbers]], node_ranks, node_slots),
    )
    return floors[np.arange(len(load))[:, None], packings[chosen]].max(axis=1)
