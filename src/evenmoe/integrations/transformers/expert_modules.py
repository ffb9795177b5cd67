"""`experts_of`: the modules of a model that hold its routed experts, by the model's own layer numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from evenmoe.errors import ConstraintError

#: What transformers' `use_experts_implementation` gives every module of routed experts, and no other.
_MARK = "_is_expert_parallel"


@dataclass(frozen=True)
class ExpertsOfLayer:
    """The routed experts of one layer.

    Attributes:
        name: the module's name in the model, such as "model.layers.3.mlp.experts".
        layer: the number that the model gives the layer, 3 there.
        module: called with (hidden states (T, H), top-k indices (T, K), top-k weights (T, K)).
    """

    name: str
    layer: int
    module: nn.Module


def experts_of(model: nn.Module, named: str = "") -> list[ExpertsOfLayer]:
    """Return the modules of routed experts of a transformers model, in the order of their layers.

    Args:
        model: any model of transformers, whole or a part.
        named: only modules with this in their names, such as "text", for models that have several stacks of layers.

    Raises:
        ConstraintError: there are none, one has no layer number in its name, or two have the same.

    >>> import torch, transformers
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1)
    >>> config = transformers.MixtralConfig(vocab_size=9, num_hidden_layers=2, num_local_experts=4, **sizes)
    >>> [(found.name, found.layer) for found in experts_of(transformers.MixtralForCausalLM(config))]
    [('model.layers.0.mlp.experts', 0), ('model.layers.1.mlp.experts', 1)]
    """
    found = sorted(_found(model, named), key=lambda experts: experts.layer)
    if not found:
        where = f"a {type(model).__name__}" + (f", named {named!r}" if named else "")
        raise ConstraintError(
            "model",
            f"{where}, in which nothing holds routed experts",
            "must have modules with an experts implementation of transformers",
            "pass a Mixture-of-Experts model of transformers 5.24 or newer",
        )
    twice = [layer for layer, times in Counter(experts.layer for experts in found).items() if times > 1]
    if twice:
        names = ", ".join(repr(experts.name) for experts in found if experts.layer == twice[0])
        raise ConstraintError(
            "model",
            f"a {type(model).__name__} with the experts of layer {twice[0]} in {names}",
            "must have one module of experts for each layer number",
            "name one stack of layers by named=",
        )
    return found


def _found(model: nn.Module, named: str) -> Iterator[ExpertsOfLayer]:
    for name, module in model.named_modules():
        if named in name and _holds_experts(module):
            numbers = re.findall(r"\.(\d+)(?=\.)", f".{name}.")
            if not numbers:
                raise ConstraintError(
                    "model",
                    f"a {type(model).__name__} with experts in {name!r}",
                    "must number its layers in the names of their modules",
                    "pass the model that has the layers, not one of its blocks",
                )
            yield ExpertsOfLayer(name, int(numbers[0]), module)


def _holds_experts(module: nn.Module) -> bool:
    """Some architectures do without that decorator: their modules are told by name and stacked weights."""
    stacked = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    name = type(module).__name__
    return hasattr(module, _MARK) or (stacked and name.endswith("Experts") and "Shared" not in name)
