"""The table of arguments, against what torch has registered and what the ranks compare."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from evenmoe.contract.operators import OPERATORS, SIGNATURES, agreement, schema
from evenmoe.contract.tensor_spec import ALLOCATED
from evenmoe.ops import (  # noqa: F401  they register
    combine,
    combine_add_rms_norm,
    combine_halves,
    combine_v1,
    dispatch,
    dispatch_halves,
    dispatch_v1,
    update_expert,
)
from evenmoe.ops.operator import CALL_TYPES
from evenmoe.transport.agreement import OPERATORS as COMPARED


def described(schema: torch._C.FunctionSchema) -> tuple[list, list, list]:
    """Tensors in order, attributes (which go by keyword) by name, what is returned."""
    arguments = [(a.name, str(a.type), a.has_default_value()) for a in schema.arguments]
    by_keyword = [a.kwarg_only for a in schema.arguments]
    positional = [argument for argument, only in zip(arguments, by_keyword, strict=True) if not only]
    keywords = [argument for argument, only in zip(arguments, by_keyword, strict=True) if only]
    return positional, sorted(keywords), [str(a.type) for a in schema.returns]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_schema_is_the_registered_one(name):
    derived = torch._C.parse_schema(f"evenmoe::{name}{schema(OPERATORS[name])}")
    assert described(derived) == described(getattr(torch.ops.evenmoe, name).default._schema)


@pytest.mark.parametrize(
    ("name", "compared"),
    [
        ("dispatch", "dispatch"),
        ("combine", "combine"),
        ("dispatch_setup", "setup of dispatch"),
        ("combine_setup", "setup of combine"),
    ],
)
def test_the_ranks_compare_what_the_table_says(name, compared):
    told = {words for words in COMPARED[compared] if not words.startswith("gradients of ")}  # which no argument says
    assert sorted(agreement(OPERATORS[name])) == sorted(told - {"dispatch"})
    assert agreement(OPERATORS["combine_add_rms_norm"]) == agreement(OPERATORS["combine"])


def test_arguments_are_listed_once():
    for operator in OPERATORS.values():
        inputs = [argument.name for argument in operator.arguments if argument.kind != "output"]
        outputs = [argument.name for argument in operator.of_kind("output")]
        assert len(set(inputs)) == len(inputs)
        assert len(set(outputs)) == len(outputs)
    for name, signature in SIGNATURES.items():
        published = [a for a in OPERATORS[signature.operator].arguments if a.since is not None]
        in_place_of_names = {"context", "ccl_buffer_size"} if name.endswith("V5") else set()
        arguments = [a for a in signature.arguments.values() if a.name not in in_place_of_names]
        assert len(arguments) == len(signature.arguments) - len(in_place_of_names)
        assert set(arguments) <= set(published), name
        assert len({argument.c_name for argument in signature.arguments.values()}) == len(signature.arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_call_has_the_arguments_of_the_table(name):
    fields = {field.name: field for field in dataclasses.fields(CALL_TYPES[name])}
    own = {"hccl_buffer_bytes", "generation", "check_values", "limits"}  # what only the contract or this package knows
    if name.endswith("_v1"):  # what came later stays at its default
        own |= {field.name for field in dataclasses.fields(CALL_TYPES[name.removesuffix("_v1")])} - {"expert_ids"}
        own -= {argument.name for argument in OPERATORS[name].arguments} - {"check_values", "limits"}
    listed = {a.name: a for a in OPERATORS[name].arguments if (a.name, a.kind) != ("dispatch_number", "output")}
    assert fields.keys() - own == listed.keys() - own
    for argument in listed.values():
        if argument.name in own:
            continue
        default = fields[argument.name].default
        if argument.required:
            assert default is dataclasses.MISSING, argument.name
        else:
            assert default == (ALLOCATED if argument.kind == "output" else argument.default), argument.name
