"""An operator as torch knows it, made from the table of its arguments; and what becomes of a call on its way there.

A call is checked where it arrives: its types and devices by whoever takes it, its shapes and attributes by the operator
once for all calls that have the same (`Prepared`), its values by the operator every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any, Generic, TypeAlias, TypeVar

import torch

from evenmoe.contract.calls import (
    AddRmsNormCall,
    CombineCall,
    CombineV1Call,
    DispatchCall,
    DispatchV1Call,
    DistributeCall,
    UpdateExpertCall,
)
from evenmoe.contract.half_calls import (
    CombineSetupCall,
    CombineTeardownCall,
    DispatchSetupCall,
    DispatchTeardownCall,
    HalfCall,
)
from evenmoe.contract.layout import Layout
from evenmoe.contract.limits import resolve_limits
from evenmoe.contract.operators import OPERATORS, schema
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.errors import ConstraintError, EvenmoeError, MissingArgumentError, UnsupportedTypeError, as_integer
from evenmoe.transport.agreement import digest
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.process_group import RemappedTransport
from evenmoe.transport.process_world import transport_of
from evenmoe.transport.transport import Transport, find_transport

Outputs: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
Dispatching: TypeAlias = DispatchCall[torch.Tensor]
Combining: TypeAlias = CombineCall[torch.Tensor]

Call: TypeAlias = DistributeCall[torch.Tensor] | UpdateExpertCall[torch.Tensor] | HalfCall[torch.Tensor]

_Call = TypeVar("_Call", bound=DistributeCall[torch.Tensor])
_Given = TypeVar("_Given")
_Plan = TypeVar("_Plan")
_Layout = TypeVar("_Layout")
_Kept = TypeVar("_Kept")
_UNCHECKED: Any = object()
_KEPT = 1024  # plans of one operator: of 64 ranks in one process with 16 batch sizes each; some kilobytes a plan

CALL_TYPES: dict[str, Callable[..., Call]] = {
    "update_expert": UpdateExpertCall,
    "dispatch": DispatchCall,
    "combine": CombineCall,
    "combine_add_rms_norm": AddRmsNormCall,
    "dispatch_setup": DispatchSetupCall,
    "dispatch_teardown": DispatchTeardownCall,
    "combine_setup": CombineSetupCall,
    "combine_teardown": CombineTeardownCall,
    "dispatch_v1": DispatchV1Call,
    "combine_v1": CombineV1Call,
}
_RUNS: dict[str, Callable[..., Outputs]] = {}  # as torch knows them
_KINDS = {
    name: {argument.name: argument.kind for argument in operator.arguments if argument.kind != "output"}
    for name, operator in OPERATORS.items()
}


def register(
    name: str, call_type: Callable[..., _Given], run: Callable[[_Given], Outputs], fake: Callable[[_Given], Outputs]
) -> None:
    """Register `torch.ops.evenmoe.<name>`; `run` and `fake` get a call of that type.

    Args:
        run: the operator. Its outputs never alias its inputs.
        fake: the same for fake tensors: outputs of the right shapes and dtypes, without values.
    """
    tensors = [argument.name for argument in OPERATORS[name].of_kind("tensor")]

    def taking(implementation: Callable[[_Given], Outputs]) -> Callable[..., Outputs]:
        def operator(*values: torch.Tensor | None, limits: str, **attributes: object) -> Outputs:
            given = dict(zip(tensors, values, strict=True))
            return implementation(call_type(**given, **attributes, limits=resolve_limits(limits)))

        return operator

    _RUNS[name] = taking(run)
    custom = torch.library.custom_op(f"evenmoe::{name}", _RUNS[name], mutates_args=(), schema=schema(OPERATORS[name]))
    custom.register_fake(taking(fake))


def perform(name: str, call: Call) -> Any:
    """Let the registered operator `name` compute a call whose types, and the devices of whose tensors, are in doubt.

    Raises:
        UnsupportedTypeError, ConstraintError: as `check_types` and `check_devices` do.
    """
    arguments = check_types(name, call)
    check_devices(arguments)
    if not _seen_by_torch(arguments.values()):
        tensors = [arguments.pop(argument) for argument, kind in _KINDS[name].items() if kind == "tensor"]
        return _RUNS[name](*tensors, **arguments)
    return getattr(torch.ops.evenmoe, name)(**arguments)


def _seen_by_torch(values: Iterable[object]) -> bool:
    """Whether a call is more to torch than its result: recorded for gradients, traced, transformed.

    Where it is not, it need not go through torch's dispatcher, whose first call of any custom operator imports the
    800 modules of torch._dynamo: 1.2 s of CPU time, half of the start of a C++ program.
    """
    if not torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
        return True
    # No public functions tell of modes (FakeTensorMode, make_fx) and transforms (vmap) that are active.
    internals: Any = torch._C
    if internals._len_torch_dispatch_stack() or internals._functorch.peek_interpreter_stack() is not None:
        return True
    return any(isinstance(value, torch.Tensor) and type(value) is not torch.Tensor for value in values)


def check_types(name: str, call: object) -> dict[str, Any]:
    """The arguments of the registered operator `name`, NumPy's whole numbers as Python's.

    torch raises for wrong types too, but in words about its dispatcher, and without a status.

    Raises:
        UnsupportedTypeError: a list, an array or a number where a tensor belongs.
        ConstraintError: an attribute that is no whole number, number, text or truth value, None included.
    """
    arguments: dict[str, Any] = {}
    for argument, kind in _KINDS[name].items():
        value = getattr(call, argument)
        if kind == "tensor":
            if value is not None and not isinstance(value, torch.Tensor):
                check_tensors(**{argument: value})
        elif argument == "limits":
            value = value.name
        elif kind == "int":
            if not isinstance(value, int):
                value = as_integer(argument, value)
        elif kind == "float" and not isinstance(value, float | int):
            raise _wrong(argument, value, "a number", "a float")
        elif kind == "str" and not isinstance(value, str):
            raise _wrong(argument, value, "text", "a str")
        elif kind == "bool" and not isinstance(value, bool):
            raise _wrong(argument, value, "True or False", "a bool")
        arguments[argument] = value
    return arguments


def _wrong(argument: str, value: object, wanted: str, passed: str) -> EvenmoeError:
    return ConstraintError(argument, repr(value), f"must be {wanted}", f"pass {passed}")


def check_tensors(**tensors: object) -> None:
    """Raise UnsupportedTypeError for the first that is no tensor, None included."""
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise UnsupportedTypeError(name, f"a {type(value).__name__}", "must be a torch.Tensor", "use torch.tensor")


def check_devices(tensors: Mapping[str, object]) -> None:
    """Raise for tensors whose values cannot be read where the call reads them; everything else passes.

    Raises:
        UnsupportedTypeError: a tensor is not dense, holds no values, or lies on another device than the first.
    """
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.layout != torch.strided or tensor.is_nested:
            layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise UnsupportedTypeError(name, f"a {layout} tensor", "must be a dense tensor", "call to_dense()")
        device = tensor.device
        if device.type == "meta":
            raise UnsupportedTypeError(
                name, "on the device meta", "must hold values", "pass a tensor on the device of the others"
            )
        first = first or (name, device)
        if device != first[1]:
            raise UnsupportedTypeError(
                name,
                f"on the device {device}",
                f"must be where `{first[0]}` is, on {first[1]}",
                f"move it with .to({str(first[1])!r})",
            )


# Shapes and attributes, once for all calls that have the same ----------------------------------------------------


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def specs_of(call: Call) -> Any:
    """The same call with every tensor replaced by its shape and dtype."""
    values = {field.name: getattr(call, field.name) for field in fields(call)}
    specs = {name: spec_of(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(call, **specs)


class Prepared(Generic[_Layout, _Plan]):
    """What is worked out once for all calls of an operator with the same shapes, dtypes and attributes.

    Args:
        name: of the operator.
        check: call of specs -> its layout; what it raises, `__call__` raises.
        plan: (call of specs, layout, elastic info) -> plan. It may raise for the elastic info.
    """

    def __init__(
        self,
        name: str,
        check: Callable[[Any], _Layout],
        plan: Callable[[Any, _Layout, tuple[int, ...] | None], _Plan],
    ) -> None:
        self._values = attrgetter(*_KINDS[name], "limits.name")
        self._check, self._plan = check, plan
        self._layouts: dict[tuple[object, ...], _Layout] = {}
        self._plans: dict[tuple[object, ...], _Plan] = {}

    def __call__(self, call: Call, elastic_info: tuple[int, ...] | None = None) -> _Plan:
        """The plan of a call, in the world that `elastic_info` leaves."""
        key = self._key(call)
        plan = self._plans.get((key, elastic_info))
        if plan is None:
            specs = specs_of(call)
            layout: Any = self._layouts.get(key, _UNCHECKED)  # looked up once, since another thread may forget it
            if layout is _UNCHECKED:
                layout = self._check(specs)
                _keep(self._layouts, key, layout)
            plan = self._plan(specs, layout, elastic_info)
            _keep(self._plans, (key, elastic_info), plan)
        return plan

    def accept(self, call: Call, layout: _Layout) -> None:
        """Take a call and all that are like it for checked, with that layout, by bounds that are no wider."""
        key = self._key(call)
        if key not in self._layouts:
            _keep(self._layouts, key, layout)

    def _key(self, call: Call) -> tuple[object, ...]:
        return tuple([(v.shape, v.dtype) if isinstance(v, torch.Tensor) else v for v in self._values(call)])


def _keep(kept: dict[tuple[object, ...], _Kept], key: tuple[object, ...], value: _Kept) -> None:
    if len(kept) >= _KEPT:
        kept.clear()
    kept[key] = value


def layout_sizes(call: DistributeCall[TensorSpec] | HalfCall[TensorSpec], layout: Layout) -> dict[str, int]:
    """What all ranks must agree on of the layout, in dispatch, in combine and in their setups."""
    return {
        "top-k of `expert_ids`": layout.top_k,
        "`num_experts`": call.moe_expert_num,
        "`shared_expert_num`": layout.shared_experts,
        "`shared_expert_rank_num`": layout.shared_ranks,
        "tokens per rank times ranks (`global_bs`)": layout.global_bs,
    }


def common_sizes(call: DistributeCall[TensorSpec], layout: Layout) -> dict[str, int]:
    """What all ranks must agree on in dispatch and combine alike."""
    return layout_sizes(call, layout) | {
        "`zero_expert_num`": call.zero_expert_num,
        "`copy_expert_num`": call.copy_expert_num,
        "`const_expert_num`": call.const_expert_num,
        "presence of `x_active_mask`": call.x_active_mask is not None,
        "tensor-parallel world size": call.tp_world_size,
        "digest of `elastic_info`": digest((layout.num_experts, *layout.active_ranks)),
    }


# The groups of a call: transports for the caller, names and numbers for the registered operator ------------------


def find_groups(
    call: DistributeCall[torch.Tensor], find: Callable[[str, str, int, int], Transport] = find_transport
) -> tuple[Transport, Transport | None]:
    """The transports behind the names; no TP transport unless there are two peers.

    Args:
        find: (argument, name, rank, world size) -> the transport; raises if no such group is open.
    """
    ep = find("group_ep", call.group_ep or "", call.ep_rank_id, call.ep_world_size)
    return ep, find("group_tp", call.group_tp or "", call.tp_rank_id, 2) if call.tp_world_size == 2 else None


def elastic_values(call: DistributeCall[torch.Tensor]) -> tuple[int, ...] | None:
    """What `elastic_info` says, read at every call, since it may have been written to."""
    return None if call.elastic_info is None else tuple(call.elastic_info.flatten().tolist())


def active_ranks(ep: Transport, layout: Layout) -> Transport:
    """The group that really exchanges: all of it, or the ranks that a scaled-down world kept (§2.11)."""
    return RemappedTransport(ep, layout.active_ranks) if layout.active_ranks else ep


def parts_of(
    operator: str, ep: Transport, tp: Transport | None, scaled_down: bool, rows: object
) -> tuple[GroupCall, GroupCall | None]:
    """This rank's parts in a call of dispatch or combine: over the expert-parallel group, and with the TP peer.

    In a scaled-down world the ranks that are gone would not hear of a failure, and the one that fails would wait; so
    nobody is told before the part is narrowed to the ranks that are left.

    Args:
        operator: "dispatch", "combine" or the first version of one, under whose name the ranks agree.
        rows: the tensor to be exchanged, or anything else if it is what is missing.
    """
    across = GroupCall(ep, operator, rows, heard=not scaled_down)
    if tp is None or tp.world_size != 2:
        return across, None
    return across, GroupCall(tp, f"tensor-parallel step of {operator.removesuffix('_v1')}", rows)


def in_order(operator: str, across: GroupCall, beside: GroupCall | None) -> tuple[GroupCall | None, GroupCall | None]:
    """The parts of a call in the order of their exchanges."""
    return (across, beside) if operator.startswith("dispatch") else (beside, across)


@contextmanager
def collective(
    operator: str, call_type: Callable[..., _Call], given: Mapping[str, Any], rows: object
) -> Iterator[_Call]:
    """The call that a public function makes of its arguments, and performs inside.

    Whatever is raised before the operator has exchanged anything is told to the other ranks.

    Args:
        operator: "dispatch", "combine" or the first version of one, under whose name the ranks agree.
        given: the fields of the call by name, but for the groups, which are `ep`, `tp` and `group`.
        rows: what would be exchanged.
    """
    arguments = dict(given)
    ep, tp, group = arguments.pop("ep"), arguments.pop("tp"), arguments.pop("group")
    if ep is not None and group is not None:
        raise ConstraintError(
            "group", "given beside `ep`", "names the same group", "pass one of the two, whichever reads better"
        )
    ep = transport_of(group if ep is None else ep, "ep")
    tp = None if tp is None else transport_of(tp, "tp")
    parts = parts_of(operator, ep, tp, arguments.get("elastic_info") is not None, rows)
    with together(*in_order(operator, *parts)):
        arguments["moe_expert_num"] = arguments.pop("num_experts")
        if arguments["moe_expert_num"] is None:
            raise MissingArgumentError(
                "num_experts", None, "must be the number of physical experts", "pass what dispatch was called with"
            )
        arguments["comm_alg"] = "" if arguments.get("comm_alg") is None else arguments["comm_alg"]
        arguments["limits"] = resolve_limits(arguments["limits"])
        yield call_type(
            **arguments,
            group_ep=ep.name,
            ep_world_size=ep.world_size,
            ep_rank_id=ep.rank,
            group_tp="" if tp is None else tp.name,
            tp_world_size=0 if tp is None else tp.world_size,
            tp_rank_id=0 if tp is None else tp.rank,
        )
