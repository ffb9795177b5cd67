"""Stand-ins for what the plug-ins find in vLLM and SGLang: the interfaces of vllm 0.33.0 and sglang 0.5.23."""

from __future__ import annotations

import enum
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def modules(**found: types.ModuleType) -> Iterator[None]:
    """Modules by their dotted names with _ for ., importable while this lasts."""
    named = {name.replace("__", "."): module for name, module in found.items()}
    before = {name: sys.modules.get(name) for name in named}
    sys.modules.update(named)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def module(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(members)
    return made


class HookType(enum.Enum):
    AROUND = "around"


class HookRegistry:
    """Hooks by target, applied as SGLang applies those around a function: the last registered is the outermost."""

    def __init__(self) -> None:
        self.hooks: dict[str, list[Callable[..., Any]]] = defaultdict(list)

    def register(self, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
        assert hook_type is HookType.AROUND
        self.hooks[target].append(hook)

    def wrapped(self, target: str, original: Callable[..., Any]) -> Callable[..., Any]:
        for hook in self.hooks[target]:
            original = partial(hook, original)
        return original
