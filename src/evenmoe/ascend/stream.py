"""`Stream`: work in order on a thread of its own, so that one host thread can launch on many ranks and then wait."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from evenmoe.ascend import status
from evenmoe.ascend.status import AclError

Work = Callable[[], None]
Describe = Callable[[], str]


class Stream:
    """An ordered queue of work, done on one thread; what the runtime calls an `aclrtStream`.

    Work that fails does not stop the work behind it, as on the device by default; the first failure is reported by the
    next `synchronize`, once. A destroyed stream drops what has not begun; what runs ends without touching the caller's
    memory any more (see `memory`), so that the memory may be freed as soon as `destroy` returns.

    >>> stream, done = Stream(), []
    >>> stream.enqueue(lambda: done.append("first"))
    1
    >>> stream.enqueue(lambda: done.append("second"))
    2
    >>> stream.synchronize()
    >>> done
    ['first', 'second']
    >>> stream.destroy()
    """

    def __init__(self, name: str = "stream") -> None:
        self.name = name
        self._changed = threading.Condition()
        self._queue: deque[tuple[Work, Describe]] = deque()
        self._enqueued = self._done = 0
        self._running: Describe | None = None
        self._failure: AclError | None = None
        self._destroyed = False
        self._touching = threading.Lock()
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def enqueue(self, work: Work, describe: Describe = lambda: "work of the caller") -> int:
        """Append `work()` and return at once, with its number: 1 for the first of the stream.

        Args:
            work: called on the stream's thread; what it raises is reported by `synchronize`.
            describe: () -> str, what the work is, or what it waits for; asked when a message needs it.

        Raises:
            AclError: the stream is destroyed (status 107017).
        """
        with self._changed:
            self._raise_if_destroyed(status.RT_INVALID_HANDLE)
            self._queue.append((work, describe))
            self._enqueued += 1
            self._changed.notify_all()
            return self._enqueued

    def synchronize(self, timeout_s: float | None = None) -> None:
        """Wait until everything enqueued before is done.

        Args:
            timeout_s: seconds to wait; None waits for ever.

        Raises:
            AclError: the first failure since the last `synchronize` (status 361001); not done in time (507046; the work
                goes on, and a later call may wait for it again); destroyed before (107017) or meanwhile (107023).
        """
        with self._changed:
            self._raise_if_destroyed(status.RT_INVALID_HANDLE)
            self._wait(self._enqueued, timeout_s)
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait_for(self, number: int, timeout_s: float | None = None) -> None:
        """Wait until the call with that number, and all before it, are done; failed ones are.

        Raises:
            AclError: not done in time (status 507046), or the stream is destroyed before (107023).
        """
        with self._changed:
            self._wait(number, timeout_s)

    def has_done(self, number: int) -> bool:
        """Whether the call with that number is done."""
        return self._done >= number

    @property
    def idle(self) -> bool:
        """Whether everything that was enqueued is done."""
        return self._done == self._enqueued

    def describe(self) -> str:
        """What the stream does now, and which ranks that waits for, for messages."""
        with self._changed:
            return self._doing()

    def destroy(self) -> None:
        """Drop the work that has not begun, and end the thread after what runs; never waits for other ranks."""
        with self._touching, self._changed:
            self._destroyed = True
            self._queue.clear()
            self._changed.notify_all()

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Entered by work while it reads or writes memory of the caller; `destroy` waits for its end.

        Raises:
            AclError: the stream was destroyed meanwhile, so the memory may be gone (status 107023).
        """
        with self._touching:
            self._raise_if_destroyed(status.RT_STREAM_ABORT)
            yield

    def _wait(self, target: int, timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._done < target:
            self._raise_if_destroyed(status.RT_STREAM_ABORT)
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                raise AclError(
                    status.RT_STREAM_SYNC_TIMEOUT,
                    f"{self.name} was not done within {timeout_s:g} s, with {target - self._done} of its "
                    f"{target} calls outstanding: {self._doing()}.",
                )
            self._changed.wait(remaining)

    def _doing(self) -> str:
        return "it has not begun" if self._running is None else self._running()

    def _raise_if_destroyed(self, code: int) -> None:
        if self._destroyed:
            raise AclError(code, f"{self.name} has been destroyed; create another one with aclrtCreateStream.")

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._destroyed:
                    self._changed.wait()
                if self._destroyed:
                    return
                work, self._running = self._queue.popleft()
            failure = None
            try:
                work()
            except BaseException as error:  # work may fail in any way; the thread serves the work behind it
                failure = AclError(
                    status.RUNTIME_ERROR, f"{self._running()} failed: {str(error) or type(error).__name__}"
                )
                failure.__cause__ = error
            with self._changed:
                self._running = None
                self._done += 1
                self._failure = self._failure or failure
                self._changed.notify_all()
