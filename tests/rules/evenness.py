"""How evenly a rule uses the replicas of one expert, on random routing, beside what other rules reached."""

from __future__ import annotations

import numpy as np
import torch

import evenmoe as em


def busiest_over_mean(choose, world, tokens, copies, share, trials, seed=0):
    """Busiest replica over the mean of one expert, used by a token with probability `share`; mean over trials."""
    rng = np.random.default_rng(seed)
    # Expert 1 takes the other assignments; expert 0 has the slots 0 … copies − 1.
    table = torch.tensor([[copies, *range(copies)], [1, copies] + [0] * (copies - 1)], dtype=torch.int32)
    slots = np.array([0] * copies + [1])
    ratios = []
    for _ in range(trials):
        ids = torch.from_numpy((rng.random((world, tokens, 1)) >= share).astype(np.int64))
        counts = torch.stack([torch.bincount(own.reshape(-1), minlength=2) for own in ids])
        if counts[:, 0].sum() == 0:
            continue
        # One slot per rank, so that the best split of expert 0 is even over its replicas.
        quotas = em.split_batch(torch.tensor([int(counts[:, 0].sum()), 0]), slots, copies + 1)
        quotas[copies] = int(counts[:, 1].sum())
        taken = np.zeros(copies + 1)
        for rank in range(world):
            np.add.at(taken, choose(ids[rank], table, rank, quotas, counts).numpy().reshape(-1), 1)
        ratios.append(taken[:copies].max() / taken[:copies].mean())
    return np.mean(ratios), np.std(ratios) / np.sqrt(len(ratios))


# Ranks, tokens a rank, replicas, share of the tokens that use the expert -> occurrence with the rank term, lower bound
# (400 trials of the table "replica rules compared").
EVENNESS = {
    (8, 1, 2, 0.5): (1.32, 1.13),
    (8, 4, 4, 0.5): (1.22, 1.10),
    (8, 32, 4, 0.25): (1.05, 1.02),
    (8, 128, 6, 0.25): (1.03, 1.01),
    (32, 1, 4, 0.5): (1.38, 1.10),
    (32, 32, 4, 0.25): (1.03, 1.01),
    (32, 128, 8, 0.25): (1.02, 1.00),
    (64, 128, 8, 0.5): (1.01, 1.00),
}

# Ranks, tokens a rank, replicas, and what the best of the other rules comes to where every token uses the expert.
EVERY_TOKEN = [
    (8, 1, 5, 1.25),
    (8, 1, 6, 1.50),
    (8, 1, 8, 1.00),
    (8, 4, 6, 1.12),
    (8, 4, 8, 1.00),
    (8, 128, 6, 1.01),
    (32, 4, 6, 1.03),
    (32, 128, 8, 1.00),
]


def check_some_tokens(choose, case, expected):
    """Assert that the busiest replica is no busier than `expected`, where a share of the tokens uses the expert."""
    mean, error = busiest_over_mean(choose, *case, trials=200 if case[0] < 64 else 20)
    # Both numbers are means of random trials, the table's of 400 and rounded to 0.01: three standard errors of each.
    assert mean <= expected + 0.005 + 3 * error * (1 + np.sqrt(200 / 400))


def check_every_token(choose, world, tokens, copies, best_of_the_others):
    """Assert that the rule is as even as the best of the others where every token uses the expert; return its mean."""
    mean, error = busiest_over_mean(choose, world, tokens, copies, share=1.0, trials=1)
    assert error == 0
    assert mean <= best_of_the_others + 0.0051  # the table rounds to 0.01
    return mean
