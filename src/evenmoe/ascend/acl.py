"""The runtime calls around the two-stage operators: streams, executors and the recent message, with status codes.

Names and order are those of the C functions; what C returns through a pointer comes behind the status.
"""

from __future__ import annotations

from collections.abc import Callable

from evenmoe.ascend import status
from evenmoe.ascend.executor import Executor
from evenmoe.ascend.status import AclError, status_of, take_recent_message
from evenmoe.ascend.stream import Stream


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
