"""`Limits`: the bounds that come from a chip, apart from the rules that come from the operators themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from evenmoe.contract.tensor_spec import join_or
from evenmoe.errors import ConstraintError, UnsupportedTypeError


class Range(NamedTuple):
    """Whole numbers low…high, both included; high None is no upper bound."""

    low: int
    high: int | None = None

    def admits(self, value: int) -> bool:
        return self.low <= value and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        return f"at least {self.low}" if self.high is None else f"{self.low} to {self.high}"


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
        full_mesh_tokens, full_mesh_top_k: Bs and K when comm_alg is "fullmesh_v2".
        token_dtypes: dtypes of x, and of expand_x in combine.
        rms_norm_dtypes: dtypes of expand_x in combine_add_rms_norm.
        tp_send_counts_needed: whether combine takes tp_send_counts=None when tp < 2. The chip does not.
        lengths_times_tp: whether combine asks for A·tp rows and ep·L·tp counts to the letter, so for nothing at all
            when tp is 0 (specification §3.2). Otherwise for A and ep·L of them even then.

    >>> ATLAS_A3.tokens, RELAXED.tokens, UNLIMITED.tokens
    (Range(low=1, high=512), Range(low=0, high=512), Range(low=0, high=None))
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
    full_mesh_tokens: Range
    full_mesh_top_k: Range
    token_dtypes: tuple[str, ...]
    rms_norm_dtypes: tuple[str, ...]
    tp_send_counts_needed: bool
    lengths_times_tp: bool

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
            lifting = (other.name for other in (RELAXED, UNLIMITED) if getattr(other, quantity).admits(value))
            fix = use.format(bound) + self._or_lift(next(lifting, None))
            raise ConstraintError(argument, shown, rule.format(bound), fix)

    def check_dtype(self, quantity: str, dtype: str, argument: str, shown: object) -> None:
        """Compares `dtype` with the field `quantity`, a tuple of dtypes.

        Raises:
            UnsupportedTypeError: not one of them. Where other limits take the dtype, the message names them.
        """
        supported: tuple[str, ...] = getattr(self, quantity)
        if dtype not in supported:
            lifting = (other.name for other in (RELAXED, UNLIMITED) if dtype in getattr(other, quantity))
            fix = f"use {join_or(supported)}" + self._or_lift(next(lifting, None))
            raise UnsupportedTypeError(argument, shown, f"must be {join_or(supported)}", fix)

    def _or_lift(self, other: str | None) -> str:
        return f', or lift this bound of {self.name} with limits="{other}"' if other else ""


ATLAS_A3 = Limits(
    name="atlas-a3",
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
    full_mesh_tokens=Range(0, 256),
    full_mesh_top_k=Range(0, 12),
    token_dtypes=("bfloat16", "float16"),
    rms_norm_dtypes=("bfloat16",),
    tp_send_counts_needed=True,
    lengths_times_tp=True,
)
"""Atlas A3 (Ascend 910_93), exactly as its tiling decides (specification §1.6, §2.2, §3.2, §4)."""

RELAXED = replace(
    ATLAS_A3,
    name="relaxed",
    tokens=Range(0, 512),
    hidden=Range(1, 8192),
    update_world_size=Range(1, 768),
    old_update_world_size=Range(1, 384),
    ep_world_size=Range(1, 768),
    token_dtypes=("bfloat16", "float16", "float32"),
    rms_norm_dtypes=("bfloat16", "float16", "float32"),
    tp_send_counts_needed=False,
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
)
"""No size bound at all: only what a correct result needs."""


def resolve_limits(limits: Limits | str | None) -> Limits:
    """The limits that a name stands for: "atlas-a3", "relaxed", "unlimited" or None, which is "unlimited" too.

    Raises:
        ConstraintError: another name.

    >>> resolve_limits("relaxed") is RELAXED, resolve_limits(None) is UNLIMITED
    (True, True)
    """
    if isinstance(limits, Limits):
        return limits
    if limits is None:
        return UNLIMITED
    for known in (ATLAS_A3, RELAXED, UNLIMITED):
        if limits == known.name:
            return known
    fix = 'use "relaxed", its new name' if limits == "laptop" else "use one of these three names"
    raise ConstraintError("limits", repr(limits), 'must be "atlas-a3", "relaxed", "unlimited" or a Limits', fix)
