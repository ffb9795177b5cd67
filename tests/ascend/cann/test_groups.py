"""Groups over processes, up to where they are one: what is said of ranks that are wrong, late or gone."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from evenmoe.ascend.cann import groups
from evenmoe.ascend.cann.groups import Communicators
from evenmoe.ascend.cann.runtime import Runtime
from evenmoe.ascend.status import AclError
from evenmoe.ascend.stream import Stream
from tests.patience import HANG_S

from .test_processes import rank_table


@pytest.fixture
def all_groups() -> Communicators:
    return Communicators()


def error_of(status: int, call, *arguments, **more) -> str:
    with pytest.raises(AclError) as error:
        call(*arguments, **more)
    assert error.value.status == status, str(error.value)
    return str(error.value)


def test_threads_of_one_process_may_be_the_ranks(all_groups) -> None:
    root = all_groups.root_info()
    assert len(root.encode()) < 4096, "as much as the C library passes on"
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda rank: all_groups.join(2, root, rank, rank, "mine", HANG_S), range(2)))
    found = [all_groups.handles.get("comm", end).transport for end in ends]
    assert [(end.name, end.rank, end.world_size) for end in found] == [("mine", 0, 2), ("mine", 1, 2)]
    streams = [Stream(), Stream()]
    for end, stream in zip(ends, streams, strict=True):
        all_groups.barrier(end, stream)
    for stream in streams:
        stream.synchronize(HANG_S)
    all_groups.finish()


def test_a_rank_that_does_not_come_is_named(all_groups) -> None:
    message = error_of(9, all_groups.join, 3, all_groups.root_info(), 1, 0, join_s=0.2)
    assert message == (
        "The group could not be opened: rank 1 waited 0.2 s for the 3 processes of the world; ranks 0, 2 did not come."
    )


def test_ranks_that_contradict_each_other(all_groups) -> None:
    root = all_groups.root_info()
    assert error_of(1, all_groups.join, 2, root, 2, 0) == (
        "`rank` is 2: it must be 0 to nRanks - 1, 1; number the ranks of the group from 0."
    )
    assert error_of(1, all_groups.join, 0, root, 0, 0).startswith("`rank` is 0: it needs a group of at least one rank;")
    error_of(9, all_groups.join, 2, root, 0, 0, join_s=0.1)
    assert error_of(1, all_groups.join, 2, root, 0, 0).startswith(
        "`rank` is 0, which has come before: it must be of one process or thread alone;"
    )
    assert error_of(1, all_groups.join, 3, root, 1, 0) == (
        "`nRanks` is 3: it must be 2, as on the first rank that came; pass the same number on all ranks."
    )
    for text in ("another", "{}", '{"evenmoe root info": 3}'):
        assert error_of(1, all_groups.join, 2, text, 0, 0).startswith("`rootInfo` is another text: it must be what ")


def test_a_root_that_has_ended_is_found_out_at_once(all_groups) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = error_of(11, all_groups.join, 2, groups._Root(port, "a group", 12345).text(), 1, 0)
    assert message.startswith("`rootInfo` is of process 12345, which does not answer: it must be of a process of this")


def test_rank_tables(all_groups, tmp_path: Path) -> None:
    join = all_groups.join_by_table
    assert "No such file" in error_of(10, join, str(tmp_path / "none"), 0, 0)
    several = rank_table(tmp_path, 2, 2)
    assert "a table of 2 servers: it must have one: groups over several hosts" in error_of(5, join, several, 0, 0)
    one = rank_table(tmp_path, 2)
    assert error_of(1, join, one, 2, 0) == "`rank` is 2: it must be 0 to 1, as in the table; number the ranks from 0."
    for text in ("", "[]", '{"server_list": [{"device": [{"rank_id": "1"}]}]}'):
        (tmp_path / "other").write_text(text)
        assert "it must be a rank table: a server_list of devices" in error_of(1, join, str(tmp_path / "other"), 0, 0)


def test_a_table_whose_rank_0_does_not_come(all_groups, tmp_path: Path, monkeypatch) -> None:
    """Nor does what a killed rank 0 has left hold anybody up."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    table = rank_table(tmp_path, 2)
    assert error_of(9, all_groups.join_by_table, table, 1, 0, join_s=0.1).startswith("Rank 0 of the rank table did not")
    error_of(9, all_groups.join_by_table, table, 0, 0, join_s=0.1)
    (folder,) = tmp_path.glob("evenmoe-*")
    assert list(folder.iterdir()) == []
    left = folder / f"hccl-{groups.read_rank_table(table, 0)[1]}"
    left.write_text(all_groups.root_info() + "\n")
    error_of(9, all_groups.join_by_table, table, 1, 0, join_s=0.1)
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda rank: all_groups.join_by_table(table, rank, rank), range(2)))
    assert len(ends) == 2
    all_groups.finish()


def test_a_group_that_is_destroyed_waits_for_its_calls(all_groups) -> None:
    first, second, third = all_groups.create([0, 1, 2])
    stream, gone, go = Stream("stream 5"), Stream(), threading.Event()
    number = stream.enqueue(lambda: go.wait(HANG_S), lambda: "a call that waits for rank 1")
    name = all_groups.handles.get("comm", first).transport.name
    all_groups.launched([(name, 0, 3)], stream, number)
    all_groups.launched([(name, 1, 3)], stream, number)
    all_groups.launched([(name, 2, 3)], gone, gone.enqueue(lambda: go.wait(HANG_S)))
    message = error_of(9, all_groups.destroy, first, drain_s=0.05)
    assert message.startswith("`comm` is in use (stream 5 was not done within 0.05 s")
    assert message.endswith("it must have no call that is not done; synchronize its streams before HcclCommDestroy.")
    assert error_of(1, all_groups.destroy, first).startswith("`comm` is 0x"), "it has ended even so"
    gone.destroy()
    all_groups.destroy(third)  # its calls are gone with their stream
    waiting = threading.Thread(target=all_groups.destroy, args=(second,))
    waiting.start()
    go.set()
    waiting.join(HANG_S)
    assert not waiting.is_alive()


def test_a_device_that_is_reset_waits_for_its_streams(monkeypatch) -> None:
    runtime = Runtime()
    context = runtime.set_device(3)
    assert runtime.set_device(3) == context
    done, go = [], threading.Event()
    stream = runtime.find_stream("stream", runtime.create_stream(context), context).stream
    stream.enqueue(lambda: go.wait(HANG_S))
    assert runtime.drain_device(3) is None, "another use of the device is left"
    assert not runtime.reset_device(3)
    monkeypatch.setattr("evenmoe.ascend.cann.runtime.DRAIN_S", 0.05)
    late = runtime.drain_device(3)
    assert late is not None
    assert late.status == 507046
    monkeypatch.undo()
    stream.enqueue(lambda: done.append(1 // 0))
    go.set()
    failed = runtime.drain_device(3)
    assert failed is not None
    assert "division" in str(failed)
    assert runtime.reset_device(3)
