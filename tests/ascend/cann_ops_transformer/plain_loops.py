"""ElasticBuffer in plain loops over the whole world, and random worlds for it; it shares nothing with the package."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st

from evenmoe.ascend.cann_ops_transformer import ElasticBuffer

NAMES = ("dst_buffer_slot_idx", "recv_src_metadata", "num_recv_tokens_per_rank", "num_recv_tokens_per_expert")


@dataclass(frozen=True)
class World:
    """What the ranks of a world call; everything else follows from `seed`.

    Attributes:
        weighted: topk_weights are given. masked: some ids are negative. repeated: ids may repeat within a token.
        hot: every entry asks for expert 0. sync: do_cpu_sync.
    """

    seed: int
    ranks: int
    experts_per_rank: int
    top_k: int
    most: int
    hidden: int
    dtype: torch.dtype
    weighted: bool
    masked: bool
    repeated: bool
    hot: bool
    sync: bool

    @property
    def num_experts(self) -> int:
        return self.ranks * self.experts_per_rank

    def inputs(self, rank: int) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """x (or tokens and scales), topk_idx, topk_weights."""
        random, own = Random(f"{self.seed} {rank}"), torch.Generator().manual_seed(self.seed * 100 + rank)
        tokens = random.randint(1, self.most)
        experts = range(self.num_experts)
        ids = []
        for _ in range(tokens):
            row = random.choices(experts, k=self.top_k) if self.repeated else random.sample(experts, self.top_k)
            row = [0] * self.top_k if self.hot else row
            ids.append([-1 if self.masked and random.random() < 0.4 else expert for expert in row])
        x: Any = torch.randn((tokens, self.hidden), generator=own).to(self.dtype)
        if self.dtype == torch.float8_e4m3fn:
            x = x, torch.rand((tokens, -(-self.hidden // 128)), generator=own)
        if self.dtype == torch.float8_e5m2:
            x = x, torch.randint(256, (tokens, -(-self.hidden // 64) * 2), generator=own).to(torch.uint8)
        weights = torch.rand((tokens, self.top_k), generator=own) if self.weighted else None
        return x, torch.tensor(ids, dtype=torch.int32), weights

    def outputs(self, rank: int, rows: int) -> torch.Tensor:
        """What the experts of a rank make of their rows."""
        own = torch.Generator().manual_seed(self.seed * 100 + rank + 50)
        return torch.randn((rows, self.hidden), generator=own).to(torch.bfloat16)


@st.composite
def worlds(draw: st.DrawFn, ranks: int | None = None) -> World:
    ranks = draw(st.integers(2, 5)) if ranks is None else ranks
    experts_per_rank = draw(st.integers(1, 4))
    repeated = draw(st.booleans())
    # Entries of one token on one rank need the room of as many rows: min(K, L) of them.
    top_k = draw(st.integers(1, min(4, experts_per_rank if repeated else ranks * experts_per_rank)))
    return World(
        seed=draw(st.integers(0, 2**16)),
        ranks=ranks,
        experts_per_rank=experts_per_rank,
        top_k=top_k,
        most=draw(st.sampled_from([1, 2, 3, 7])),
        hidden=draw(st.sampled_from([1, 3, 129])),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])),
        weighted=draw(st.booleans()),
        masked=draw(st.booleans()),
        repeated=repeated,
        hot=repeated and draw(st.booleans()),
        sync=draw(st.booleans()),
    )


def plain(world: World) -> list[dict[str, Any]]:
    """What every rank must find: {name: value}."""
    given = [world.inputs(rank) for rank in range(world.ranks)]
    local = world.experts_per_rank
    slots: list[list[list[int]]] = []
    arrived: list[list[list[tuple[int, int]]]] = [[[] for _ in range(world.ranks)] for _ in range(world.ranks)]
    for source, (_, ids, _) in enumerate(given):
        slots.append([[-1] * world.top_k for _ in ids])
        for token, row in enumerate(ids.tolist()):
            for k, expert in enumerate(row):
                if expert < 0:
                    continue
                there = arrived[expert // local][source]
                if (source, token) not in there:
                    there.append((source, token))
                slots[source][token][k] = there.index((source, token))
    results = []
    for rank in range(world.ranks):
        found = []
        for expert in range(rank * local, (rank + 1) * local):
            for source in range(world.ranks):
                for slot, (_, token) in enumerate(arrived[rank][source]):
                    ids = given[source][1][token].tolist()
                    found += [(source, token, k, slot, expert) for k, chosen in enumerate(ids) if chosen == expert]
        room = len(found) if world.sync else world.ranks * world.most * min(world.top_k, local)
        results.append(
            {
                "dst_buffer_slot_idx": torch.tensor(slots[rank], dtype=torch.int32),
                "recv_src_metadata": _filled((room, 4), torch.int32, [torch.tensor(row[:4]) for row in found]),
                "num_recv_tokens_per_rank": torch.tensor([len(a) for a in arrived[rank]], dtype=torch.int32),
                "num_recv_tokens_per_expert": torch.tensor(
                    [sum(row[4] == rank * local + e for row in found) for e in range(local)]
                ),
                "rows": _rows(world, [given[row[0]][0] for row in found], [row[1] for row in found], room),
                "weights": _filled((room,), torch.float32, [given[r[0]][2][r[1], r[2]] for r in found])
                if world.weighted
                else None,
                "found": found,
            }
        )
    for source, (_, ids, weights) in enumerate(given):
        total = torch.zeros((len(ids), world.hidden))
        for token, row in enumerate(ids.tolist()):
            for k, expert in enumerate(row):
                if expert >= 0:
                    there = results[expert // local]
                    at = [found[:3] for found in there["found"]].index((source, token, k))
                    out = world.outputs(expert // local, len(there["recv_src_metadata"]))
                    total[token] = total[token] + out[at].float()
        results[source]["y"] = total.to(torch.bfloat16)
        results[source]["returned"] = None if weights is None else torch.where(ids < 0, 0.0, weights)
    return results


def _filled(shape: tuple[int, ...], dtype: torch.dtype, rows: list[torch.Tensor]) -> torch.Tensor:
    values = torch.zeros(shape, dtype=dtype)
    for i, row in enumerate(rows):
        values[i] = row
    return values


def _rows(world: World, xs: list[Any], tokens: list[int], room: int) -> Any:
    if isinstance(world.inputs(0)[0], tuple):
        return tuple(_rows_of([x[part] for x in xs], tokens, room, world.inputs(0)[0][part]) for part in (0, 1))
    return _rows_of(xs, tokens, room, world.inputs(0)[0])


def _rows_of(xs: list[torch.Tensor], tokens: list[int], room: int, like: torch.Tensor) -> torch.Tensor:
    values = torch.zeros((room, like.shape[1] * like.element_size()), dtype=torch.uint8)
    for i, (x, token) in enumerate(zip(xs, tokens, strict=True)):
        values[i] = x[token : token + 1].clone().view(torch.uint8).flatten()
    return comparable(values.view(like.dtype))


def comparable(rows: torch.Tensor) -> torch.Tensor:
    """Float8 as bytes, which can be compared and pickled."""
    return rows.contiguous().view(torch.uint8) if "float8" in str(rows.dtype) else rows


def run(rank: Any, world: World) -> dict[str, Any]:
    """The same on a real rank: dispatch, dispatch again by the handle, combine."""
    buffer = ElasticBuffer(rank.ep, num_max_tokens_per_rank=world.most, hidden=world.hidden, num_topk=world.top_k)
    x, ids, weights = world.inputs(rank.ep.rank)
    given = ids.clone()
    rows, nothing, received, handle = buffer.dispatch(
        x, topk_idx=given, topk_weights=weights, num_experts=world.num_experts, do_cpu_sync=world.sync
    )
    given.fill_(0)  # the handle has its own
    assert nothing is None
    again, _, no_weights, cached = buffer.dispatch(x, handle=handle)
    assert no_weights is None
    for name in NAMES:
        assert torch.equal(getattr(cached, name), getattr(handle, name)), name
    first, second = (part if isinstance(part, tuple) else (part,) for part in (rows, again))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(comparable(one), comparable(other))
    rows = tuple(map(comparable, rows)) if isinstance(rows, tuple) else comparable(rows)
    result = {name: getattr(handle, name) for name in NAMES} | {"rows": rows, "weights": received}
    assert handle.num_recv_tokens == int(handle.num_recv_tokens_per_rank.sum())
    if world.sync:  # a rank without rows is refused by the host code, so all combine what has room
        handle = buffer.dispatch(x, topk_idx=ids, num_experts=world.num_experts, do_cpu_sync=False)[3]
        if received is not None:
            room = torch.zeros(len(handle.recv_src_metadata))
            room[: len(received)] = received
            received = room
    out = world.outputs(rank.ep.rank, len(result["recv_src_metadata"]))
    padded = torch.zeros((len(handle.recv_src_metadata), world.hidden), dtype=torch.bfloat16)
    padded[: len(out)] = out
    y, returned = buffer.combine(padded, handle, topk_weights=received)
    buffer.barrier()
    buffer.destroy()
    return result | {"y": y, "returned": returned}
