"""How the C functions refuse: the message form of `evenmoe.errors`, with the runtime's codes."""

from __future__ import annotations

from evenmoe.ascend.status import AclError

ACL_INVALID_PARAM = 100000  # ACL_ERROR_INVALID_PARAM
ACL_UNINITIALIZE = 100001  # ACL_ERROR_UNINITIALIZE
ACL_REPEAT_INITIALIZE = 100002  # ACL_ERROR_REPEAT_INITIALIZE
ACL_INTERNAL_ERROR = 500000  # ACL_ERROR_INTERNAL_ERROR
RT_INVALID_DEVICEID = 107001  # ACL_ERROR_RT_INVALID_DEVICEID
RT_CONTEXT_NULL = 107002  # ACL_ERROR_RT_CONTEXT_NULL
RT_STREAM_CONTEXT = 107003  # ACL_ERROR_RT_STREAM_CONTEXT
RT_MEMORY_ALLOCATION = 207001  # ACL_ERROR_RT_MEMORY_ALLOCATION
HCCL_PARA = 1  # HCCL_E_PARA
HCCL_PTR = 2  # HCCL_E_PTR
HCCL_INTERNAL = 4  # HCCL_E_INTERNAL
HCCL_RUNTIME = 15  # HCCL_E_RUNTIME


def refusal(code: int, argument: str, value: object, rule: str, fix: str) -> AclError:
    """An error to raise: argument, value, rule, fix.

    >>> print(refusal(ACL_INVALID_PARAM, "size", 0, "must be 1 or more", "allocate what you need"))
    `size` is 0: it must be 1 or more; allocate what you need.
    """
    return AclError(code, f"`{argument}` is {value}: it {rule}; {fix}.")


def null(code: int, argument: str) -> AclError:
    """The refusal of a null pointer."""
    return refusal(code, argument, "a null pointer", "must be given", "pass the address of one")
