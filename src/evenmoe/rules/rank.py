"""The `rank` rule (Ascend's balance mode 0) as arithmetic: which replicas it reaches, and with how many ranks.

Rank r takes replica r // ceil(W / count), so replica j gets the ranks from j · ceil(W / count) on (specification §1.4).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def ranks_per_replica(num_replicas: npt.ArrayLike, world_size: int) -> npt.NDArray[np.int64]:
    """Ranks that choose each replica but the last reachable one: ceil(W / count), integers of the shape given.

    >>> ranks_per_replica([1, 3, 5, 8], world_size=8).tolist()
    [8, 3, 2, 1]
    """
    return -(-world_size // np.asarray(num_replicas, np.int64))


def reachable(num_replicas: npt.ArrayLike, world_size: int) -> npt.NDArray[np.int64]:
    """Replicas that some rank chooses: ceil(W / ceil(W / count)), integers of the shape given.

    Eight ranks leave the last of 5, 6 and 7 replicas without a token:

    >>> reachable([1, 2, 3, 4, 5, 6, 7, 8], world_size=8).tolist()
    [1, 2, 3, 4, 4, 4, 4, 8]
    """
    return ranks_per_replica(ranks_per_replica(num_replicas, world_size), world_size)


def ranks_choosing(num_replicas: npt.ArrayLike, replica_index: npt.ArrayLike, world_size: int) -> npt.NDArray[np.int64]:
    """How many of the W ranks choose replica `replica_index` (from 0) of `num_replicas`; the arguments broadcast.

    >>> ranks_choosing(3, [0, 1, 2], world_size=8).tolist()
    [3, 3, 2]
    >>> ranks_choosing(5, [0, 1, 2, 3, 4], world_size=8).tolist()
    [2, 2, 2, 2, 0]
    """
    width = ranks_per_replica(num_replicas, world_size)
    return np.clip(world_size - width * np.asarray(replica_index, np.int64), 0, width)
