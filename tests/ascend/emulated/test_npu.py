"""`torch.npu`: device numbers of threads, streams and events."""

from __future__ import annotations

import threading

import pytest
import torch

from evenmoe.ascend import patch
from evenmoe.errors import ConstraintError


@pytest.fixture(autouse=True)
def npu():
    with patch(npu=True):
        torch.npu.set_device(0)
        yield torch.npu


def test_torch_npu_npu_is_torch_npu(npu):
    import torch_npu
    import torch_npu.npu as by_import

    assert torch_npu.npu is npu is by_import
    assert (npu.is_available(), npu.is_initialized(), npu.device_count()) == (True, True, 16)
    assert npu.get_device_name(3) == "Ascend910_93"
    assert [npu.synchronize(), npu.synchronize("npu:2"), npu.empty_cache()] == [None] * 3


@pytest.mark.parametrize(("device", "number"), [(3, 3), ("npu:15", 15), ("npu", 7), (torch.tensor(2), 2)])
def test_set_device(npu, device, number):
    npu.set_device(7)
    npu.set_device(device)
    assert npu.current_device() == number


def test_a_torch_device_has_no_number(npu):
    npu.set_device(7)
    npu.set_device(torch.device("npu:3"))
    assert npu.current_device() == 7


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (16, "`device` is 16: it must be one of the 16 devices of a server; pass 0 to 15, such as rank % "),
        (-1, "`device` is -1: it must be one of the 16 devices of a server; "),
        ("npu:16", "`device` is 16: it must be one of the 16 devices of a server; "),
        ("cuda:1", "`device` is 'cuda:1': it must be a number or \"npu:<number>\"; "),
        (1.5, "`device` is 1.5: it must be an integer; pass 0 to 15"),
    ],
)
def test_devices_that_are_not_there(npu, device, said):
    for call in (npu.set_device, npu.synchronize, npu.Stream, npu.current_stream):
        with pytest.raises(ConstraintError) as caught:
            call(device)
        assert str(caught.value).startswith(said)


def test_the_current_device_is_the_threads_own(npu):
    npu.set_device(5)
    seen = []
    thread = threading.Thread(target=lambda: (seen.append(npu.current_device()), npu.set_device(6)))
    thread.start()
    thread.join()
    assert (seen, npu.current_device()) == ([0], 5)


def test_a_block_with_a_device(npu):
    block = npu.device("npu:4")
    with block:
        assert npu.current_device() == 4
        with block, npu.device(None), npu.device(-1):
            assert npu.current_device() == 4
    assert npu.current_device() == 0
    with pytest.raises(ZeroDivisionError), block:
        _ = 1 / 0
    assert npu.current_device() == 0


def test_streams(npu):
    default, mine, other = npu.default_stream(), npu.Stream(), npu.Stream(device=2, priority=-1)
    assert npu.current_stream() is default is npu.default_stream("npu:0")
    assert npu.default_stream(1) is not default
    with npu.stream(mine):
        with npu.stream(other), npu.stream(None):
            assert npu.current_device() == 2
            assert npu.current_stream() is other
            assert npu.current_stream(0) is mine
        assert npu.current_stream() is mine
        assert npu.current_device() == 0
        mine.wait_stream(default)
        mine.wait_event(default.record_event())
    assert npu.current_stream() is default
    assert mine.query()
    mine.synchronize()
    npu.set_stream(other)
    assert (npu.current_device(), npu.current_stream()) == (2, other)
    npu.set_stream(npu.default_stream(2))
    npu.set_stream(default)
    torch.ones(1).record_stream(mine)  # which does nothing


def test_events(npu):
    begin, end = npu.Event(enable_timing=True), npu.Event(enable_timing=True)
    begin.record()
    end.record(npu.current_stream())
    assert begin.elapsed_time(end) >= 0
    assert npu.Event().query()
    assert begin.wait() is end.wait(npu.current_stream()) is begin.synchronize() is None
    assert npu.current_stream().record_event(end) is end


@pytest.mark.parametrize(
    ("timing", "said"),
    [
        (False, "`end_event` is without enable_timing: it must have kept the time of its record; make both with "),
        (True, "`end_event` is not recorded: it must have kept the time of its record; make both with "),
    ],
)
def test_times_that_were_not_kept(npu, timing, said):
    begin = npu.Event(enable_timing=True)
    begin.record()
    with pytest.raises(ConstraintError) as caught:
        begin.elapsed_time(npu.Event(enable_timing=timing))
    assert str(caught.value).startswith(said)


def test_seeds_are_those_of_the_cpu(npu):
    npu.manual_seed(3)
    first = torch.rand(4, device="npu")
    npu.manual_seed_all(3)
    assert torch.equal(first, torch.rand(4))
