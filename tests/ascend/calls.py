"""Calls of the whole chain on one rank, at the smallest sizes that the chip takes, for tests of Ascend's APIs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

import evenmoe as em
from evenmoe.ascend.context import DEFAULT_BUFFER_BYTES, make_context
from evenmoe.contract.operators import SIGNATURES
from evenmoe.transport.world import Rank

HIDDEN = 1024  # the chip's least
UNTOUCHED = 77  # what outputs are filled with before a call


@dataclass(frozen=True)
class Chain:
    """What the ranks of one world call; the fields are the operators' attributes."""

    ep: int = 2
    tp: int = 0
    experts_per_rank: int = 2
    tokens: int = 3
    top_k: int = 2
    dtype: torch.dtype = torch.bfloat16
    shared_experts: int = 0
    shared_ranks: int = 0
    quant_mode: int = 0
    comm_quant_mode: int = 0
    nums_type: int = 1
    virtual: tuple[int, int, int] = (0, 0, 0)
    mask: str = "none"
    pruning: bool = False
    seed: int = 0

    @property
    def num_experts(self) -> int:
        return self.experts_per_rank * (self.ep - self.shared_ranks)

    def attributes(self, rank: Rank) -> dict[str, Any]:
        """Every attribute of every operator by name, and the context, which stands for one."""
        return {
            "local_rank_id": rank.ep.rank,
            "world_size": self.ep,
            "balance_mode": 0,
            "group_ep": rank.ep.name,
            "context": make_context(rank.ep.name, rank.ep.rank, self.ep),
            "ccl_buffer_size": DEFAULT_BUFFER_BYTES,
            "ep_world_size": self.ep,
            "ep_rank_id": rank.ep.rank,
            "moe_expert_num": self.num_experts,
            "group_tp": rank.tp.name if self.tp else "",
            "tp_world_size": self.tp,
            "tp_rank_id": rank.tp.rank if self.tp == 2 else 0,
            "expert_shard_type": 0,
            "shared_expert_num": self.shared_experts,
            "shared_expert_rank_num": self.shared_ranks,
            "quant_mode": self.quant_mode,
            "global_bs": 0,
            "expert_token_nums_type": self.nums_type,
            "out_dtype": 0,
            "comm_quant_mode": self.comm_quant_mode,
            "group_list_type": 0,
            "comm_alg": "",
            **dict(zip(("zero_expert_num", "copy_expert_num", "const_expert_num"), self.virtual, strict=True)),
            "norm_eps": 1e-6,
        }

    def inputs(self, rank: Rank) -> dict[str, torch.Tensor | None]:
        """Every input of every operator by name, but for those that an operator before gives."""
        random_ = random.Random(f"{self.seed} {rank.index}")
        torch_random = torch.Generator().manual_seed(self.seed * 100 + rank.index)

        def values(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=torch_random).to(self.dtype)

        num_ids = self.num_experts + sum(self.virtual)
        rows = [random_.sample(range(num_ids), self.top_k) for _ in range(self.tokens)]
        table = [[1, expert] for expert in range(num_ids)]  # the identity, so that ids are physical and virtual ones
        masks = {
            "none": None,
            "tokens": torch.tensor([token < self.tokens - 1 for token in range(self.tokens)]),
            "assignments": torch.tensor([[random_.random() < 0.6 for _ in row] for row in rows]),
        }
        const = self.virtual[2]
        weights = torch.rand((self.tokens, self.top_k), generator=torch_random)
        return {
            "x": values(self.tokens, HIDDEN),
            "expert_ids": torch.tensor(rows, dtype=torch.int32),
            "eplb_table": torch.tensor(table, dtype=torch.int32),
            "scales": torch.rand(
                ((self.shared_experts if self.shared_ranks else 0) + self.num_experts, HIDDEN), generator=torch_random
            )
            if self.quant_mode == 2
            else None,
            "expert_scales": weights,
            "pruning_threshold": torch.full((self.top_k,), 0.4) if self.pruning else None,
            "active_mask": None,
            "x_active_mask": masks[self.mask],
            "shared_expert_x": values(self.tokens, HIDDEN) if self.shared_ranks == 0 else None,
            "ori_x": values(self.tokens, HIDDEN) if sum(self.virtual[1:]) else None,
            **{
                name: values(const, HIDDEN) if const else None
                for name in ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
            },
            "residual_x": values(self.tokens, 1, HIDDEN),
            "gamma": values(HIDDEN),
        }

    def outputs(self, rank: Rank) -> dict[str, torch.Tensor]:
        """Every output of every operator by name, full of UNTOUCHED and a little larger where that is allowed."""
        shared = rank.ep.rank < self.shared_ranks
        tp = max(self.tp, 1)
        local = 1 if shared else self.experts_per_rank
        total = self.tokens * self.ep
        per_shared = self.shared_ranks // self.shared_experts if self.shared_ranks else 1
        rows = self.tokens * -(-self.ep // per_shared) if shared else total * min(local, self.top_k)
        sent = torch.int8 if self.quant_mode == 2 else self.dtype
        shapes = {
            "balanced_expert_ids": ((self.tokens, self.top_k), torch.int32),
            "expand_x": ((rows * tp + 1, HIDDEN), sent),
            "dynamic_scales": ((rows * tp + 1,), torch.float32),
            "assist_info_for_combine": ((128 * rows + 1,), torch.int32),
            "expert_token_nums": ((local,), torch.int64),
            "ep_recv_counts": ((self.ep * local * tp + 1,), torch.int32),
            "tp_recv_counts": ((self.tp,), torch.int32),
            "expand_scales": ((rows,), torch.float32),
            "y_out": ((self.tokens, 1, HIDDEN), self.dtype),
            "rstd_out": ((self.tokens, 1, 1), torch.float32),
        }
        made = {name: torch.full(shape, UNTOUCHED, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        return made | {"balanced_active_mask": torch.zeros((self.tokens, self.top_k), dtype=torch.bool)}

    def x_out(self, *, with_norm: bool) -> torch.Tensor:
        shape = (self.tokens, 1, HIDDEN) if with_norm else (self.tokens, HIDDEN)
        return torch.full(shape, UNTOUCHED, dtype=self.dtype)


def pick(operator: str, values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one operator in C order; null where `values` has none."""
    return {name: values.get(name) for name in SIGNATURES[operator].arguments}


FIRST_VERSIONS = ("MoeDistributeDispatch", "MoeDistributeCombine")
FIRST_WORLD, FIRST_HIDDEN = 8, 7168  # the least that the first versions take


def valid_calls(rank: Rank, of_eight: Rank) -> dict[str, dict[str, Any]]:
    """Operator -> arguments in C order that its first stage takes, of one rank of a world of two, or of eight ranks."""
    chain = Chain()
    out = chain.outputs(rank)
    values = chain.inputs(rank) | chain.attributes(rank) | out
    back = {
        "expand_x": out["expand_x"],
        "assist_info_for_combine": out["assist_info_for_combine"],
        "ep_send_counts": torch.zeros(4, dtype=torch.int32),
        "tp_send_counts": torch.zeros(0, dtype=torch.int32),
        "expand_scales": None,
    }
    calls = _first_calls(of_eight)
    for operator, signature in SIGNATURES.items():
        if signature.operator.endswith(("_setup", "_teardown")):
            calls[operator] = pick(operator, valid_halves(rank, signature.operator))
            continue
        if operator in calls:
            continue
        changes = {"expert_scales": None} if signature.operator == "update_expert" else {}
        if signature.operator.startswith("combine"):
            changes = back | {"x_out": chain.x_out(with_norm="AddRmsNorm" in operator)}
        calls[operator] = pick(operator, values | changes)
    return calls


def valid_halves(rank: Rank, operator: str) -> dict[str, Any]:
    """What the first stages of setup and teardown take (§14); combine takes few sizes, so its tensors are views."""
    combine = operator.startswith("combine")
    chain = Chain(experts_per_rank=16, tokens=8, top_k=6) if combine else Chain()
    columns = 4096 if combine else HIDDEN
    rows = chain.tokens * chain.ep * min(chain.experts_per_rank, chain.top_k)
    sent = chain.tokens * chain.top_k
    commands = 16 * (rows + chain.ep if combine else sent + chain.ep * chain.experts_per_rank)

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    return (
        chain.inputs(rank)
        | chain.attributes(rank)
        | {
            "comm_type": 2,
            "x": zeros(chain.tokens, columns, dtype=chain.dtype),
            "y": zeros(sent, columns, dtype=chain.dtype),
            "expand_idx": zeros(sent),
            "comm_cmd_info": zeros(commands),
            "expand_x": zeros(rows, columns, dtype=chain.dtype),
            "dynamic_scales": zeros(rows, dtype=torch.float32),
            "assist_info_for_combine": zeros(128 * rows),
            "expert_token_nums": zeros(chain.experts_per_rank, dtype=torch.int64),
            "quant_expand_x": zeros(rows, 6144, dtype=torch.int8),
            "shared_expert_x": None,
            "x_out": zeros(chain.tokens, columns, dtype=chain.dtype),
        }
    )


def _first_calls(rank: Rank) -> dict[str, dict[str, Any]]:
    """Three tokens of every rank, each for two of eight experts, so at most 24 rows for the one here."""
    int32, rows = {"dtype": torch.int32}, torch.zeros(24, FIRST_HIDDEN, dtype=torch.bfloat16)
    chain = Chain(ep=FIRST_WORLD, experts_per_rank=1)
    weights, tokens = torch.ones(3, 2), torch.zeros(3, FIRST_HIDDEN, dtype=torch.bfloat16)
    values = chain.attributes(rank) | {"shared_expert_num": 1, "expert_ids": torch.tensor([[0, 1]] * 3, **int32)}
    values |= {"expert_scales": weights, "expand_idx": torch.zeros(6, **int32)}
    out = {"expand_x": rows, "dynamic_scales": torch.zeros(24), "expert_token_nums": torch.zeros(1).long()}
    out |= {"ep_recv_counts": torch.zeros(8, **int32), "tp_recv_counts": torch.zeros(0, **int32)}
    out |= {"expand_scales": torch.zeros(24)}
    back = {"expand_x": rows, "ep_send_counts": torch.zeros(8, **int32), "tp_send_counts": torch.zeros(0, **int32)}
    return {
        "MoeDistributeDispatch": pick("MoeDistributeDispatch", values | out | {"x": tokens}),
        "MoeDistributeCombine": pick("MoeDistributeCombine", values | back | {"x_out": tokens.clone()}),
    }


def expected(chain: Chain, rank: Rank, given: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The same chain by the package's own operators: {operator family: outputs}."""
    attributes = chain.attributes(rank)
    shared = {
        "ep": rank.ep,
        "tp": rank.tp if chain.tp == 2 else None,
        "num_experts": chain.num_experts,
        "x_active_mask": given["x_active_mask"],
        **{
            name: attributes[name]
            for name in (
                *("shared_expert_num", "shared_expert_rank_num"),
                *("zero_expert_num", "copy_expert_num", "const_expert_num"),
            )
        },
    }
    dispatched = em.dispatch(
        given["x"],
        given["expert_ids"],
        scales=given["scales"],
        expert_scales=given["expert_scales"],
        quant_mode=chain.quant_mode,
        expert_token_nums_type=chain.nums_type,
        **shared,
    )
    arguments = (rows, given["expert_ids"], dispatched, given["expert_scales"])
    names = ("shared_expert_x", "ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
    shared |= {name: given[name] for name in names} | {"comm_quant_mode": chain.comm_quant_mode}
    combined = em.combine(*arguments, **shared)
    normed = em.combine_add_rms_norm(*arguments, given["residual_x"], given["gamma"], **shared)
    return {"dispatch": dispatched, "combine": combined, "combine_add_rms_norm": normed}


CHAINS = {
    "plain": Chain(),
    "tp": Chain(tp=2, experts_per_rank=1, ep=3, tokens=2),
    "shared": Chain(ep=4, shared_experts=1, shared_ranks=2, nums_type=0),
    "quantized": Chain(quant_mode=2, dtype=torch.bfloat16, top_k=3, comm_quant_mode=2),
    "masked tokens": Chain(mask="tokens", ep=3, top_k=1),
    "masked assignments": Chain(mask="assignments", shared_experts=2, shared_ranks=2, ep=4),
    "virtual": Chain(virtual=(1, 2, 2), top_k=5, tokens=4),
    "one token": Chain(tokens=1, experts_per_rank=1, top_k=1),
}
