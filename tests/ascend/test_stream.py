"""Streams: order, time-outs, failures, and what destroying one does to its work."""

from __future__ import annotations

import threading
import time

import pytest

from evenmoe.ascend import status
from evenmoe.ascend.status import AclError, set_recent_message, take_recent_message
from evenmoe.ascend.stream import Stream
from tests.patience import HANG_S, until_it_waits


@pytest.fixture
def stream():
    stream = Stream("the stream")
    yield stream
    stream.destroy()


def error_of(code, call, *arguments):
    with pytest.raises(AclError) as caught:
        call(*arguments)
    assert caught.value.status == code, caught.value
    return str(caught.value)


def test_work_runs_in_order_on_one_other_thread(stream):
    done, threads = [], set()

    def work(number):
        time.sleep(0.002 * (number % 3))
        done.append(number)
        threads.add(threading.get_ident())

    for number in range(20):
        stream.enqueue(lambda number=number: work(number))
    stream.synchronize()
    assert done == list(range(20))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_enqueue_returns_before_the_work_is_done(stream):
    gate = threading.Event()
    stream.enqueue(gate.wait)  # would wait for ever if enqueue ran it
    gate.set()
    stream.synchronize(HANG_S)


def test_synchronize_of_an_idle_stream_returns(stream):
    stream.synchronize()
    stream.synchronize(0)


def test_time_out_names_the_work_and_the_work_goes_on(stream):
    gate, done = threading.Event(), []
    stream.enqueue(gate.wait, lambda: "the first one")
    stream.enqueue(lambda: done.append(True))
    begin = time.monotonic()
    message = error_of(status.RT_STREAM_SYNC_TIMEOUT, stream.synchronize, 0.05)
    assert time.monotonic() - begin >= 0.05
    assert message == "the stream was not done within 0.05 s, with 2 of its 2 calls outstanding: the first one."
    gate.set()
    stream.synchronize(HANG_S)
    assert done == [True]


def test_time_out_waits_only_for_work_enqueued_before(stream):
    """Work that another thread adds meanwhile does not prolong the wait."""
    first, gate = threading.Event(), threading.Event()
    waited = threading.Thread(target=stream.synchronize)
    stream.enqueue(first.wait)
    waited.start()
    until_it_waits(waited, "_wait")
    stream.enqueue(gate.wait)
    first.set()
    waited.join(HANG_S)
    assert not waited.is_alive()
    gate.set()


def test_the_first_failure_is_reported_once_and_work_behind_it_runs(stream):
    done = []

    def fail(text):
        raise ValueError(text)

    stream.enqueue(lambda: fail("broken"), lambda: "call 1")
    stream.enqueue(lambda: fail("broken too"), lambda: "call 2")
    stream.enqueue(lambda: done.append(True))
    assert error_of(status.RUNTIME_ERROR, stream.synchronize) == "call 1 failed: broken"
    assert done == [True]
    stream.synchronize()


def test_even_an_exit_in_the_work_leaves_the_stream_serving(stream):
    def leave():
        raise SystemExit

    stream.enqueue(leave, lambda: "call 1")
    assert error_of(status.RUNTIME_ERROR, stream.synchronize) == "call 1 failed: SystemExit"
    done = []
    stream.enqueue(lambda: done.append(True))
    stream.synchronize()
    assert done


def test_destroy_drops_what_has_not_begun_and_does_not_wait_for_what_runs():
    stream, gate, begun, done = Stream("the stream"), threading.Event(), threading.Event(), []
    stream.enqueue(lambda: (begun.set(), gate.wait(HANG_S), done.append("what ran")))
    stream.enqueue(lambda: done.append("what had not begun"))
    assert begun.wait(HANG_S)
    stream.destroy()
    assert not done
    for call in (stream.synchronize, lambda: stream.enqueue(lambda: None)):
        assert "has been destroyed" in error_of(status.RT_INVALID_HANDLE, call)
    gate.set()
    time.sleep(0.02)
    assert done in ([], ["what ran"])
    stream.destroy()  # twice does nothing


def test_destroy_wakes_a_thread_that_synchronizes():
    stream, gate, begun = Stream(), threading.Event(), threading.Event()
    stream.enqueue(lambda: (begun.set(), gate.wait()))
    begun.wait(HANG_S)
    messages = []
    waiter = threading.Thread(target=lambda: messages.append(error_of(status.RT_STREAM_ABORT, stream.synchronize)))
    waiter.start()
    until_it_waits(waiter, "_wait")
    stream.destroy()
    waiter.join(HANG_S)
    assert len(messages) == 1
    gate.set()


def test_after_destroy_the_callers_memory_is_not_touched():
    stream, gate, begun, written = Stream(), threading.Event(), threading.Event(), []

    def work():
        begun.set()
        gate.wait()
        with stream.memory():
            written.append(True)

    stream.enqueue(work)
    begun.wait(HANG_S)
    stream.destroy()
    gate.set()
    time.sleep(0.02)
    assert not written


def test_destroy_waits_while_the_callers_memory_is_touched():
    stream, gate, begun, written = Stream(), threading.Event(), threading.Event(), []

    def work():
        with stream.memory():
            begun.set()
            gate.wait()
            written.append(True)

    stream.enqueue(work)
    begun.wait(HANG_S)
    ender = threading.Thread(target=stream.destroy)
    ender.start()
    ender.join(0.05)
    assert ender.is_alive()
    gate.set()
    ender.join(HANG_S)
    assert written == [True]


def test_recent_messages_are_each_threads_own_and_taken_once():
    set_recent_message("mine")
    theirs = []
    other = threading.Thread(target=lambda: theirs.append(take_recent_message()))
    other.start()
    other.join()
    assert theirs == [None]
    assert take_recent_message() == "mine"
    assert take_recent_message() is None
