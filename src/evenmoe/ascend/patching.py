"""What `patch()` puts in the place of other packages' attributes, for as long as anyone wants it.

Several patches may hold at once, in nested blocks or in several threads: what one of them needs is put in place by the
first and put back by the last that ends.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import ModuleType

from evenmoe.contract.limits import ATLAS_A3, Limits
from evenmoe.errors import EvenmoeError

TORCH_NPU, NPU, UNCHECKED = "torch_npu", "npu", "unchecked values"  # what a patch may need
_EXTENSION = "cann_ops_transformer"
_EXTENSION_PARTS = ("deep_ep", "elastic_buffer", "comm_context")
_ABSENT = object()


class NotEmulatedError(EvenmoeError, AttributeError):
    """A name of torch_npu or torch.npu that evenmoe does not have; `hasattr` is False for it, as for any other."""


class Replacements:
    """Attributes and modules that stand in the place of others, until `take_back`.

    >>> import string
    >>> replacements = Replacements()
    >>> replacements.put(string, "digits", "01")
    >>> string.digits
    '01'
    >>> replacements.take_back()
    >>> string.digits
    '0123456789'
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def put(self, owner: object, name: str, value: object) -> None:
        """Set an attribute of a module or a class."""
        # Of the owner alone: what it inherits shows again once the attribute is gone.
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)

        def undo() -> None:
            if vars(owner).get(name) is not value:
                return  # somebody else has put something there since, and knows ours only
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)

    def put_module(self, name: str, module: ModuleType) -> None:
        """Let `import name` find `module`."""
        before = sys.modules.get(name)
        sys.modules[name] = module

        def undo() -> None:
            if sys.modules.get(name) is not module:
                return
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before

        self._undo.append(undo)

    def take_back(self) -> None:
        """Put back what was there, the last first."""
        while self._undo:
            self._undo.pop()()


_lock = threading.RLock()
_users: Counter[str] = Counter()  # patches that need it, by what they need
_replaced: dict[str, Replacements] = {}
_limits = [ATLAS_A3]  # the last one holds


def real_package_is_here() -> bool:
    """Whether `import torch_npu` finds Ascend's own package."""
    return not _users[TORCH_NPU] and (TORCH_NPU in sys.modules or importlib.util.find_spec(TORCH_NPU) is not None)


def begin(need: str) -> None:
    """Put in place what one more patch needs; all of it or, if that fails, nothing."""
    with _lock:
        if not _users[need]:
            replacements = Replacements()
            try:
                _INSTALL[need](replacements)
            except BaseException:
                replacements.take_back()
                raise
            _replaced[need] = replacements
        _users[need] += 1


def end(need: str) -> None:
    """Put back what was there, if no other patch needs it."""
    with _lock:
        _users[need] -= 1
        if not _users[need]:
            _replaced.pop(need).take_back()


def in_effect(need: str) -> bool:
    """Whether any patch needs it now; in any thread."""
    return _users[need] > 0


def begin_limits(limits: Limits) -> None:
    """Let the functions of torch_npu take what `limits` takes, until `end_limits` or a later one."""
    with _lock:
        _limits.append(limits)


def end_limits(limits: Limits) -> None:
    """End what the same `begin_limits` began; what began before it and has not ended holds again."""
    with _lock:
        # The last of equal ones: it does not matter whose of them goes.
        del _limits[len(_limits) - 1 - _limits[::-1].index(limits)]


def limits_in_effect() -> Limits:
    """What the functions of torch_npu take now; in any thread."""
    return _limits[-1]


def _install_torch_npu(replacements: Replacements) -> None:
    ours = importlib.import_module("evenmoe.ascend.cann_ops_transformer.ops")
    replacements.put_module("torch_npu", importlib.import_module("evenmoe.ascend.torch_npu"))
    replacements.put_module(_EXTENSION, importlib.import_module("evenmoe.ascend.cann_ops_transformer"))
    replacements.put_module(f"{_EXTENSION}.ops", ours)
    for part in _EXTENSION_PARTS:  # which lie one floor lower in upstream's package
        module = importlib.import_module(f"evenmoe.ascend.cann_ops_transformer.{part}")
        replacements.put(ours, part, module)
        replacements.put_module(f"{_EXTENSION}.ops.{part}", module)


def _install_npu(replacements: Replacements) -> None:
    for part in ("npu", "devices", "hccl", "testing"):
        importlib.import_module(f"evenmoe.ascend.emulated.{part}").install(replacements)


_INSTALL: dict[str, Callable[[Replacements], None]] = {
    TORCH_NPU: _install_torch_npu,
    NPU: _install_npu,
    UNCHECKED: lambda _: None,
}
