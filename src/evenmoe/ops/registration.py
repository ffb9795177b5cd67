"""Operators known to torch: one listing of their arguments makes the schema, the call and the fake kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any

import torch

from evenmoe.errors import ConstraintError, EvenmoeError, UnsupportedTypeError

Outputs = torch.Tensor | tuple[torch.Tensor, ...]
Implementation = Callable[[dict[str, Any]], Outputs]

#: Attributes that several operators share, {name: schema type}, in the operators' order (§2.1, §3.1).
GROUPS = {
    "group_ep": "str",
    "ep_world_size": "int",
    "ep_rank_id": "int",
    "moe_expert_num": "int",
    "group_tp": "str",
    "tp_world_size": "int",
    "tp_rank_id": "int",
}
VIRTUAL = {"zero_expert_num": "int", "copy_expert_num": "int", "const_expert_num": "int"}
CHECKS = {"check_values": "bool", "limits": "str"}

_kinds: dict[str, dict[str, str]] = {}  # operator -> {argument: schema type}


def register(
    name: str,
    required: Sequence[str],
    optional: Sequence[str],
    attributes: Mapping[str, str],
    outputs: int,
    run: Implementation,
    fake: Implementation,
) -> None:
    """Register `torch.ops.evenmoe.<name>`, whose implementation gets all its arguments in one dict.

    Args:
        required, optional: names of the tensors, in the operator's order.
        attributes: {name: schema type}, in the operator's order, keyword-only.
        outputs: number of tensors returned.
        run: the operator. Its outputs never alias its inputs.
        fake: the same for fake tensors: outputs of the right shapes and dtypes, without values.
    """
    tensors = (*required, *optional)
    _kinds[name] = {**dict.fromkeys(tensors, "Tensor"), **attributes}
    # Even a required tensor may be None for torch: the contract's check then says which is missing, with its status.
    # And no argument has a default: torch leaves out of the call what equals its default, and the dict would lack it.
    arguments = [f"Tensor? {name}" for name in tensors]
    keywords = [f"{kind} {name}" for name, kind in attributes.items()]
    returns = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    schema = f"({', '.join([*arguments, '*', *keywords])}) -> {returns}"

    def collecting(implementation: Implementation) -> Callable[..., Outputs]:
        def call(*values: torch.Tensor | None, **given: Any) -> Outputs:
            return implementation(dict(zip(tensors, values, strict=True)) | given)

        return call

    operator = torch.library.custom_op(f"evenmoe::{name}", collecting(run), mutates_args=(), schema=schema)
    operator.register_fake(collecting(fake))


def of_right_types(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the registered operator `name`, NumPy's whole numbers as Python's.

    torch refuses wrong types too, but in words about its dispatcher, and without a status.

    Raises:
        UnsupportedTypeError: a list, an array or a number where a tensor belongs.
        ConstraintError: an attribute that is no whole number, number, text or truth value, None included.
    """
    return {argument: _of_kind(kind, argument, given[argument]) for argument, kind in _kinds[name].items()}


def _of_kind(kind: str, argument: str, value: Any) -> Any:
    if kind == "Tensor":
        if value is None or isinstance(value, torch.Tensor):
            return value
        raise UnsupportedTypeError(argument, f"a {type(value).__name__}", "must be a torch.Tensor", "use torch.tensor")
    if kind == "int" and not isinstance(value, int):
        try:
            return index(value)
        except TypeError:
            raise _wrong(argument, value, "an integer", "an int") from None
    if kind == "float" and not isinstance(value, float | int):
        raise _wrong(argument, value, "a number", "a float")
    if kind == "str" and not isinstance(value, str):
        raise _wrong(argument, value, "text", "a str")
    if kind == "bool" and not isinstance(value, bool):
        raise _wrong(argument, value, "True or False", "a bool")
    return value


def _wrong(argument: str, value: Any, wanted: str, passed: str) -> EvenmoeError:
    return ConstraintError(argument, repr(value), f"must be {wanted}", f"pass {passed}")
