"""Status codes of the two-stage calls and of the runtime calls around them, and each thread's most recent message.

The aclnn codes are those of specification §6, the runtime's those of the published header rt_error_codes.h.
"""

from __future__ import annotations

import re
import threading

from evenmoe.errors import EvenmoeError

SUCCESS = 0  # ACL_SUCCESS, ACLNN_SUCCESS

PARAM_NULLPTR = 161001  # ACLNN_ERR_PARAM_NULLPTR
PARAM_INVALID = 161002  # ACLNN_ERR_PARAM_INVALID
RUNTIME_ERROR = 361001  # ACLNN_ERR_RUNTIME_ERROR
INNER = 561000  # ACLNN_ERR_INNER
TILING_ERROR = 561002  # ACLNN_ERR_INNER_TILING_ERROR
INNER_NULLPTR = 561103  # ACLNN_ERR_INNER_NULLPTR

RT_PARAM_INVALID = 107000  # ACL_ERROR_RT_PARAM_INVALID
RT_INVALID_HANDLE = 107017  # ACL_ERROR_RT_INVALID_HANDLE
RT_STREAM_ABORT = 107023  # ACL_ERROR_RT_STREAM_ABORT
RT_STREAM_SYNC_TIMEOUT = 507046  # ACL_ERROR_RT_STREAM_SYNC_TIMEOUT
RT_EVENT_SYNC_TIMEOUT = 507047  # ACL_ERROR_RT_EVENT_SYNC_TIMEOUT

ACL_INVALID_PARAM = 100000  # ACL_ERROR_INVALID_PARAM
ACL_UNINITIALIZE = 100001  # ACL_ERROR_UNINITIALIZE
ACL_REPEAT_INITIALIZE = 100002  # ACL_ERROR_REPEAT_INITIALIZE
ACL_INTERNAL_ERROR = 500000  # ACL_ERROR_INTERNAL_ERROR
RT_INVALID_DEVICEID = 107001  # ACL_ERROR_RT_INVALID_DEVICEID
RT_CONTEXT_NULL = 107002  # ACL_ERROR_RT_CONTEXT_NULL
RT_STREAM_CONTEXT = 107003  # ACL_ERROR_RT_STREAM_CONTEXT
RT_EVENT_TIMESTAMP_INVALID = 107006  # ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID
RT_MEMORY_ALLOCATION = 207001  # ACL_ERROR_RT_MEMORY_ALLOCATION
HCCL_PARA = 1  # HCCL_E_PARA
HCCL_PTR = 2  # HCCL_E_PTR
HCCL_INTERNAL = 4  # HCCL_E_INTERNAL
HCCL_NOT_SUPPORT = 5  # HCCL_E_NOT_SUPPORT
HCCL_NOT_FOUND = 6  # HCCL_E_NOT_FOUND
HCCL_TIMEOUT = 9  # HCCL_E_TIMEOUT
HCCL_OPEN_FILE = 10  # HCCL_E_OPEN_FILE_FAILURE
HCCL_TCP_CONNECT = 11  # HCCL_E_TCP_CONNECT
HCCL_RUNTIME = 15  # HCCL_E_RUNTIME

_recent = threading.local()


class AclError(RuntimeError):
    """An error of the runtime or of a second stage; `status` (int) is its code, `str()` the message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status, self.message = status, message

    def __str__(self) -> str:
        return self.message


class NpuCallError(EvenmoeError, RuntimeError):
    """A call that is not valid on Atlas A3; `status` (int) is the code of its first stage: 161001, 161002 or 561002."""

    @classmethod
    def of(cls, error: EvenmoeError) -> NpuCallError:
        """The same error as torch_npu raises it."""
        raised = cls(error.argument, error.value, error.rule, of_the_chip(error).fix)
        raised.status = error.status
        return raised


def acl_error(code: int, argument: str, value: object, rule: str, fix: str) -> AclError:
    """An error to raise: argument, value, rule, fix.

    >>> print(acl_error(ACL_INVALID_PARAM, "size", 0, "must be 1 or more", "allocate what you need"))
    `size` is 0: it must be 1 or more; allocate what you need.
    """
    return AclError(code, f"`{argument}` is {value}: it {rule}; {fix}.")


def null_pointer(code: int, argument: str) -> AclError:
    """The error of a null pointer."""
    return acl_error(code, argument, "a null pointer", "must be given", "pass the address of one")


def check_not_null(code: int, argument: str, address: object) -> None:
    """Raise an AclError for a null pointer, a number or a list."""
    if address is None or address == 0:
        raise null_pointer(code, argument)


def of_the_chip(error: EvenmoeError) -> EvenmoeError:
    """The same error without the advice to call with other limits, which the functions of the chip cannot take.

    >>> from evenmoe.errors import ConstraintError
    >>> use = 'use 1 to 512 tokens, or lift this bound of atlas-a3 with limits="relaxed"'
    >>> print(of_the_chip(ConstraintError("x", "of 513 tokens", "must have 1 to 512 tokens", use)))
    `x` is of 513 tokens: it must have 1 to 512 tokens; use 1 to 512 tokens.
    """
    fix = re.sub(r', or lift this bound of [\w-]+ with limits="[\w-]+"', "", error.fix)
    return type(error)(error.argument, error.value, error.rule, fix)


def set_recent_message(message: str) -> None:
    """Remember why the calling thread's last call failed."""
    _recent.message = message


def take_recent_message() -> str | None:
    """The calling thread's most recent message, or None; taking it clears it, as `aclGetRecentErrMsg` does.

    >>> set_recent_message("`expert_ids` is None")
    >>> take_recent_message(), take_recent_message()
    ('`expert_ids` is None', None)
    """
    message: str | None = getattr(_recent, "message", None)
    _recent.message = None
    return message


def status_of(error: Exception) -> int:
    """The code of an error: its own, or ACLNN_ERR_RUNTIME_ERROR for one that has none. Its text becomes recent."""
    set_recent_message(str(error) or type(error).__name__)
    return getattr(error, "status", RUNTIME_ERROR)
