"""The worlds of `evenmoe demo`: the operator chain of a layer with real experts, and how far it is from a dense model.

The ranks are threads of this process, or the processes that torchrun started.
Shapes: W expert-parallel ranks, B tokens per rank, H hidden, F inner width, K experts per token, E logical experts,
S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

import evenmoe as em
from evenmoe.errors import ConstraintError
from evenmoe.placement import default_placement
from evenmoe.reference.dense import FP32, Experts, dense_add_rms_norm, dense_moe, make_experts
from evenmoe.traces.trace import Trace
from evenmoe.transport.process_world import process_world
from evenmoe.transport.world import Rank, local_world

#: The published demo's world: 8 × 2 ranks, 8 tokens each, hidden 7168, 3 experts per token, one expert per rank.
PAGE_EP, PAGE_TP, PAGE_TOKENS, PAGE_HIDDEN, PAGE_TOP_K = 8, 2, 8, 7168, 3
PAGE_INNER = 512
TRACE_TOKENS, TRACE_HIDDEN, TRACE_INNER = 64, 1024, 256  # per rank; a trace does not say how wide its model is
DEFAULT_TOP_K = 4  # for a trace without `routing`
NORM_EPS = 1e-6

Result = TypeVar("Result")


@dataclass(frozen=True)
class DemoLayer:
    """One layer's work for a world: what every rank starts with.

    Attributes:
        ep_size, tp_size: the world.
        table: int32 (E, F), the EPLB table; num_slots: S.
        slot_to_expert: int64 (S,), the logical expert in every slot.
        x, residual, shared: bfloat16 (W·tp, B, H). topk_ids: int32 (W·tp, B, K), logical. scales: float32 (W·tp, B, K).
        gamma: bfloat16 (H,).
        experts: weights of the E logical experts.
    """

    ep_size: int
    tp_size: int
    table: torch.Tensor
    num_slots: int
    slot_to_expert: torch.Tensor
    x: torch.Tensor
    residual: torch.Tensor
    shared: torch.Tensor
    topk_ids: torch.Tensor
    scales: torch.Tensor
    gamma: torch.Tensor
    experts: Experts


@dataclass(frozen=True)
class Expected:
    """What the dense model gives for a layer, all ranks' tokens in rank order: float64 (tokens, H) each."""

    x: torch.Tensor
    x_bound: torch.Tensor
    y: torch.Tensor
    y_bound: torch.Tensor


@dataclass(frozen=True)
class Comparison:
    """How the chain did on one layer.

    Attributes:
        num_values: values compared.
        largest_difference: max |chain − dense| over x and y.
        largest_share: max |chain − dense| / bound; at most 1.0 when rounding explains every difference.
        rows_per_rank: rows that each expert-parallel rank computed.
    """

    num_values: int
    largest_difference: float
    largest_share: float
    rows_per_rank: list[int]


def make_layer(
    placement: em.Placement, layer: int, topk_ids: torch.Tensor, tp_size: int, hidden: int, inner: int, seed: int
) -> DemoLayer:
    """Random tokens and weights around the given routing: topk_ids integers (W·tp, B, K), logical experts."""
    generator = torch.Generator().manual_seed(seed)
    ranks, tokens, top_k = topk_ids.shape

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    return DemoLayer(
        ep_size=placement.num_ranks,
        tp_size=tp_size,
        table=placement.eplb_table(layer),
        num_slots=placement.num_slots,
        slot_to_expert=torch.from_numpy(placement.slot_to_expert[layer].astype("int64")),
        x=normal(ranks, tokens, hidden),
        residual=normal(ranks, tokens, hidden),
        shared=normal(ranks, tokens, hidden),
        topk_ids=topk_ids.int(),
        scales=torch.softmax(torch.randn((ranks, tokens, top_k), generator=generator), dim=-1),
        gamma=normal(hidden),
        experts=make_experts(placement.num_experts, hidden, inner, seed),
    )


def with_placement(layer: DemoLayer, placement: em.Placement, index: int) -> DemoLayer:
    """The same tokens and experts, spread over slots by another placement's layer `index`."""
    return replace(
        layer,
        table=placement.eplb_table(index),
        num_slots=placement.num_slots,
        slot_to_expert=torch.from_numpy(placement.slot_to_expert[index].astype("int64")),
    )


def expect(layer: DemoLayer) -> Expected:
    """The dense model's values and what rounding may move them by; the placement plays no part."""
    x, topk_ids, scales = (t.flatten(0, 1) for t in (layer.x, layer.topk_ids, layer.scales))
    total, bound = dense_moe(x, topk_ids, scales, layer.experts, shards=layer.tp_size)
    hidden = layer.x.shape[-1]
    total = total + layer.shared.reshape(-1, hidden).double()
    bound = bound + 2 * FP32 * (total.abs() + bound)  # its float32 sum, doubled for the higher terms
    return Expected(*dense_add_rms_norm(total, bound, layer.residual.reshape(-1, hidden), layer.gamma, NORM_EPS))


def run_chain(layer: DemoLayer) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Run the chain; (y, x, rows computed) of every rank, y and x bfloat16 (B, 1, H)."""
    return run_world(layer.ep_size, layer.tp_size, lambda rank: _one_rank(layer, rank))


def compare(layer: DemoLayer, results: list[tuple[torch.Tensor, torch.Tensor, int]], expected: Expected) -> Comparison:
    """Every value of x and y of every rank against the dense model."""
    y = torch.cat([r[0] for r in results]).double().flatten(0, 1)
    x = torch.cat([r[1] for r in results]).double().flatten(0, 1)
    differences = [(y - expected.y).abs(), (x - expected.x).abs()]
    shares = [d / bound for d, bound in zip(differences, (expected.y_bound, expected.x_bound), strict=True)]
    return Comparison(
        num_values=y.numel() + x.numel(),
        largest_difference=float(torch.stack(differences).max()),
        largest_share=float(torch.stack(shares).max()),  # torch's maximum of a NaN is NaN, Python's may be anything
        rows_per_rank=[r[2] for r in results[:: layer.tp_size]],
    )


def _one_rank(layer: DemoLayer, rank: Rank) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The chain as a model would call it; returns y, x and the rows that this rank computed."""
    i = rank.index
    tp = rank.tp if layer.tp_size > 1 else None
    ids, _ = em.update_expert(layer.topk_ids[i], layer.table, rank.ep.rank, layer.ep_size, limits="unlimited")
    dispatched = em.dispatch(layer.x[i], ids, ep=rank.ep, tp=tp, num_experts=layer.num_slots, limits="unlimited")
    out = torch.zeros_like(dispatched.expand_x)
    here = layer.num_slots // layer.ep_size
    stops = dispatched.expert_token_nums.cumsum(0).tolist()
    inner = layer.experts.up.shape[1]
    mine = slice(rank.tp.rank * inner // layer.tp_size, (rank.tp.rank + 1) * inner // layer.tp_size)
    for local, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
        expert = int(layer.slot_to_expert[rank.ep.rank * here + local])
        rows = dispatched.expand_x[start:stop]
        inner_rows = torch.relu(rows @ layer.experts.up[expert, mine].T)
        out[start:stop] = inner_rows @ layer.experts.down[expert][:, mine].T
    y, _, x = em.combine_add_rms_norm(
        out,
        ids,
        dispatched,
        layer.scales[i],
        layer.residual[i][:, None],
        layer.gamma,
        ep=rank.ep,
        tp=tp,
        num_experts=layer.num_slots,
        shared_expert_x=layer.shared[i],
        norm_eps=NORM_EPS,
        limits="unlimited",
    )
    return y, x, stops[-1]


def demo_worlds(
    trace: Trace, identity: em.Placement, placement: em.Placement, layer: int, processes: int, seed: int
) -> Iterator[tuple[str, DemoLayer]]:
    """The published demo's world, then the trace's most unbalanced layer before and after planning."""
    tp = PAGE_TP if not processes or (processes >= 4 and processes % 2 == 0) else 1
    ep = processes // tp if processes else PAGE_EP
    generator = torch.Generator().manual_seed(seed)
    top_k = min(PAGE_TOP_K, ep)
    ids = torch.rand((ep * tp, PAGE_TOKENS, ep), generator=generator).argsort(dim=-1)[..., :top_k]
    page = default_placement(1, ep, ep)
    title = f"published demo's world: {ep} EP x {tp} TP ranks, {PAGE_TOKENS} tokens each, H {PAGE_HIDDEN}, K {top_k}"
    yield title, make_layer(page, 0, ids, tp, PAGE_HIDDEN, PAGE_INNER, seed)
    ids = _tokens(trace, layer, identity.num_ranks, seed)
    world = f"{trace.num_experts} experts, K {ids.shape[-1]}, {identity.num_ranks} ranks, layer {layer}"
    loaded = make_layer(identity, layer, ids, 1, TRACE_HIDDEN, TRACE_INNER, seed)
    yield f"{world}, default placement", loaded
    yield f"{world}, planned", with_placement(loaded, placement, layer)


def _tokens(trace: Trace, layer: int, ranks: int, seed: int) -> torch.Tensor:
    """int64 (ranks, tokens, K): recorded tokens of the layer where there are any, else drawn from its load."""
    rng = np.random.default_rng(seed)
    if trace.routing is not None:
        # With replacement, so that a trace of a few tokens will do as well.
        picked = rng.integers(0, len(trace.routing), (ranks, TRACE_TOKENS))
        return torch.from_numpy(trace.routing[picked, layer])
    top_k = min(DEFAULT_TOP_K, trace.num_experts)
    # Top-k of log-weights plus Gumbel noise draws distinct experts in proportion to their load.
    weight = np.log(trace.load[:, layer].sum(axis=0) + 1.0)
    noise = rng.gumbel(size=(ranks, TRACE_TOKENS, trace.num_experts))
    return torch.from_numpy(np.argsort(-(weight + noise), axis=-1)[..., :top_k].copy())


def num_processes() -> int:
    """Processes that torchrun started, 0 without it."""
    if not dist.is_torchelastic_launched():
        return 0
    if not dist.is_initialized():
        torch.set_num_threads(1)  # the processes share the cores
        dist.init_process_group("gloo")
    return dist.get_world_size()


def is_first_process() -> bool:
    """True without torchrun."""
    return not dist.is_initialized() or dist.get_rank() == 0


def run_world(ep_size: int, tp_size: int, fn: Callable[[Rank], Result]) -> list[Result]:
    """`fn` on every rank; the results of all ranks, in rank order, on every process."""
    processes = num_processes()
    if not processes:
        with local_world(ep_size, tp_size) as world:
            return world.run(fn)
    if processes != ep_size * tp_size:
        raise ConstraintError(
            "--nproc-per-node", processes, f"must be {ep_size * tp_size}", "start as many processes as ranks"
        )
    rank = process_world(ep_size, tp_size)
    results: list[Result | None] = [None] * processes
    try:
        dist.all_gather_object(results, fn(rank))
    finally:
        rank.close()
    return results  # pyright: ignore[reportReturnType]


def finish() -> None:
    """Leave the processes' group, so that torchrun ends without a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()
