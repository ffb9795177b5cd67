"""The time of one rank's grouped expert GEMM, from the rows of its slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

MICROSECONDS = 1e6

# Slots on a rank cost less each the more there are. Fitted to uniform rows alone, 1.0 and 0.8 predict H100's skewed
# rows equally well (mean error 3.9 %), and 0.8 B200's better (6.1 against 6.6 %): `tools/fit_costs.py` shows both.
_SLOT_POWER = 0.8
# The launch floor is met where it and the work are alike: between their sum (1) and their maximum (infinity).
_FLOOR_NORM = 8


@dataclass(frozen=True)
class KernelModel:
    """A rank's expert kernels as a function of its activated slots and of its rows, padded to tiles.

    t = ‖floor, start + slot · S^0.8 + ‖bytes · A / BW, FLOP · R / PK‖ₙ + token · N‖₈, where A of the rank's S slots
    have rows, R is the rows once each slot's are padded to a tile, N the tokens that the kernel walks over, and
    ‖a, b‖ₙ = (aⁿ + bⁿ)^(1/n).

    Attributes:
        memory_bytes_per_s: BW, at which weights are read.
        flops_per_s: PK, that full tiles reach.
        start_us, slot_us: microseconds of every call, and of S^0.8 slots.
        floor_us: microseconds below which no call comes: the host's launches.
        token_us: microseconds of a token that the rank receives, whatever its experts.
        norm: n, 1 or more; infinity is the maximum of reading and computing.
        tile: rows that a slot's are padded to.

    One slot of 2 has 65 rows, which fill two tiles of 64: 128 rows at 1 FLOP each take as long as reading 96 bytes
    takes times 4/3, together 160 µs.

    >>> model = KernelModel(memory_bytes_per_s=1e6, flops_per_s=1e6, start_us=0.0, slot_us=0.0)
    >>> rows = np.array([[65, 0]])
    >>> float(model.time_us(model.padded(rows).sum(axis=1), np.array([1]), 2, expert_bytes=96, expert_flops=1)[0])
    160.0
    """

    memory_bytes_per_s: float
    flops_per_s: float
    start_us: float = 0.0
    slot_us: float = 0.0
    floor_us: float = 0.0
    token_us: float = 0.0
    norm: float = 2.0
    tile: int = 64

    def padded(self, rows: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The rows of slots, each padded to whole tiles; int64, the shape of `rows`.

        >>> KernelModel(1.0, 1.0, tile=64).padded([0, 1, 64, 65]).tolist()
        [0, 64, 64, 128]
        """
        return -(-np.asarray(rows, np.int64) // self.tile) * self.tile

    def time_us(
        self,
        padded_rows: npt.ArrayLike,
        active: npt.ArrayLike,
        num_slots: npt.ArrayLike,
        expert_bytes: float,
        expert_flops: float,
        tokens: npt.ArrayLike = 0.0,
    ) -> FloatArray:
        """Microseconds of each rank, float64 in the shape of `padded_rows`; a rank without rows takes 0.

        Args:
            padded_rows: R of each rank, its slots' rows padded to tiles (`padded`) and summed.
            active: A, its slots that have rows.
            num_slots: S, all of its slots.
            expert_bytes: bytes of one expert's weights.
            expert_flops: FLOP of one expert on one row.
            tokens: N, tokens that the rank receives.
        """
        rows, slots = np.asarray(padded_rows, np.float64), np.asarray(num_slots, np.float64)
        read = np.asarray(active, np.float64) * (expert_bytes / self.memory_bytes_per_s * MICROSECONDS)
        compute = rows * (expert_flops / self.flops_per_s * MICROSECONDS)
        work = _norm(read, compute, self.norm) + self.start_us + self.slot_us * slots**_SLOT_POWER
        work = work + self.token_us * np.asarray(tokens, np.float64)
        works = (rows > 0) | (np.asarray(active) > 0)
        return np.where(works, _norm(np.full_like(work, self.floor_us), work, _FLOOR_NORM), 0.0)


def _norm(one: FloatArray, other: FloatArray, power: float) -> FloatArray:
    """(oneⁿ + otherⁿ)^(1/n) of numbers that are not negative, without overflow of their powers."""
    high, low = np.maximum(one, other), np.minimum(one, other)
    if power == np.inf:
        return high
    ratio = np.divide(low, high, out=np.zeros_like(high), where=high > 0)
    return high * (1 + ratio**power) ** (1 / power)
