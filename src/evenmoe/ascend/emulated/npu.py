"""`torch.npu` and `torch_npu.npu`: devices by number, streams and events, on a CPU that has done all work at once.

Every call of torch has ended when it returns, so that streams order nothing and there is nothing to wait for. Device
memory is host memory; what counts it is not emulated.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from evenmoe.ascend.patching import NotEmulatedError, Replacements
from evenmoe.errors import ConstraintError, as_integer

_DEVICES = 16  # of one Atlas A3 server: eight modules of two chips
Device = int | str | torch.device | None


class _Here(threading.local):
    """The current device and the current stream of every device, of one thread."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, Stream] = {}


def is_available() -> bool:
    """Whether there are devices: True."""
    return True


def is_initialized() -> bool:
    """Whether the devices are ready: True, from the start."""
    return True


def device_count() -> int:
    """How many devices there are: 16, as in one Atlas A3 server.

    >>> device_count()
    16
    """
    return _DEVICES


def current_device() -> int:
    """The number of this thread's current device, 0 until `set_device`."""
    return _here.device


def set_device(device: Device) -> None:
    """Make a device this thread's current one.

    Args:
        device: 0…15, "npu:3", or a torch.device, which has no number here and leaves the current device as it is.

    Raises:
        ConstraintError: there is no such device.

    >>> set_device("npu:3")
    >>> current_device()
    3
    >>> set_device(0)
    """
    _here.device = _number(device)


def get_device_name(device: Device = None) -> str:
    """The name of the chip whose values are emulated."""
    _number(device)
    return "Ascend910_93"


def synchronize(device: Device = None) -> None:
    """Wait for the work of a device, which is done already."""
    _number(device)


def empty_cache() -> None:
    """Give unused device memory back, of which there is none."""


def manual_seed(seed: int) -> None:
    """Set the seed of the device's random numbers, which are those of the CPU here."""
    torch.manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    """Set the seed of all devices, as `manual_seed` does."""
    torch.manual_seed(seed)


class device:
    """A block in which a device is the current one; None or a negative number leave it as it is.

    >>> with device(5):
    ...     current_device()
    5
    >>> current_device()
    0
    """

    def __init__(self, device: Device) -> None:
        self.idx = -1 if device is None or device == -1 else _number(device)
        self._before: list[int] = []

    def __enter__(self) -> None:
        self._before.append(_here.device)
        _here.device = self.idx if self.idx >= 0 else _here.device

    def __exit__(self, *_: object) -> None:
        _here.device = self._before.pop()


class Event:
    """A point in the work of a stream, reached when it is recorded.

    Args:
        enable_timing: keep the time of `record`, for `elapsed_time`.
        blocking, interprocess: False or True; nothing waits here.
    """

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._timing, self._time = enable_timing, None

    def record(self, stream: Stream | None = None) -> None:
        """Mark the point that the stream has reached, which is now."""
        self._time: float | None = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Let a stream wait for the event, which has been reached."""

    def query(self) -> bool:
        """Whether all work before the event is done: True."""
        return True

    def synchronize(self) -> None:
        """Wait for the event, which has been reached."""

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds of this machine's clock between the two records; not a time of the chip.

        Raises:
            ConstraintError: one of the two was made without `enable_timing`, or was not recorded.
        """
        for name, event in (("self", self), ("end_event", end_event)):
            if not event._timing or event._time is None:
                value = "without enable_timing" if not event._timing else "not recorded"
                fix = "make both with Event(enable_timing=True) and call record() on each"
                raise ConstraintError(name, value, "must have kept the time of its record", fix)
        assert self._time is not None
        assert end_event._time is not None
        return 1000 * (end_event._time - self._time)


class Stream:
    """A queue of a device's work, which is done when the call that makes it returns.

    Args:
        device: as in `set_device`; None for the current one.
        priority: any, as there is no order to change.

    Attributes: `device_index` (int), the number of its device.
    """

    def __init__(self, device: Device = None, priority: int = 0) -> None:
        self.device_index, self.priority = _number(device), priority

    def wait_event(self, event: Event) -> None:
        """Let the stream wait for an event, which has been reached."""

    def wait_stream(self, stream: Stream) -> None:
        """Let the stream wait for another one's work, which is done."""

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event, a new one by default, and return it."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Wait for the stream's work, which is done."""

    def query(self) -> bool:
        """Whether all work of the stream is done: True."""
        return True


def default_stream(device: Device = None) -> Stream:
    """The stream that a device's work is in unless `stream` says otherwise; the same at every call."""
    return _defaults[_number(device)]


def current_stream(device: Device = None) -> Stream:
    """The stream that this thread puts a device's work into."""
    number = _number(device)
    return _here.streams.get(number, _defaults[number])


def set_stream(stream: Stream) -> None:
    """Make a stream the current one of its device, and its device the current one."""
    _here.device, _here.streams[stream.device_index] = stream.device_index, stream


@contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """A block in which a stream is the current one; None leaves it as it is.

    >>> mine = Stream()
    >>> with stream(mine):
    ...     current_stream() is mine
    True
    >>> current_stream() is mine
    False
    """
    if stream is None:
        yield
        return
    device, before = _here.device, _here.streams.get(stream.device_index)
    set_stream(stream)
    try:
        yield
    finally:
        _here.device = device
        if before is None:
            _here.streams.pop(stream.device_index, None)
        else:
            _here.streams[stream.device_index] = before


def _number(device: Device) -> int:
    if device is None or isinstance(device, torch.device):
        return _here.device
    text = re.fullmatch(r"npu(?::(\d+))?", device) if isinstance(device, str) else None
    fix = "pass 0 to 15, such as rank % torch.npu.device_count()"
    if isinstance(device, str) and text is None:
        raise ConstraintError("device", repr(device), 'must be a number or "npu:<number>"', fix)
    if text is not None:
        device = _here.device if text[1] is None else int(text[1])
    number = as_integer("device", device, fix)
    if not 0 <= number < _DEVICES:
        raise ConstraintError("device", number, f"must be one of the {_DEVICES} devices of a server", fix)
    return number


def __getattr__(name: str) -> object:
    public = sorted(k for k, v in globals().items() if getattr(v, "__module__", None) == __name__ and k[0] != "_")
    raise NotEmulatedError(
        f"torch.npu.{name}",
        "not emulated",
        f"must be one of {', '.join(other for other in public if other != 'install')}",
        "leave it out where the program does not run on the chip",
    )


def install(replacements: Replacements) -> None:
    """Let `torch.npu` and `torch_npu.npu` be this module, and `torch.ops.npu` hold the operators."""
    module, torch_npu = sys.modules[__name__], sys.modules["torch_npu"]
    for owner, name in ((torch, "torch.npu"), (torch_npu, "torch_npu.npu")):
        replacements.put(owner, "npu", module)
        replacements.put_module(name, module)
    replacements.put(torch.ops, "npu", torch_npu)


_here = _Here()
_defaults = [Stream(number) for number in range(_DEVICES)]
