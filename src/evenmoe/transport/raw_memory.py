"""Operations of compiled kernels on memory that other ranks read and write: by address, and in an order that holds.

A rank publishes rows by writing them and then a number beside them; whoever has read that number reads the rows. Plain
loads and stores may be reordered, by the compiler everywhere and by processors such as aarch64 (x86-64 keeps loads
among loads and stores among stores). So the number is stored with release order and read with acquire order: all that
was written before such a store is seen after a load that sees what it stored, by the memory model of C11 and LLVM, on
every processor.

Callers keep the arrays that they take addresses of. These are intrinsics of numba; its cache does not watch this file.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

instruction: Any = intrinsic  # whose type leaves the context among the arguments that callers give


@instruction
def copy_bytes(_context: Any, _to: Any, _source: Any, _count: Any) -> Any:
    """Copy `count` bytes from one address to another, which do not overlap."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        target, source = (builder.inttoptr(argument, cgutils.voidptr_t) for argument in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@instruction
def load_acquire(_context: Any, _address: Any) -> Any:
    """Read the int64 at an address; nothing that follows is read or written before."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], cgutils.intp_t.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@instruction
def store_release(_context: Any, _address: Any, _value: Any) -> Any:
    """Write an int64 to an address, after everything before has been read and written."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], cgutils.intp_t.as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@instruction
def fence_acquire(_context: Any) -> Any:
    """Read and write nothing that follows before what has been read so far."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("acquire")
        return context.get_dummy_value()

    return types.void(), generate


@instruction
def float_of_bits(_context: Any, _bits: Any) -> Any:
    """The float32 that has these bits."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@instruction
def pointer_to(_context: Any, _address: Any) -> Any:
    """An address as the pointer of which `numba.carray` makes an array."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate
