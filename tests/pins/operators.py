"""What is pinned of the operators and of `ExpertParallel`: every output's bits, on small worlds of threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

import evenmoe as em
from evenmoe.ascend import torch_npu
from tests.pins.cases import Cases
from tests.pins.inputs import default_placement, distinct_ids, integers, sha256, skewed, values

cases = Cases()
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def _table(experts: int = 24, slots: int = 40, ranks: int = 8) -> torch.Tensor:
    return em.plan(skewed(200, 1, experts), num_ranks=ranks, num_slots=slots).eplb_table(0)


def _update(
    balance_mode: int | str, ids_dtype: torch.dtype = torch.int32, scales: torch.dtype | None = None, **more: Any
) -> dict[str, Any]:
    ids = distinct_ids(201, 37, 6, 24).to(ids_dtype)
    if scales is not None:
        more |= {
            "expert_scales": values(202, 37, 6).abs().to(scales),
            "pruning_threshold": torch.tensor([0.05, 0.08, 0.1, 0.12, 0.15, 0.2]),
        }
    results = [em.update_expert(ids, _table(), rank, 8, balance_mode, **more) for rank in (0, 3, 7)]
    return {
        "sha256": sha256(*(tensor for result in results for tensor in result)),
        "first_token": [slots[0].tolist() for slots, _ in results],
        "kept": [int(mask.sum()) for _, mask in results],
    }


def _updates() -> None:
    for mode in (0, "rank", 1, "token", "occurrence"):
        cases.add(f"update_expert/{mode!r}", partial(_update, mode))
        cases.add(f"update_expert/{mode!r}, int64", partial(_update, mode, torch.int64))
    for dtype in (HALF, BRAIN, SINGLE):
        name = str(dtype).removeprefix("torch.")
        cases.add(f"update_expert/pruning in {name}", partial(_update, "rank", scales=dtype))
    mask = torch.from_numpy(integers(203, 3, 37) > 0)
    for mode in ("rank", "token", "occurrence"):
        cases.add(
            f"update_expert/{mode}, pruning and active tokens",
            partial(_update, mode, scales=SINGLE, active_mask=mask),
        )
    cases.add("update_expert/unchecked", partial(_update, "token", check_values=False))


@dataclass(frozen=True)
class World:
    """One world of the operators' chain; all else follows from `seed`.

    Attributes:
        tp: 0 for a call without the group, 1 or 2 peers.
        virtual: zero, copy and const experts.
        gone: EP ranks that elastic_info leaves out.
        mask: "", "tokens" or "assignments".
    """

    seed: int
    ep: int = 4
    tp: int = 0
    shared: tuple[int, int] = (1, 0)
    experts_per_rank: int = 2
    virtual: tuple[int, int, int] = (0, 0, 0)
    gone: tuple[int, ...] = ()
    dtype: torch.dtype = BRAIN
    hidden: int = 24
    tokens: Sequence[int] = (5,)
    top_k: int = 3
    mask: str = ""
    quant_mode: int = 0
    smooth: bool = False
    comm_quant_mode: int = 0
    nums_type: int = 1
    shared_x: bool = False

    @property
    def num_experts(self) -> int:
        return (self.ep - self.shared[1]) * self.experts_per_rank

    @property
    def physical(self) -> int:
        """Experts that are left when ranks are gone, which are all behind the shared ones."""
        return self.num_experts - len(self.gone) * self.experts_per_rank

    def tokens_of(self, index: int) -> int:
        return self.tokens[index % len(self.tokens)]

    def elastic_info(self) -> torch.Tensor | None:
        if not self.gone:
            return None
        left = [rank for rank in range(self.ep) if rank not in self.gone]
        new = [left.index(rank) if rank in left else -1 for rank in range(self.ep)]
        head = [1, len(left), self.shared[1], self.physical]
        return torch.tensor(head + new + left + [-1] * len(self.gone), dtype=torch.int32)


def _run_rank(rank: Any, world: World) -> dict[str, torch.Tensor] | None:
    """The outputs of dispatch, combine and combine_add_rms_norm on one rank; None on one that is gone."""
    if rank.ep.rank in world.gone:
        return None
    seed, n, hidden, (zero, copy, const) = (
        world.seed + rank.index,
        world.tokens_of(rank.index),
        world.hidden,
        world.virtual,
    )
    random = partial(values, dtype=world.dtype)
    x, residual = random(seed, n, hidden), random(seed + 20, n, 1, hidden)
    ids = distinct_ids(seed + 40, n, world.top_k, world.physical + sum(world.virtual))
    ids = torch.where(ids < world.physical, ids, ids - world.physical + world.num_experts).to(torch.int32)
    weights = values(seed + 60, n, world.top_k).abs()
    both: dict[str, Any] = {
        "ep": rank.ep,
        "tp": rank.tp if world.tp else None,
        "num_experts": world.num_experts,
        "shared_expert_num": world.shared[0],
        "shared_expert_rank_num": world.shared[1],
        "elastic_info": world.elastic_info(),
        "zero_expert_num": zero,
        "copy_expert_num": copy,
        "const_expert_num": const,
    }
    if len(world.tokens) > 1:
        both["global_bs"] = max(world.tokens) * world.ep
    if world.mask == "tokens":
        both["x_active_mask"] = torch.arange(n) < (n + 1 + rank.index) // 2
    if world.mask == "assignments":
        both["x_active_mask"] = torch.from_numpy(integers(seed + 80, 3, n, world.top_k) > 0)
    factors = values(world.seed + 999, world.shared[0] * (world.shared[1] > 0) + world.num_experts, hidden)
    dispatched = em.dispatch(
        x,
        ids,
        scales=factors if world.smooth else None,
        quant_mode=world.quant_mode,
        expert_token_nums_type=world.nums_type,
        **both,
    )
    rows = random(seed + 120, len(dispatched.expand_x), hidden)
    both |= {"comm_quant_mode": world.comm_quant_mode, "shared_expert_x": None, "ori_x": None}
    if world.shared_x:
        both["shared_expert_x"] = random(seed + 140, n, hidden)
    if copy or const:
        both["ori_x"] = x
    if const:
        for number, name in enumerate(("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")):
            both[name] = random(world.seed + 160 + number, const, hidden) / 8
    combined = em.combine(rows, ids, dispatched, weights, **both)
    gamma = random(world.seed + 180, hidden)
    normed = em.combine_add_rms_norm(rows, ids, dispatched, weights, residual, gamma, norm_eps=1e-5, **both)
    found = {field.name: getattr(dispatched, field.name) for field in fields(dispatched)[:7]}
    return found | {"combine": combined, "norm_y": normed[0], "norm_rstd": normed[1], "norm_x": normed[2]}


def _pin_of(ranks: Sequence[dict[str, torch.Tensor] | None]) -> dict[str, Any]:
    """A digest for each output, over the ranks; rows by rank, and one value of the last output."""
    here = [rank for rank in ranks if rank is not None]
    pin: dict[str, Any] = {name: sha256(*(rank[name] for rank in here)) for name in here[0]}
    counts = next(name for name in ("expert_token_nums", "num_tokens_per_expert") if name in here[0])
    pin["counts"] = [rank[counts].tolist() for rank in here]
    pin["combined"] = [[round(value, 4) for value in rank["combine"][:1, :2].flatten().tolist()] for rank in here]
    return pin


def _chain(world: World) -> dict[str, Any]:
    with em.local_world(ep_size=world.ep, tp_size=max(world.tp, 1)) as threads:
        return _pin_of(threads.run(partial(_run_rank, world=world)))


WORLDS = {
    "plain": World(1000),
    "float16": World(1100, dtype=HALF),
    "float32": World(1200, dtype=SINGLE, hidden=17),
    "one rank": World(1300, ep=1, experts_per_rank=4),
    "one peer": World(1400, ep=3, tp=1, nums_type=0),
    "two peers": World(1500, ep=3, tp=2, experts_per_rank=1, top_k=2),
    "two peers, shared experts": World(1600, ep=4, tp=2, shared=(1, 2), experts_per_rank=1, top_k=2, dtype=HALF),
    "shared experts": World(1700, ep=5, shared=(2, 2)),
    "shared experts, prefix sums": World(1800, ep=6, shared=(1, 3), nums_type=0, dtype=HALF),
    "unequal tokens": World(1900, tokens=(5, 0, 3, 7)),
    "active tokens": World(2000, mask="tokens"),
    "active entries": World(2100, mask="assignments", shared=(1, 1)),
    "virtual experts": World(2200, virtual=(1, 2, 2), top_k=6),
    "virtual experts in float32": World(2300, virtual=(2, 1, 1), top_k=5, dtype=SINGLE),
    "rows in int8": World(2400, quant_mode=2),
    "rows in int8, smoothed": World(2500, quant_mode=2, smooth=True, shared=(1, 1), dtype=HALF),
    "rows back in int8": World(2600, comm_quant_mode=2, hidden=32),
    "int8 both ways": World(2700, quant_mode=2, comm_quant_mode=2, hidden=32, tp=1),
    "int8, two peers": World(2800, ep=2, tp=2, experts_per_rank=1, top_k=2, quant_mode=2),
    "ranks gone": World(2900, ep=5, gone=(1, 4), experts_per_rank=2),
    "ranks gone, shared experts": World(3000, ep=6, shared=(1, 2), gone=(3,), experts_per_rank=1, top_k=2),
    "tokens of the shared expert": World(3100, shared_x=True),
    "all at once": World(
        3200, ep=4, tp=1, virtual=(1, 1, 1), mask="assignments", quant_mode=2, comm_quant_mode=2, hidden=40, top_k=5,
        shared_x=True, nums_type=0, dtype=HALF,
    ),
}  # fmt: skip


def _expert_parallel(
    rule: str, ranks: int, experts: int, slots: int, dtype: torch.dtype, tokens: Sequence[int], missing: bool
) -> dict[str, Any]:
    """A layer of its own, then its second dispatch of other sizes, as in a running model."""
    load = skewed(300, 1, experts)
    placement = em.plan(load, num_ranks=ranks, num_slots=slots)

    def step(rank: Any) -> dict[str, torch.Tensor]:
        layer = em.ExpertParallel(rank.ep, placement.eplb_table(0), num_slots=slots, rule=rule)
        found: dict[str, torch.Tensor] = {}
        for number in range(2):
            seed, n = 310 + 20 * rank.index + number, tokens[(rank.index + number) % len(tokens)]
            ids = distinct_ids(seed, n, 4, experts)
            if missing:
                ids[torch.from_numpy(integers(seed, 5, n, 4) == 0)] = -1
            sent = layer.dispatch(values(seed, n, 12, dtype=dtype), ids, values(seed + 500, n, 4).abs())
            slot = (
                torch.arange(slots // ranks).repeat_interleave(sent.num_tokens_per_expert) + rank.index * slots // ranks
            )
            out = (sent.rows.double() * (1 + slot[:, None] / 8) - 0.5).to(dtype)
            found |= {
                f"rows{number}": sent.rows,
                f"sources{number}": torch.stack([sent.source_rank, sent.source_token, sent.source_k]),
                f"counts{number}": sent.num_tokens_per_expert,
                f"combine{number}": layer.combine(sent, out),
            }
        return found | {"num_tokens_per_expert": found["counts1"], "combine": found["combine1"]}

    with em.local_world(ep_size=ranks) as threads:
        return _pin_of(threads.run(step))


def _layers() -> None:
    for rule in ("rank", "token", "occurrence", "batch"):
        for name, dtype in (("bfloat16", BRAIN), ("float32", SINGLE)):
            cases.add(
                f"ExpertParallel/{rule} in {name}",
                partial(_expert_parallel, rule, 4, 16, 24, dtype, (9, 6), missing=False),
            )
        cases.add(
            f"ExpertParallel/{rule}, unequal tokens, some entries not computed",
            partial(_expert_parallel, rule, 4, 16, 24, HALF, (9, 0, 4, 13), missing=True),
        )
        cases.add(
            f"ExpertParallel/{rule}, one rank",
            partial(_expert_parallel, rule, 1, 6, 9, torch.float64, (8,), missing=True),
        )


def _npu() -> dict[str, Any]:
    """The chain by torch_npu's names, at the smallest sizes of the chip."""
    placement = default_placement(1, 4, 6, 2)

    def step(rank: Any) -> dict[str, torch.Tensor]:
        seed = 400 + rank.index
        x, ids = values(seed, 3, 1024, dtype=BRAIN), distinct_ids(seed, 3, 2, 4).to(torch.int32)
        table, weights = placement.eplb_table(0), values(seed + 10, 3, 2).abs()
        older = torch_npu.npu_moe_eplb_update_expert(ids, table, rank.index, 2)
        slots, mask = torch_npu.npu_moe_update_expert(ids, table, local_rank_id=rank.index, world_size=2)
        group = (rank.ep.name, 2, rank.index, 6)
        outputs = torch_npu.npu_moe_distribute_dispatch_v2(x, slots, *group, expert_scales=weights)
        sent = {"assist": outputs[2], "counts": outputs[4]}
        rows = values(seed + 20, len(outputs[0]), 1024, dtype=BRAIN)
        back = (rows, slots, sent["assist"], sent["counts"], weights)
        combined = torch_npu.npu_moe_distribute_combine_v2(*back, *group, tp_send_counts=outputs[5])
        residual, gamma = values(seed + 30, 3, 1, 1024, dtype=BRAIN), values(41, 1024, dtype=BRAIN)
        normed = torch_npu.npu_moe_distribute_combine_add_rms_norm(
            *back, residual, gamma, *group, tp_send_counts=outputs[5]
        )
        found = {f"dispatch{number}": output for number, output in enumerate(outputs)}
        found |= {f"norm{number}": output for number, output in enumerate(normed)}
        return found | {
            "older": older, "slots": slots, "mask": mask, "expert_token_nums": outputs[3], "combine": combined
        }  # fmt: skip

    with em.local_world(ep_size=2) as threads:
        return _pin_of(threads.run(step))


def _more_updates_by_npu() -> dict[str, Any]:
    ids, table = distinct_ids(430, 7, 3, 24).to(torch.int32), _table()
    pruned = torch_npu.npu_moe_update_expert(
        ids, table, expert_scales=values(431, 7, 3).abs(), pruning_threshold=torch.tensor([0.1, 0.2, 0.3]),
        active_mask=torch.arange(7) < 5, balance_mode=1,
    )  # fmt: skip
    return {"sha256": sha256(*pruned), "slots": pruned[0][0].tolist(), "kept": int(pruned[1].sum())}


_updates()
for _name, _world in WORLDS.items():
    cases.add(f"chain/{_name}", partial(_chain, _world))
_layers()
cases.add("torch_npu/chain", _npu)
cases.add("torch_npu/update_expert by token, pruned", _more_updates_by_npu)
