"""A rule in one file, as a user would write it: the tokens of rank r take the replicas in turn, beginning at r."""

from __future__ import annotations

import torch

from evenmoe.rules.rule import Rule


class Toy(Rule):
    """By row as the token rule does, but every rank begins at another replica."""

    name = "toy"
    description = "The token in row i of rank r takes replica (i + r) mod replicas."

    def choose(self, expert_ids, eplb_table, *, rank, **_):
        row = torch.arange(len(expert_ids), device=expert_ids.device)[:, None]
        count = eplb_table[expert_ids.long(), 0]
        return eplb_table[expert_ids.long(), 1 + (row + rank) % count].to(expert_ids.dtype)


class Counting(Toy):
    """The same turns, over all ranks: it needs to know how many assignments the ranks below have."""

    name = "counting"
    description = "The n-th assignment of an expert over all ranks takes replica n mod replicas."
    needs_counts = True

    def choose(self, expert_ids, eplb_table, *, rank, counted, counts_by_rank, **_):
        seen = torch.from_numpy(counts_by_rank[:rank].sum(axis=0)).clone()
        chosen = torch.empty_like(expert_ids)
        for token, k in torch.cartesian_prod(*map(torch.arange, expert_ids.shape)).tolist():
            expert = int(expert_ids[token, k])
            chosen[token, k] = eplb_table[expert, 1 + seen[expert] % eplb_table[expert, 0]]
            seen[expert] += counted is None or bool(counted[token, k])
        return chosen


class Wrong(Toy):
    """Takes slot 0 for every expert."""

    name = "wrong"
    description = "Every token takes slot 0, whatever its expert."

    def choose(self, expert_ids, eplb_table, **_):
        return torch.zeros_like(expert_ids)


RULE, COUNTING, WRONG = Toy(), Counting(), Wrong()
