"""What the C libraries call: functions of numbers, texts and lists, each answering (status, message, results).

Pointers arrive as numbers. Those to results are only compared with null here; the C side writes through them.
"""

from __future__ import annotations

from functools import partial

import torch

from evenmoe.ascend import status
from evenmoe.ascend.cann import build
from evenmoe.ascend.cann.answers import answers
from evenmoe.ascend.cann.calls import Calls
from evenmoe.ascend.cann.groups import Communicator, Communicators
from evenmoe.ascend.cann.runtime import NUM_DEVICES, Runtime
from evenmoe.ascend.cann.tensors import BYTES_PER_DEVICE, DTYPES, Memory, check_copy, describe_tensor
from evenmoe.ascend.context import buffer_address
from evenmoe.ascend.event import Event
from evenmoe.ascend.executor import stage_one as stage_one_of_operator
from evenmoe.ascend.status import acl_error, check_not_null, null_pointer
from evenmoe.ascend.stream import Stream
from evenmoe.contract.limits import chip_limits
from evenmoe.ops.combine import combine
from evenmoe.ops.dispatch import dispatch
from evenmoe.transport.world import local_world

_runtime = Runtime()
_device_memory, _host_memory = Memory(), Memory()
_communicators = Communicators()
_calls = Calls(_runtime, _device_memory, _communicators)
_initialized = False


def _check_initialized(code: int) -> None:
    if not _initialized:
        raise acl_error(code, "aclInit", "not called", "must come first", "call aclInit")


_before_init = partial(answers, internal=status.ACL_INTERNAL_ERROR, null=status.ACL_INVALID_PARAM)
_acl = partial(_before_init, ready=partial(_check_initialized, status.ACL_UNINITIALIZE))
_aclnn = partial(answers, internal=status.INNER, null=status.PARAM_NULLPTR)
_hccl_ready = partial(_check_initialized, status.HCCL_RUNTIME)
_hccl = partial(answers, internal=status.HCCL_INTERNAL, null=status.HCCL_PTR, ready=_hccl_ready)

digest = build.digest


def use_limits(name: str) -> None:
    """What the operators take, by the name that the tree was written with."""
    _calls.limits = chip_limits(name)


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
    failure = _runtime.drain_device(device)
    if _runtime.reset_device(device):
        _device_memory.free_device(device)
    if failure is not None:
        raise failure
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


def _seconds(timeout_ms: int) -> float | None:
    if timeout_ms < -1:
        rule = "must be milliseconds, or -1 to wait for ever"
        raise acl_error(status.ACL_INVALID_PARAM, "timeout", timeout_ms, rule, "pass -1, 0 or more")
    return None if timeout_ms == -1 else timeout_ms / 1000


@_acl
def synchronize_stream(handle: int, timeout_ms: int, context: int) -> None:
    _stream(handle, context).synchronize(_seconds(timeout_ms))


synchronize_device = _acl(_runtime.synchronize_device)


@partial(_acl, out="status")
def query_stream(handle: int, context: int) -> int:
    return int(not _stream(handle, context).idle)  # aclrtStreamStatus


def _stream(handle: int, context: int) -> Stream:
    return _runtime.find_stream("stream", handle, context).stream


# Events --------------------------------------------------------------------------------------------------------------


@partial(_acl, out="event")
def create_event(context: int) -> int:
    _runtime.device_of(context)
    return _runtime.events.add(Event())


def _event(handle: int, argument: str = "event") -> Event:
    return _runtime.events.get(argument, handle)


@_acl
def destroy_event(handle: int) -> None:
    _runtime.events.pop("event", handle)


record_event = _acl(lambda event, stream, context: _event(event).record(_stream(stream, context)))
stream_wait_event = _acl(lambda stream, event, context: _event(event).wait_on(_stream(stream, context)))


@_acl
def reset_event(event: int, stream: int, context: int) -> None:
    _stream(stream, context).enqueue(_event(event).reset, lambda: "aclrtResetEvent")


query_event = _acl(lambda event: int(_event(event).complete), "status")  # aclrtEventRecordedStatus
synchronize_event = _acl(lambda event, timeout_ms: _event(event).synchronize(_seconds(timeout_ms)))
elapsed_time = _acl(lambda start, end: repr(_event(start, "startEvent").elapsed_ms(_event(end, "endEvent"))), "ms")

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
    _check_count(size, room)
    _device_memory.check_room("devPtr", address, size).fill(address, value, size)


@_acl
def memset_async(address: int, room: int, value: int, size: int, handle: int, context: int) -> None:
    check_not_null(status.ACL_INVALID_PARAM, "devPtr", address)
    _check_count(size, room)
    stream = _stream(handle, context)
    block = _device_memory.check_room("devPtr", address, size)

    def work() -> None:
        with stream.memory():
            block.fill(address, value, size)

    stream.enqueue(work, lambda: "aclrtMemsetAsync")


@_acl
def memory_info(context: int, free: int, total: int) -> tuple[int, int]:
    for argument, address in (("free", free), ("total", total)):
        check_not_null(status.ACL_INVALID_PARAM, argument, address)
    return BYTES_PER_DEVICE - _device_memory.used(_runtime.device_of(context)), BYTES_PER_DEVICE


def _check_count(size: int, room: int) -> None:
    if size > room:
        raise acl_error(status.ACL_INVALID_PARAM, "count", size, f"must be at most maxCount, {room}", "set less")


@_acl
def memcpy(destination: int, room: int, source: int, size: int, kind: int) -> None:
    check_copy(_device_memory, destination, room, source, size, kind).run()


@_acl
def memcpy_async(destination: int, room: int, source: int, size: int, kind: int, handle: int, context: int) -> None:
    stream = _stream(handle, context)
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


@partial(_hccl, out="comm")
def hccl_init_root_info(size: int, root_info: str | None, rank: int, name: str, buffer_mb: int, context: int) -> int:
    if root_info is None:
        raise null_pointer(status.HCCL_PTR, "rootInfo")
    handle = _communicators.join(size, root_info, rank, _runtime.device_of(context), name)
    _end_of_group(handle).set_buffer(buffer_mb)
    return handle


@partial(_hccl, out="comm")
def hccl_init_cluster_info(path: str | None, rank: int, name: str, buffer_mb: int, context: int) -> int:
    if path is None:
        raise null_pointer(status.HCCL_PTR, "clusterInfo")
    handle = _communicators.join_by_table(path, rank, _runtime.device_of(context), name)
    _end_of_group(handle).set_buffer(buffer_mb)
    return handle


@partial(_hccl, out="comm")
def hccl_find(name: str | None, context: int) -> int:
    if name is None:
        raise null_pointer(status.HCCL_PTR, "group")
    return _communicators.find(name, _runtime.device_of(context))


@_hccl
def hccl_buffer(handle: int, address: int, size: int) -> tuple[int, int]:
    return _buffer_of(_end_of_group(handle), _end_of_group(handle).transport.rank, address, size)


@_hccl
def hccl_remote_buffer(handle: int, rank: int, address: int, size: int) -> tuple[int, int]:
    return _buffer_of(_end_of_group(handle), rank, address, size)


def _buffer_of(end: Communicator, rank: int, address: int, size: int) -> tuple[int, int]:
    for argument, out in (("addr", address), ("size", size)):
        check_not_null(status.HCCL_PTR, argument, out)
    group = end.transport
    if not 0 <= rank < group.world_size:
        rule = f"must be 0 to {group.world_size - 1}, a rank of the group"
        raise acl_error(status.HCCL_PARA, "remoteRank", rank, rule, "number the ranks of the group from 0")
    return buffer_address(group.name, rank), end.buffer_bytes


@_hccl
def hccl_barrier(handle: int, stream: int, context: int) -> None:
    _communicators.barrier(handle, _stream(stream, context))


hccl_root_info = _hccl(_communicators.root_info, "rootInfo")
hccl_destroy = _hccl(_communicators.destroy)
hccl_name = _hccl(lambda handle: _end_of_group(handle).transport.name, "commName")
hccl_rank_size = _hccl(lambda handle: _end_of_group(handle).transport.world_size, "rankSize")
hccl_rank_id = _hccl(lambda handle: _end_of_group(handle).transport.rank, "rank")

# Arrays, tensors and the two stages ----------------------------------------------------------------------------------


@_aclnn
def create_int_array(values: list[int] | None) -> int:
    if values is None:
        raise null_pointer(status.PARAM_NULLPTR, "value")
    return _calls.int_arrays.add(tuple(values))


@_aclnn
def destroy_int_array(handle: int) -> None:
    _calls.int_arrays.pop("array", handle)


int_array_size = _aclnn(lambda handle: len(_calls.int_arrays.get("array", handle)), "size")

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
