"""Devices, contexts and streams of the process, as the acl runtime keeps them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from evenmoe.ascend import status
from evenmoe.ascend.cann import refusals
from evenmoe.ascend.cann.handles import Handles
from evenmoe.ascend.cann.refusals import null, refusal
from evenmoe.ascend.stream import Stream

NUM_DEVICES = 16  # the dies of one Atlas A3 server
_DRAIN_S = 60.0  # aclrtDestroyStream waits for the stream's work; a rank that never comes must not hold it for ever


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
            2, "a stream", "aclrtCreateStream", refusals.RT_STREAM_CONTEXT, refusals.RT_STREAM_CONTEXT
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
        """Undo one set_device; after the last, all contexts and streams of the device end, and this is True."""
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
                ended.stream.synchronize(_DRAIN_S)
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

    def _current(self, context: int) -> Context:
        if context not in self.contexts.handles():
            value = "destroyed" if context else "not set"
            rule = "must be set in the calling thread"
            fix = "call aclrtSetDevice or aclrtSetCurrentContext in this thread"
            raise refusal(refusals.RT_CONTEXT_NULL, "context", value, rule, fix)
        return self.contexts.get("context", context)


def check_out(argument: str, address: int, code: int = refusals.ACL_INVALID_PARAM) -> None:
    """Refuses a null pointer for a result."""
    if address == 0:
        raise null(code, argument)


def _check_device(device: int) -> None:
    if not 0 <= device < NUM_DEVICES:
        rule = f"must be 0 to {NUM_DEVICES - 1}"
        raise refusal(refusals.RT_INVALID_DEVICEID, "deviceId", device, rule, "use a device there is")
