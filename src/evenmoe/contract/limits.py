"""`Limits`: the bounds that come from a chip, apart from the rules that come from the operators themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from evenmoe.contract.tensor_spec import join_or
from evenmoe.errors import ConstraintError, UnsupportedTypeError


class Range(NamedTuple):
    """Whole numbers low…high, both included, every `step` of them; high None is no upper bound.

    >>> str(Range(16, 256, 16)), Range(16, 256, 16).admits(24)
    ('16 to 256 in steps of 16', False)
    """

    low: int
    high: int | None = None
    step: int = 1

    def admits(self, value: int) -> bool:
        return self.low <= value and (self.high is None or value <= self.high) and (value - self.low) % self.step == 0

    def __str__(self) -> str:
        bounds = f"at least {self.low}" if self.high is None else f"{self.low} to {self.high}"
        return bounds if self.step == 1 else f"{bounds} in steps of {self.step}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a chip, or the lack of one, lets an operator take. Make your own with `dataclasses.replace`.

    Attributes:
        name: what `limits=` calls it.
        tokens, hidden, top_k: Bs, H and K of every operator.
        logical_experts: E, rows of the EPLB table.
        update_world_size: world_size of update expert under balance mode 0.
        table_columns_by_token: F, columns of the EPLB table, under balance mode 1.
        table_columns_within_world: whether F must be at most world_size + 1 under balance mode 0. A wider table is
            correct, but no rank ever reaches its last replicas (specification §1.4).
        old_logical_experts, old_update_world_size: the same for the older operator, eplb_update_expert.
        ep_world_size: ranks of the expert-parallel group.
        physical_experts: M, MoE expert instances over all ranks.
        experts_times_ranks: L·ep, MoE experts of one rank times ranks.
        shared_experts: Sn.
        tp_world_size: tp, which means tensor-parallel peers when it is 2.
        comm_algs: the algorithms that comm_alg names. They differ in what they take, not in what they compute.
        full_mesh_tokens, full_mesh_top_k: Bs and K when comm_alg is "fullmesh_v2".
        full_mesh_alone: whether "fullmesh_v2" excludes elastic worlds, virtual experts, (Bs, K) masks and unequal Bs.
        hierarchy_ranks, hierarchy_experts, hierarchy_tokens, hierarchy_hidden: ep, M, Bs and H when comm_alg is
            "hierarchy".
        v1_ep_world_size, v1_physical_experts, v1_hidden, v1_top_k: ep, M, H and K of the first versions of dispatch and
            combine. Where ep goes in steps, it also has to divide 256 or be a multiple of 144.
        token_dtypes: dtypes of x, and of expand_x in combine.
        rms_norm_dtypes: dtypes of expand_x in combine_add_rms_norm.
        const_alpha_dims: dimensions of const_expert_alpha_1 and _2 that combine takes (specification §3.4).
        tp_arguments_reserved: whether nobody looks at what is for peers when there are none: tp_recv_counts,
            tp_send_counts, and a group_tp that is a null pointer. Otherwise they are as strict as with peers.
        lengths_times_tp: whether combine asks for A·tp rows and ep·L·tp counts to the letter, so for nothing at all
            when tp is 0 (specification §3.2). Otherwise for A and ep·L of them even then.
        assist_info_per_row: int32 numbers that dispatch asks for in assist_info_for_combine, per row of A.
        expand_scales: what dispatch does with expert_scales. "unwritten": it ignores them. "required": it checks them,
            and writes each row's weight to expand_scales, which must have room. "optional": likewise, where there is
            room.

    >>> ATLAS_A3.tokens, RELAXED.tokens.low, UNLIMITED.tokens.high
    (Range(low=1, high=512, step=1), 0, None)
    """

    name: str
    tokens: Range
    hidden: Range
    top_k: Range
    logical_experts: Range
    update_world_size: Range
    table_columns_by_token: Range
    table_columns_within_world: bool
    old_logical_experts: Range
    old_update_world_size: Range
    ep_world_size: Range
    physical_experts: Range
    experts_times_ranks: Range
    shared_experts: Range
    tp_world_size: Range
    comm_algs: tuple[str, ...]
    full_mesh_tokens: Range
    full_mesh_top_k: Range
    full_mesh_alone: bool
    hierarchy_ranks: Range
    hierarchy_experts: Range
    hierarchy_tokens: Range
    hierarchy_hidden: Range
    v1_ep_world_size: Range
    v1_physical_experts: Range
    v1_hidden: Range
    v1_top_k: Range
    token_dtypes: tuple[str, ...]
    rms_norm_dtypes: tuple[str, ...]
    const_alpha_dims: tuple[int, ...]
    tp_arguments_reserved: bool
    lengths_times_tp: bool
    assist_info_per_row: int
    expand_scales: Literal["unwritten", "optional", "required"]

    def check(self, quantity: str, value: int, argument: str, shown: object, rule: str, use: str) -> None:
        """Compares `value` with the field `quantity`; `{}` in `rule` and in `use` stands for the range.

        Raises:
            ConstraintError: outside the range. Where other limits take the value, the message names them.

        >>> ATLAS_A3.check("top_k", 17, "expert_ids", 17, "must have {} columns", "use {}")
        Traceback (most recent call last):
        evenmoe.errors.ConstraintError: `expert_ids` is 17: it must have 1 to 16 columns; use 1 to 16, or lift this \
bound of atlas-a3 with limits="unlimited".
        """
        bound: Range = getattr(self, quantity)
        if not bound.admits(value):
            lifting = (other.name for other in _WIDER if getattr(other, quantity).admits(value))
            fix = use.format(bound) + self._or_lift(next(lifting, None))
            raise ConstraintError(argument, shown, rule.format(bound), fix)

    def check_dtype(self, quantity: str, dtype: str, argument: str, shown: object) -> None:
        """Compares `dtype` with the field `quantity`, a tuple of dtypes.

        Raises:
            UnsupportedTypeError: not one of them. Where other limits take the dtype, the message names them.
        """
        supported: tuple[str, ...] = getattr(self, quantity)
        if dtype not in supported:
            lifting = (other.name for other in _WIDER if dtype in getattr(other, quantity))
            fix = f"use {join_or(supported)}" + self._or_lift(next(lifting, None))
            raise UnsupportedTypeError(argument, shown, f"must be {join_or(supported)}", fix)

    def _or_lift(self, other: str | None) -> str:
        return f', or lift this bound of {self.name} with limits="{other}"' if other else ""


ATLAS_A3_2025 = Limits(
    name="atlas-a3-2025",
    tokens=Range(1, 512),
    hidden=Range(1024, 8192),
    top_k=Range(1, 16),
    logical_experts=Range(1, 1024),
    update_world_size=Range(2, 768),
    table_columns_by_token=Range(2, 769),
    table_columns_within_world=True,
    old_logical_experts=Range(1, 512),
    old_update_world_size=Range(2, 384),
    ep_world_size=Range(2, 768),
    physical_experts=Range(1, 1024),
    experts_times_ranks=Range(1, 2048),
    shared_experts=Range(0, 4),
    tp_world_size=Range(0, 2),
    comm_algs=("", "fullmesh_v1", "fullmesh_v2"),
    full_mesh_tokens=Range(0, 256),
    full_mesh_top_k=Range(0, 12),
    full_mesh_alone=True,
    hierarchy_ranks=Range(16, 256, 16),
    hierarchy_experts=Range(1, 512),
    hierarchy_tokens=Range(1, 256),
    hierarchy_hidden=Range(32, 7168, 32),
    v1_ep_world_size=Range(8, 288, 8),
    v1_physical_experts=Range(1, 512),
    v1_hidden=Range(7168, 7168),
    v1_top_k=Range(1, 8),
    token_dtypes=("bfloat16", "float16"),
    rms_norm_dtypes=("bfloat16",),
    const_alpha_dims=(2,),
    tp_arguments_reserved=False,
    lengths_times_tp=True,
    assist_info_per_row=3,
    expand_scales="unwritten",
)
"""Atlas A3 (Ascend 910_93), exactly as its tiling of December 2025 decides (specification §1.6, §2.2, §3.2, §4)."""

ATLAS_A3_2026 = replace(
    ATLAS_A3_2025,
    name="atlas-a3-2026",
    tp_world_size=Range(0, 1),
    comm_algs=(*ATLAS_A3_2025.comm_algs, "hierarchy"),
    full_mesh_alone=False,
    tp_arguments_reserved=True,
    lengths_times_tp=False,
    assist_info_per_row=128,
    expand_scales="required",
)
"""The same chip as the tiling of July 2026 decides, which has no tensor-parallel peers (specification §2.16)."""

ATLAS_A3 = replace(
    ATLAS_A3_2026,
    name="atlas-a3",
    tp_world_size=ATLAS_A3_2025.tp_world_size,
    const_alpha_dims=(1, 2),
    lengths_times_tp=True,
    assist_info_per_row=3,
    expand_scales="optional",
)
"""The same chip, whatever its release: what either of the two takes, and the one dimension of November 2025 (§3.4)."""

RELAXED = replace(
    ATLAS_A3,
    name="relaxed",
    tokens=Range(0, 512),
    hidden=Range(1, 8192),
    update_world_size=Range(1, 768),
    old_update_world_size=Range(1, 384),
    ep_world_size=Range(1, 768),
    hierarchy_ranks=Range(1, 256),
    hierarchy_tokens=Range(0, 256),
    hierarchy_hidden=Range(1, 7168),
    v1_ep_world_size=Range(1, 288),
    v1_hidden=Range(1, 7168),
    token_dtypes=("bfloat16", "float16", "float32"),
    rms_norm_dtypes=("bfloat16", "float16", "float32"),
    lengths_times_tp=False,
)
"""The chip's upper bounds without its lower ones, so that a world of one rank and tiny sizes runs; float32 beside."""

UNLIMITED = replace(
    RELAXED,
    name="unlimited",
    tokens=Range(0),
    hidden=Range(1),
    top_k=Range(1),
    logical_experts=Range(1),
    update_world_size=Range(1),
    table_columns_by_token=Range(2),
    table_columns_within_world=False,
    old_logical_experts=Range(1),
    old_update_world_size=Range(1),
    ep_world_size=Range(1),
    physical_experts=Range(1),
    experts_times_ranks=Range(1),
    shared_experts=Range(0),
    full_mesh_tokens=Range(0),
    full_mesh_top_k=Range(0),
    hierarchy_ranks=Range(1),
    hierarchy_experts=Range(1),
    hierarchy_tokens=Range(0),
    hierarchy_hidden=Range(1),
    v1_ep_world_size=Range(1),
    v1_physical_experts=Range(1),
    v1_hidden=Range(1),
    v1_top_k=Range(1),
)
"""No size bound at all: only what a correct result needs."""


_WIDER = (ATLAS_A3, RELAXED, UNLIMITED)
_KNOWN = {known.name: known for known in (ATLAS_A3, ATLAS_A3_2025, ATLAS_A3_2026, RELAXED, UNLIMITED)}


def resolve_limits(limits: Limits | str | None) -> Limits:
    """The limits that a name stands for; None is "unlimited" too.

    The names are "atlas-a3", "atlas-a3-2025", "atlas-a3-2026", "relaxed" and "unlimited".

    Raises:
        ConstraintError: another name.

    >>> resolve_limits("relaxed") is RELAXED, resolve_limits(None) is UNLIMITED
    (True, True)
    """
    if isinstance(limits, Limits):
        return limits
    if limits is None:
        return UNLIMITED
    if isinstance(limits, str) and limits in _KNOWN:
        return _KNOWN[limits]
    fix = 'use "relaxed", its new name' if limits == "laptop" else "use one of these names"
    names = ", ".join(f'"{name}"' for name in _KNOWN)
    raise ConstraintError("limits", repr(limits), f"must be {names} or a Limits", fix)


def chip_limits(name: str) -> Limits:
    """The limits of a name that stands for a chip: "atlas-a3", "atlas-a3-2025" or "atlas-a3-2026".

    Raises:
        ConstraintError: another name.

    >>> chip_limits("atlas-a3-2026") is ATLAS_A3_2026
    True
    """
    names = [limits.name for limits in (ATLAS_A3, ATLAS_A3_2025, ATLAS_A3_2026)]
    if name not in names:
        rule = "must be " + join_or(tuple(f'"{known}"' for known in names))
        raise ConstraintError("limits", repr(name), rule, "use one of these names, or evenmoe's own functions")
    return _KNOWN[name]
