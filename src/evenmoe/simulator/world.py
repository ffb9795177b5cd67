"""`World`: the ranks and their batches that a replay runs on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evenmoe.errors import ConstraintError


@dataclass(frozen=True)
class World:
    """Ranks, nodes and the batch of each rank.

    Attributes:
        num_ranks: G, every one of which is a source rank and holds experts.
        num_nodes: nodes that share the ranks evenly, in rank order.
        tokens_per_rank: B, tokens of one source rank in one step.

    Raises:
        ConstraintError: a count below 1, or nodes that do not divide the ranks.

    >>> World(8, 2, 128).ranks_per_node
    4
    """

    num_ranks: int
    num_nodes: int = 1
    tokens_per_rank: int = 128

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_nodes", "tokens_per_rank"):
            if getattr(self, name) < 1:
                raise ConstraintError(name, getattr(self, name), "must be at least 1", "use 1 or more")
        if self.num_ranks % self.num_nodes:
            fitting = [nodes for nodes in range(1, self.num_ranks + 1) if self.num_ranks % nodes == 0]
            raise ConstraintError(
                "num_nodes", self.num_nodes, f"must divide the {self.num_ranks} ranks evenly", f"use one of {fitting}"
            )

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @property
    def count_type(self) -> type[np.signedinteger]:
        """The smallest integers that count the picks of an expert on a rank: a replay waits for their memory."""
        return np.int16 if self.tokens_per_rank < 1 << 15 else np.int32
