"""What the table of operators is written in: an argument, an operator in all its versions, a C function of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["tensor", "output", "str", "int", "float", "bool"]


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of an operator.

    Attributes:
        name: as the specification has it, in snake_case.
        kind: a tensor that is read, a tensor that is written, or the type of an attribute.
        required: whether a call must give it; an output is always given in C, and never anywhere else.
        default: of an attribute that need not be given; None for tensors.
        since: the first version of the C function that has it, None where no C function does.
        c_name: its name in the C functions.
        agrees: what must be equal on all ranks, as an error names it.
    """

    name: str
    kind: Kind
    required: bool = False
    default: str | float | None = None
    since: int | None = 1
    c_name: str = ""
    agrees: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.c_name:
            camel = re.sub(r"_(\w)", lambda match: match[1].upper(), self.name)
            optional = self.kind == "tensor" and not self.required
            object.__setattr__(self, "c_name", f"{camel}Optional" if optional else camel)


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator in all its versions.

    Attributes:
        name: it is registered as `torch.ops.evenmoe.<name>`.
        arguments: tensors, attributes and outputs, each in the operator's order.
        versions: the C functions that compute it, {name behind `aclnn`: version}.
    """

    name: str
    arguments: tuple[Argument, ...]
    versions: Mapping[str, int]

    def of_kind(self, *kinds: Kind) -> tuple[Argument, ...]:
        """The arguments of these kinds, in order."""
        return tuple(argument for argument in self.arguments if argument.kind in kinds)

    def published(self, version: int) -> tuple[Argument, ...]:
        """The arguments that the operator has in this version, in order."""
        return tuple(a for a in self.arguments if a.since is not None and a.since <= version)


@dataclass(frozen=True, slots=True)
class Signature:
    """One C function of the two-stage interface.

    Attributes:
        operator: the registered operator that computes it.
        arguments: in C order, by name, without workspaceSize and executor.
    """

    operator: str
    arguments: Mapping[str, Argument]

    def names(self, *kinds: Kind) -> list[str]:
        """The arguments of these kinds, in order.

        >>> from evenmoe.contract.operators import SIGNATURES
        >>> SIGNATURES["MoeEPLBUpdateExpert"].names("tensor", "int", "output")
        ['expert_ids', 'eplb_table', 'local_rank_id', 'world_size', 'balance_mode', 'balanced_expert_ids']
        """
        return [name for name, argument in self.arguments.items() if argument.kind in kinds]


def tensor(name: str, *agrees: str) -> Argument:
    return Argument(name, "tensor", required=True, agrees=agrees)


def optional(name: str, *agrees: str, since: int | None = 1) -> Argument:
    return Argument(name, "tensor", since=since, agrees=agrees)


def integer(name: str, default: int | None = 0, *agrees: str, since: int = 1) -> Argument:
    return Argument(name, "int", default is None, default, since, agrees=agrees)


def output(name: str, since: int | None = 1, c_name: str = "") -> Argument:
    return Argument(name, "output", since=since, c_name=c_name)
