"""The compiled part of the rules that count: one pass over a rank's assignments, in the order of the rows."""

from __future__ import annotations

import numpy as np

from evenmoe.compiled import compiled


@compiled
def choose_by_occurrence(experts, table, rank, counted, chosen):
    """Fill `chosen` (N,) for the assignments `experts` (N,); `counted` is bool (N,), or empty when all count.

    Returns −1, or the index of the first assignment that is no row of the table or whose row counts no replica.
    """
    num_experts, columns = table.shape
    following = np.empty(num_experts, np.int32)  # the replica of the expert's next assignment, from 0
    for expert in range(num_experts):
        count = table[expert, 0]
        following[expert] = (rank + expert) % count if 0 < count < columns else -1
    for index in range(experts.size):
        expert = experts[index]
        if expert < 0 or expert >= num_experts or following[expert] < 0:
            return index
        replica = following[expert]
        chosen[index] = table[expert, 1 + replica]
        if counted.size == 0 or counted[index]:
            replica += 1
            following[expert] = 0 if replica == table[expert, 0] else replica
    return -1


@compiled
def choose_by_quota(experts, table, quotas, first, counted, chosen):
    """Fill `chosen` (N,): those of expert e are numbered first[e], first[e] + 1, … and cut at the replicas' quotas.

    Returns −1, or the index of the first assignment that is no row of the table or whose row names no slot of `quotas`.
    """
    num_experts, columns = table.shape
    replica = np.empty(num_experts, np.int32)  # the one in use, from 0
    left = np.empty(num_experts, np.int64)  # assignments it still takes
    for expert in range(num_experts):
        count = table[expert, 0]
        replica[expert] = 0 if 0 < count < columns else -1
        for column in range(1, count + 1 if count < columns else 1):
            if table[expert, column] < 0 or table[expert, column] >= quotas.size:
                replica[expert] = -1
        if replica[expert] == 0:
            left[expert] = quotas[table[expert, 1]] - first[expert]
            _advance(expert, table, quotas, replica, left)
    for index in range(experts.size):
        expert = experts[index]
        if expert < 0 or expert >= num_experts or replica[expert] < 0:
            return index
        chosen[index] = table[expert, 1 + replica[expert]]
        if counted.size == 0 or counted[index]:
            left[expert] -= 1
            _advance(expert, table, quotas, replica, left)
    return -1


@compiled
def _advance(expert, table, quotas, replica, left):
    """Go on to the replica that takes the next assignment; the last one takes whatever the quotas do not cover."""
    while left[expert] <= 0 and replica[expert] + 1 < table[expert, 0]:
        replica[expert] += 1
        left[expert] += quotas[table[expert, 1 + replica[expert]]]
