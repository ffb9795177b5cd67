"""What the C libraries call: functions of numbers, texts and lists, each answering (status, message, results).

Pointers arrive as numbers. Those to results are only compared with null here; the C side writes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps

import torch

from evenmoe.ascend import status
from evenmoe.ascend.cann import build
from evenmoe.ascend.cann.calls import Calls
from evenmoe.ascend.cann.runtime import NUM_DEVICES, Communicator, Communicators, Runtime
from evenmoe.ascend.cann.tensors import DTYPES, Memory, check_copy, describe_tensor
from evenmoe.ascend.executor import stage_one as stage_one_of_operator
from evenmoe.ascend.status import AclError, acl_error, check_not_null, null_pointer
from evenmoe.ops.combine import combine
from evenmoe.ops.dispatch import dispatch
from evenmoe.transport.world import local_world

Result = int | str | Sequence[int | str] | None
Answer = tuple[int, str | None, Sequence[int | str]]

_runtime = Runtime()
_device_memory, _host_memory = Memory(), Memory()
_communicators = Communicators()
_calls = Calls(_runtime, _device_memory, _communicators)
_initialized = False


def _answers(
    function: Callable[..., Result], out: str = "", *, internal: int, null: int, uninitialized: int | None = None
) -> Callable[..., Answer]:
    """The function as C calls it.

    Args:
        out: the C name of a pointer to the result, which is the last argument and must not be null.
        internal, null, uninitialized: statuses for a mistake of ours, a null `out`, and a call before aclInit.
    """

    @wraps(function)
    def answer(*arguments: object) -> Answer:
        try:
            if uninitialized is not None and not _initialized:
                raise acl_error(uninitialized, "aclInit", "not called", "must come first", "call aclInit")
            if out:
                check_not_null(null, out, arguments[-1])
                arguments = arguments[:-1]
            results = function(*arguments)
        except AclError as error:
            return error.status, str(error), ()
        except Exception as error:  # a mistake of ours must not end the C program
            return internal, f"internal error: {type(error).__name__}: {error}", ()
        if results is None:
            return 0, None, ()
        return 0, None, (results,) if isinstance(results, int | str) else results

    return answer


_before_init = partial(_answers, internal=status.ACL_INTERNAL_ERROR, null=status.ACL_INVALID_PARAM)
_acl = partial(_before_init, uninitialized=status.ACL_UNINITIALIZE)
_aclnn = partial(_answers, internal=status.INNER, null=status.PARAM_NULLPTR)
_hccl = partial(_answers, internal=status.HCCL_INTERNAL, null=status.HCCL_PTR, uninitialized=status.HCCL_RUNTIME)

digest = build.digest


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
    """Call the operators once, since torch imports 800 modules at the first call, and numba compiles the sums.

    That is some seconds of CPU time. It belongs into aclInit, not under the timeout of the first synchronization: a
    program that gave up there would end while its streams' threads still compile, which LLVM answers with an abort.
    """
    ids, table = torch.zeros((1, 1), dtype=torch.int32), torch.tensor([[1, 0]], dtype=torch.int32)
    attributes = {"local_rank_id": 0, "world_size": 2, "balance_mode": 0}
    given = {"expert_ids": ids, "eplb_table": table, **attributes, "balanced_expert_ids": ids.clone()}
    stage_one_of_operator("MoeEPLBUpdateExpert", given).run()
    with local_world(1) as world, torch.inference_mode():
        group = world.ranks[0].ep
        dispatched = dispatch(torch.zeros((1, 1), dtype=torch.bfloat16), ids, ep=group, num_experts=1)
        combine(dispatched.expand_x, ids, dispatched, torch.ones((1, 1)), ep=group)


def _init() -> None:
    global _initialized  # noqa: PLW0603  the C program's state is the process's
    if _initialized:
        code = status.ACL_REPEAT_INITIALIZE
        raise acl_error(code, "aclInit", "called again", "must be called once", "call aclFinalize before")
    _warm_up()
    _initialized = True


init = _before_init(_init)


@_acl
def finalize() -> None:
    global _initialized  # noqa: PLW0603
    _end_everything()
    _initialized = False


@_aclnn
def data_type_size(data_type: int) -> int:
    dtype = DTYPES.get(data_type)
    return dtype.itemsize if dtype else 0


# Devices, contexts and streams. What changes the thread's context is given the one before, and returns the one after.

device_count = _acl(lambda: NUM_DEVICES, "count")
set_device = _acl(lambda device, context: _runtime.set_device(device))
get_device = _acl(_runtime.device_of, "deviceId")


@_acl
def reset_device(device: int, context: int) -> int:
    if _runtime.reset_device(device):
        _device_memory.free_device(device)
    return context if context in _runtime.contexts.handles() else 0


create_context = _acl(_runtime.create_context, "context")


@_acl
def destroy_context(handle: int, context: int) -> int:
    _runtime.destroy_context(handle)
    return 0 if handle == context else context


@_acl
def set_current_context(handle: int, context: int) -> int:
    _runtime.contexts.get("context", handle)
    return handle


@partial(_acl, out="context")
def get_current_context(context: int) -> int:
    _runtime.device_of(context)
    return context


create_stream = _acl(_runtime.create_stream, "stream")
destroy_stream = _acl(lambda handle, force: _runtime.destroy_stream(handle, bool(force)))


@_acl
def synchronize_stream(handle: int, timeout_ms: int, context: int) -> None:
    if timeout_ms < -1:
        rule = "must be milliseconds, or -1 to wait for ever"
        raise acl_error(status.ACL_INVALID_PARAM, "timeout", timeout_ms, rule, "pass -1, 0 or more")
    stream = _runtime.find_stream("stream", handle, context).stream
    stream.synchronize(None if timeout_ms == -1 else timeout_ms / 1000)


synchronize_device = _acl(_runtime.synchronize_device)

# Memory --------------------------------------------------------------------------------------------------------------


@partial(_acl, out="devPtr")
def malloc(context: int, size: int) -> int:
    return _device_memory.allocate(_runtime.device_of(context), size)


@_acl
def free(address: int) -> None:
    check_not_null(status.ACL_INVALID_PARAM, "devPtr", address)
    _device_memory.free(address)


malloc_host = _acl(lambda size: _host_memory.allocate(0, size), "hostPtr")


@_acl
def free_host(address: int) -> None:
    check_not_null(status.ACL_INVALID_PARAM, "hostPtr", address)
    _host_memory.free(address)


@_acl
def memset(address: int, room: int, value: int, size: int) -> None:
    check_not_null(status.ACL_INVALID_PARAM, "devPtr", address)
    if size > room:
        raise acl_error(status.ACL_INVALID_PARAM, "count", size, f"must be at most maxCount, {room}", "set less")
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


# Groups --------------------------------------------------------------------------------------------------------------


@_hccl
def hccl_init_all(num_devices: int, devices: list[int] | None, out: int) -> list[int]:
    if devices is None or out == 0:
        raise null_pointer(status.HCCL_PTR, "devices" if devices is None else "comms")
    if len(devices) != num_devices:  # more than the library reads
        rule = f"must be at most {NUM_DEVICES}"
        raise acl_error(status.HCCL_PARA, "ndev", num_devices, rule, "count the devices of the group")
    return _communicators.create(devices)


def _end_of_group(handle: int) -> Communicator:
    return _communicators.handles.get("comm", handle)


hccl_destroy = _hccl(_communicators.destroy)
hccl_name = _hccl(lambda handle: _end_of_group(handle).transport.name, "commName")
hccl_rank_size = _hccl(lambda handle: _end_of_group(handle).transport.world_size, "rankSize")
hccl_rank_id = _hccl(lambda handle: _end_of_group(handle).transport.rank, "rank")

# Tensors and the two stages ------------------------------------------------------------------------------------------

create_tensor = _aclnn(lambda *described: _calls.tensors.add(describe_tensor(*described)))


@_aclnn
def destroy_tensor(handle: int) -> None:
    _calls.tensors.pop("tensor", handle)


set_repeatable = _aclnn(_calls.set_repeatable)
destroy_executor = _aclnn(_calls.destroy_executor)
set_tensor_address = _aclnn(_calls.set_tensor_address)
stage_two = _aclnn(_calls.second_stage)
output_sizes = _aclnn(_calls.output_sizes)


@_aclnn
def stage_one(operator: str, size_out: int, executor_out: int, *arguments: object) -> tuple[int, int]:
    check_not_null(status.PARAM_NULLPTR, "workspaceSize", size_out)
    check_not_null(status.PARAM_NULLPTR, "executor", executor_out)
    return _calls.first_stage(operator, arguments)
