"""What the C libraries call: functions of numbers, texts and lists, each answering (status, message, results).

Pointers arrive as numbers. Those to results are only compared with null here; the C side writes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from evenmoe.ascend import status
from evenmoe.ascend.cann import refusals, sources
from evenmoe.ascend.cann.calls import Calls
from evenmoe.ascend.cann.communicators import Communicators, check_given
from evenmoe.ascend.cann.memory import Memory, check_copy
from evenmoe.ascend.cann.refusals import refusal
from evenmoe.ascend.cann.runtime import NUM_DEVICES, Runtime, check_out
from evenmoe.ascend.cann.tensors import DTYPES, describe_tensor
from evenmoe.ascend.executor import stage_one as stage_one_of_operator
from evenmoe.ascend.status import AclError

Answer = tuple[int, str | None, Sequence[int | str]]

_runtime = Runtime()
_device_memory, _host_memory = Memory(), Memory()
_communicators = Communicators()
_calls = Calls(_runtime, _device_memory, _communicators)
_initialized = False


def _answers(function: Callable[..., Any], internal: int, uninitialized: int | None) -> Callable[..., Answer]:
    @wraps(function)
    def answer(*arguments: Any) -> Answer:
        try:
            if uninitialized is not None and not _initialized:
                raise refusal(uninitialized, "aclInit", "not called", "must come first", "call aclInit")
            results = function(*arguments)
        except AclError as error:
            return error.status, str(error), ()
        except Exception as error:  # a mistake of ours must not end the C program
            return internal, f"internal error: {type(error).__name__}: {error}", ()
        if results is None:
            return 0, None, ()
        return 0, None, results if isinstance(results, list | tuple) else (results,)

    return answer


def _acl(function: Callable[..., Any]) -> Callable[..., Answer]:
    return _answers(function, refusals.ACL_INTERNAL_ERROR, refusals.ACL_UNINITIALIZE)


def _aclnn(function: Callable[..., Any]) -> Callable[..., Answer]:
    return _answers(function, status.INNER, None)


def _hccl(function: Callable[..., Any]) -> Callable[..., Answer]:
    return _answers(function, refusals.HCCL_INTERNAL, refusals.HCCL_RUNTIME)


digest = sources.digest


def own_process() -> None:
    """This Python serves a C program alone: one thread per stream, for there are streams enough to fill the cores."""
    torch.set_num_threads(1)


def _end_everything() -> None:
    _runtime.finish()
    _communicators.finish()
    _calls.finish()
    _device_memory.free_device(None)
    _host_memory.free_device(None)


shutdown = _aclnn(_end_everything)


def _warm_up() -> None:
    """Call one operator, since torch imports 800 modules at the first call.

    That is 2 s of CPU time, on an idle machine. It belongs into aclInit, not under the timeout of the first
    synchronisation, nor into 16 streams' threads at once.
    """
    ids, table = torch.zeros((1, 1), dtype=torch.int32), torch.tensor([[1, 0]], dtype=torch.int32)
    attributes = {"local_rank_id": 0, "world_size": 2, "balance_mode": 0}
    tensors = {"expert_ids": ids, "eplb_table": table}
    stage_one_of_operator("MoeEPLBUpdateExpert", tensors, attributes, {"balanced_expert_ids": ids.clone()}).run()


def _init() -> None:
    global _initialized  # noqa: PLW0603  the C program's state is the process's
    if _initialized:
        code = refusals.ACL_REPEAT_INITIALIZE
        raise refusal(code, "aclInit", "called again", "must be called once", "call aclFinalize before")
    _warm_up()
    _initialized = True


init = _answers(_init, refusals.ACL_INTERNAL_ERROR, None)


@_acl
def finalize() -> None:
    global _initialized  # noqa: PLW0603
    _end_everything()
    _initialized = False


@_aclnn
def data_type_size(data_type: int) -> int:
    dtype = DTYPES.get(data_type)
    return dtype.itemsize if dtype else 0


@_acl
def device_count(out: int) -> int:
    check_out("count", out)
    return NUM_DEVICES


@_acl
def set_device(device: int, context: int) -> int:
    return _runtime.set_device(device)


@_acl
def get_device(context: int, out: int) -> int:
    check_out("deviceId", out)
    return _runtime.device_of(context)


@_acl
def reset_device(device: int, context: int) -> int:
    if _runtime.reset_device(device):
        _device_memory.free_device(device)
    return context if context in _runtime.contexts.handles() else 0


@_acl
def create_context(device: int, out: int) -> int:
    check_out("context", out)
    return _runtime.create_context(device)


@_acl
def destroy_context(handle: int, context: int) -> int:
    _runtime.destroy_context(handle)
    return 0 if handle == context else context


@_acl
def set_current_context(handle: int, context: int) -> int:
    _runtime.contexts.get("context", handle)
    return handle


@_acl
def get_current_context(context: int, out: int) -> int:
    check_out("context", out)
    _runtime.device_of(context)
    return context


@_acl
def create_stream(context: int, out: int) -> int:
    check_out("stream", out)
    return _runtime.create_stream(context)


@_acl
def destroy_stream(handle: int, force: int) -> None:
    _runtime.destroy_stream(handle, bool(force))


@_acl
def synchronize_stream(handle: int, timeout_ms: int, context: int) -> None:
    if timeout_ms < -1:
        rule = "must be milliseconds, or -1 to wait for ever"
        raise refusal(refusals.ACL_INVALID_PARAM, "timeout", timeout_ms, rule, "pass -1, 0 or more")
    stream = _runtime.find_stream("stream", handle, context).stream
    stream.synchronize(None if timeout_ms == -1 else timeout_ms / 1000)


@_acl
def synchronize_device(context: int) -> None:
    _runtime.synchronize_device(context)


@_acl
def malloc(context: int, size: int, out: int) -> int:
    check_out("devPtr", out)
    return _device_memory.allocate(_runtime.device_of(context), size)


@_acl
def free(address: int) -> None:
    check_out("devPtr", address)
    _device_memory.free(address)


@_acl
def malloc_host(size: int, out: int) -> int:
    check_out("hostPtr", out)
    return _host_memory.allocate(0, size)


@_acl
def free_host(address: int) -> None:
    check_out("hostPtr", address)
    _host_memory.free(address)


@_acl
def memset(address: int, room: int, value: int, size: int) -> None:
    check_out("devPtr", address)
    if size > room:
        raise refusal(refusals.ACL_INVALID_PARAM, "count", size, f"must be at most maxCount, {room}", "set less")
    _device_memory.fill(address, value, size)


@_acl
def memcpy(destination: int, room: int, source: int, size: int, kind: int) -> None:
    check_copy(_device_memory, destination, room, source, size, kind).run()


@_acl
def memcpy_async(destination: int, room: int, source: int, size: int, kind: int, handle: int, context: int) -> None:
    stream = _runtime.find_stream("stream", handle, context).stream
    copy = check_copy(_device_memory, destination, room, source, size, kind)

    def work() -> None:
        with stream.memory():
            copy.run()

    stream.enqueue(work, lambda: "aclrtMemcpyAsync")


@_hccl
def hccl_init_all(num_devices: int, devices: list[int] | None, out: int) -> list[int]:
    check_given("devices", devices)
    check_given("comms", out)
    if devices is None or len(devices) != num_devices:  # more than the library reads
        rule = f"must be at most {NUM_DEVICES}"
        raise refusal(refusals.HCCL_PARA, "ndev", num_devices, rule, "count the devices of the group")
    return _communicators.create(devices)


@_hccl
def hccl_destroy(handle: int) -> None:
    _communicators.destroy(handle)


@_hccl
def hccl_name(handle: int, out: int) -> str:
    check_given("commName", out)
    return _communicators.handles.get("comm", handle).transport.name


@_hccl
def hccl_rank_size(handle: int, out: int) -> int:
    check_given("rankSize", out)
    return _communicators.handles.get("comm", handle).transport.world_size


@_hccl
def hccl_rank_id(handle: int, out: int) -> int:
    check_given("rank", out)
    return _communicators.handles.get("comm", handle).transport.rank


@_aclnn
def create_tensor(*described: Any) -> int:
    return _calls.tensors.add(describe_tensor(*described))


@_aclnn
def destroy_tensor(handle: int) -> None:
    _calls.tensors.pop("tensor", handle)


@_aclnn
def set_repeatable(handle: int) -> None:
    _calls.set_repeatable(handle)


@_aclnn
def destroy_executor(handle: int) -> None:
    _calls.destroy_executor(handle)


@_aclnn
def set_tensor_address(handle: int, side: str, index: int, tensor: int, address: int) -> None:
    _calls.set_tensor_address(handle, side, index, tensor, address)


@_aclnn
def stage_one(operator: str, size_out: int, executor_out: int, *arguments: Any) -> tuple[int, int]:
    check_out("workspaceSize", size_out, status.PARAM_NULLPTR)
    check_out("executor", executor_out, status.PARAM_NULLPTR)
    return _calls.first_stage(operator, arguments)


@_aclnn
def stage_two(operator: str, workspace: int, size: int, handle: int, stream: int, context: int) -> None:
    _calls.second_stage(operator, workspace, size, handle, stream, context)
