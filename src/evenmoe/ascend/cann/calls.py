"""Both stages of an operator, as the C functions call them: handles and addresses in, statuses out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evenmoe.ascend import status
from evenmoe.ascend.cann.memory import Memory
from evenmoe.ascend.cann.runtime import Communicators, Handles, Runtime
from evenmoe.ascend.cann.sources import c_names
from evenmoe.ascend.cann.tensors import TensorDescription, shape_only, view
from evenmoe.ascend.executor import Executor, stage_one
from evenmoe.ascend.status import AclError, acl_error, null_pointer
from evenmoe.contract.operators import SIGNATURES
from evenmoe.errors import EvenmoeError

_OPEN_GROUP = "; make the group with HcclCommInitAll, and pass the name that HcclGetCommName returns."


@dataclass(eq=False)
class Call:
    """An executor, and the ranks that its call is for: (C name of the group, group, rank)."""

    executor: Executor
    ranks: list[tuple[str, str, int]]


class Calls:
    """Tensors and executors of the process."""

    def __init__(self, runtime: Runtime, memory: Memory, communicators: Communicators) -> None:
        self._runtime, self._memory, self._communicators = runtime, memory, communicators
        self.tensors: Handles[TensorDescription] = Handles(
            4, "an aclTensor", "aclCreateTensor", status.PARAM_INVALID, status.PARAM_NULLPTR
        )
        self.executors: Handles[Call] = Handles(
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
            executor = self._stage(operator, given, names)
        except EvenmoeError as error:
            raise _with_c_names(error, names) from error
        return executor.workspace_size, self.executors.add(Call(executor, _ranks(given)))

    def _stage(self, operator: str, given: dict[str, Any], names: Mapping[str, str]) -> Executor:
        signature = SIGNATURES[operator]
        outputs = signature.names("output")
        tensors: dict[str, torch.Tensor | None] = {}
        failure: EvenmoeError | None = None
        for name in signature.names("tensor", "output"):
            handle = given[name]
            if handle == 0:
                tensors[name] = None
                continue
            description = self.tensors.get(names[name], handle)
            try:
                tensors[name] = view(self._memory, name, description, name in outputs)
            except EvenmoeError as error:
                # Shapes and ranges are checked before the memory behind them, which a wrong shape would not fit anyway.
                failure = failure or error
                tensors[name] = shape_only(name, description)
        attributes = {name: given[name] for name in signature.names("str", "int", "float")}
        inputs = {name: tensors[name] for name in signature.names("tensor")}
        executor = stage_one(operator, inputs, attributes, {name: tensors[name] for name in outputs})
        if failure is not None:
            raise failure
        return executor

    def second_stage(
        self, operator: str, workspace: int, workspace_size: int, handle: int, stream: int, context: int
    ) -> None:
        """Put a call on a stream.

        Raises:
            AclError: an executor, stream or workspace that is none or does not fit; the executor is not used up.
        """
        if handle == 0:
            raise null_pointer(status.PARAM_NULLPTR, "executor")
        call = self.executors.get("executor", handle)
        try:
            chosen = self._runtime.find_stream("stream", stream, context)
        except AclError as error:
            raise AclError(status.PARAM_INVALID, str(error)) from error
        for argument, name, rank in call.ranks:
            device = self._communicators.device_of(name, rank)
            if device not in (None, chosen.device):
                rule = f"must belong to device {device}, which is rank {rank} of {argument} {name!r}"
                fix = "launch each rank on its own device"
                raise acl_error(status.PARAM_INVALID, "stream", f"of device {chosen.device}", rule, fix)
        if workspace:
            self._memory.check_room("workspace", workspace, workspace_size, status.PARAM_INVALID)
        names = c_names(operator)
        call.executor.launch(
            operator, workspace != 0, workspace_size, chosen.stream, lambda error: _with_c_names(error, names)
        )
        if not call.executor.repeatable:
            self.executors.pop("executor", handle)  # used up; the stream's work keeps what it needs

    def set_repeatable(self, handle: int) -> None:
        if handle == 0:
            raise null_pointer(status.INNER_NULLPTR, "executor")
        self.executors.get("executor", handle).executor.make_repeatable()

    def destroy_executor(self, handle: int) -> None:
        if handle == 0:
            raise null_pointer(status.INNER_NULLPTR, "executor")
        self.executors.pop("executor", handle).executor.destroy()

    def set_tensor_address(self, handle: int, side: str, index: int, tensor: int, address: int) -> None:
        """Move input or output `index` of a repeatable executor to other memory; the tensor describes its view.

        Raises:
            AclError: a null executor or tensor (561103), an executor that is not repeatable (561000), an index there
                is not or other memory than the tensor needs (161002), another shape or dtype (561002).
        """
        for argument, value in (("executor", handle), ("tensor", tensor)):
            if value == 0:
                raise null_pointer(status.INNER_NULLPTR, argument)
        executor = self.executors.get("executor", handle).executor
        if not executor.repeatable:
            rule, fix = "must be repeatable", "call aclSetAclOpExecutorRepeatable before"
            raise acl_error(status.INNER, "executor", "for one call", rule, fix)
        tensors = executor.tensors if side == "input" else executor.outputs
        if index >= len(tensors):
            rule = f"must be below {len(tensors)}, the {side}s of aclnn{executor.operator}"
            raise acl_error(status.PARAM_INVALID, "index", index, rule, "count them in the order of the first stage")
        name, before = list(tensors.items())[index]
        description = self.tensors.get("tensor", tensor).moved(address)
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


def _ranks(given: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    if "group_ep" not in given:
        return []
    ranks = [("groupEp", given["group_ep"], given["ep_rank_id"])]
    return [*ranks, ("groupTp", given["group_tp"], given["tp_rank_id"])] if given["tp_world_size"] == 2 else ranks


def _with_c_names(error: EvenmoeError, names: Mapping[str, str]) -> AclError:
    """The same error with the names of the C functions."""
    # A name of one word is also English, so it is taken for a name only between backquotes.
    patterns = [rf"\b{name}\b" if "_" in name else f"(?<=`){name}(?=`)" for name in names]
    text = re.sub("|".join(patterns), lambda match: names[match[0]], str(error))
    return AclError(error.status, re.sub(r"; [^;]*evenmoe\.local_world[^;]*$", _OPEN_GROUP, text))
