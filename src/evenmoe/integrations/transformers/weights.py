"""`moved`: the weights of a rank's new slots, fetched from the ranks that hold them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

IntArray = npt.NDArray[np.int64]


def moved(
    held_rows: torch.Tensor, held: IntArray, wanted: IntArray, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Return the rows of this rank's `wanted` experts; a collective of the group.

    A rank copies what it holds and fetches each expert that it lacks once, from the holder that has been asked least.

    Args:
        held_rows: (slots held, …), this rank's rows, of any dtype; one for each of its `held` experts.
        held: int64 (W, slots held), the experts that each rank holds; every wanted expert is among them.
        wanted: int64 (W, slots wanted), those that each rank is to hold.
        group: the W ranks, in order; None for all of torch.distributed.

    Returns:
        (slots wanted, …), dtype and device of `held_rows`, new memory.
    """
    rank, world_size = dist.get_rank(group), len(held)
    route = _route(held, wanted)
    to_send = [[position for position, _ in route[rank][there]] for there in range(world_size)]
    to_come = [[expert for _, expert in route[there][rank]] for there in range(world_size)]
    row_bytes = held_rows[:1].numel() * held_rows.element_size()
    as_bytes = held_rows.detach().contiguous().view(len(held_rows), -1).view(torch.uint8)  # gloo knows few dtypes
    outgoing = as_bytes[[position for part in to_send for position in part]]
    incoming = outgoing.new_empty(sum(map(len, to_come)), row_bytes)
    dist.all_to_all_single(incoming, outgoing, list(map(len, to_come)), list(map(len, to_send)), group=group)
    position_of = {expert: index for index, expert in reversed(list(enumerate(held[rank].tolist())))}
    arrived_at = {expert: index for index, expert in enumerate(expert for part in to_come for expert in part)}
    rows = outgoing.new_empty(wanted.shape[1], row_bytes)
    for slot, expert in enumerate(wanted[rank].tolist()):
        rows[slot] = as_bytes[position_of[expert]] if expert in position_of else incoming[arrived_at[expert]]
    return rows.view(held_rows.dtype).view(wanted.shape[1], *held_rows.shape[1:])


def _route(held: IntArray, wanted: IntArray) -> list[list[list[tuple[int, int]]]]:
    """For each source and destination the (position, expert) that go; the same on every rank."""
    world_size = len(held)
    holders: dict[int, list[tuple[int, int]]] = {}
    for rank, experts in enumerate(held.tolist()):
        for position, expert in enumerate(experts):
            if not holders.get(expert) or holders[expert][-1][0] != rank:
                holders.setdefault(expert, []).append((rank, position))
    route: list[list[list[tuple[int, int]]]] = [[[] for _ in range(world_size)] for _ in range(world_size)]
    asked = [0] * world_size
    for there in range(world_size):
        for expert in sorted(set(wanted[there].tolist()) - set(held[there].tolist())):
            source, position = min(holders[expert], key=lambda holder: (asked[holder[0]], holder[0]))
            asked[source] += 1
            route[source][there].append((position, expert))
    return route
