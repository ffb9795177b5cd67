"""Groups of one process for each rank: C++ programs that fork, by root info and by rank table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from .conftest import Run, statuses


def rank_table(folder: Path, *servers: int) -> str:
    """The path of a rank table whose servers have so many ranks."""
    ranks = iter(range(sum(servers)))
    listed = [
        {
            "server_id": f"10.0.0.{i}",
            "device": [{"device_id": str(n), "rank_id": str(next(ranks))} for n in range(count)],
        }
        for i, count in enumerate(servers)
    ]
    path = folder / "table.json"
    path.write_text(json.dumps({"version": "1.0", "status": "completed", "server_list": listed}))
    return str(path)


@pytest.mark.parametrize(("way", "what"), [("root", "late"), ("table", "late")])
def test_processes_dispatch_to_each_other(run_program: Run, tmp_path: Path, way: str, what: str) -> None:
    """The last one comes late; every rank receives the rows of all, in their order."""
    where = rank_table(tmp_path, 2) if way == "table" else way
    assert statuses(run_program("processes", where, "2", what)) == {f"rank {rank}": (0, "right") for rank in range(2)}


def test_a_killed_process_is_named_by_the_others(run_program: Run) -> None:
    got = statuses(run_program("processes", "root", "3", "dies"))
    assert set(got) == {"rank 0", "rank 1"}
    for status, message in got.values():
        assert status == 361001
        # A slow process may find the other one gone, too: it ends as soon as it knows.
        assert re.search(r"lost rank (\d, )?2 of group", message), message
        assert "its process is gone" in message or "which closed its transport" in message
