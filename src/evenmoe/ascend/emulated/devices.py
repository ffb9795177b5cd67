"""Devices of type "npu" wherever torch takes a device: they are the CPU.

torch knows the name "npu" only once its one out-of-tree device type has been renamed to it, for the rest of the
process. So what takes a device is wrapped here instead, and put back afterwards; a wrapper that somebody has kept does
then what the original does. Modes of torch would hold in the thread that entered them alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from evenmoe.ascend.emulated.npu import Stream
from evenmoe.ascend.patching import NPU, Replacements, in_effect

_FACTORIES = (
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_like", "empty_permuted",
    "empty_strided", "eye", "full", "full_like", "hamming_window", "hann_window", "kaiser_window", "linspace",
    "logspace", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like",
    "randperm", "range", "scalar_tensor", "sparse_coo_tensor", "sparse_csr_tensor", "tensor", "tril_indices",
    "triu_indices", "zeros", "zeros_like",
)  # fmt: skip
_METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


def host_of(device: Any) -> Any:
    """ "cpu" for "npu", "npu:3" and, where torch has no accelerator of its own, a number; anything else unchanged.

    >>> from evenmoe.ascend import patch
    >>> with patch(npu=True):
    ...     host_of("npu:3"), host_of("meta"), host_of(None)
    ('cpu', 'meta', None)
    >>> host_of("npu:3")
    'npu:3'
    """
    if not in_effect(NPU):
        return device
    if isinstance(device, str):
        return "cpu" if re.fullmatch(r"npu(:\d+)?", device) else device
    if isinstance(device, int) and not isinstance(device, bool) and device >= 0 and not _has_accelerator():
        return "cpu"
    return device


def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def _taking_npu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which takes such a device by the keyword `device`."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = host_of(kwargs["device"])
        return function(*args, **kwargs)

    return call


class _StandIn(type):
    """A class of torch's that cannot be derived from: its instances, its hash and its name, with another call."""

    original: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.original(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.original)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or issubclass(subclass, cls.original)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.original

    def __hash__(cls) -> int:
        return hash(cls.original)


class _DeviceStandIn(_StandIn):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        kind = args[0] if args else kwargs.get("type", kwargs.get("device"))
        if host_of(kind) is not kind and len(args) <= 2 and kwargs.keys() <= {"type", "device", "index"}:
            return cls.original("cpu")  # which has no numbers
        return cls.original(*args, **kwargs)


class _GeneratorStandIn(_StandIn):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = host_of(kwargs["device"])
        return cls.original(*map(host_of, args), **kwargs)


def _stand_in(kind: type[_StandIn], original: type) -> type:
    names = {"__module__": original.__module__, "__doc__": original.__doc__, "original": original}
    return kind(original.__name__, (), names)


def _npu(tensor: torch.Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> torch.Tensor:
    """A copy, as one on the chip would be."""
    return tensor.clone(**kwargs)


def _cpu(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(original)
    def cpu(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = original(tensor, *args, **kwargs)
        # A tensor of the chip is another one than its copy on the host.
        return result.clone() if result is tensor and in_effect(NPU) else result

    return cpu


def _to(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(original)
    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        device = args[0] if args else kwargs.get("device")
        host = host_of(device)
        if host is not device:
            args, kwargs = ((host, *args[1:]), kwargs) if args else (args, {**kwargs, "device": host})
        result = original(tensor, *args, **kwargs)
        moved = isinstance(device, str | int | torch.device) and in_effect(NPU)
        return result.clone() if result is tensor and moved else result

    return to


def _module_to(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = host_of(kwargs["device"])
        return original(module, *map(host_of, args[:1]), *args[1:], **kwargs)

    return to


def _module_npu(module: torch.nn.Module, device: Any = None) -> torch.nn.Module:
    return module.to("npu")


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if in_effect(NPU):
            # A file written on the chip says of each tensor on which device it was.
            map_location = {f"npu:{n}": "cpu" for n in range(64)} if map_location is None else host_of(map_location)
        return original(f, map_location, *args, **kwargs)

    return load


def _record_stream(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def record_stream(tensor: torch.Tensor, stream: Any) -> None:
        if not isinstance(stream, Stream):  # whose work is done
            original(tensor, stream)

    return record_stream


def install(replacements: Replacements) -> None:
    """Let torch take such devices wherever a program for the chip names one."""
    tensor, module = torch.Tensor, torch.nn.Module
    replacements.put(torch, "device", _stand_in(_DeviceStandIn, torch.device))
    replacements.put(torch, "Generator", _stand_in(_GeneratorStandIn, torch.Generator))
    for name in _FACTORIES:
        replacements.put(torch, name, _taking_npu(getattr(torch, name)))
    for name in _METHODS:
        replacements.put(tensor, name, _taking_npu(getattr(tensor, name)))
    replacements.put(tensor, "to", _to(tensor.to))
    replacements.put(tensor, "cpu", _cpu(tensor.cpu))
    replacements.put(tensor, "npu", _npu)
    replacements.put(tensor, "is_npu", property(lambda self: self.device.type == "cpu"))
    replacements.put(tensor, "record_stream", _record_stream(tensor.record_stream))
    replacements.put(module, "to", _module_to(module.to))
    replacements.put(module, "npu", _module_npu)
    replacements.put(torch, "load", _load(torch.load))
