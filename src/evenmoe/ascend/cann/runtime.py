"""What a C program holds by handle: contexts, streams and events of the process's devices.

Handles are numbers that stand for objects, never addresses, so that a stale or foreign one is found out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from evenmoe.ascend import status
from evenmoe.ascend.event import Event
from evenmoe.ascend.status import AclError, acl_error, null_pointer
from evenmoe.ascend.stream import Stream

Thing = TypeVar("Thing")

# No address of a 64-bit process has these upper bits, so a handle that is taken for a pointer faults at once.
_BASE = 0x5E00_0000_0000_0000
_STEP = 16


class Handles(Generic[Thing]):
    """The live objects of one kind.

    A handle is never given out twice. `_BASE` + kind · 2^48 + number · 16 tells which kind it once was.

    >>> streams: Handles[str] = Handles(1, "a stream", "aclrtCreateStream", 107003, 107003)
    >>> handle = streams.add("a")
    >>> streams.get("stream", handle)
    'a'

    Args:
        kind: a number of its own for each kind.
        noun: what one of them is called, with its article.
        maker: the function that makes them.
        code, null_code: statuses for a handle that is none, and for a null one.
        ended: what has happened to one that is no more.
    """

    def __init__(self, kind: int, noun: str, maker: str, code: int, null_code: int, ended: str = "destroyed") -> None:
        self._noun, self._maker, self._code, self._null_code, self._ended = noun, maker, code, null_code, ended
        self._first = _BASE + (kind << 48)
        self._issued = 0
        self._live: dict[int, Thing] = {}
        self._lock = threading.Lock()

    def add(self, thing: Thing) -> int:
        """A new handle for `thing`."""
        with self._lock:
            self._issued += 1
            handle = self._first + self._issued * _STEP
            self._live[handle] = thing
            return handle

    def get(self, argument: str, handle: int) -> Thing:
        """What `handle` stands for.

        Raises:
            AclError: a null handle, one that was destroyed, or none of these.
        """
        thing = self._live.get(handle)
        if thing is None:
            raise self._error_of(argument, handle)
        return thing

    def replace(self, handle: int, thing: Thing) -> None:
        """Let a live handle stand for another object."""
        with self._lock:
            if handle in self._live:
                self._live[handle] = thing

    def pop(self, argument: str, handle: int) -> Thing:
        """As `get`, and the handle ends."""
        with self._lock:
            thing = self._live.pop(handle, None)
        if thing is None:
            raise self._error_of(argument, handle)
        return thing

    def handles(self) -> list[int]:
        """The live handles."""
        return list(self._live)

    def values(self) -> Iterator[Thing]:
        """All of them, as they are now."""
        return iter(list(self._live.values()))

    def clear(self) -> None:
        """End all of them."""
        with self._lock:
            self._live.clear()

    def _error_of(self, argument: str, handle: int) -> Exception:
        if handle == 0:
            return null_pointer(self._null_code, argument)
        number, odd = divmod(handle - self._first, _STEP)
        known = odd == 0 and 0 < number <= self._issued
        bare = self._noun.split(" ", 1)[1]
        value = f"{handle:#x}, " + (f"{self._noun} that was {self._ended}" if known else f"no {bare}")
        return acl_error(self._code, argument, value, f"must be a live {bare}", f"pass one of {self._maker}")


NUM_DEVICES = 16  # the dies of one Atlas A3 server
#: What ends a stream or a group waits for its work; a rank that never comes must not hold it for ever.
DRAIN_S = 60.0


_DESTROYED = (status.RT_INVALID_HANDLE, status.RT_STREAM_ABORT)


@dataclass(eq=False)
class DeviceStream:
    """A stream, and whose it is."""

    device: int
    context: int
    stream: Stream


@dataclass(eq=False)
class Context:
    """A device in use: its streams, and the one that a null stream stands for, made when first used."""

    device: int
    streams: set[int] = field(default_factory=set)
    default_stream: int = 0


@dataclass(eq=False)
class Device:
    """How often a device was set, and the context that aclrtSetDevice made for it."""

    uses: int
    context: int


class Runtime:
    """What the runtime calls of the C program change."""

    def __init__(self) -> None:
        self.contexts: Handles[Context] = Handles(
            1, "a context", "aclrtCreateContext", status.RT_PARAM_INVALID, status.RT_PARAM_INVALID
        )
        self.streams: Handles[DeviceStream] = Handles(
            2, "a stream", "aclrtCreateStream", status.RT_STREAM_CONTEXT, status.RT_STREAM_CONTEXT
        )
        self.events: Handles[Event] = Handles(
            6, "an event", "aclrtCreateEvent", status.RT_PARAM_INVALID, status.RT_PARAM_INVALID
        )
        self._devices: dict[int, Device] = {}
        self._lock = threading.RLock()

    def set_device(self, device: int) -> int:
        """The default context of a device, made when first asked for."""
        _check_device(device)
        with self._lock:
            known = self._devices.get(device)
            if known is None:
                known = self._devices[device] = Device(0, self.contexts.add(Context(device)))
            known.uses += 1
            return known.context

    def reset_device(self, device: int) -> bool:
        """Undo one set_device; after the last, all contexts and streams of the device end, and this is True.

        What its streams have not begun is dropped; see `drain_device`.
        """
        _check_device(device)
        with self._lock:
            known = self._devices.get(device)
            if known is not None and known.uses > 1:
                known.uses -= 1
                return False
            self._devices.pop(device, None)
            for handle in self.contexts.handles():
                if self.contexts.get("context", handle).device == device:
                    self.destroy_context(handle)
            return True

    def drain_device(self, device: int) -> AclError | None:
        """Wait for the work of a device that is about to be reset for the last time.

        Returns:
            What failed first, or was not done within a minute.
        """
        with self._lock:
            known = self._devices.get(device)
            if known is not None and known.uses > 1:
                return None
        failure, end = None, time.monotonic() + DRAIN_S
        for stream in self.streams.values():
            if stream.device == device:
                try:
                    stream.stream.synchronize(max(0.0, end - time.monotonic()))
                except AclError as error:
                    if error.status not in _DESTROYED:  # by another thread
                        failure = failure or error
        return failure

    def create_context(self, device: int) -> int:
        _check_device(device)
        return self.contexts.add(Context(device))

    def destroy_context(self, handle: int) -> None:
        """End a context and its streams; what they have not begun is dropped."""
        with self._lock:
            for stream in self.contexts.pop("context", handle).streams:
                self.streams.pop("stream", stream).stream.destroy()

    def device_of(self, context: int) -> int:
        """The device of the calling thread's context.

        Raises:
            AclError: it has none, or one that was destroyed (107002).
        """
        return self._current(context).device

    def create_stream(self, context: int) -> int:
        with self._lock:
            owner = self._current(context)
            stream = Stream(f"stream {len(owner.streams)} of device {owner.device}")
            handle = self.streams.add(DeviceStream(owner.device, context, stream))
            owner.streams.add(handle)
            return handle

    def find_stream(self, argument: str, handle: int, context: int) -> DeviceStream:
        """A stream by its handle; null stands for the default stream of the calling thread's context."""
        if handle:
            return self.streams.get(argument, handle)
        with self._lock:
            owner = self._current(context)
            if not owner.default_stream:
                owner.default_stream = self.create_stream(context)
            return self.streams.get(argument, owner.default_stream)

    def destroy_stream(self, handle: int, force: bool) -> None:
        """End a stream after its work, or with `force` at once.

        Raises:
            AclError: the work failed (361001), or did not end within a minute (507046); the stream has ended even so.
        """
        with self._lock:
            ended = self.streams.pop("stream", handle)
            owner = self.contexts.get("context", ended.context)
            owner.streams.discard(handle)
            if owner.default_stream == handle:
                owner.default_stream = 0
        try:
            if not force:
                ended.stream.synchronize(DRAIN_S)
        finally:
            ended.stream.destroy()

    def synchronize_device(self, context: int) -> None:
        device = self.device_of(context)
        for stream in self.streams.values():
            if stream.device == device:
                stream.stream.synchronize()

    def finish(self) -> None:
        """End everything."""
        with self._lock:
            for handle in self.contexts.handles():
                self.destroy_context(handle)
            self._devices.clear()
            self.events.clear()

    def _current(self, context: int) -> Context:
        if context not in self.contexts.handles():
            value = "destroyed" if context else "not set"
            rule = "must be set in the calling thread"
            fix = "call aclrtSetDevice or aclrtSetCurrentContext in this thread"
            raise acl_error(status.RT_CONTEXT_NULL, "context", value, rule, fix)
        return self.contexts.get("context", context)


def _check_device(device: int) -> None:
    if not 0 <= device < NUM_DEVICES:
        rule = f"must be 0 to {NUM_DEVICES - 1}"
        raise acl_error(status.RT_INVALID_DEVICEID, "deviceId", device, rule, "use a device there is")
