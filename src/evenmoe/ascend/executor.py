"""`Executor`: one checked call of an operator, between the first stage, which makes it, and the second, which runs it.

The first stage works on shapes, dtypes and attributes; values are read when the call runs, on a stream's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from evenmoe.ascend import status
from evenmoe.ascend.context import OverContext
from evenmoe.ascend.context import group_of as group_of_context
from evenmoe.ascend.groups import Membership, find_group, late_ranks, peers_here, taking_part
from evenmoe.ascend.status import AclError, of_the_chip
from evenmoe.ascend.stream import Stream
from evenmoe.ascend.tensors import check_unchanged, number_of, write_outputs
from evenmoe.contract.argument import Kind
from evenmoe.contract.calls import (
    CombineCall,
    CombineV1Call,
    DispatchCall,
    DispatchV1Call,
    DistributeCall,
    UpdateExpertCall,
)
from evenmoe.contract.combine import check_combine_call
from evenmoe.contract.combine_halves import check_combine_setup_call, check_combine_teardown_call
from evenmoe.contract.dispatch import check_dispatch_call
from evenmoe.contract.dispatch_halves import check_dispatch_setup_call, check_dispatch_teardown_call
from evenmoe.contract.first_version import check_combine_v1_call, check_dispatch_v1_call
from evenmoe.contract.half_calls import (
    CombineSetupCall,
    CombineTeardownCall,
    DispatchSetupCall,
    DispatchTeardownCall,
    HalfCall,
)
from evenmoe.contract.layout import Layout, scale_down
from evenmoe.contract.limits import ATLAS_A3, ATLAS_A3_2026, Limits
from evenmoe.contract.operators import SIGNATURES
from evenmoe.contract.tensor_spec import TensorSpec
from evenmoe.contract.update_expert import check_update_expert_call
from evenmoe.errors import ConstraintError, EvenmoeError, UnsupportedTypeError, as_integer
from evenmoe.ops import (
    combine,
    combine_add_rms_norm,
    combine_halves,
    combine_v1,
    dispatch,
    dispatch_halves,
    dispatch_v1,
    update_expert,
)
from evenmoe.ops.halves import group_of
from evenmoe.ops.operator import CALL_TYPES, Call, Prepared, find_groups, perform, spec_of, specs_of
from evenmoe.transport.transport import Transport

_PREPARED: dict[str, Prepared[Any, Any]] = {  # importing the operators registers them
    "combine": combine.PREPARED,
    "combine_add_rms_norm": combine_add_rms_norm.PREPARED,
    "combine_v1": combine_v1.PREPARED,
    "dispatch": dispatch.PREPARED,
    "dispatch_v1": dispatch_v1.PREPARED,
    "update_expert": update_expert.PREPARED,
    "dispatch_setup": dispatch_halves.SETUP,
    "dispatch_teardown": dispatch_halves.TEARDOWN,
    "combine_setup": combine_halves.SETUP,
    "combine_teardown": combine_halves.TEARDOWN,
}

#: What the operators' tiling asks for, the fixed system workspace; this implementation does not touch it.
WORKSPACE_BYTES = 16 * 2**20

Specs: TypeAlias = (
    UpdateExpertCall[TensorSpec] | DispatchCall[TensorSpec] | CombineCall[TensorSpec] | HalfCall[TensorSpec]
)
_INT64 = range(-(2**63), 2**63)
_OF_CONTEXT = "(of the context)"  # until the call runs, when the context is read


def check_call(specs: Specs) -> Layout | None:
    """Check a call of any operator, of the shapes and dtypes of its tensors; its layout where it has one.

    Raises:
        EvenmoeError: what the contract says.
    """
    if isinstance(specs, UpdateExpertCall):
        return check_update_expert_call(specs)
    if isinstance(specs, DispatchV1Call):
        return check_dispatch_v1_call(specs)
    if isinstance(specs, CombineV1Call):
        return check_combine_v1_call(specs)
    if isinstance(specs, DispatchCall):
        return check_dispatch_call(specs)
    if isinstance(specs, CombineCall):
        return check_combine_call(specs)
    if isinstance(specs, DispatchSetupCall):
        return check_dispatch_setup_call(specs)
    if isinstance(specs, DispatchTeardownCall):
        return check_dispatch_teardown_call(specs)
    if isinstance(specs, CombineSetupCall):
        return check_combine_setup_call(specs)
    assert isinstance(specs, CombineTeardownCall)
    return check_combine_teardown_call(specs)


def stage_one(operator: str, given: Mapping[str, object], limits: Limits = ATLAS_A3) -> Executor:
    """Check one call as the operator's first stage does, and make it ready to run.

    Args:
        operator: a key of `SIGNATURES`.
        given: {name: value} for every name of its signature; None is a null pointer. Tensors may be strided views. The
            outputs are written by `Executor.run`, as far as the operator writes them.
        limits: what the chip takes. V5 is younger than the rules of 2025, so the default for it is those of 2026.

    Raises:
        MissingArgumentError: a null tensor or group name (status 161001).
        UnsupportedTypeError: a dtype that the operator does not take, or an object of a wrong type (161002).
        ConstraintError: everything else (561002), last of all a group name that is not open here.
    """
    signature = SIGNATURES[operator]
    assert given.keys() == signature.arguments.keys(), (operator, given.keys() ^ signature.arguments.keys())
    arguments = {name: _of_type(argument.kind, name, given[name]) for name, argument in signature.arguments.items()}
    if operator == "MoeEPLBUpdateExpert":
        arguments["generation"] = "eplb_update_expert"
    over = None
    if "context" in arguments:
        size: Any = arguments.pop("ccl_buffer_size")
        over, limits = OverContext(arguments.pop("context"), size), ATLAS_A3_2026 if limits is ATLAS_A3 else limits
        arguments["group_ep"] = _OF_CONTEXT
    try:
        if over is not None:
            arguments["hccl_buffer_bytes"] = over.check(arguments["comm_alg"])
        call = CALL_TYPES[signature.operator](**arguments, limits=limits)
        layout = check_call(specs_of(call))
    except EvenmoeError as error:
        raise of_the_chip(error if over is None else over.in_its_words(error)) from error
    return Executor(operator, call, layout, over)


class Executor:
    """A call that passed the first stage; what the two-stage interface calls an `aclOpExecutor`.

    Attributes:
        operator: its name behind `aclnn`.
        workspace_size: bytes that the second stage must be given.
        repeatable: whether the second stage may be called more than once; see `make_repeatable`.
        tensors, outputs: {name: tensor or None}; replace a tensor by one of equal shape and dtype to move it.
        groups: (name, rank, world size) of those that it exchanges over, the expert-parallel one first. The name is
            None where a context tells the group, until the call runs.
    """

    def __init__(self, operator: str, call: Call, layout: Layout | None, over: OverContext | None = None) -> None:
        signature = SIGNATURES[operator]
        self.operator, self.workspace_size, self.repeatable = operator, WORKSPACE_BYTES, False
        self.tensors: dict[str, torch.Tensor | None] = {
            name: getattr(over if name == "context" else call, name) for name in signature.names("tensor")
        }
        self.outputs: dict[str, torch.Tensor | None] = {name: getattr(call, name) for name in signature.names("output")}
        self._specs = {
            name: None if tensor is None else spec_of(tensor) for name, tensor in (self.tensors | self.outputs).items()
        }
        self._call, self._layout = call, layout
        self.groups: list[tuple[str | None, int, int]] = []
        if over is None:
            self.groups.extend(_groups_of(call))
        elif isinstance(call, DistributeCall):
            self.groups.append((None, call.ep_rank_id, call.ep_world_size))
        self._state = threading.Lock()
        self._launched = self._destroyed = False
        self._memberships: list[Membership] = []

    def launch(
        self,
        operator: str,
        workspace: bool,
        workspace_size: int,
        stream: Stream,
        translate: Callable[[EvenmoeError], Exception] = lambda error: error,
    ) -> int:
        """The second stage: put the call on a stream and return its number there at once.

        Args:
            operator: the operator whose second stage this is.
            workspace: whether the workspace is there, not a null pointer.
            workspace_size: bytes of it.
            translate: turns an error of the run into the caller's words.

        Raises:
            AclError: an executor of another operator, one used or destroyed before (561000), a null workspace
                (161001), one smaller than the first stage asked for (161002), a destroyed stream (107017). The
                executor is not used up then.
        """
        if operator != self.operator:
            raise AclError(
                status.INNER,
                f"The executor was made by aclnn{self.operator}GetWorkspaceSize: it must be given to "
                f"aclnn{self.operator}, not to aclnn{operator}.",
            )
        if not workspace:
            raise AclError(
                status.PARAM_NULLPTR,
                f"`workspace` is a null pointer: aclnn{operator} needs {self.workspace_size} bytes; allocate what the "
                "first stage returned as workspaceSize.",
            )
        if workspace_size < self.workspace_size:
            raise AclError(
                status.PARAM_INVALID,
                f"`workspaceSize` is {workspace_size}: aclnn{operator} needs {self.workspace_size} bytes; allocate "
                "what the first stage returned.",
            )

        def work() -> None:
            try:
                self.run(stream.memory)
            except EvenmoeError as error:
                raise translate(error) from error

        with self._state:
            self._raise_if_spent()
            number = stream.enqueue(work, self.describe)
            self._launched = True
            return number

    def make_repeatable(self) -> None:
        """Let the second stage be called any number of times, until `destroy`; before the first of them.

        Raises:
            AclError: the executor was used or destroyed before (561000).
        """
        with self._state:
            self._raise_if_spent()
            self.repeatable = True

    def destroy(self) -> None:
        """Give the executor back; calls that are on a stream already still run.

        Raises:
            AclError: it was destroyed before, or used without being repeatable, which gives it back (561000).
        """
        with self._state:
            self._raise_if_spent()
            self._destroyed = True

    def run(self, memory: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Perform the operator now, and write the outputs; a collective of its groups.

        Args:
            memory: a context in which the tensors are read and the outputs written; in between, while other ranks are
                waited for, neither is touched. See `Stream.memory`.

        Raises:
            EvenmoeError: values that contradict each other, ranks that disagree, or a tensor of another shape or dtype
                than in the first stage.
            LostRankError: a rank did not call.
        """
        # In inference mode tensors are written that were made in it, and those that require a gradient.
        with torch.inference_mode():
            self._run(memory)

    def _run(self, memory: Callable[[], AbstractContextManager[None]]) -> None:
        with memory():
            check_unchanged(self._specs, {**self.tensors, **self.outputs})
            # The chip too makes every input contiguous first.
            given = {name: _copy_of(tensor) for name, tensor in self.tensors.items()}
        name = SIGNATURES[self.operator].operator
        context = given.pop("context", None)
        call, layout = replace(self._call, **given), self._layout
        if context is not None and isinstance(call, DistributeCall):
            call = replace(call, group_ep=group_of_context(context, call.ep_rank_id))
            self.groups = [*_groups_of(call)]
        checked = layout
        if isinstance(call, DistributeCall):
            call = replace(call, comm_alg=call.comm_alg or "", group_tp=call.group_tp or "")
            if layout is not None and call.elastic_info is not None:
                layout = scale_down(layout, call.elastic_info.tolist())
        if isinstance(call, HalfCall):
            call = replace(call, comm_alg=call.comm_alg or "")
        if isinstance(call, CombineCall):
            origin = "expand_idx" if isinstance(call, CombineV1Call) else "assist_info_for_combine"
            call = replace(call, dispatch_number=number_of(self.tensors[origin]))
        _PREPARED[name].accept(call, checked)  # the first stage has looked at all that is told from shapes
        self._memberships = self._join(layout)
        with taking_part(self._memberships):
            results = perform(name, call)
        with memory():
            write_outputs(call, self.outputs, (results,) if isinstance(results, torch.Tensor) else results, layout)

    def describe(self) -> str:
        """What the call is, and which ranks it waits for, for messages."""
        where = "".join(f" as rank {rank} of {_named(name)}" for name, rank, _ in self.groups[:1])
        late = late_ranks(self._memberships)
        behind = "; ".join(f"rank {', '.join(map(str, ranks))} of group {name!r}" for name, ranks in late.items())
        waits = f" waits for {behind}, which has not begun its call," if behind else ""
        return f"aclnn{self.operator}{where}{waits}".removesuffix(",")

    def _raise_if_spent(self) -> None:
        if self._destroyed:
            raise AclError(
                status.INNER,
                f"The executor of aclnn{self.operator} has been destroyed; call the first stage again.",
            )
        if self._launched and not self.repeatable:
            raise AclError(
                status.INNER,
                f"The executor of aclnn{self.operator} has been used: an executor serves one call; call the first "
                "stage again, or aclSetAclOpExecutorRepeatable before the first use.",
            )

    def _join(self, layout: Layout | None) -> list[Membership]:
        memberships = []
        for position, (name, rank, world_size) in enumerate(self.groups):
            assert name is not None, "read from the context, or given"
            members = peers_here(name, world_size)
            if position == 0 and layout is not None and layout.active_ranks:
                members = [member for member in members if member in layout.active_ranks]
            memberships.append(Membership(name, rank, tuple(members)))
        return memberships


def _groups_of(call: Call) -> list[tuple[str, int, int]]:
    """(name, rank, world size) of the groups of a call, which must be open here."""
    found: tuple[Transport | None, ...] = ()
    if isinstance(call, DistributeCall):
        found = find_groups(call, find_group)
    elif isinstance(call, HalfCall):
        found = (group_of(call, find_group),)
    return [(group.name, group.rank, group.world_size) for group in found if group is not None]


def _named(group: str | None) -> str:
    return "the group of its context" if group is None else f"group {group!r}"


def _of_type(kind: Kind, name: str, value: Any) -> object:
    """What a C compiler would see to: the type of one argument. Numbers of other libraries become Python's."""
    if kind in ("tensor", "output"):
        if value is not None and not isinstance(value, torch.Tensor):
            raise UnsupportedTypeError(name, f"a {type(value).__name__}", "must be a torch.Tensor", "use torch.tensor")
        if value is not None and value.layout != torch.strided:
            raise UnsupportedTypeError(name, str(value.layout), "must be a dense tensor", "call to_dense()")
        return value
    if kind == "str":
        if value is not None and not isinstance(value, str):
            raise UnsupportedTypeError(name, repr(value), "must be a str", "pass a str, or None for a null pointer")
        return value
    if kind == "float":
        if not isinstance(value, float | int):
            raise UnsupportedTypeError(name, repr(value), "must be a float", "pass a float")
        try:
            return float(value)
        except OverflowError:
            raise ConstraintError(name, "out of range", "must fit into a double", "pass a float") from None
    value = as_integer(name, value)
    if value not in _INT64:
        raise ConstraintError(name, value, "must fit into 64 bits", "pass an int64")
    return value


def _copy_of(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)
