"""The weighted sum of rows on a CPU in one pass: every row is read once, the float32 sums stay in a core's cache.

Nothing is fused: numba compiles without fast-math, so a product is rounded to float32 before it is added (§3.4).
"""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled

# Columns at a time: two float32 buffers of 8 KiB leave room for the rows in a first-level cache of 32 KiB.
WIDTH = 2048


@compiled
def add_bfloat16(total, rows, position, weights):
    """total[t] += weights[t, k] · rows[position[t, k]] for ascending k, where position is not −1.

    `total` float32 (T, H), `rows` uint16 (N, H), the bits of bfloat16, `position` int64 (T, K), `weights` float32
    (T, K).
    """
    hidden = total.shape[1]
    bits = np.empty(WIDTH, np.uint32)
    values = bits.view(np.float32)
    for token in range(position.shape[0]):
        for start in range(0, hidden, WIDTH):
            part = total[token, start : min(start + WIDTH, hidden)]
            for k in range(position.shape[1]):
                if position[token, k] < 0:
                    continue
                row = rows[position[token, k], start : start + part.size]
                weight = weights[token, k]
                for h in range(part.size):
                    bits[h] = np.uint32(row[h]) << np.uint32(16)  # a bfloat16 is the upper half of a float32
                for h in range(part.size):
                    part[h] += weight * values[h]


@compiled
def add_float32(total, rows, position, weights):
    """As `add_bfloat16`, of float32 rows."""
    for token in range(position.shape[0]):
        part = total[token]
        for k in range(position.shape[1]):
            if position[token, k] < 0:
                continue
            row = rows[position[token, k]]
            weight = weights[token, k]
            for h in range(part.size):
                part[h] += weight * row[h]
