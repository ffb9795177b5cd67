"""What rows, weights and copies cost in time: a model of few stated figures, all of which can be given."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement
from evenmoe.traces.models import MODELS, ModelShape, find_model

IntArray = npt.NDArray[np.int64]

MICROSECONDS = 1e6
_MOST = 1e30  # of a figure: a step of 10^12 tokens then takes less than 10^78 µs, and nothing overflows


@dataclass(frozen=True)
class CostModel:
    """Figures of one rank and its links. Everything outside the MoE layers' experts and their exchanges is left out.

    Attributes:
        expert_flops_per_token: FLOP of one expert on one row.
        flops_per_s: FLOP/s that a rank achieves in experts (not its peak).
        expert_bytes: bytes of one expert's weights, all of which a rank reads if the expert has any row.
        memory_bytes_per_s: bytes/s at which a rank reads weights.
        within_bytes_per_s: bytes/s that a rank sends, and at once receives, to ranks of its node.
        between_bytes_per_s: the same to other nodes.
        latency_us: microseconds of one exchange besides its bytes; a layer has two, dispatch and combine.
        dispatch_row_bytes: bytes of one row on its way to an expert.
        combine_row_bytes: bytes of one row on its way back.
        copy_bytes: bytes that one copied expert sends.
        one_row_per_rank: whether a token goes once to each destination rank; else once to each expert.

    Raises:
        ConstraintError: a figure that is negative, not finite or beyond 1e30, or a speed below 1e-30.

    The defaults are round figures of an H800 node and its network: half of 990 TFLOP/s dense bf16 is achieved, 3.35
    TB/s memory, 160 GB/s NVLink and 50 GB/s network a GPU as DeepEP's README states for that machine, rows in bf16.
    """

    expert_flops_per_token: float
    expert_bytes: float
    dispatch_row_bytes: float
    combine_row_bytes: float
    copy_bytes: float
    flops_per_s: float = 4.95e14
    memory_bytes_per_s: float = 3.35e12
    within_bytes_per_s: float = 1.6e11
    between_bytes_per_s: float = 5e10
    latency_us: float = 20.0
    one_row_per_rank: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least, rule = 0.0, f"0 or more, up to {_MOST:g}"
            if field.name.endswith("_per_s"):
                least, rule = 1 / _MOST, f"more than 0, from {1 / _MOST:g} to {_MOST:g}"
            if not isinstance(value, int | float | np.number) or not least <= value <= _MOST:
                raise ConstraintError(field.name, value, f"must be finite and {rule}", "state it in its unit")

    @staticmethod
    def for_expert(hidden: int, expert_bytes: float, expert_flops_per_token: float, **figures: float) -> CostModel:
        """The model for experts of this size: rows of `hidden` bf16 numbers, copies of all weights.

        `figures` are further attributes, which come before these.

        >>> CostModel.for_expert(7168, 88_080_384, 88_080_384).dispatch_row_bytes
        14336.0
        """
        model = CostModel(
            expert_flops_per_token=float(expert_flops_per_token),
            expert_bytes=float(expert_bytes),
            dispatch_row_bytes=2.0 * hidden,
            combine_row_bytes=2.0 * hidden,
            copy_bytes=float(figures.get("expert_bytes", expert_bytes)),
        )
        return replace(model, **figures)

    @staticmethod
    def for_model(name: str, **figures: float) -> CostModel:
        """The model for the experts of a known one (`evenmoe.traces.models`); `figures` as in `for_expert`.

        Raises:
            ConstraintError: a name that is not known.

        >>> CostModel.for_model("deepseek-v3") == CostModel.for_expert(7168, 44_040_192, 88_080_384)
        True
        """
        shape = find_model(name)
        return CostModel.for_expert(shape.hidden, shape.expert_bytes, shape.expert_flops_per_token, **figures)

    @property
    def hardware(self) -> str:
        """What the figures of a rank and its links are of, in words."""
        own = all(getattr(self, field.name) == field.default for field in fields(self) if field.default is not MISSING)
        return "an H800 node with rows in bf16 (the defaults)" if own else "the figures in the settings"

    def layer_time(self, tokens: IntArray, busy: IntArray, sent: FloatArray, received: FloatArray) -> FloatArray:
        """Microseconds of each layer, float64 (L,): the busiest rank's experts, then the busiest rank's exchanges.

        A rank's experts take the longer of computing its rows and reading the weights of the slots that have any. A
        rank's exchanges take the longer of its two links, each of which sends and receives at once; dispatch and
        combine follow each other.

        Args:
            tokens: int64 (L, G), rows that each rank computes.
            busy: int64 (L, G), slots of each rank that have rows.
            sent, received: float64 (L, 2, G), rows within and between nodes.

        Two ranks of one node: 4 rows take 4 s, and reading 1 busy expert 2 s; 3 rows of 1 byte go each way at 1 byte/s:

        >>> costs = CostModel(1, 2, 1, 1, 2, flops_per_s=1, memory_bytes_per_s=1, within_bytes_per_s=1, latency_us=0)
        >>> sent = np.array([[[3.0, 0.0], [0.0, 0.0]]])
        >>> costs.layer_time(np.array([[1, 4]]), np.array([[1, 1]]), sent, sent[:, :, ::-1]) / 1e6
        array([10.])
        """
        compute = tokens * (self.expert_flops_per_token / self.flops_per_s)
        read = busy * (self.expert_bytes / self.memory_bytes_per_s)
        experts = np.maximum(compute, read).max(axis=1)
        rows = np.maximum(sent, received)
        per_row = self.dispatch_row_bytes + self.combine_row_bytes
        links = np.array([self.within_bytes_per_s, self.between_bytes_per_s])
        exchange = (rows * (per_row / links)[:, None]).max(axis=(1, 2))
        return (experts + exchange) * MICROSECONDS + 2 * self.latency_us

    def copy_time(self, sent: IntArray, received: IntArray) -> float:
        """Microseconds of copies: experts sent and received, int64 (2, G) within and between nodes; 0.0 for none.

        All copies run at once, so the busiest link of any rank decides, and one latency is added.
        """
        experts = np.maximum(sent, received)
        if not experts.any():
            return 0.0
        links = np.array([self.within_bytes_per_s, self.between_bytes_per_s])
        seconds = (experts * (self.copy_bytes / links)[:, None]).max()
        return float(seconds) * MICROSECONDS + self.latency_us


def costs_of(shape: ModelShape | None) -> CostModel:
    """The costs of a model of this shape.

    Raises:
        MissingArgumentError: there is none.
    """
    if shape is None:
        raise MissingArgumentError(
            "costs",
            "not given, and the trace is of no known model",
            "must say what experts and rows cost",
            f"name a model ({', '.join(MODELS)}), or pass a CostModel",
        )
    return CostModel.for_expert(shape.hidden, shape.expert_bytes, shape.expert_flops_per_token)


def route_copies(previous: Placement, placement: Placement, ranks_per_node: int) -> tuple[IntArray, IntArray]:
    """Experts that each rank sends and receives, all layers together: two int64 (2, G), within and between nodes.

    Layer by layer and slot by slot, an expert that was not on its new rank is sent by a rank that held it: one of the
    same node if there is any, and of those the one that has sent the fewest so far over that link, then the lowest.

    Ranks 0 and 1 swap experts 1 and 2:

    >>> sent, received = route_copies(Placement([[0, 1, 2, 3]], 2), Placement([[0, 2, 1, 3]], 2), 2)
    >>> sent.tolist(), received.tolist()
    ([[1, 1], [0, 0]], [[1, 1], [0, 0]])
    """
    from evenmoe.simulator import copy_kernels  # not at the top: importing numba takes 0.3 s

    num_ranks = placement.num_ranks
    sent, received = np.zeros((2, 2, num_ranks), np.int64)
    copy_kernels.count_routes(
        previous.slot_to_expert,
        placement.slot_to_expert,
        num_ranks,
        ranks_per_node,
        placement.num_experts,
        sent,
        received,
    )
    return sent, received
