"""Events: what the host and other streams wait for."""

from __future__ import annotations

import threading

import pytest

from evenmoe.ascend.event import Event
from evenmoe.ascend.status import AclError
from evenmoe.ascend.stream import Stream
from tests.patience import HANG_S, until


def held(name: str = "stream 3") -> tuple[Stream, threading.Event]:
    """A stream whose first call waits until it is let go."""
    stream, go = Stream(name), threading.Event()
    stream.enqueue(lambda: go.wait(HANG_S), lambda: "a held call")
    return stream, go


def test_an_event_is_complete_when_all_before_it_is_done() -> None:
    stream, go = held()
    event = Event()
    assert (event.recorded, event.complete) == (False, False)
    event.record(stream)
    assert (event.recorded, event.complete) == (True, False)
    with pytest.raises(AclError, match=r"^stream 3 was not done within 0 s, with 2 of its 2 calls") as error:
        event.synchronize(0)
    assert error.value.status == 507047
    go.set()
    event.synchronize(HANG_S)
    assert event.complete
    event.reset()
    assert (event.recorded, event.complete) == (False, False)


def test_an_event_that_was_never_recorded_holds_nobody() -> None:
    stream, event = Stream(), Event()
    event.synchronize()
    event.wait_on(stream)
    stream.synchronize(HANG_S)


def test_another_stream_waits_for_the_last_record_before_the_wait() -> None:
    first, go = held()
    second, order = Stream("stream 4"), []
    event = Event()
    first.enqueue(lambda: order.append("first"))
    event.record(first)
    event.wait_on(second)
    second.enqueue(lambda: order.append("second"))
    event.record(first)  # later than the wait
    until(lambda: second.describe() == "a wait for an event of stream 3, where the work is a held call")
    with pytest.raises(AclError, match="a wait for an event of stream 3") as error:
        second.synchronize(0)
    assert error.value.status == 507046
    go.set()
    second.synchronize(HANG_S)
    assert order == ["first", "second"]


def test_a_failed_call_completes_the_event_and_is_reported_by_its_stream_alone() -> None:
    stream, other, event = Stream(), Stream(), Event()
    stream.enqueue(lambda: 1 // 0)
    event.record(stream)
    event.wait_on(other)
    event.synchronize(HANG_S)
    other.synchronize(HANG_S)
    with pytest.raises(AclError, match="division"):
        stream.synchronize(HANG_S)


def test_a_destroyed_stream_ends_the_waits_for_its_events() -> None:
    stream, go = held("stream 7")
    other, event = Stream(), Event()
    event.record(stream)
    event.wait_on(other)
    stream.destroy()
    for wait in (event.synchronize, other.synchronize):
        with pytest.raises(AclError, match="stream 7 has been destroyed") as error:
            wait(HANG_S)
        assert error.value.status in (107023, 361001)
    go.set()


def test_times_between_events() -> None:
    stream, start, end = Stream(), Event(), Event()
    start.record(stream)
    start.synchronize(HANG_S)
    gate = threading.Event()
    stream.enqueue(lambda: gate.wait(HANG_S))
    end.record(stream)
    with pytest.raises(
        AclError, match=r"^`end` is recorded, but not complete: it must be complete; record it"
    ) as error:
        start.elapsed_ms(end)
    assert error.value.status == 107006
    gate.set()
    end.synchronize(HANG_S)
    assert start.elapsed_ms(end) > 0  # the clock is monotonic, and ticks between two calls
    assert start.elapsed_ms(end) == -end.elapsed_ms(start)
    with pytest.raises(AclError, match=r"^`start` is not recorded"):
        Event().elapsed_ms(end)
