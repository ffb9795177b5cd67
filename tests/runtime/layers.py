"""Random MoE layers for `ExpertParallel`, the chain over one rank, and a plain loop that says what must come out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st

import evenmoe as em
from evenmoe import rules
from evenmoe.placement import Placement
from evenmoe.transport.world import Rank
from tests.placements import random_placement
from tests.rules.plain_loops import PLAIN_LOOPS

RULES = tuple(rule for rule in rules.RULES if rule != "even")  # by which a rank can choose
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Spec:
    """What a layer is like; everything else follows from `seed`.

    Attributes:
        per_rank: slots of a rank. experts: logical, at most ranks · per_rank.
        most_tokens: a rank has 0…most_tokens of them. absent: share of the ids that are −1.
        hot: every token also wants expert 0. repeats: an expert may occur twice in a token.
        out_hidden: H′. x_dtype, out_dtype, weight_dtype: positions in FLOATS.
        special: ±0, subnormals, the largest numbers, ±inf and NaN among the values.
    """

    seed: int = 0
    ranks: int = 2
    per_rank: int = 2
    experts: int = 3
    top_k: int = 2
    hidden: int = 3
    out_hidden: int = 3
    most_tokens: int = 4
    absent: float = 0.0
    hot: bool = False
    repeats: bool = False
    wide_ids: bool = False
    x_dtype: int = 2
    out_dtype: int = 2
    weight_dtype: int = 2
    special: bool = False
    check_values: bool = True


@st.composite
def specs(draw: st.DrawFn, ranks: int | None = None) -> Spec:
    ranks = draw(st.integers(1, 8)) if ranks is None else ranks
    per_rank = draw(st.integers(1, 4))
    experts = draw(st.integers(1, ranks * per_rank))
    repeats = draw(st.booleans())
    return Spec(
        seed=draw(st.integers(0, 2**32)),
        ranks=ranks,
        per_rank=per_rank,
        experts=experts,
        top_k=draw(st.integers(1, 5 if repeats else min(5, experts))),
        hidden=draw(st.sampled_from([1, 2, 7, 17])),
        out_hidden=draw(st.sampled_from([1, 3, 7, 24])),
        most_tokens=draw(st.sampled_from([0, 1, 3, 9])),
        absent=draw(st.sampled_from([0.0, 0.3, 1.0])),
        hot=draw(st.booleans()),
        repeats=repeats,
        wide_ids=draw(st.booleans()),
        x_dtype=draw(st.integers(0, 3)),
        out_dtype=draw(st.integers(0, 3)),
        weight_dtype=draw(st.integers(0, 3)),
        special=draw(st.booleans()),
        check_values=draw(st.booleans()),
    )


@dataclass
class Layer:
    """The inputs of every rank, made from a spec: lists in rank order."""

    spec: Spec
    placement: Placement = field(init=False)
    table: torch.Tensor = field(init=False)
    x: list[torch.Tensor] = field(init=False)
    ids: list[torch.Tensor] = field(init=False)
    weights: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        spec = self.spec
        rng = np.random.default_rng(spec.seed)
        self.placement = random_placement(rng, 1, spec.experts, spec.ranks, spec.per_rank)
        self.table = self.placement.eplb_table(0)
        columns = torch.arange(self.table.shape[1])
        self.table[columns > self.table[:, :1]] = int(rng.choice([-7, 0, 10**6]))  # nobody may look at the padding
        tokens = rng.integers(0, spec.most_tokens + 1, spec.ranks)
        self.x = [self._values(rng, (n, spec.hidden), FLOATS[spec.x_dtype]) for n in tokens]
        self.ids = [self._ids(rng, n) for n in tokens]
        self.weights = [self._values(rng, (n, spec.top_k), FLOATS[spec.weight_dtype]) for n in tokens]

    def _ids(self, rng: np.random.Generator, tokens: int) -> torch.Tensor:
        spec = self.spec
        ids = np.zeros((tokens, spec.top_k), np.int64)
        for row in ids:
            if spec.repeats:
                row[:] = rng.integers(0, spec.experts, spec.top_k)
            else:
                row[:] = rng.permutation(spec.experts)[: spec.top_k]
            if spec.hot and 0 not in row:
                row[rng.integers(spec.top_k)] = 0
        ids[rng.random(ids.shape) < spec.absent] = -1
        return torch.from_numpy(ids).to(torch.int64 if spec.wide_ids else torch.int32)

    def _values(self, rng: np.random.Generator, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        values = torch.from_numpy(rng.standard_normal(shape))
        if self.spec.special:
            info = torch.finfo(dtype)
            special = [0.0, -0.0, info.max, -info.max, info.tiny / 2, float("inf"), float("-inf"), float("nan")]
            chosen = torch.tensor(special, dtype=torch.float64)[torch.from_numpy(rng.integers(0, len(special), shape))]
            values = torch.where(torch.from_numpy(rng.random(shape) < 0.1), chosen, values)
        return values.to(dtype)


def expert_of(expert: int, row: torch.Tensor, spec: Spec) -> torch.Tensor:
    """An expert as a function of each element: times a power of two, plus its number; columns repeated to H′."""
    columns = torch.arange(spec.out_hidden) % spec.hidden
    return (row[..., columns].float() * 2.0 ** (expert % 3 - 1) + expert).to(FLOATS[spec.out_dtype])


def in_process(rank: Rank, spec: Spec) -> dict[str, dict[str, torch.Tensor]]:
    """The job for processes, which make the layer anew."""
    return one_rank(rank, Layer(spec))


def one_rank(rank: Rank, layer: Layer) -> dict[str, dict[str, torch.Tensor]]:
    """{rule: what dispatch gave and `y`}."""
    spec, i, results = layer.spec, rank.index, {}
    for rule in RULES:
        ep = em.ExpertParallel(
            rank.ep, layer.table, num_slots=layer.placement.num_slots, rule=rule, check_values=spec.check_values
        )
        dispatched = ep.dispatch(layer.x[i], layer.ids[i], layer.weights[i])
        slots = torch.arange(spec.per_rank).repeat_interleave(dispatched.num_tokens_per_expert) + i * spec.per_rank
        out = torch.zeros((len(dispatched.rows), spec.out_hidden), dtype=FLOATS[spec.out_dtype])
        for slot in slots.unique().tolist():
            expert = int(layer.placement.slot_to_expert[0, slot])
            out[slots == slot] = expert_of(expert, dispatched.rows[slots == slot], spec)
        results[rule] = {
            "rows": dispatched.rows,
            "slots": slots,
            "counts": dispatched.num_tokens_per_expert,
            "source_rank": dispatched.source_rank,
            "source_token": dispatched.source_token,
            "source_k": dispatched.source_k,
            "y": ep.combine(dispatched, out),
        }
    return results


def expected_sums(layer: Layer) -> list[torch.Tensor]:
    """Per rank (T, H′): k ascending, each product rounded, then added, in float64 for rows of it, else in float32."""
    spec = layer.spec
    sums, exact = [], torch.float64 if FLOATS[spec.out_dtype] == torch.float64 else torch.float32
    for x, ids, weights in zip(layer.x, layer.ids, layer.weights, strict=True):
        y = torch.zeros((len(x), spec.out_hidden), dtype=FLOATS[spec.out_dtype])
        for token in range(len(x)):
            total = torch.zeros(spec.out_hidden, dtype=exact)
            for k in range(spec.top_k):
                expert = int(ids[token, k])
                if expert >= 0:
                    product = expert_of(expert, x[token], spec).to(exact) * weights[token, k].to(exact)
                    total = total + product
            y[token] = total.to(y.dtype)
        sums.append(y)
    return sums


def expected_slots(layer: Layer, rule: str) -> dict[tuple[int, int, int], int]:
    """{(rank, token, k): slot} under a rule that needs no counts of other ranks."""
    slots = {}
    for rank, ids in enumerate(layer.ids):
        counted = ids >= 0
        chosen = PLAIN_LOOPS[rule](torch.where(counted, ids, 0), layer.table, rank, layer.spec.ranks, counted)
        slots |= {(rank, token, k): int(chosen[token, k]) for token, k in counted.nonzero().tolist()}
    return slots
