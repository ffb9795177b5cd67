"""Slots for experts that stay on their rank: serial, compiled, arrays in and arrays out."""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled


@compiled
def keep_places(slots, num_ranks, ordered):
    """Reorder each rank's experts of `slots` (L, S) so that those that stay keep their slot.

    `ordered` (L, S) holds the placement in use, and afterwards the new one.
    """
    num_slots = slots.shape[1]
    width = num_slots // num_ranks
    arriving = np.empty(width, np.int64)
    free = np.empty(width, np.int64)
    for layer in range(len(slots)):
        for first in range(0, num_slots, width):
            arriving[:] = slots[layer, first : first + width]
            num_free = 0
            for slot in range(first, first + width):
                stays = False
                for i in range(width):
                    if not stays and arriving[i] == ordered[layer, slot]:
                        arriving[i] = -1
                        stays = True
                if not stays:
                    free[num_free] = slot
                    num_free += 1
            taken = 0
            for i in range(width):
                if arriving[i] >= 0:
                    ordered[layer, free[taken]] = arriving[i]
                    taken += 1
