"""How a function of torch_npu is made from one of a call object, and what its wrapper does around the operator (§5)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, TypeAlias, TypeVar

import torch

from evenmoe.ascend.barrier import _npu_distribute_barrier  # noqa: F401  one of the functions here
from evenmoe.ascend.executor import check_call
from evenmoe.ascend.groups import find_group
from evenmoe.ascend.init_routing import npu_moe_init_routing, npu_moe_init_routing_v2  # noqa: F401  as well
from evenmoe.ascend.patching import UNCHECKED, in_effect, limits_in_effect
from evenmoe.ascend.status import NpuCallError, of_the_chip
from evenmoe.ascend.tensors import number_of
from evenmoe.contract.argument import Argument, Kind
from evenmoe.contract.calls import CombineCall, CombineV1Call, DispatchCall, DispatchV1Call, UpdateExpertCall
from evenmoe.contract.dispatch import check_token_nums_type
from evenmoe.contract.distribute import check_ep_rank, check_shared_pair, check_shared_rank_num
from evenmoe.contract.half_calls import (
    HalfCall,
)
from evenmoe.contract.operators import OPERATORS
from evenmoe.contract.tensor_spec import TensorSpec, check_dims
from evenmoe.errors import ConstraintError, EvenmoeError, MissingArgumentError
from evenmoe.ops.exchange import check_range
from evenmoe.ops.halves import group_of, told
from evenmoe.ops.operator import CALL_TYPES, check_devices, check_types, find_groups, in_order, parts_of, specs_of
from evenmoe.transport.call import together
from evenmoe.transport.transport import Transport

Tensor = torch.Tensor
_RANKS_PER_NODE = 8  # of Atlas A2, in the room that the wrapper makes for its counts (§5)
_TYPES: dict[Kind, type] = {"tensor": torch.Tensor, "str": str, "int": int, "float": float}
_Result = TypeVar("_Result")
_Half: TypeAlias = HalfCall[Tensor]
_Collective: TypeAlias = DispatchCall[Tensor] | CombineCall[Tensor]


def made_from(
    operator: str,
    version: int,
    *,
    without: tuple[str, ...] = (),
    required: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
    later_chips: tuple[str, ...] = (),
    **fields: object,
) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Makes a function of torch_npu from one of a call object, and its errors those of torch_npu.

    Args:
        operator, version: of the table; what must be given comes by position, everything else by keyword.
        without: arguments that torch_npu does not take.
        required: arguments that must be given here, although the newest version has a default.
        renamed: {name of the table: name in torch_npu}.
        later_chips: arguments that only later chips take, None here.
        fields: of every call.
    """
    names = renamed or {}
    taken = [a for a in OPERATORS[operator].published(version) if a.kind != "output" and a.name not in without]
    first = [argument for argument in taken if argument.required or argument.name in required]
    others = [argument for argument in taken if argument not in first] + [Argument(name, "int") for name in later_chips]
    by_position, by_keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    positions = [names.get(argument.name, argument.name) for argument in first]
    defaults = {argument.name: argument.default for argument in others}
    parameters = [
        inspect.Parameter(name, by_position, annotation=_TYPES[argument.kind])
        for name, argument in zip(positions, first, strict=True)
    ]
    for argument in others:
        kind = _TYPES[argument.kind] if argument.default is not None else _TYPES[argument.kind] | None
        parameters.append(inspect.Parameter(argument.name, by_keyword, default=argument.default, annotation=kind))
    signature = inspect.Signature(parameters)

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        @wraps(function)
        def call(*args: object, **kwargs: object) -> _Result:
            given = {**defaults, **dict(zip(positions, args, strict=False)), **kwargs}
            twice = not kwargs.keys().isdisjoint(positions[: len(args)])
            if twice or len(args) > len(positions) or given.keys() != signature.parameters.keys():
                signature.bind(*args, **kwargs)  # raises the TypeError; it would take a tenth of a whole call
            unknown = {name: given.pop(name) for name in later_chips}
            for name, theirs in names.items():
                given[name] = given.pop(theirs)
            try:
                always = operator == "update_expert" or operator.endswith(("_setup", "_teardown"))
                checked = always or not in_effect(UNCHECKED)
                made = CALL_TYPES[operator](**given, **fields, limits=limits_in_effect(), check_values=checked)
                return function(made, **unknown)
            except EvenmoeError as error:
                argument, fix = error.argument, of_the_chip(error).fix
                if argument in names:
                    fix = fix.replace("output of this name", argument)
                raised = NpuCallError(names.get(argument, argument), error.value, error.rule, fix)
                raised.status = error.status
                raise raised from error

        setattr(call, "__signature__", signature)  # noqa: B010  what help() shows
        return call

    return decorate


def perform_as_wrapper(operator: str, call: _Collective, check_first: Callable[[], None] = lambda: None) -> Any:
    """Complete a call as the wrapper does, and let the operator compute it; the other ranks are told of an error."""
    ep, tp = _find_groups(operator, call)
    rows = call.x if isinstance(call, DispatchCall) else call.expand_x
    exchanged = "combine" if operator == "combine_add_rms_norm" else operator
    parts = parts_of(exchanged, ep, tp, call.elastic_info is not None, rows)
    with together(*in_order(exchanged, *parts)):
        arguments = check_types(operator, _completed(call))
        check_first()
        check_devices(arguments)
        if not call.check_values:  # ids may occur twice in a token, and nothing else
            check_range(call.expert_ids, call.moe_expert_num + call.virtual_experts)
        return getattr(torch.ops.evenmoe, operator)(**arguments)


def update_expert_as_wrapper(call: UpdateExpertCall[Tensor]) -> tuple[Tensor, Tensor]:
    arguments = check_types("update_expert", call)
    if call.old or call.balance_mode not in (0, 1):  # the registered operator takes more rules, and checks the rest
        check_call(specs_of(call))
    return torch.ops.evenmoe.update_expert(**arguments)


@contextmanager
def telling(operator: str, call: _Half) -> Iterator[None]:
    """What the wrapper looks at before a setup; the other ranks are told of an error."""
    with told(_group_of_half(call), operator):
        yield


def end_half(operator: str, call: _Half) -> Any:
    _group_of_half(call)
    arguments = check_types(operator, with_comm_alg(call))
    check_devices(arguments)
    return getattr(torch.ops.evenmoe, operator)(**arguments)


def with_comm_alg(call: _Half) -> _Half:
    if call.group_ep is None:
        raise MissingArgumentError("group_ep", None, "must be a name", "pass a str")
    return replace(call, comm_alg="") if call.comm_alg is None else call


def check_as_wrapper(call: DispatchCall[Tensor], later_chips: Mapping[str, object]) -> None:
    """What torch_npu looks at before the first stage does."""
    for name, value in later_chips.items():
        if value is not None:
            raise ConstraintError(name, repr(value), "must be None on Atlas A3", "leave it out")
    specs: DispatchCall[TensorSpec] = specs_of(call)
    check_dims("x", specs.x, (2,), "(tokens, hidden)")
    check_dims("expert_ids", specs.expert_ids, (2,), "(tokens, top_k)")
    check_ep_rank(specs)
    check_shared_rank_num(specs)
    check_shared_pair(specs)
    check_token_nums_type(specs)


def check_as_first_wrapper(call: DispatchV1Call[Tensor]) -> None:
    """What the function of the first version looks at before the first stage does."""
    specs: DispatchV1Call[TensorSpec] = specs_of(call)
    check_dims("x", specs.x, (2,), "(tokens, hidden)")
    check_dims("expert_ids", specs.expert_ids, (2,), "(tokens, top_k)")
    check_shared_rank_num(specs)
    check_token_nums_type(specs)


def with_room_for_nodes(ep_recv_counts: Tensor, call: DispatchCall[Tensor]) -> Tensor:
    if call.expert_scales is None:
        return ep_recv_counts
    tokens, top_k = call.expert_ids.shape
    more = 2 * (call.global_bs or tokens * call.ep_world_size) * top_k * (call.ep_world_size // _RANKS_PER_NODE)
    return torch.cat([ep_recv_counts, ep_recv_counts.new_zeros(more)])


def _group_of_half(call: _Half) -> Transport:
    try:
        return group_of(call, find_group)
    except (ConstraintError, TypeError):
        # What is wrong with the call itself comes first, as on the chip.
        check_call(specs_of(call))
        raise


def _find_groups(operator: str, call: _Collective) -> tuple[Transport, Transport | None]:
    try:
        return find_groups(call, find_group)
    except (ConstraintError, TypeError):
        # What is wrong with the call itself comes first, as on the chip.
        call = _completed(call)
        check_types(operator, call)
        check_call(specs_of(call))
        raise


def _completed(call: _Collective) -> _Collective:
    for name, value in (("group_ep", call.group_ep), ("group_tp", call.group_tp)):
        if value is None:
            raise MissingArgumentError(name, None, "must be a name", 'pass a str, "" for no tensor parallelism')
    if isinstance(call, DispatchCall):
        return replace(call, comm_alg="") if call.comm_alg is None else call
    number = number_of(call.expand_idx if isinstance(call, CombineV1Call) else call.assist_info_for_combine)
    return replace(call, comm_alg="" if call.comm_alg is None else call.comm_alg, dispatch_number=number)
