"""Worlds of processes: ranks that do not come, that end while the world is opened, and groups that exist already."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import evenmoe as em
from evenmoe.errors import ConstraintError, EvenmoeError, LostRankError, MissingArgumentError, UnsupportedTypeError
from evenmoe.placement import Placement
from tests.processes import run_once

TABLE = Placement([[0, 1]], 2).eplb_table(0)


def lost(call: Callable[[], object]) -> tuple[str, tuple[int, ...]]:
    try:
        call()
    except LostRankError as error:
        return str(error), error.ranks
    return "no error", ()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def as_torchrun_starts(index: int, size: int, port: int) -> None:
    environment = {"RANK": index, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})


def start(index: int, absent: int, kind: str, place: str) -> tuple[str, tuple[int, ...]] | None:
    """Three of four processes open a world; the fourth never comes, or ends before its turn."""
    store, size = None, 4
    if kind != "environment":
        store = dist.FileStore(place, size)
    if kind == "begun":
        dist.init_process_group("gloo", store=store, rank=index, world_size=size)
        store.set(f"up/{index}", "")
        if index == absent:  # not before the others are connected, whose own start would fail else
            store.wait([f"up/{other}" for other in range(size)])
    if index == absent:
        os._exit(1)
    if kind == "begun":
        return lost(lambda: em.process_world(size, timeout_s=2.0))
    if kind == "environment":
        as_torchrun_starts(index, size, int(place))
        return lost(lambda: em.process_world(size, backend="gloo", timeout_s=2.0))
    return lost(lambda: em.process_world(size, backend="gloo", timeout_s=2.0, store=store, index=index))


@pytest.mark.parametrize(("kind", "absent"), [("file", 0), ("file", 2), ("begun", 0), ("begun", 3), ("environment", 2)])
def test_ranks_that_do_not_come_are_named(tmp_path, kind, absent):
    found = run_once(4, start, absent, kind, str(free_port() if kind == "environment" else tmp_path / "store"))
    for index, result in enumerate(found):
        if index == absent:
            assert result is None
        else:
            text = f"rank {index} waited 2 s for the 4 processes of the world; rank {absent} did not come"
            assert result == (text, (absent,))


def test_without_the_process_that_holds_the_store_it_cannot_be_told():
    found = run_once(3, start, 0, "environment", str(free_port()))
    assert found[0] is None
    for text, ranks in found[1:]:
        assert ranks == ()
        assert text.startswith(
            "the store where the processes meet could not be reached, so that it cannot be told which of them are "
            "missing ("
        )


def wrong_start(index: int) -> list[tuple[type, str]]:
    found = []
    store = dist.HashStore()
    for call in (
        lambda: em.process_world(2, backend="gloo", store=store),
        lambda: em.process_world(2, backend="gloo", index=0),
        lambda: em.process_world(2, backend="gloo", store=store, index=5),
        lambda: em.process_world(2, backend="gloo", timeout_s=math.nan),
        lambda: em.process_world(2, 3),
        lambda: em.process_world(2),
    ):
        try:
            call()
        except EvenmoeError as error:
            found.append((type(error), str(error)))
    return found


def test_what_makes_no_world_is_refused():
    os.environ.pop("RANK", None)
    found = run_once(1, wrong_start)[0]
    assert found[:5] == [
        (
            MissingArgumentError,
            "`index` is None: it must be given with the other; pass both, or neither.",
        ),
        (MissingArgumentError, "`store` is None: it must be given with the other; pass both, or neither."),
        (ConstraintError, "`index` is 5: it must be 0 to 1; number the processes of the world from 0."),
        (
            ConstraintError,
            "`timeout_s` is nan: it must be a number of seconds above 0; say how long to wait for a rank.",
        ),
        (
            ConstraintError,
            "`tp_size` is 3: it must be 1 or 2; the operators serve two tensor-parallel peers at most.",
        ),
    ]
    kind, text = found[5]
    assert kind is MissingArgumentError
    assert text.startswith("`store` is None: it must be given outside torchrun (")
    assert text.endswith("); start the processes with torchrun, or pass a store and this process's index.")


def in_a_mesh(index: int, place: str) -> dict[str, Any]:
    """Expert parallelism within data parallelism: two groups of two ranks, used in every way that names a group."""
    dist.init_process_group("gloo", store=dist.FileStore(place, 4), rank=index, world_size=4)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    x, ids, ones = torch.full((2, 1), index + 1.0), torch.tensor([[0], [1]]), torch.ones(2, 1)
    values, layers = [], []
    for group in (mesh["ep"], mesh.get_group("ep"), mesh["ep"].get_group()):
        layer = em.ExpertParallel(group, TABLE, num_slots=2)
        rows = layer.dispatch(x, ids, ones)
        dist.all_reduce(torch.ones(3), group=mesh.get_group("ep"))  # the caller's own collectives never mix with ours
        values.append(layer.combine(rows, 2 * rows.rows).unique().tolist())
        layers.append(layer.layer)
    for names in ({"group": mesh["ep"]}, {"ep": mesh.get_group("ep")}):
        d = em.dispatch(x, ids.int(), num_experts=2, **names)
        values.append(em.combine(3 * d.expand_x, ids.int(), d, ones, **names).unique().tolist())
    refused = []
    for group in (mesh, "ep", None, dist.GroupMember.NON_GROUP_MEMBER):
        try:
            em.ExpertParallel(group, TABLE, num_slots=2)
        except EvenmoeError as error:
            refused.append((type(error), str(error)))
    try:
        em.dispatch(x, ids.int(), num_experts=2, ep=mesh["ep"], group=mesh["ep"])
    except ConstraintError as error:
        refused.append((type(error), str(error)))
    if index == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    told = lost(lambda: layer.dispatch(x, ids, ones)) if index == 2 else ("", ())
    return {"values": values, "layers": layers, "refused": refused, "lost": told}


NOT_A_GROUP = (
    "it must be a transport, a ProcessGroup or a DeviceMesh of which this process is a member; pass rank.ep of an open "
    "world, the group itself, or one axis of a mesh."
)


def test_groups_of_torch_distributed(tmp_path):
    found = run_once(4, in_a_mesh, str(tmp_path / "store"))
    assert found[3] is None
    for index, result in enumerate(found[:3]):
        mine = float(index + 1)
        assert result["values"] == [[2 * mine]] * 3 + [[3 * mine]] * 2
        assert result["layers"] == [0, 1, 2]
        assert result["refused"] == [
            (
                ConstraintError,
                "`group` is a mesh of 2 axes: it must have one axis, that of the experts; pass that axis, such as "
                "mesh['dp'].",
            ),
            (UnsupportedTypeError, f"`group` is a str: {NOT_A_GROUP}"),
            (
                MissingArgumentError,
                "`group` is None: it must be the transport of the expert-parallel group; pass rank.ep of an open "
                "world, a ProcessGroup, or one axis of a DeviceMesh.",
            ),
            (UnsupportedTypeError, f"`group` is a int: {NOT_A_GROUP}"),  # what non-members have in place of a group
            (
                ConstraintError,
                "`group` is given beside `ep`: it names the same group; pass one of the two, whichever reads better.",
            ),
        ]
    text, ranks = found[2]["lost"]
    assert ranks == (1,)  # rank 3 of the world is rank 1 of its group
    assert ", which ended: its process is gone (" in text


TORCHRUN_SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
import evenmoe as em
from evenmoe.errors import LostRankError

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the other ranks a tenth of a second after a death
torch.set_num_threads(1)
rank = em.process_world(3, backend="gloo", timeout_s=30.0)
ids = torch.tensor([[0, 1], [2, 1]], dtype=torch.int32)
em.dispatch(torch.ones(2, 4), ids, ep=rank.ep, num_experts=3)
if rank.index == int(sys.argv[2]):
    os.kill(os.getpid(), signal.SIGKILL)
try:
    em.dispatch(torch.ones(2, 4), ids, ep=rank.ep, num_experts=3)
except LostRankError as error:
    Path(sys.argv[1], str(rank.index)).write_text(repr(error.ranks))
os._exit(0)
"""


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_dies_under_torchrun_is_named(tmp_path, dead):
    script = tmp_path / "train.py"
    script.write_text(TORCHRUN_SCRIPT)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script), str(tmp_path), dead]
    done = subprocess.run(
        [sys.executable, *map(str, command)], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0  # torchrun reports the death
    others = {index: (tmp_path / str(index)) for index in range(3) if index != dead}
    assert {index: path.read_text() for index, path in others.items() if path.exists()} == dict.fromkeys(
        others, f"({dead},)"
    )
