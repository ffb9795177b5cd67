"""Both stages of an operator, as the C functions call them: handles and addresses in, statuses out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from evenmoe.ascend import status
from evenmoe.ascend.cann.build import c_names
from evenmoe.ascend.cann.groups import Communicators
from evenmoe.ascend.cann.runtime import Handles, Runtime
from evenmoe.ascend.cann.tensors import Memory, TensorDescription, shape_only, view
from evenmoe.ascend.executor import Executor, stage_one
from evenmoe.ascend.status import AclError, acl_error, check_not_null
from evenmoe.contract.halves import combine_sizes, dispatch_sizes
from evenmoe.contract.limits import ATLAS_A3
from evenmoe.contract.operators import SIGNATURES
from evenmoe.errors import EvenmoeError

_OPEN_GROUP = "; make the group with HcclCommInitAll, and pass the name that HcclGetCommName returns."


class Calls:
    """Tensors and executors of the process.

    Attributes: `limits`, what the operators take.
    """

    def __init__(self, runtime: Runtime, memory: Memory, communicators: Communicators) -> None:
        self._runtime, self._memory, self._communicators = runtime, memory, communicators
        self.limits = ATLAS_A3
        self.tensors: Handles[TensorDescription] = Handles(
            4, "an aclTensor", "aclCreateTensor", status.PARAM_INVALID, status.PARAM_NULLPTR
        )
        self.int_arrays: Handles[tuple[int, ...]] = Handles(
            7, "an aclIntArray", "aclCreateIntArray", status.PARAM_INVALID, status.PARAM_NULLPTR
        )
        self.executors: Handles[Executor] = Handles(
            5, "an executor", "the first stage", status.INNER, status.PARAM_NULLPTR, "used or destroyed"
        )

    def first_stage(self, operator: str, arguments: Sequence[object]) -> tuple[int, int]:
        """(workspace size, executor) of a call whose arguments are in C order.

        Raises:
            AclError: they are not valid; the message uses the C names.
        """
        names = c_names(operator)
        given = dict(zip(names, arguments, strict=True))
        try:
            executor = self._stage(operator, given)
        except EvenmoeError as error:
            raise _with_c_names(error, names) from error
        return executor.workspace_size, self.executors.add(executor)

    def _stage(self, operator: str, given: Mapping[str, object]) -> Executor:
        arguments = dict(given)
        failure: EvenmoeError | None = None
        for name, argument in SIGNATURES[operator].arguments.items():
            if argument.kind not in ("tensor", "output"):
                continue
            handle = given[name]
            assert isinstance(handle, int)
            if handle == 0:
                arguments[name] = None
                continue
            description = self.tensors.get(argument.c_name, handle)
            try:
                arguments[name] = view(self._memory, name, description, argument.kind == "output")
            except EvenmoeError as error:
                # Shapes and ranges are checked before the memory behind them, which a wrong shape would not fit anyway.
                failure = failure or error
                arguments[name] = shape_only(name, description)
        executor = stage_one(operator, arguments, self.limits)
        if failure is not None:
            raise failure
        return executor

    def output_sizes(self, operator: str, *arguments: object) -> tuple[int, ...]:
        """What aclnnXxxSetupTeardownCalcOutputSize gives for its arguments, without expertTokenNumsType.

        Raises:
            AclError: a null tensor, one that has not two dimensions, or numbers that make no layout.
        """
        signature = SIGNATURES[operator]
        given = dict(zip(signature.names("tensor", "str", "int"), arguments, strict=True))
        shapes = []
        for name in signature.names("tensor")[:2]:
            handle, argument = given[name], signature.arguments[name].c_name
            assert isinstance(handle, int)
            shape = self.tensors.get(argument, handle).shape
            if len(shape) != 2:
                raise acl_error(
                    status.PARAM_INVALID, argument, shape, "must have two dimensions", "pass another tensor"
                )
            shapes.append(shape)
        (rows, hidden), (tokens, top_k) = shapes
        numbers = {name: int(given[name]) for name in signature.names("int")}  # type: ignore[call-overload]
        try:
            if signature.operator == "combine_setup":
                return combine_sizes(rows, hidden, numbers["ep_world_size"])
            return dispatch_sizes(tokens, hidden, top_k, numbers)
        except EvenmoeError as error:
            raise AclError(status.PARAM_INVALID, str(error)) from error

    def second_stage(
        self, operator: str, workspace: int, workspace_size: int, handle: int, stream: int, context: int
    ) -> None:
        """Put a call on a stream.

        Raises:
            AclError: an executor, stream or workspace that is none or does not fit; the executor is not used up.
        """
        executor = self.executors.get("executor", handle)
        try:
            chosen = self._runtime.find_stream("stream", stream, context)
        except AclError as error:
            raise AclError(status.PARAM_INVALID, str(error)) from error
        for argument, (name, rank, _) in zip(("groupEp", "groupTp"), executor.groups, strict=False):
            device = self._communicators.device_of(name, rank)
            if device not in (None, chosen.device):
                rule = f"must belong to device {device}, which is rank {rank} of {argument} {name!r}"
                fix = "launch each rank on its own device"
                raise acl_error(status.PARAM_INVALID, "stream", f"of device {chosen.device}", rule, fix)
        if workspace:
            self._memory.check_room("workspace", workspace, workspace_size, status.PARAM_INVALID)
        names = c_names(operator)
        number = executor.launch(
            operator, workspace != 0, workspace_size, chosen.stream, lambda error: _with_c_names(error, names)
        )
        self._communicators.launched(executor.groups, chosen.stream, number)
        if not executor.repeatable:
            self.executors.pop("executor", handle)  # used up; the stream's work keeps what it needs

    def set_repeatable(self, handle: int) -> None:
        check_not_null(status.INNER_NULLPTR, "executor", handle)
        self.executors.get("executor", handle).make_repeatable()

    def destroy_executor(self, handle: int) -> None:
        check_not_null(status.INNER_NULLPTR, "executor", handle)
        self.executors.pop("executor", handle).destroy()

    def set_tensor_address(self, handle: int, side: str, index: int, tensor: int, address: int) -> None:
        """Move input or output `index` of a repeatable executor to other memory; the tensor describes its view.

        Raises:
            AclError: a null executor or tensor (561103), an executor that is not repeatable (561000), an index there
                is not or other memory than the tensor needs (161002), another shape or dtype (561002).
        """
        check_not_null(status.INNER_NULLPTR, "executor", handle)
        check_not_null(status.INNER_NULLPTR, "tensor", tensor)
        executor = self.executors.get("executor", handle)
        if not executor.repeatable:
            rule, fix = "must be repeatable", "call aclSetAclOpExecutorRepeatable before"
            raise acl_error(status.INNER, "executor", "for one call", rule, fix)
        tensors = executor.tensors if side == "input" else executor.outputs
        if index >= len(tensors):
            rule = f"must be below {len(tensors)}, the {side}s of aclnn{executor.operator}"
            raise acl_error(status.PARAM_INVALID, "index", index, rule, "count them in the order of the first stage")
        name, before = list(tensors.items())[index]
        description = replace(self.tensors.get("tensor", tensor), address=address)
        try:
            after = view(self._memory, "addr", description, side == "output")
        except EvenmoeError as error:
            raise AclError(error.status, str(error)) from error
        if before is None or before.shape != after.shape or before.dtype != after.dtype:
            what = "null" if before is None else f"{before.dtype} {tuple(before.shape)}"
            value = f"{after.dtype} {tuple(after.shape)}"
            rule = f"must be as `{c_names(executor.operator)[name]}` was, {what}"
            raise acl_error(status.TILING_ERROR, "tensor", value, rule, "call the first stage again for another")
        self.tensors.replace(tensor, description)
        tensors[name] = after

    def finish(self) -> None:
        """Forget all of them."""
        self.executors.clear()
        self.tensors.clear()
        self.int_arrays.clear()


def _with_c_names(error: EvenmoeError, names: Mapping[str, str]) -> AclError:
    """The same error with the names of the C functions."""
    # A name of one word is also English, so it is taken for a name only between backquotes.
    patterns = [rf"\b{name}\b" if "_" in name else f"(?<=`){name}(?=`)" for name in names]
    text = re.sub("|".join(patterns), lambda match: names[match[0]], str(error))
    return AclError(error.status, re.sub(r"; [^;]*evenmoe\.local_world[^;]*$", _OPEN_GROUP, text))
