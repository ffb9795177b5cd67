"""Micro-batches of the fault campaign: calls whose every result is known beforehand, on every rank.

All inputs are whole numbers and every product and sum stays below 2^24, so float32 holds each of them exactly, in any
order of addition. Each seed gives other numbers, so a row of another step or of another rank shows.

Shapes: T tokens of a rank, H hidden, K experts per token, W expert-parallel ranks, N assignments to this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

import evenmoe as em
from evenmoe.transport.world import Rank
from tests.placements import random_placement

# (rule, number of its table): two layers share a table, so that only the layer's identity tells them apart.
LAYERS = (("rank", 0), ("occurrence", 1), ("batch", 2), ("token", 3), ("rank", 4), ("rank", 4))
SLOTS_PER_RANK = 2
NORM_EPS = 1e-6
# combine_add_rms_norm against float64, relative: the squares, 1/H and their product round once each, the tree adds up
# to 6 times (H <= 64), norm_eps once: 10 roundings, halved by the root; the root, its reciprocal and two products: 4.
NORM_TOLERANCE = 1.01 * (10 / 2 + 4) * 2.0**-24


@dataclass(frozen=True)
class Batch:
    """One dispatch and the combine that belongs to it, the same description on every rank.

    Attributes:
        kind: "layer" (ExpertParallel), "chain" (em.dispatch, em.combine) or "norm" (em.combine_add_rms_norm).
        layer: position in LAYERS, of kind "layer".
        tokens: T of every rank of the world. hot: every token also wants expert 0.
        quant_mode, comm_quant_mode: of the chain.
    """

    seed: int
    kind: str
    layer: int
    tokens: tuple[int, ...]
    hidden: int
    top_k: int
    quant_mode: int = 0
    comm_quant_mode: int = 0
    hot: bool = False

    def operator(self, verb: str, tp_size: int = 1) -> str:
        """The operator that "dispatch" or "combine" of this batch calls, as the table names it."""
        if self.kind == "layer":
            return f"ExpertParallel.{verb}"
        peers = " tp=2" if tp_size == 2 else ""
        return ("combine_add_rms_norm" if self.kind == "norm" and verb == "combine" else verb) + peers

    def variant(self) -> str:
        if self.kind == "layer":
            return f"ExpertParallel, rule {LAYERS[self.layer][0]}"
        return f"{self.kind}, quant_mode {self.quant_mode}, comm_quant_mode {self.comm_quant_mode}"


class Member:
    """One rank of a world, with its layers; they are made once, as those of a model are."""

    def __init__(self, rank: Rank, tp_size: int) -> None:
        self.rank, self.tp_size, self.ep_size = rank, tp_size, rank.ep.world_size
        self.placements = []
        self.layers = []
        if tp_size == 2:
            return
        for rule, table in LAYERS:
            rng = np.random.default_rng(table)
            placement = random_placement(rng, 1, self.ep_size + 1, self.ep_size, SLOTS_PER_RANK)
            self.placements.append(placement)
            self.layers.append(
                em.ExpertParallel(rank.ep, placement.eplb_table(0), num_slots=SLOTS_PER_RANK * self.ep_size, rule=rule)
            )


@dataclass(frozen=True)
class Inputs:
    """Of one rank: x float32 (T, H), ids int64 (T, K), weights float32 (T, K), residual float32 (T, H)."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    residual: torch.Tensor


def make_inputs(batch: Batch, index: int, num_experts: int) -> Inputs:
    rng = np.random.default_rng([batch.seed, index])
    count, hidden = batch.tokens[index], batch.hidden
    if batch.quant_mode or batch.comm_quant_mode:
        # Largest elements of 127 in every block of eight make all scales powers of two, so int8 loses nothing.
        x = rng.integers(-127, 128, (count, hidden))
        x[:, ::8] = 127 * rng.choice([-1, 1], (count, -(-hidden // 8)))
    else:
        x = rng.integers(-(2**13), 2**13, (count, hidden))
    ids = rng.random((count, num_experts)).argsort(axis=1)[:, : batch.top_k]
    if batch.hot:
        ids[(ids != 0).all(axis=1), 0] = 0
    if batch.kind == "layer":
        ids[rng.random(ids.shape) < 0.1] = -1
    numbers = (x, rng.integers(1, 8, ids.shape), rng.integers(-99, 100, x.shape))
    x, weights, residual = (torch.from_numpy(array).float() for array in numbers)
    return Inputs(x, torch.from_numpy(ids), weights, residual)


class Running:
    """A batch on one rank: the arguments of its two calls, the calls, and whether their results are right."""

    def __init__(self, member: Member, batch: Batch) -> None:
        self.member, self.batch = member, batch
        self.index, self.layered = member.rank.index, batch.kind == "layer"
        self.num_experts = member.ep_size + 1 if self.layered else member.ep_size * self._experts_per_rank()
        self.mine = self.inputs_of(self.index)
        self._result: Any = None

    def arguments(self, verb: str) -> dict[str, Any]:
        """By name; those that the caller may get wrong."""
        given = self.mine
        if verb == "dispatch":
            if self.layered:
                return {"x": given.x, "topk_ids": given.ids, "topk_weights": given.weights}
            return {"x": given.x, "expert_ids": given.ids.int()}
        if self.layered:
            return {"expert_out": self._layer_output()}
        arguments = {"expert_out": self._chain_output(), "expert_ids": given.ids.int(), "expert_scales": given.weights}
        if self.batch.kind == "norm":
            arguments |= {"residual_x": given.residual[:, None], "gamma": self._gamma()}
        return arguments

    def call(self, verb: str, arguments: dict[str, Any]) -> Any:
        rank, batch = self.member.rank, self.batch
        if self.layered:
            layer = self.member.layers[batch.layer]
            return layer.dispatch(**arguments) if verb == "dispatch" else layer.combine(self._result, **arguments)
        groups = {"ep": rank.ep, "tp": rank.tp if self.member.tp_size == 2 else None}
        sizes = {"num_experts": self.num_experts, "global_bs": max(1, *batch.tokens) * self.member.ep_size}
        if verb == "dispatch":
            return em.dispatch(**arguments, **groups, **sizes, quant_mode=batch.quant_mode)
        keywords = {"dispatched": self._result, "comm_quant_mode": batch.comm_quant_mode, **groups, **sizes}
        if batch.kind == "norm":
            return em.combine_add_rms_norm(**arguments, **keywords, norm_eps=NORM_EPS)
        return em.combine(**arguments, **keywords)

    def check(self, verb: str, result: Any) -> str:
        """What is wrong with a call's result; "" if nothing is."""
        if verb == "dispatch":
            self._result = result
            return self._check_layer_rows(result) if self.layered else self._check_chain_rows(result)
        if self.batch.kind != "norm":
            return _difference("y", result, self._expected_sum())
        x = self._expected_sum().double() + self.mine.residual.double()
        rstd = (x.square().mean(dim=1, keepdim=True) + NORM_EPS).rsqrt()
        y = x * rstd * self._gamma().double()
        near = (("y", result[0], y), ("rstd", result[1], rstd))
        problems = [_difference(name, got[:, 0], want, NORM_TOLERANCE) for name, got, want in near]
        return "; ".join(filter(None, [*problems, _difference("x", result[2][:, 0], x.float())]))

    def inputs_of(self, index: int) -> Inputs:
        return make_inputs(self.batch, index, self.num_experts)

    @cached_property
    def sources(self) -> list[int]:
        """World indices of the ranks of this rank's expert-parallel group, by EP rank."""
        tp_size = self.member.tp_size
        return [source * tp_size + self.index % tp_size for source in range(self.member.ep_size)]

    def _experts_per_rank(self) -> int:
        return 1 if self.member.tp_size == 2 else 2

    def _gamma(self) -> torch.Tensor:
        return torch.arange(1, self.batch.hidden + 1).float()

    # -- what the experts compute -------------------------------------------------------------------------------------

    def _layer_output(self) -> torch.Tensor:
        """Expert e doubles its rows e mod 3 times and adds e."""
        experts = self._experts_of_slots()[self._local_slots(self._result)][:, None]
        out = self._result.rows * 2.0 ** (experts % 3) + experts
        shown = self.member.rank.ep.new_rows(tuple(out.shape), out)  # where there is memory that the others read
        return out if shown is None else shown.copy_(out)

    def _chain_output(self) -> torch.Tensor:
        """Expert e doubles its rows e mod 4 times, on TP rank 1 once more; the rows behind those in use stay."""
        rows, batch = self._result.expand_x.float(), self.batch
        if batch.quant_mode:
            rows = rows * self._result.dynamic_scales[:, None]
        per_expert = self._result.expert_token_nums
        ep, local = self.member.rank.ep.rank, len(per_expert)
        factors = 2.0 ** ((torch.arange(local) + ep * local) % 4) * (1 + self.member.rank.tp.rank)
        used = int(per_expert.sum())
        out = torch.zeros_like(rows)
        out[:used] = rows[:used] * factors.repeat_interleave(per_expert)[:, None]
        return out

    def _expected_sum(self) -> torch.Tensor:
        given = self.mine
        experts = given.ids.clamp(min=0)[:, :, None]
        rows = given.x[:, None].double()
        if self.layered:
            outputs = rows * 2.0 ** (experts % 3) + experts
        else:
            outputs = rows * 2.0 ** (experts % 4) * (3 if self.member.tp_size == 2 else 1)
        return (outputs * (given.weights * (given.ids >= 0))[:, :, None]).sum(dim=1).float()

    # -- what dispatch must give --------------------------------------------------------------------------------------

    def _experts_of_slots(self) -> torch.Tensor:
        placement = self.member.placements[self.batch.layer]
        return torch.tensor(placement.slot_to_expert[0], dtype=torch.int64)

    def _local_slots(self, result: Any) -> torch.Tensor:
        """Slot of every row received."""
        first = SLOTS_PER_RANK * self.index
        return torch.arange(SLOTS_PER_RANK).repeat_interleave(result.num_tokens_per_expert) + first

    def _check_layer_rows(self, result: Any) -> str:
        slots = self._local_slots(result)
        keys = torch.stack([slots, result.source_rank, result.source_token, result.source_k], dim=1).long()
        everyone = [self.inputs_of(index) for index in range(self.member.ep_size)]
        if LAYERS[self.batch.layer][0] == "batch":
            # The split may choose any replica, so the experts alone are compared.
            wanted = self._wanted(keys, everyone)
        else:
            wanted = self._expected_keys(everyone)
        if problem := _difference("assignments", keys, wanted):
            return problem
        rows = [everyone[source].x[token] for _, source, token, _ in keys.tolist()]
        return _difference("rows", result.rows, torch.stack(rows) if rows else self.mine.x[:0])

    def _wanted(self, keys: torch.Tensor, everyone: list[Inputs]) -> torch.Tensor:
        """Those of `keys` that name their slot's expert, each once and in order."""
        experts = self._experts_of_slots()
        wanted = sorted({tuple(key) for key in keys.tolist()})
        right = [key for key in wanted if everyone[key[1]].ids[key[2], key[3]] == experts[key[0]]]
        return torch.tensor(right, dtype=torch.int64).reshape(-1, 4)

    def _expected_keys(self, everyone: list[Inputs]) -> torch.Tensor:
        """(slot, source rank, token, k) of the assignments to this rank, in order, under a rule without counts."""
        rule = LAYERS[self.batch.layer][0]
        table = self.member.placements[self.batch.layer].eplb_table(0).tolist()
        keys = []
        for source, inputs in enumerate(everyone):
            seen = [0] * len(table)
            for token, row in enumerate(inputs.ids.tolist()):
                for k, expert in enumerate(row):
                    if expert < 0:
                        continue
                    count, *slots = table[expert]
                    if rule == "rank":
                        replica = source // -(-self.member.ep_size // count)
                    else:
                        replica = (token if rule == "token" else seen[expert] + source + expert) % count
                    seen[expert] += 1
                    if slots[replica] // SLOTS_PER_RANK == self.index:
                        keys.append((slots[replica], source, token, k))
        return torch.tensor(sorted(keys), dtype=torch.int64).reshape(-1, 4)

    def _check_chain_rows(self, result: em.Dispatched) -> str:
        own = self._received_by(self.sources)
        count, hidden = len(own.keys), self.batch.hidden
        rows, counts = own.rows, own.counts.cumsum(0)
        if self.member.tp_size == 2:
            peer = self._received_by([index ^ 1 for index in self.sources])
            rows, counts = torch.cat([rows, peer.rows]), torch.cat([counts, peer.counts.cumsum(0)])
        scales = torch.full((len(rows),), 1.0 if self.batch.quant_mode else 0.0)
        padding = (0, 0, 0, len(result.expand_x) - len(rows))
        assist = torch.tensor(own.keys, dtype=torch.int64).reshape(count, 4)[:, 1:]
        compared = (
            ("assist info", result.assist_info_for_combine[: 3 * count].view(count, 3).long(), assist),
            ("ep_recv_counts", result.ep_recv_counts.long(), counts),
            ("expand_x", result.expand_x.float(), torch.nn.functional.pad(rows.view(-1, hidden), padding)),
            ("dynamic_scales", result.dynamic_scales[: len(rows)], scales),
        )
        return "; ".join(filter(None, (_difference(*pair) for pair in compared)))

    def _received_by(self, sources: list[int]) -> _Received:
        """What this EP rank receives from ranks with the world indices `sources`."""
        local = self._experts_per_rank()
        first = self.member.rank.ep.rank * local
        everyone = [self.inputs_of(index) for index in sources]
        counts = torch.zeros((local, len(sources)), dtype=torch.int64)
        keys = []
        for source, inputs in enumerate(everyone):
            here = ((inputs.ids >= first) & (inputs.ids < first + local)).nonzero().tolist()
            for token, k in here:
                expert = int(inputs.ids[token, k])
                counts[expert - first, source] += 1
                keys.append((expert, source, token, k))
        keys.sort()
        rows = [everyone[source].x[token] for _, source, token, _ in keys]
        return _Received(keys, torch.stack(rows) if rows else torch.zeros((0, self.batch.hidden)), counts.flatten())


@dataclass(frozen=True)
class _Received:
    """keys (expert, source, token, k) in order; rows (N, H); counts (local experts * W,) by expert, then source."""

    keys: list[tuple[int, int, int, int]]
    rows: torch.Tensor
    counts: torch.Tensor


def _difference(name: str, got: torch.Tensor, want: torch.Tensor, relative: float = 0.0) -> str:
    if got.shape != want.shape:
        return f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
    wrong = ~((got.double() - want.double()).abs() <= relative * want.double().abs())  # a NaN is wrong too
    if not wrong.any():
        return ""
    at = tuple(wrong.nonzero()[0].tolist())
    return f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, first {float(got[at])} for {float(want[at])} at {at}"
