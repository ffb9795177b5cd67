"""`BatchRows`: whose request each token of a forward pass is, and which tokens are padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class BatchRows:
    """Follows the rows of batches from prompt to end, by the arguments of the model's forward passes.

    Args:
        ends: ids of tokens that end a request; what is fed to a row from such a token on is padding, since `generate`
            keeps a finished row in its batch until all are.

    A prompt of two tokens, left-padded, then one generated token:

    >>> rows = BatchRows(frozenset([7]))
    >>> rows.begin({"input_ids": torch.tensor([[0, 3, 4]]), "attention_mask": torch.tensor([[0, 1, 1]])})
    >>> rows.of_tokens(3)
    (array([False,  True,  True]), array([0, 0, 0]), False)
    >>> rows.begin({"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])})
    >>> rows.of_tokens(1)
    (array([ True]), array([0]), True)
    """

    def __init__(self, ends: frozenset[int]) -> None:
        self._ends = ends
        self._requests: IntArray = np.zeros(0, np.int64)
        self._ended: BoolArray = np.zeros(0, np.bool_)
        self._counted: BoolArray = np.zeros((0, 0), np.bool_)
        self._decoded = False
        self.num_requests = 0

    def begin(self, given: Mapping[str, Any]) -> None:
        """Note the arguments of a forward pass, before it runs."""
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        tokens = ids if ids is not None else given.get("inputs_embeds")
        batch, length = (1, 0) if tokens is None else tokens.shape[:2]
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] < length:
            mask = None
        past = _tokens_before(given) or (0 if mask is None else mask.shape[1] - length)
        if past == 0 or batch != len(self._requests):
            self._requests = self.num_requests + np.arange(batch)
            self._ended = np.zeros(batch, np.bool_)
            self.num_requests += batch
        self._decoded = past > 0 and length == 1
        if mask is None:
            self._counted = np.ones((batch, length), np.bool_)
        else:
            self._counted = mask[:, mask.shape[1] - length :].detach().cpu().numpy() != 0
        if self._decoded and ids is not None and self._ends:
            self._ended |= np.isin(ids[:, 0].detach().cpu().numpy(), list(self._ends))
            self._counted &= ~self._ended[:, None]

    def of_tokens(self, count: int) -> tuple[BoolArray, IntArray, bool]:
        """For each of `count` tokens whether it counts, and its request; and whether they were generated.

        Tokens that are not the rows of the batch one after the other are one request, and all count.
        """
        batch, length = self._counted.shape
        if count != batch * length:
            return np.ones(count, np.bool_), np.full(count, self._requests[0]), self._decoded
        return self._counted.ravel(), np.repeat(self._requests, length), self._decoded


def _tokens_before(given: Mapping[str, Any]) -> int:
    """The tokens that the model's cache holds; architectures differ in what they call it."""
    for cache in given.values():
        if hasattr(cache, "get_seq_length"):
            try:
                return int(cache.get_seq_length())
            except ValueError:  # a cache of linear attention alone counts no tokens
                break
    positions = given.get("position_ids")
    return int(positions.min()) if isinstance(positions, torch.Tensor) and positions.numel() else 0
