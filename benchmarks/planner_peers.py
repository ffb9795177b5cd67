"""Other planners behind one signature: a compiled greedy as the yardstick of time, and what is installed beside us."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from numba import njit

from planner_loads import Case, Load

Peer = Callable[[Load, Case], npt.NDArray[np.integer]]  # slots (L, S)


@njit(nogil=True)
def greedy_layers(load, num_ranks, num_slots, slots):
    """DeepSeek's global planner: each spare slot to the largest load / count, then heaviest first to the lightest."""
    width = num_slots // num_ranks
    for layer in range(load.shape[0]):
        counts = np.ones(load.shape[1], np.int64)
        share = load[layer].copy()
        for _ in range(num_slots - load.shape[1]):
            expert = np.argmax(share)
            counts[expert] += 1
            share[expert] = load[layer, expert] / counts[expert]
        owner = np.repeat(np.arange(load.shape[1]), counts)
        ranks, used = np.zeros(num_ranks), np.zeros(num_ranks, np.int64)
        for replica in np.argsort(-share[owner]):
            best = -1
            for rank in range(num_ranks):
                if used[rank] < width and (best < 0 or ranks[rank] < ranks[best]):
                    best = rank
            slots[layer, best * width + used[best]] = owner[replica]
            used[best] += 1
            ranks[best] += share[owner[replica]]


def greedy(load: Load, case: Case) -> npt.NDArray[np.integer]:
    slots = np.empty((len(load), case.slots), np.int64)
    greedy_layers(load, case.ranks, case.slots, slots)
    return slots


def installed() -> dict[str, Peer]:
    """The planners of vLLM and SGLang, where they are installed."""
    peers: dict[str, Peer] = {}
    try:
        import torch
        from vllm.distributed.eplb.policy.default import DefaultEplbPolicy
    except ImportError:
        pass
    else:
        peers["vLLM"] = lambda load, case: DefaultEplbPolicy.rebalance_experts(
            torch.from_numpy(load), case.slots, case.groups, case.nodes, case.ranks
        ).numpy()
    try:
        import torch
        from sglang.srt.eplb.eplb_algorithms import deepseek
    except ImportError:
        pass
    else:
        peers["SGLang"] = lambda load, case: deepseek.rebalance_experts(
            torch.from_numpy(load), case.slots, case.groups, case.nodes, case.ranks, case.groups > 1
        )[0].numpy()
    return peers
