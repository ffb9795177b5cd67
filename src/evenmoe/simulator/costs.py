"""What rows, weights and copies cost in time: `evenmoe.costs` for one model's experts, every figure of which can be
given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np
import numpy.typing as npt

from evenmoe.costs import KernelModel, find_hardware
from evenmoe.costs.hardware import Phase
from evenmoe.errors import ConstraintError, MissingArgumentError
from evenmoe.metrics import FloatArray
from evenmoe.placement import Placement
from evenmoe.traces.models import MODELS, ModelShape, find_model

IntArray = npt.NDArray[np.int64]

MICROSECONDS = 1e6
_MOST = 1e30  # of a figure: a step of 10^12 tokens then takes less than 10^78 µs, and nothing overflows

#: What the figures are of where nothing else is said: the accelerator with most public measurements, in decode.
USUAL_GPU = "H100"
_KERNEL = ("memory_bytes_per_s", "flops_per_s", "start_us", "slot_us", "floor_us", "token_us", "norm", "tile")
_EXCHANGE = ("within_bytes_per_s", "between_bytes_per_s", "latency_us")


def _usual(name: str) -> Callable[[], float]:
    return lambda: _figures(USUAL_GPU, "decode", 1.0)[name]


def _figures(gpu: str, phase: Phase, weight_bytes: float) -> dict[str, float]:
    """The figures of an accelerator, by their names in `CostModel`."""
    hardware = find_hardware(gpu)
    model, exchange = hardware.kernel(phase, weight_bytes).model, hardware.exchanges[phase]
    return {name: getattr(model, name) for name in _KERNEL} | {
        "within_bytes_per_s": exchange.bytes_per_s,
        "between_bytes_per_s": hardware.between_bytes_per_s,
        "latency_us": exchange.latency_us,
    }


@dataclass(frozen=True)
class CostModel:
    """Figures of one rank and its links. Everything outside the MoE layers' experts and their exchanges is left out.

    The defaults are an H100's in decode, fitted to public tables of measured kernels (`evenmoe.costs`).

    Attributes:
        expert_flops_per_token: FLOP of one expert on one row.
        expert_bytes: bytes of one expert's weights, all of which a rank reads if the expert has any row.
        dispatch_row_bytes: bytes of one row on its way to an expert.
        combine_row_bytes: bytes of one row on its way back.
        copy_bytes: bytes that one copied expert sends.
        flops_per_s: FLOP/s that a rank achieves in experts (not its peak).
        memory_bytes_per_s: bytes/s at which a rank reads weights.
        within_bytes_per_s: bytes/s that a rank sends, and at once receives, to ranks of its node.
        between_bytes_per_s: the same to other nodes.
        latency_us: microseconds of one exchange besides its bytes; a layer has two, dispatch and combine.
        one_row_per_rank: whether a token goes once to each destination rank; else once to each expert.
        start_us, slot_us, floor_us, token_us, norm, tile: of the expert kernels, as in `KernelModel`; the tokens that
            `token_us` counts are the rows that a rank computes.
        fitted_to: the accelerator that all figures of ranks and links are of, and on what evidence; "" where they were
            given.

    Raises:
        ConstraintError: a figure that is negative, not finite or beyond 1e30, a speed below 1e-30, a norm below 1 or
            a tile that is no whole number of rows.
    """

    expert_flops_per_token: float
    expert_bytes: float
    dispatch_row_bytes: float
    combine_row_bytes: float
    copy_bytes: float
    flops_per_s: float = field(default_factory=_usual("flops_per_s"))
    memory_bytes_per_s: float = field(default_factory=_usual("memory_bytes_per_s"))
    within_bytes_per_s: float = field(default_factory=_usual("within_bytes_per_s"))
    between_bytes_per_s: float = field(default_factory=_usual("between_bytes_per_s"))
    latency_us: float = field(default_factory=_usual("latency_us"))
    one_row_per_rank: bool = True
    start_us: float = field(default_factory=_usual("start_us"))
    slot_us: float = field(default_factory=_usual("slot_us"))
    floor_us: float = field(default_factory=_usual("floor_us"))
    token_us: float = field(default_factory=_usual("token_us"))
    norm: float = field(default_factory=_usual("norm"))
    tile: int = field(default_factory=_usual("tile"))  # pyright: ignore[reportAssignmentType]
    fitted_to: str = ""

    def __post_init__(self) -> None:
        for figure in fields(self):
            value = getattr(self, figure.name)
            if figure.name == "fitted_to":
                continue
            least, rule = 0.0, f"0 or more, up to {_MOST:g}"
            if figure.name.endswith("_per_s"):
                least, rule = 1 / _MOST, f"more than 0, from {1 / _MOST:g} to {_MOST:g}"
            if figure.name in ("norm", "tile"):
                least, rule = 1.0, f"1 or more, up to {_MOST:g}"
            if not isinstance(value, int | float | np.number) or not least <= value <= _MOST:
                raise ConstraintError(figure.name, value, f"must be finite and {rule}", "state it in its unit")
        if self.tile != int(self.tile) or self.tile > 1 << 20:
            raise ConstraintError("tile", self.tile, "must be a whole number of rows, up to 1048576", "use 1 for none")

    @staticmethod
    def for_expert(
        hidden: int,
        expert_bytes: float,
        expert_flops_per_token: float,
        gpu: str = USUAL_GPU,
        phase: Phase = "decode",
        **figures: float,
    ) -> CostModel:
        """The model for experts of this size: rows of `hidden` bf16 numbers, copies of all weights.

        `gpu` is an accelerator of `evenmoe.costs`, `phase` "decode" or "prefill"; `figures` are further attributes,
        which come before its own.

        Raises:
            ConstraintError: an accelerator or a phase that is not known.

        >>> model = CostModel.for_expert(7168, 88_080_384, 88_080_384)
        >>> model.dispatch_row_bytes, model.tile, model.hardware[:24]
        (14336.0, 64, "an H100's decode kernels")
        """
        if phase not in ("decode", "prefill"):
            raise ConstraintError("phase", repr(phase), "must be a kind of step", "use decode or prefill")
        weight_bytes = 2.0 * expert_bytes / expert_flops_per_token if expert_flops_per_token > 0 else 1.0
        own = not {*_KERNEL, *_EXCHANGE} & figures.keys()
        hardware = find_hardware(gpu)
        fit = hardware.kernel(phase, weight_bytes)
        article = "an" if hardware.name[0] in "AH" else "a"
        model = CostModel(
            expert_flops_per_token=float(expert_flops_per_token),
            expert_bytes=float(expert_bytes),
            dispatch_row_bytes=2.0 * hidden,
            combine_row_bytes=2.0 * hidden,
            copy_bytes=float(figures.get("expert_bytes", expert_bytes)),
            fitted_to=f"{article} {hardware.name}'s {phase} kernels ({fit.basis}: {fit.source})" if own else "",
            **_figures(gpu, phase, weight_bytes),  # pyright: ignore[reportArgumentType]
        )
        return replace(model, **figures)

    @staticmethod
    def for_model(name: str, gpu: str = USUAL_GPU, phase: Phase = "decode", **figures: float) -> CostModel:
        """The model for the experts of a known one (`evenmoe.traces.models`); the rest as in `for_expert`.

        Raises:
            ConstraintError: a name that is not known.

        >>> CostModel.for_model("deepseek-v3") == CostModel.for_expert(7168, 44_040_192, 88_080_384)
        True
        """
        shape = find_model(name)
        sizes = shape.hidden, shape.expert_bytes, shape.expert_flops_per_token
        return CostModel.for_expert(*sizes, gpu, phase, **figures)

    @property
    def hardware(self) -> str:
        """What the figures of a rank and its links are of, in words."""
        return self.fitted_to or "the figures in the settings"

    @property
    def kernel(self) -> KernelModel:
        """The expert kernels."""
        return KernelModel(**{name: getattr(self, name) for name in _KERNEL})

    def expert_time(self, tokens: IntArray, busy: IntArray, padded: IntArray, slots: npt.ArrayLike) -> FloatArray:
        """Microseconds of every rank's experts, float64 in the shape of `tokens`.

        Args:
            tokens: int64 (…, G), rows that each rank computes.
            busy: int64 (…, G), slots of each rank that have rows.
            padded: int64 (…, G), the rows once each slot's are padded to tiles.
            slots: of every rank, (G,), or one number.
        """
        return self.kernel.time_us(padded, busy, slots, self.expert_bytes, self.expert_flops_per_token, tokens)

    def layer_time(
        self,
        tokens: IntArray,
        busy: IntArray,
        padded: IntArray,
        slots: npt.ArrayLike,
        sent: FloatArray,
        received: FloatArray,
    ) -> FloatArray:
        """Microseconds of each layer, float64 (L,): the slowest rank's experts, then the busiest rank's exchanges.

        A rank's exchanges take the longer of its two links, each of which sends and receives at once; dispatch and
        combine follow each other.

        Args:
            tokens, busy, padded, slots: as in `expert_time`, (L, G).
            sent, received: float64 (L, 2, G), rows within and between nodes.

        Two ranks of one node: 4 rows take 4 s, and reading 1 busy expert 3 s, together √(3² + 4²); 3 rows of 1 byte go
        each way at 1 byte/s:

        >>> costs = CostModel(1, 3, 1, 1, 2, 1, 1, 1, latency_us=0, start_us=0, slot_us=0, tile=1)
        >>> sent = np.array([[[3.0, 0.0], [0.0, 0.0]]])
        >>> tokens, busy = np.array([[1, 4]]), np.array([[1, 1]])
        >>> costs.layer_time(tokens, busy, tokens, 1, sent, sent[:, :, ::-1]) / 1e6
        array([11.])
        """
        experts = self.expert_time(tokens, busy, padded, slots).max(axis=1)
        rows = np.maximum(sent, received)
        per_row = self.dispatch_row_bytes + self.combine_row_bytes
        links = np.array([self.within_bytes_per_s, self.between_bytes_per_s])
        exchange = (rows * (per_row / links)[:, None]).max(axis=(1, 2))
        return experts + exchange * MICROSECONDS + 2 * self.latency_us

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
