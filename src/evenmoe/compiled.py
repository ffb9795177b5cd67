"""`compiled`: how every kernel is compiled by numba, with a cache on disk wherever there is room for one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from numba import njit
from numba.core.caching import FunctionCache
from numba.core.dispatcher import Dispatcher

Function = TypeVar("Function", bound=Callable)


def compiled(function: Function) -> Function:
    """Compile a function when it is first called, without the interpreter's lock.

    The machine code is kept beside the source or in the user's cache folder. Where neither can be written, as in a
    read-only installation without a home, or where the disk is full, it is kept for this process only.

    >>> @compiled
    ... def double(x):
    ...     return 2 * x
    >>> double(21)
    42
    """
    return _compile(function, counts_references=True)


def compiled_inner(function: Function) -> Function:
    """As `compiled`, for a small kernel that makes no array and is called by others all the time.

    Its arrays are the caller's, so references to them are not counted: two locked instructions for each array of each
    call, which were a fifth of the time of the planner's searches.

    >>> @compiled_inner
    ... def first(x):
    ...     return x[0]
    >>> import numpy as np
    >>> first(np.array([7]))
    7
    """
    return _compile(function, counts_references=False)


def _compile(function: Function, *, counts_references: bool) -> Function:
    decorator: Any = njit  # its stubs do not know _nrt
    dispatcher = decorator(nogil=True, no_cfunc_wrapper=True, _nrt=counts_references)(function)
    if hasattr(dispatcher, "enable_caching"):  # numba gives the function back where compiling is switched off
        with suppress(RuntimeError):  # "no locator available": no folder can be written
            dispatcher._cache = _Cache(function)  # as `cache=True` does with a cache that may raise
    return dispatcher


class _Cache(FunctionCache):
    """A cache whose files may be damaged, and whose disk may fill up, without failing the call.

    Numba watches a function's own file. The kernels that this imports by name from other files are compiled along
    with it, so their files are watched, too (but not for constants).

    Exceptions are caught broadly: a damaged file raises whatever pickle, numba or LLVM make of it.
    """

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        kernels = (value for value in function.__globals__.values() if isinstance(value, Dispatcher))
        caches = [getattr(kernel, "_cache", None) for kernel in kernels]
        imported = {file for cache in caches if isinstance(cache, _Cache) for file in cache.files}
        self.files = imported | {self._cache_file._source_stamp}
        self._cache_file._source_stamp = tuple(sorted(self.files, key=repr))

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            with suppress(OSError):
                self.flush()  # else the damaged index would keep its place, and nothing would be cached again
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception:
            self.disable()
