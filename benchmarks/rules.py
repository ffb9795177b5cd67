"""How evenly the replica rules share one expert: busiest replica over the mean, and how many stay idle.

First every token of W ranks with T tokens uses the expert with c replicas, then a share q of them at random, means of
400 trials. `rank`, `token`, `occurrence` and `batch` are evenmoe's; the others are retold from other programs: rank mod
count, row mod count, a multiplicative hash of the row, (row + rank + expert) mod count, and a random choice. The bound
is ceil(assignments / c) over the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

import evenmoe as em
from evenmoe.rules import batch, occurrence

TRIALS = 400
Routed = list[np.ndarray]  # per rank, the rows (tokens) that use the expert


def replicas(routed: Routed, copies: int, choose: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """Assignments per replica, (c,)."""
    return sum(np.bincount(choose(rows, rank), minlength=copies) for rank, rows in enumerate(routed))


def by_update_expert(mode: str) -> Callable[[Routed, int, np.random.Generator], np.ndarray]:
    def taken(routed: Routed, copies: int, _: np.random.Generator) -> np.ndarray:
        table = torch.tensor([[copies, *range(copies)]], dtype=torch.int32)

        def choose(rows: np.ndarray, rank: int) -> np.ndarray:
            num_tokens = int(rows.max(initial=0)) + 1  # the rule by token counts rows, routed or not
            ids = torch.zeros((num_tokens, 1), dtype=torch.int64)
            chosen, _ = em.update_expert(ids, table, rank, len(routed), mode, check_values=False, limits="unlimited")
            return chosen.numpy()[rows, 0]

        return replicas(routed, copies, choose)

    return taken


def by_occurrence(routed: Routed, copies: int, _: np.random.Generator) -> np.ndarray:
    table = torch.tensor([[copies, *range(copies)]], dtype=torch.int32)
    return replicas(
        routed,
        copies,
        lambda rows, rank: occurrence.choose(torch.zeros((len(rows), 1), dtype=torch.int64), table, rank).numpy()[:, 0],
    )


def by_batch(routed: Routed, copies: int, _: np.random.Generator) -> np.ndarray:
    table = torch.tensor([[copies, *range(copies)]], dtype=torch.int32)
    counts = np.array([[len(rows)] for rows in routed])
    quotas = em.split_batch(counts.sum(axis=0), np.zeros(copies, np.int64), copies)
    return replicas(
        routed,
        copies,
        lambda rows, rank: batch.choose(
            torch.zeros((len(rows), 1), dtype=torch.int64), table, quotas, counts, rank
        ).numpy()[:, 0],
    )


def by_formula(formula: Callable[[np.ndarray, int, int], np.ndarray]):
    def taken(routed: Routed, copies: int, _: np.random.Generator) -> np.ndarray:
        return replicas(routed, copies, lambda rows, rank: formula(rows, rank, copies))

    return taken


def by_chance(routed: Routed, copies: int, rng: np.random.Generator) -> np.ndarray:
    return replicas(routed, copies, lambda rows, _: rng.integers(0, copies, len(rows)))


def bound(routed: Routed, copies: int, _: np.random.Generator) -> np.ndarray:
    total = sum(len(rows) for rows in routed)
    return total // copies + (np.arange(copies) < total % copies)


RULES = {
    "rank": by_update_expert("rank"),
    "token": by_update_expert("token"),
    "occurrence": by_occurrence,
    "batch": by_batch,
    "rank mod c": by_formula(lambda rows, rank, copies: np.full(len(rows), rank % copies)),
    "row hash": by_formula(lambda rows, _, copies: (rows * 2654435761 % 2**32 % copies).astype(np.int64)),
    "row+rank": by_formula(lambda rows, rank, copies: (rows + rank) % copies),
    "random": by_chance,
    "bound": bound,
}

ALL_USE = ((8, 1, 5), (8, 1, 6), (8, 1, 8), (8, 4, 6), (8, 4, 8), (8, 128, 6), (32, 4, 6), (32, 128, 8))
SOME_USE = (
    (8, 1, 2, 0.5),
    (8, 4, 4, 0.5),
    (8, 32, 4, 0.25),
    (8, 128, 6, 0.25),
    (32, 1, 4, 0.5),
    (32, 32, 4, 0.25),
    (32, 128, 8, 0.25),
    (64, 128, 8, 0.5),
)


def main() -> None:
    print("every token uses the expert; in brackets the replicas that stay idle")
    print(f"{'W,T,c':>14} " + " ".join(f"{name:>11}" for name in RULES))
    for world, tokens, copies in ALL_USE:
        rng = np.random.default_rng(0)
        routed = [np.arange(tokens)] * world
        cells = []
        for rule in RULES.values():
            taken = rule(routed, copies, rng)
            idle = int((taken == 0).sum())
            cells.append(f"{taken.max() / taken.mean():.2f}" + (f" ({idle})" if idle else ""))
        print(f"{f'{world},{tokens},{copies}':>14} " + " ".join(f"{cell:>11}" for cell in cells))
    print(f"\na share q of the tokens uses it, mean of {TRIALS} trials")
    print(f"{'W,T,c,q':>14} " + " ".join(f"{name:>11}" for name in RULES))
    for world, tokens, copies, share in SOME_USE:
        rng = np.random.default_rng(0)
        ratios: dict[str, list[float]] = {name: [] for name in RULES}
        for _ in range(TRIALS if world < 64 else TRIALS // 4):
            routed = [np.flatnonzero(rng.random(tokens) < share) for _ in range(world)]
            if not sum(len(rows) for rows in routed):
                continue
            for name, rule in RULES.items():
                taken = rule(routed, copies, rng)
                ratios[name].append(taken.max() / taken.mean())
        cells = " ".join(f"{np.mean(values):11.2f}" for values in ratios.values())
        print(f"{f'{world},{tokens},{copies},{share}':>14} {cells}")


if __name__ == "__main__":
    main()
