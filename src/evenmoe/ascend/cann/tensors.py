"""`aclTensor`: a view described by shape, strides, offset and address, and the torch tensor over the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from evenmoe.ascend import status
from evenmoe.ascend.cann.memory import Memory
from evenmoe.ascend.status import acl_error, null_pointer
from evenmoe.ascend.tensors import check_no_overlap
from evenmoe.errors import ConstraintError, MissingArgumentError, UnsupportedTypeError

DTYPES = {  # aclDataType; those without an entry have no torch dtype
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    7: torch.uint16,
    8: torch.uint32,
    9: torch.int64,
    10: torch.uint64,
    11: torch.float64,
    12: torch.bool,
    16: torch.complex64,
    17: torch.complex128,
    27: torch.bfloat16,
    33: torch.complex32,
    35: torch.float8_e5m2,
    36: torch.float8_e4m3fn,
}
_FRACTAL_NZ = 29
_MOST_DIMS = 25  # the library reads no longer list


@dataclass(frozen=True)
class TensorDescription:
    """What aclCreateTensor was told; strides and offset count elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: int
    format: int
    address: int

    def moved(self, address: int) -> TensorDescription:
        """The same view of other memory."""
        return replace(self, address=address)


def describe_tensor(
    dims: Sequence[int] | None,
    num_dims: int,
    dtype: int,
    strides: Sequence[int] | None,
    offset: int,
    format: int,
    storage_dims: Sequence[int] | None,
    num_storage_dims: int,
    address: int,
) -> TensorDescription:
    """The description, as far as it can be one; which memory it needs is looked at when an operator is called.

    Raises:
        AclError: dimensions that are missing, negative or too many, a negative stride or offset (161002).
    """
    for argument, values, count in (("viewDims", dims, num_dims), ("storageDims", storage_dims, num_storage_dims)):
        if count > _MOST_DIMS:
            raise _invalid(f"{argument}Num", count, f"must be at most {_MOST_DIMS}", "use fewer dimensions")
        if values is None and count:
            raise null_pointer(status.PARAM_NULLPTR, argument)
        _check_not_negative(argument, values or ())
    shape = tuple(dims or ())
    if strides is None:
        strides = _contiguous(shape)
    _check_not_negative("stride", strides)
    _check_not_negative("offset", [offset])
    return TensorDescription(shape, tuple(strides), offset, dtype, format, address)


def _check_not_negative(argument: str, values: Sequence[int]) -> None:
    if any(value < 0 for value in values):
        raise _invalid(argument, list(values), "must not be negative", "pass 0 or more")


def _contiguous(shape: tuple[int, ...]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]


def check_size(argument: str, tensor: TensorDescription) -> None:
    """Torch counts elements in 64 bits.

    Raises:
        ConstraintError: a shape with 2^63 elements or more.
    """
    if prod(max(size, 1) for size in tensor.shape) >= 2**63:
        raise ConstraintError(argument, f"{tensor.shape}", "must have fewer than 2^63 elements", "use a smaller shape")


def check_type(argument: str, tensor: TensorDescription) -> torch.dtype:
    """The torch dtype of a tensor.

    Raises:
        UnsupportedTypeError: a data type that torch does not have.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        rule = "must be a type that the operator takes"
        raise UnsupportedTypeError(argument, f"of aclDataType {tensor.dtype}", rule, "convert it")
    return dtype


def shape_only(argument: str, tensor: TensorDescription) -> torch.Tensor:
    """A tensor of this shape and type without any memory, for checks that look at nothing else."""
    dtype = check_type(argument, tensor)
    check_size(argument, tensor)
    return torch.empty((), dtype=dtype, device="meta").as_strided(tensor.shape, [0] * len(tensor.shape))


def view(memory: Memory, argument: str, tensor: TensorDescription, written: bool) -> torch.Tensor:
    """The torch tensor over the memory that a description names.

    Args:
        argument: its name in the call, for messages.
        written: whether the operator writes it; then no two elements may share memory.

    Raises:
        MissingArgumentError: it has elements, and a null address.
        UnsupportedTypeError: memory that is not the device's, too small, or not aligned to the element.
        ConstraintError: the format NZ; an output whose elements overlap.
    """
    dtype = check_type(argument, tensor)
    check_size(argument, tensor)
    if tensor.format == _FRACTAL_NZ:
        raise ConstraintError(argument, "in format ACL_FORMAT_FRACTAL_NZ", "must be ND", "use ACL_FORMAT_ND")
    if 0 in tensor.shape:
        return torch.empty(tensor.shape, dtype=dtype)
    if tensor.address == 0:
        raise MissingArgumentError(argument, "a tensor at a null address", "must have memory", "call aclrtMalloc")
    if written:
        check_no_overlap(argument, tensor.shape, tensor.strides)
    found = memory.find(tensor.address)
    if found is None:
        raise UnsupportedTypeError(
            argument, f"at {tensor.address:#x}", "must lie in memory of aclrtMalloc", "copy it to the device"
        )
    block, byte = found
    size = dtype.itemsize
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if byte % size:
        rule = f"must be aligned to its elements of {size} bytes"
        raise UnsupportedTypeError(argument, f"at {tensor.address:#x}", rule, "align it")
    needed, room = (last + 1) * size, block.data.numel() - byte
    if needed > room:
        rule = f"must have room for its {needed} bytes"
        raise UnsupportedTypeError(argument, f"in an allocation with {room} bytes", rule, "allocate more")
    empty = torch.empty(0, dtype=dtype)
    return empty.set_(block.data.untyped_storage(), byte // size + tensor.offset, tensor.shape, tensor.strides)


def _invalid(argument: str, value: object, rule: str, fix: str) -> Exception:
    return acl_error(status.PARAM_INVALID, argument, value, rule, fix)
