"""The two-stage aclnn calls (specification §1.2, §2.1, §3.1, §4, §6), over CPU tensors instead of device memory.

`aclnnXxxGetWorkspaceSize(…) -> (status, workspace_size, executor)` takes the C function's arguments in its order, but
for the two pointers that it returns through; names are in snake_case, a null pointer is None, and outputs are tensors
that the second stage writes in place, only as far as the operator writes them. It never raises for a wrong value: the
status says what kind of mistake, `aclGetRecentErrMsg` which argument, and size and executor are 0 and None.

`aclnnXxx(workspace, workspace_size, executor, stream) -> status` puts the work on a stream and returns at once, so one
thread can launch on the streams of all ranks. `workspace` is any object for memory (a tensor, an array or
a bytearray must really have `workspace_size` bytes), None a null pointer. Failures while running show at
synchronization.

Two ranks, one thread; rank 0's token goes to expert 1 and rank 1's to expert 0:

>>> import torch
>>> import evenmoe as em
>>> from evenmoe.ascend import aclnn
>>> def launch(rank, stream):
...     i32, bf16 = {"dtype": torch.int32}, {"dtype": torch.bfloat16}
...     expand_x, counts = torch.zeros(2, 1024, **bf16), torch.zeros(2, **i32)
...     status, size, executor = aclnn.aclnnMoeDistributeDispatchV2GetWorkspaceSize(
...         torch.full((1, 1024), float(rank.index), **bf16), torch.tensor([[1 - rank.index]], **i32), None, None, None,
...         rank.ep.name, 2, rank.index, 2, "", 0, 0, 0, 0, 0, 0, 0, 1, "",
...         expand_x, torch.zeros(2), torch.zeros(256, **i32), torch.zeros(1, dtype=torch.int64), counts,
...         torch.zeros(0, **i32), torch.zeros(2))
...     workspace = torch.empty(size, dtype=torch.uint8)
...     return aclnn.aclnnMoeDistributeDispatchV2(workspace, size, executor, stream), expand_x, counts
>>> with em.local_world(ep_size=2) as world:
...     streams = [aclnn.aclrtCreateStream()[1] for _ in world.ranks]
...     launched = [launch(rank, stream) for rank, stream in zip(world.ranks, streams)]
...     [aclnn.aclrtSynchronizeStream(stream) for stream in streams]
[0, 0]
>>> [(status, expand_x[0, 0].item(), counts.tolist()) for status, expand_x, counts in launched]
[(0, 1.0, [0, 1]), (0, 0.0, [1, 1])]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import torch

from evenmoe.ascend import status
from evenmoe.ascend.executor import Executor, stage_one
from evenmoe.ascend.status import AclError, status_of, take_recent_message
from evenmoe.ascend.stream import Stream
from evenmoe.ascend.tensors import check_memory
from evenmoe.contract.operators import SIGNATURES
from evenmoe.errors import EvenmoeError


def aclrtCreateStream() -> tuple[int, Stream]:
    """Create a stream with a thread of its own: (0, stream).

    >>> status, stream = aclrtCreateStream()
    >>> status, aclrtSynchronizeStream(stream), aclrtDestroyStream(stream), aclrtSynchronizeStream(stream)
    (0, 0, 0, 107017)
    >>> aclGetRecentErrMsg()
    'stream has been destroyed; create another one with aclrtCreateStream.'
    """
    return status.SUCCESS, Stream()


def aclrtSynchronizeStream(stream: Stream | None) -> int:
    """Wait until the work on a stream is done.

    Returns:
        0; 361001 when a call on the stream failed since the last wait (the message says which and why, of the first);
        107000 for a null stream; 107017 and 107023 for one destroyed before and meanwhile.
    """
    return _status(lambda: given_stream(stream).synchronize())


def aclrtSynchronizeStreamWithTimeout(stream: Stream | None, timeout: int) -> int:
    """Wait until the work on a stream is done, at most `timeout` milliseconds; −1 waits for ever.

    Returns:
        As `aclrtSynchronizeStream`; 507046 when the time is over (the message names the calls, and the ranks that they
        wait for; the work goes on); 107000 for another negative timeout.
    """

    def wait() -> None:
        if type(timeout) is not int or timeout < -1:
            raise AclError(
                status.RT_PARAM_INVALID, f"`timeout` is {timeout!r}: it must be milliseconds, or -1 to wait for ever."
            )
        given_stream(stream).synchronize(None if timeout == -1 else timeout / 1000)

    return _status(wait)


def aclrtDestroyStream(stream: Stream | None) -> int:
    """Destroy a stream: work that has not begun is dropped, and no tensor is touched after this returns.

    Returns:
        0; 107000 for a null stream.
    """
    return _status(lambda: given_stream(stream).destroy())


def aclSetAclOpExecutorRepeatable(executor: Executor | None) -> int:
    """Let an executor serve more than one call; directly after the first stage.

    Returns:
        0; 561103 for a null executor; 561000 for one used or destroyed before.
    """
    return _status(lambda: given_executor(executor).make_repeatable())


def aclDestroyAclOpExecutor(executor: Executor | None) -> int:
    """Give back an executor that is repeatable or was not used; its calls that are on a stream already still run.

    Returns:
        0; 561103 for a null executor; 561000 for one used or destroyed before.
    """
    return _status(lambda: given_executor(executor).destroy())


def aclGetRecentErrMsg() -> str | None:
    """The message of the calling thread's last failed call, or None; it is cleared."""
    return take_recent_message()


def _status(call: Callable[[], None]) -> int:
    try:
        call()
    except AclError as error:
        return status_of(error)
    return status.SUCCESS


def given_stream(stream: Stream | None, code: int = status.RT_PARAM_INVALID) -> Stream:
    """The stream, or an AclError with this code for a null one."""
    if not isinstance(stream, Stream):
        raise AclError(code, f"`stream` is {stream!r}: it must be a stream; create one with aclrtCreateStream.")
    return stream


def given_executor(executor: Executor | None, code: int = status.INNER_NULLPTR) -> Executor:
    """The executor, or an AclError with this code for a null one."""
    if not isinstance(executor, Executor):
        raise AclError(code, f"`executor` is {executor!r}: it must be an executor; call the first stage for one.")
    return executor


FirstStage = Callable[..., tuple[int, int, Executor | None]]
SecondStage = Callable[[object, int, Executor | None, Stream | None], int]


def _two_stages(operator: str) -> tuple[FirstStage, SecondStage]:
    """The two functions of one operator, made from its listing."""
    arguments = SIGNATURES[operator]
    outputs = arguments.names("output")
    signature = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in arguments.arguments]
    )

    def first(*args: object, **kwargs: object) -> tuple[int, int, Executor | None]:
        given = signature.bind(*args, **kwargs).arguments  # a wrong number of arguments, C would not compile
        try:
            executor = stage_one(operator, given)
            check_memory(given, outputs)
        except EvenmoeError as error:
            return status_of(error), 0, None
        return status.SUCCESS, executor.workspace_size, executor

    def second(workspace: object, workspace_size: int, executor: Executor | None, stream: Stream | None) -> int:
        try:
            call, queue = given_executor(executor, status.PARAM_NULLPTR), given_stream(stream, status.PARAM_NULLPTR)
            call.launch(operator, workspace is not None, _bytes_of(workspace, workspace_size), queue)
        except AclError as error:
            return status_of(error)
        return status.SUCCESS

    first.__name__, second.__name__ = f"aclnn{operator}GetWorkspaceSize", f"aclnn{operator}"
    for function in (first, second):
        function.__qualname__, function.__module__ = function.__name__, __name__
    setattr(first, "__signature__", signature)  # noqa: B010  what help() shows
    first.__doc__ = f"First stage of {operator}: check the call, (status, workspace_size, executor)."
    second.__doc__ = f"Second stage of {operator}: put the call on a stream, and return a status at once."
    return first, second


def _bytes_of(workspace: object, workspace_size: object) -> int:
    """What the caller says, or the size of the tensor or buffer where that is less."""
    if type(workspace_size) is not int:
        raise AclError(status.PARAM_INVALID, f"`workspaceSize` is {workspace_size!r}: it must be an int, in bytes.")
    if isinstance(workspace, torch.Tensor):
        return min(workspace_size, workspace.numel() * workspace.element_size())
    if isinstance(workspace, bytearray):
        return min(workspace_size, len(workspace))
    if isinstance(workspace, np.ndarray | memoryview):
        return min(workspace_size, workspace.nbytes)
    return workspace_size


aclnnMoeEPLBUpdateExpertGetWorkspaceSize, aclnnMoeEPLBUpdateExpert = _two_stages("MoeEPLBUpdateExpert")
aclnnMoeUpdateExpertGetWorkspaceSize, aclnnMoeUpdateExpert = _two_stages("MoeUpdateExpert")
aclnnMoeDistributeDispatchGetWorkspaceSize, aclnnMoeDistributeDispatch = _two_stages("MoeDistributeDispatch")
aclnnMoeDistributeDispatchV2GetWorkspaceSize, aclnnMoeDistributeDispatchV2 = _two_stages("MoeDistributeDispatchV2")
aclnnMoeDistributeDispatchV3GetWorkspaceSize, aclnnMoeDistributeDispatchV3 = _two_stages("MoeDistributeDispatchV3")
aclnnMoeDistributeDispatchV4GetWorkspaceSize, aclnnMoeDistributeDispatchV4 = _two_stages("MoeDistributeDispatchV4")
aclnnMoeDistributeCombineGetWorkspaceSize, aclnnMoeDistributeCombine = _two_stages("MoeDistributeCombine")
aclnnMoeDistributeCombineV2GetWorkspaceSize, aclnnMoeDistributeCombineV2 = _two_stages("MoeDistributeCombineV2")
aclnnMoeDistributeCombineV3GetWorkspaceSize, aclnnMoeDistributeCombineV3 = _two_stages("MoeDistributeCombineV3")
aclnnMoeDistributeCombineV4GetWorkspaceSize, aclnnMoeDistributeCombineV4 = _two_stages("MoeDistributeCombineV4")
aclnnMoeDistributeDispatchV5GetWorkspaceSize, aclnnMoeDistributeDispatchV5 = _two_stages("MoeDistributeDispatchV5")
aclnnMoeDistributeCombineV5GetWorkspaceSize, aclnnMoeDistributeCombineV5 = _two_stages("MoeDistributeCombineV5")
aclnnMoeDistributeCombineAddRmsNormGetWorkspaceSize, aclnnMoeDistributeCombineAddRmsNorm = _two_stages(
    "MoeDistributeCombineAddRmsNorm"
)
aclnnMoeDistributeCombineAddRmsNormV2GetWorkspaceSize, aclnnMoeDistributeCombineAddRmsNormV2 = _two_stages(
    "MoeDistributeCombineAddRmsNormV2"
)
aclnnMoeDistributeDispatchSetupGetWorkspaceSize, aclnnMoeDistributeDispatchSetup = _two_stages(
    "MoeDistributeDispatchSetup"
)
aclnnMoeDistributeDispatchTeardownGetWorkspaceSize, aclnnMoeDistributeDispatchTeardown = _two_stages(
    "MoeDistributeDispatchTeardown"
)
aclnnMoeDistributeCombineSetupGetWorkspaceSize, aclnnMoeDistributeCombineSetup = _two_stages(
    "MoeDistributeCombineSetup"
)
aclnnMoeDistributeCombineTeardownGetWorkspaceSize, aclnnMoeDistributeCombineTeardown = _two_stages(
    "MoeDistributeCombineTeardown"
)
