"""Random worlds: one small `Spec` makes the inputs of every rank, so that any process can make them again from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from itertools import product
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.reference.combine import combine as reference_combine
from evenmoe.reference.combine import combine_add_rms_norm as reference_norm
from evenmoe.reference.dispatch import dispatch as reference_dispatch
from evenmoe.transport.world import Rank

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CONST_EXPERTS = ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Spec:
    """What a world is like; everything else follows from `seed`.

    Attributes:
        tp: 0, 1 or 2. shared_experts, shared_ranks: Sn and Sr as given, (1, 0) and (0, 0) for none.
        moe_ranks, experts_per_rank: ranks behind the shared ones, and L. virtual: zero, copy and const experts.
        sizes: "equal" (max_bs tokens on every rank), "unequal" (0…max_bs), "one" (a single token in the whole world).
        mask: "none", "tokens" (Bs,), "assignments" (Bs, K). hot: every token wants expert 0.
        values: "normal", or "special" with ±0, subnormals, the largest numbers, ±inf and NaN among them.
        elastic: "none", "whole" (a vector that says nobody is gone), "scaled" (some ranks are).
        gates: dispatch is given the weights of combine. factors: alphas of const experts are one number each.
        strided: every tensor is transposed in memory, with gaps and an offset.
        roomy: expert_out has more rows than dispatch made, and gamma is given per token.
    """

    seed: int = 0
    tp: int = 0
    shared_experts: int = 1
    shared_ranks: int = 0
    moe_ranks: int = 2
    experts_per_rank: int = 1
    virtual: tuple[int, int, int] = (0, 0, 0)
    top_k: int = 2
    hidden: int = 3
    dtype: str = "bfloat16"
    max_bs: int = 3
    sizes: str = "equal"
    mask: str = "none"
    hot: bool = False
    quant_mode: int = 0
    smooth: bool = False
    comm_quant_mode: int = 0
    nums_type: int = 1
    shared_x: str = "none"
    values: str = "normal"
    elastic: str = "none"
    gates: bool = False
    factors: bool = False
    strided: bool = False
    roomy: bool = False

    @property
    def ep(self) -> int:
        return self.shared_ranks + self.moe_ranks

    @property
    def ranks(self) -> int:
        return self.ep * max(self.tp, 1)


@st.composite
def specs(draw: st.DrawFn, ep: int | None = None, tp: int | None = None, elastic: bool = False) -> Spec:
    """Specs of 1 to 8 expert-parallel ranks, or of exactly `ep`; with ranks that are gone if `elastic`."""
    ep = draw(st.integers(2 if elastic else 1, 8)) if ep is None else ep
    tp = draw(st.sampled_from([0, 0, 1, 2])) if tp is None else tp
    if elastic:
        tp = min(tp, 1)
    pairs = [(e, e * r) for e, r in product(range(1, 5), range(1, 4)) if e * r < ep]
    shared_experts, shared_ranks = draw(st.sampled_from([(0, 0), (1, 0), *pairs]))
    moe_ranks = ep - shared_ranks
    experts_per_rank = 1 if tp == 2 else draw(st.integers(1, 3))
    virtual = draw(st.sampled_from([(0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 2), (2, 1, 2)]))
    mask = draw(st.sampled_from(["none", "tokens", "assignments"]))
    quant_mode = draw(st.sampled_from([0, 2]))
    return Spec(
        seed=draw(st.integers(0, 2**16)),
        tp=tp,
        shared_experts=shared_experts,
        shared_ranks=shared_ranks,
        moe_ranks=moe_ranks,
        experts_per_rank=experts_per_rank,
        virtual=virtual,
        top_k=draw(st.integers(1, min(6, moe_ranks * experts_per_rank + sum(virtual)))),
        hidden=draw(st.sampled_from([1, 3, 8, 17, 24])),
        dtype=draw(st.sampled_from(list(DTYPES))),
        max_bs=draw(st.sampled_from([1, 2, 3, 4, 5, 6, 0])),
        sizes=draw(st.sampled_from(["equal", "unequal", "one"])) if mask == "none" else "equal",
        mask=mask,
        hot=draw(st.booleans()),
        quant_mode=quant_mode,
        smooth=quant_mode == 2 and draw(st.booleans()),
        comm_quant_mode=0 if tp == 2 else draw(st.sampled_from([0, 2])),
        nums_type=draw(st.integers(0, 1)),
        shared_x=draw(st.sampled_from(["none", "flat", "cube"])) if shared_ranks == 0 else "none",
        values=draw(st.sampled_from(["normal", "special"])),
        elastic="scaled" if elastic else draw(st.sampled_from(["none", "none", "whole"])) if tp < 2 else "none",
        gates=draw(st.booleans()),
        factors=draw(st.booleans()),
        strided=draw(st.booleans()),
        roomy=draw(st.booleans()),
    )


class Case:
    """The inputs of every rank of one world, lists in rank order (EP-major); None for a rank that is gone."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.random = Random(spec.seed)
        self.torch_random = torch.Generator().manual_seed(spec.seed)
        self.dtype = DTYPES[spec.dtype]
        physical = spec.moe_ranks * spec.experts_per_rank
        self.elastic_info, self.present, self.physical = None, [True] * spec.ranks, physical
        if spec.elastic == "whole":
            self.elastic_info = torch.tensor([0] * (4 + 2 * spec.ep), dtype=torch.int32)
        if spec.elastic == "scaled":
            self._scale_down()
        self.top_k = min(spec.top_k, self.physical + sum(spec.virtual))
        self._make_sizes()
        self._make_routing()
        hidden, const = spec.hidden, spec.virtual[2]
        self.x = self._per_rank(lambda n: self._values(n, hidden))
        self.scales = self._factors(spec, physical) if spec.smooth else None
        self.weights = self._per_rank(lambda n: self._values(n, self.top_k, dtype=torch.float32))
        self.shared_x = None
        if spec.shared_x != "none":
            shape = (lambda n: (n, 1, hidden) if n % 2 else (n // 2, 2, hidden)) if spec.shared_x == "cube" else None
            self.shared_x = self._per_rank(
                lambda n: self._values(n, hidden) if shape is None else self._values(n, hidden).reshape(shape(n))
            )
        self.ori_x = self.x if spec.virtual[1] or const else None
        self.const = [self._values(const, hidden) if const else None for _ in range(3)]
        if const and spec.factors:
            self.const[:2] = [alphas[:, 0].contiguous() for alphas in self.const[:2]]
        self.gates = self.weights if spec.gates else None
        self.residual = self._per_rank(lambda n: self._values(n, hidden)[:, None])
        self.gamma = [self._values(1, hidden)[0]] * spec.ranks
        if spec.roomy:
            self.gamma = self._per_rank(lambda n: self._values(n, hidden)[:, None])
        self.norm_eps = self.random.choice([1e-6, 0.0, 0.3])

    @property
    def sizes(self) -> dict[str, Any]:
        """The keywords that all operators share, over ranks or the reference."""
        spec = self.spec
        return {
            "num_experts": spec.moe_ranks * spec.experts_per_rank,
            "shared_expert_num": spec.shared_experts,
            "shared_expert_rank_num": spec.shared_ranks,
            "global_bs": self.global_bs,
            **dict(zip(("zero_expert_num", "copy_expert_num", "const_expert_num"), spec.virtual, strict=True)),
        }

    def expert_out(self, index: int, rows: int) -> torch.Tensor:
        """What the experts of one rank make of their rows; any numbers, also behind the rows that count."""
        own = torch.Generator().manual_seed(self.spec.seed * 1000 + index)  # ranks may be threads
        return self._values(rows + (2 if self.spec.roomy else 0), self.spec.hidden, generator=own)

    def _scale_down(self) -> None:
        """Some ranks gone, the others under new numbers; a rank gets at most the experts that it had (§2.11)."""
        spec = self.spec
        shared = spec.shared_experts if spec.shared_ranks else 0
        left = self.random.randint(shared + 1, spec.ep)
        active_ranks = self.random.sample(range(spec.ep), left)
        shared_new = shared * self.random.randint(1, (left - 1) // shared) if shared else 0
        per_rank = self.random.randint(1, spec.experts_per_rank)
        if any(old < spec.shared_ranks for old in active_ranks[shared_new:]):
            per_rank = 1
        if spec.smooth:  # every expert needs its row of `scales`, of which there are as many as the world had experts
            keep = shared_new + min(left - shared_new, self.physical)
            active_ranks, left = active_ranks[:keep], keep
        self.physical = per_rank * (left - shared_new)
        new_rank = [active_ranks.index(old) if old in active_ranks else -1 for old in range(spec.ep)]
        old_rank = active_ranks + [-1] * (spec.ep - left)
        head = [1, left, shared_new, self.physical]
        self.elastic_info = torch.tensor(head + new_rank + old_rank, dtype=torch.int32)
        self.present = [old in active_ranks for old in range(spec.ep) for _ in range(max(spec.tp, 1))]

    def _make_sizes(self) -> None:
        spec, random = self.spec, self.random
        self.global_bs = random.choice([0, spec.max_bs * spec.ep])
        self.num_tokens = [spec.max_bs] * spec.ranks
        if spec.sizes == "unequal":
            self.num_tokens = [random.randint(0, spec.max_bs) for _ in range(spec.ranks)]
            self.global_bs = max(1, spec.max_bs) * spec.ep
        if spec.sizes == "one":
            self.num_tokens = [0] * spec.ranks
            self.num_tokens[random.choice([i for i, here in enumerate(self.present) if here])] = 1
            self.global_bs = spec.ep

    def _make_routing(self) -> None:
        """Distinct physical ids where assignments take part; virtual ids may repeat, and padding may hold anything."""
        spec, random = self.spec, self.random
        self.ids, self.masks = [], None if spec.mask == "none" else []
        for index, num_tokens in enumerate(self.num_tokens):
            num_ids = self.physical + sum(spec.virtual)
            rows = [random.sample(range(num_ids), self.top_k) for _ in range(num_tokens)]
            for row in rows:
                if spec.hot and 0 not in row:
                    row[random.randrange(self.top_k)] = 0
                if row[-1] >= self.physical:
                    row[0] = row[-1]
            active = [[True] * self.top_k for _ in rows]
            if self.masks is not None:
                if spec.mask == "tokens":
                    mask = [random.random() < 0.7 for _ in rows]
                    active = [[token < sum(mask)] * self.top_k for token in range(num_tokens)]
                else:
                    mask = active = [[random.random() < 0.6 for _ in row] for row in rows]
                shape = (num_tokens,) if spec.mask == "tokens" else (num_tokens, self.top_k)
                self.masks.append(torch.tensor(mask, dtype=torch.bool).reshape(shape) if self.present[index] else None)
            padded = (zip(row, on, strict=True) for row, on in zip(rows, active, strict=True))
            ids = [[i if on or random.random() < 0.5 else 0 for i, on in pairs] for pairs in padded]
            tensor = torch.tensor(ids, dtype=torch.int32).reshape(num_tokens, self.top_k)
            self.ids.append(tensor if self.present[index] else None)

    def _per_rank(self, make: Any) -> list[torch.Tensor | None]:
        made = [make(n) for n in self.num_tokens]
        return [tensor if here else None for tensor, here in zip(made, self.present, strict=True)]

    def _factors(self, spec: Spec, physical: int) -> torch.Tensor:
        shared = spec.shared_experts if spec.shared_ranks else 0
        return torch.rand((shared + physical, spec.hidden), generator=self.torch_random) - 0.3

    def _values(
        self, *shape: int, dtype: torch.dtype | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        generator, dtype = generator or self.torch_random, dtype or self.dtype
        values = torch.randn(shape, generator=generator).to(dtype)
        if self.spec.values == "special" and values.numel():
            info = torch.finfo(dtype)
            special = [0.0, -0.0, info.max, -info.max, math.inf, -math.inf, math.nan, info.tiny]
            # The specification leaves int8 blocks of nothing but float32 subnormals open (their quotients overflow).
            if dtype != torch.float32 or self.spec.comm_quant_mode == 0:
                special += [info.smallest_normal / 2, -info.smallest_normal / 64]
            chosen = torch.randint(len(special), shape, generator=generator)
            replaced = torch.rand(shape, generator=generator) < 0.06
            replaced |= torch.rand(shape[0], generator=generator)[:, None].expand(shape) < 0.05
            values = torch.where(replaced, torch.tensor(special).to(dtype)[chosen], values)
        return values


class Lent:
    """Copies of tensors for one call, overwritten once it has returned: nobody may read or hand them out later."""

    def __init__(self, case: Case, index: int) -> None:
        self._copy = strided if case.spec.strided else torch.clone
        self._index, self._copies = index, []

    def __call__(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        self._copies.append(self._copy(tensor))
        return self._copies[-1]

    def mine(self, per_rank: list[torch.Tensor | None] | None) -> torch.Tensor | None:
        return None if per_rank is None else self(per_rank[self._index])

    def take_back(self) -> None:
        for copy in self._copies:
            copy.zero_()


def run_rank(rank: Rank, case: Case) -> tuple | None:
    """The chain on one rank: (Dispatched, combine's y, the three of combine_add_rms_norm); None on one that is gone."""
    spec, i = case.spec, rank.index
    if not case.present[i]:
        return None
    lent = Lent(case, i)
    dispatched = em.dispatch(
        lent.mine(case.x),
        lent.mine(case.ids),
        scales=lent(case.scales),
        expert_scales=lent.mine(case.gates),
        quant_mode=spec.quant_mode,
        expert_token_nums_type=spec.nums_type,
        **_shared(rank, case, lent),
    )
    lent.take_back()
    rows = case.expert_out(i, len(dispatched.expand_x))
    lent, arguments, keywords = _combining(rank, case, rows, dispatched)
    y = em.combine(*arguments, **keywords)
    lent.take_back()
    lent, arguments, keywords = _combining(rank, case, rows, dispatched)
    norm = (lent.mine(case.residual), lent.mine(case.gamma))
    normed = em.combine_add_rms_norm(*arguments, *norm, norm_eps=case.norm_eps, **keywords)
    lent.take_back()
    return dispatched, y, normed


def _shared(rank: Rank, case: Case, lent: Lent) -> dict[str, Any]:
    return {
        "ep": rank.ep,
        "tp": rank.tp if case.spec.tp else None,
        "x_active_mask": lent.mine(case.masks),
        "elastic_info": lent(case.elastic_info),
        "check_values": case.spec.seed % 3 > 0,
        **case.sizes,
    }


def _combining(rank: Rank, case: Case, rows: torch.Tensor, dispatched: em.Dispatched) -> tuple[Lent, tuple, dict]:
    lent = Lent(case, rank.index)
    passed = replace(dispatched, **{name: lent(tensor) for name, tensor in outputs_of(dispatched).items()})
    keywords = {
        "shared_expert_x": lent.mine(case.shared_x),
        "ori_x": lent.mine(case.ori_x),
        **dict(zip(CONST_EXPERTS, map(lent, case.const), strict=True)),
        "comm_quant_mode": case.spec.comm_quant_mode,
        **_shared(rank, case, lent),
    }
    if case.spec.seed % 2:
        del keywords["num_experts"]  # the dispatch knows it
    return lent, (lent(rows), lent.mine(case.ids), passed, lent.mine(case.weights)), keywords


def run_reference(case: Case) -> list[tuple | None]:
    """The same over the whole world by `evenmoe.reference`."""
    spec = case.spec
    shared = {
        "tp_world_size": spec.tp,
        "x_active_mask": case.masks,
        "elastic_info": case.elastic_info,
        **case.sizes,
    }
    dispatched = reference_dispatch(
        case.x,
        case.ids,
        scales=case.scales,
        expert_scales=case.gates,
        quant_mode=spec.quant_mode,
        expert_token_nums_type=spec.nums_type,
        **shared,
    )
    rows = [None if d is None else case.expert_out(i, len(d.expand_x)) for i, d in enumerate(dispatched)]
    shared |= {
        "shared_expert_x": case.shared_x,
        "ori_x": case.ori_x,
        **dict(zip(CONST_EXPERTS, case.const, strict=True)),
        "comm_quant_mode": spec.comm_quant_mode,
    }
    y = reference_combine(rows, case.ids, dispatched, case.weights, **shared)
    normed = reference_norm(
        rows, case.ids, dispatched, case.weights, case.residual, case.gamma, norm_eps=case.norm_eps, **shared
    )
    return [None if d is None else (d, y[i], normed[i]) for i, d in enumerate(dispatched)]


def assert_equal_worlds(results: list[tuple | None], expected: list[tuple | None]) -> None:
    """Every output of every rank, bit for bit."""
    assert len(results) == len(expected)
    for index, (got, want) in enumerate(zip(results, expected, strict=True)):
        assert (got is None) == (want is None), index
        if got is None:
            continue
        theirs = outputs_of(want[0])
        for name, ours in outputs_of(got[0]).items():
            assert_same_bits(ours, theirs[name], f"dispatch's {name} on rank {index}")
        assert_same_bits(got[1], want[1], f"combine's y on rank {index}")
        for name, ours, theirs in zip(("y", "rstd", "x"), got[2], want[2], strict=True):
            assert_same_bits(ours, theirs, f"combine_add_rms_norm's {name} on rank {index}")


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Equal dtype, shape and bits; a NaN equals any NaN, since IEEE 754 leaves its payload open."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), what
    if ours.dtype.is_floating_point:
        nan = ours.isnan()
        assert torch.equal(nan, theirs.isnan()), what
        as_bits = _AS_INTEGERS[ours.element_size()]
        ours, theirs = (tensor.masked_fill(nan, 0.0).contiguous().view(as_bits) for tensor in (ours, theirs))
    different = (ours != theirs).nonzero()
    assert not len(different), f"{what}: {len(different)} of {ours.numel()} differ, first at {different[0].tolist()}"


def outputs_of(dispatched: em.Dispatched) -> dict[str, torch.Tensor]:
    """The seven outputs of the operator by name."""
    values = {field.name: getattr(dispatched, field.name) for field in fields(dispatched) if field.name != "number"}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values transposed in memory, every other element, one element behind the start of the storage."""
    base = torch.zeros([2 * n + 1 for n in reversed(tensor.shape)], dtype=tensor.dtype)
    view = base.permute(*reversed(range(tensor.dim())))[(slice(1, None, 2),) * tensor.dim()]
    view.copy_(tensor)
    return view
