"""Operators known to torch: one listing of their arguments makes the schema, the call and the fake kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

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
