"""`Event`: a point in a stream's work, for which the host and other streams can wait; an `aclrtEvent`."""

from __future__ import annotations

import time

from evenmoe.ascend import status
from evenmoe.ascend.status import AclError, acl_error
from evenmoe.ascend.stream import Stream


class _Record:
    """One recording of an event."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.finished_s = stream, 0.0
        self.number = stream.enqueue(self._finish, lambda: "the record of an event")

    @property
    def complete(self) -> bool:
        return self.stream.has_done(self.number)

    def _finish(self) -> None:
        self.finished_s = time.perf_counter()


class Event:
    """A point in a stream's work; recorded again, it stands for the later one alone.

    >>> stream, event = Stream(), Event()
    >>> event.record(stream)
    >>> event.synchronize()
    >>> event.recorded, event.complete
    (True, True)
    """

    def __init__(self) -> None:
        self._last: _Record | None = None

    @property
    def recorded(self) -> bool:
        """Whether it was recorded since it was made or reset."""
        return self._last is not None

    @property
    def complete(self) -> bool:
        """Whether it was recorded, and everything before that point is done."""
        return self._last is not None and self._last.complete

    def record(self, stream: Stream) -> None:
        """Stand for what the stream has been given so far.

        Raises:
            AclError: the stream is destroyed (status 107017).
        """
        self._last = _Record(stream)

    def reset(self) -> None:
        """Stand for nothing, as when new; whoever waits already goes on waiting."""
        self._last = None

    def wait_on(self, stream: Stream) -> None:
        """Let what the stream is given from now on wait for the event; at once if it was never recorded.

        Raises:
            AclError: the stream is destroyed (status 107017).
        """
        record = self._last
        if record is not None:
            stream.enqueue(
                lambda: record.stream.wait_for(record.number),
                lambda: f"a wait for an event of {record.stream.name}, where the work is {record.stream.describe()}",
            )

    def synchronize(self, timeout_s: float | None = None) -> None:
        """Wait on the host; at once if it was never recorded.

        Args:
            timeout_s: seconds to wait; None waits for ever.

        Raises:
            AclError: not done in time (status 507047), or its stream was destroyed before (107023).
        """
        record = self._last
        if record is None:
            return
        try:
            record.stream.wait_for(record.number, timeout_s)
        except AclError as error:
            timed_out = error.status == status.RT_STREAM_SYNC_TIMEOUT
            raise AclError(status.RT_EVENT_SYNC_TIMEOUT if timed_out else error.status, error.message) from None

    def elapsed_ms(self, end: Event) -> float:
        """Milliseconds on the host's clock between this event and a later one.

        Raises:
            AclError: one of them is not complete (status 107006).
        """
        for name, event in (("start", self), ("end", end)):
            if not event.complete:
                value = "recorded, but not complete" if event.recorded else "not recorded"
                fix = "record it, and synchronize it before its time is asked for"
                raise acl_error(status.RT_EVENT_TIMESTAMP_INVALID, name, value, "must be complete", fix)
        assert self._last is not None
        assert end._last is not None
        return (end._last.finished_s - self._last.finished_s) * 1000
