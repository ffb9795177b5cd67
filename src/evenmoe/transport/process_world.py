"""Worlds whose ranks are processes: of a job of one's own, or of a group that torch.distributed has already."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from evenmoe.errors import (
    ConstraintError,
    LostRankError,
    MissingArgumentError,
    RankDisagreementError,
    UnsupportedTypeError,
    require,
)
from evenmoe.transport import mesh
from evenmoe.transport.agreement import by_value
from evenmoe.transport.process_group import ProcessGroupTransport
from evenmoe.transport.segment import Gather, Octets, share_memory
from evenmoe.transport.shared_memory import SharedMemoryTransport
from evenmoe.transport.transport import Transport, register, unregister
from evenmoe.transport.world import Rank, check_world

#: What a public function takes for a group.
Group: TypeAlias = Transport | dist.ProcessGroup | DeviceMesh
#: How the ranks of a group of processes may exchange what is on the CPU.
TRANSPORTS = ("auto", "shared_memory", "process_group")
Memory: TypeAlias = tuple[Octets | None, str]  # what the ranks of a group share; or why they share none

_SEEN_S = 2.0  # the processes' time-outs end about when they came, which is seconds apart at most under a launcher
_worlds = itertools.count()
# By the name of the user's group, and what transport was asked for.
_of_groups: dict[tuple[str, str], tuple[dist.ProcessGroup, ProcessGroupTransport]] = {}


def process_world(
    ep_size: int,
    tp_size: int = 1,
    *,
    backend: str | None = None,
    timeout_s: float = 600.0,
    store: distributed_c10d.Store | None = None,
    index: int | None = None,
    transport: str = "auto",
) -> Rank:
    """Open this process's rank of a world of processes; a collective of all of them.

    Args:
        ep_size: expert-parallel ranks; `ep_size × tp_size` must be the number of processes.
        tp_size: tensor-parallel ranks per EP rank, 1 or 2. Processes are numbered EP-major.
        backend: torch.distributed backend to start if none is initialised, and for the groups; None for torch's choice.
        timeout_s: seconds that the others may take to come, and later to take part in one exchange.
        store, index: where the processes meet, and this one's number, if torch.distributed is to be started with
            them; without them it is started as torchrun wants it.
        transport: how the ranks of a group exchange what is on the CPU, the same on all of them: "shared_memory" where
            all are on one Linux host, "process_group" by torch.distributed, "auto" for the first where it can be had
            and else the second. Tensors on other devices always go by torch.distributed.

    Returns:
        The `Rank` of this process, as `local_world` gives it to each thread.

    Raises:
        ConstraintError: a size or a time-out out of range, a product that is not the number of processes, or a
            transport that is unknown or cannot be had.
        RankDisagreementError: the processes want different transports.
        LostRankError: processes that did not come in time, which `.ranks` names (by their numbers in the world).
    """
    ep_size, tp_size, timeout_s = check_world(ep_size, tp_size, timeout_s)
    check_transport(transport)
    size, timeout = ep_size * tp_size, timedelta(seconds=timeout_s)
    if (store is None) != (index is None):
        missing = "store" if store is None else "index"
        raise MissingArgumentError(missing, None, "must be given with the other", "pass both, or neither")
    if dist.is_initialized():
        index, processes = dist.get_rank(), dist.get_world_size()
        store = vars(distributed_c10d)["_get_default_store"]()
    elif store is None:
        store, index, processes = _meet_as_torchrun(timeout)
    else:
        processes = size
    assert store is not None
    assert index is not None
    rule, fix = f"must be 0 to {processes - 1}", "number the processes of the world from 0"
    require(0 <= index < processes, "index", index, rule, fix)
    value, rule = (
        f"{ep_size} with tp_size {tp_size}",
        f"must give the number of processes, {processes}, as ep_size * tp_size",
    )
    fix = f"use ep_size={processes // tp_size} with tp_size={tp_size}, or start {size} processes"
    require(size == processes, "ep_size", value, rule, fix)
    e, t = divmod(index, tp_size)
    own = distributed_c10d.PrefixStore(f"evenmoe/world{next(_worlds)}", store)
    _call_the_roll(own, index, size, timeout)
    meshes, memories = [], []
    for name, rank, count in ((f"ep{t}", e, ep_size), (f"tp{e}", t, tp_size)):
        gather = _through(distributed_c10d.PrefixStore(name, own), rank, count, timeout)
        meshes.append(mesh.connect(rank, count, gather))
        alone = name.startswith("tp") and count == 1  # which nobody exchanges with
        memories.append((None, "since it has one rank") if alone else _memory(transport, rank, count, gather))
    try:
        if not dist.is_initialized():
            dist.init_process_group(backend, store=store, rank=index, world_size=size, timeout=timeout)
        # Every process must create every group, in the same order.
        ep_groups = [
            dist.new_group([e * tp_size + t for e in range(ep_size)], timeout=timeout, backend=backend)
            for t in range(tp_size)
        ]
        tp_groups = [
            dist.new_group([e * tp_size + t for t in range(tp_size)], timeout=timeout, backend=backend)
            for e in range(ep_size)
        ]
    except RuntimeError as error:
        raise _lost_at_start(error, index, meshes, e, t, tp_size) from error
    parts = zip((ep_groups[t], tp_groups[e]), meshes, memories, strict=True)
    ep, tp = (_open(group, one, memory, timeout_s) for group, one, memory in parts)
    return Rank(index, ep, tp)


def transport_of(
    group: object, argument: str = "group", *, timeout_s: float = 600.0, transport: str = "auto"
) -> Transport:
    """Return the transport over a group, which may be one of torch.distributed's.

    The first use of such a group is a collective of its ranks: exchanges go over a group of their own with the same
    ranks, so that they never mix with the caller's collectives; later uses find it again.

    Args:
        group: a `Transport`, a torch.distributed ProcessGroup, or a DeviceMesh of one axis (`mesh["ep"]`).
        argument: what the caller calls it, for messages.
        timeout_s: seconds that one exchange may take.
        transport: as in `process_world`, for a group of torch.distributed. A `Transport` has been opened as one kind,
            so that another than "auto" must be that one.

    Raises:
        MissingArgumentError, UnsupportedTypeError, ConstraintError: it is none of these, or has other axes; or the
            transport is unknown or cannot be had.
        RankDisagreementError: the ranks want different transports.
        LostRankError: a rank did not come.
    """
    check_transport(transport)
    if isinstance(group, Transport):
        value, rule = f"{transport!r} for a group that has been opened", f"must be what it is, {group.kind!r}"
        fix = 'leave it at "auto", or choose where the group is opened'
        require(transport in ("auto", group.kind), "transport", value, rule, fix)
        return group
    if isinstance(group, DeviceMesh):
        fix = f"pass that axis, such as mesh[{(group.mesh_dim_names or ('ep',))[0]!r}]"
        require(
            group.ndim == 1, argument, f"a mesh of {group.ndim} axes", "must have one axis, that of the experts", fix
        )
        group = group.get_group()
    if group is None:
        fix = "pass rank.ep of an open world, a ProcessGroup, or one axis of a DeviceMesh"
        raise MissingArgumentError(argument, None, "must be the transport of the expert-parallel group", fix)
    if not isinstance(group, dist.ProcessGroup):
        rule = "must be a transport, a ProcessGroup or a DeviceMesh of which this process is a member"
        fix = "pass rank.ep of an open world, the group itself, or one axis of a mesh"
        raise UnsupportedTypeError(argument, f"a {type(group).__name__}", rule, fix)
    known, opened = _of_groups.get((group.group_name, transport), (None, None))
    if known is not group or opened is None:
        opened = _beside(group, timeout_s, transport)
        _of_groups[group.group_name, transport] = group, opened
    return opened


def check_transport(kind: object) -> None:
    """Raise if `kind` is not the name of a way to exchange.

    Raises:
        ConstraintError: it is not.
    """
    rule, fix = f"must be one of {', '.join(map(repr, TRANSPORTS))}", "leave it at 'auto' if any will do"
    require(kind in TRANSPORTS, "transport", repr(kind), rule, fix)


def _memory(kind: str, rank: int, world_size: int, gather: Gather) -> Memory:
    """The memory that the ranks of a group share, or why they share none; a collective of the group."""
    wanted = {other: str(one["transport"]) for other, one in enumerate(gather({"transport": kind}))}
    if len(set(wanted.values())) > 1:
        rule, fix = "must be equal on every rank of a group", "pass the same on all ranks"
        raise RankDisagreementError("transport", by_value(wanted), rule, fix)
    if kind == "process_group":
        return None, "as was asked for"
    memory, reason = share_memory(rank, world_size, gather)
    if memory is None and kind == "shared_memory":
        fix = "use 'auto' or 'process_group'"
        raise ConstraintError("transport", repr(kind), f"cannot be had here, since {reason}", fix)
    return memory, f"since {reason}"


def _beside(group: dist.ProcessGroup, timeout_s: float, kind: str) -> ProcessGroupTransport:
    """A transport over a new group with the ranks of `group`."""
    ranks = dist.get_process_group_ranks(group)
    try:
        own = dist.new_group(
            ranks, timeout=timedelta(seconds=timeout_s), backend=dist.get_backend(group), use_local_synchronization=True
        )

        def gather(value: dict[str, object]) -> list[dict[str, object]]:
            values: list[object] = [None] * len(ranks)
            dist.all_gather_object(values, value, group=own)
            return values  # pyright: ignore[reportReturnType]

        rank = ranks.index(dist.get_rank())
        connections = mesh.connect(rank, len(ranks), gather)
        memory = _memory(kind, rank, len(ranks), gather)
    except RuntimeError as error:
        raise LostRankError(
            f"a rank of group {group.group_name!r} ({len(ranks)} ranks) was lost while a group of the same ranks was "
            f"being made; which cannot be told ({str(error).splitlines()[0]})"
        ) from error
    return _open(own, connections, memory, timeout_s)


def _open(group: object, connections: mesh.Mesh, memory: Memory, timeout_s: float) -> ProcessGroupTransport:
    assert isinstance(group, dist.ProcessGroup), "new_group gives every member of a group the group"
    shared, reason = memory

    def close() -> None:
        unregister(transport)

    if shared is not None:
        transport = SharedMemoryTransport(shared, group, connections, _destroy, close, timeout_s)
    else:
        transport = ProcessGroupTransport(group, connections, _destroy, close, timeout_s)
        transport.description += f" ({dist.get_backend(group)}), {reason}"
    register(transport)
    return transport


def join_group(
    store: distributed_c10d.Store,
    meeting: str,
    name: str,
    rank: int,
    size: int,
    *,
    join_s: float,
    exchange_s: float,
    stays: bool,
) -> ProcessGroupTransport:
    """Return this process's rank of a group on one host, of which torch.distributed's own world knows nothing.

    Args:
        store, meeting: where the processes meet, and the name of the group there.
        name: of the group.
        join_s, exchange_s: seconds that the others may take to come, and later for one exchange.
        stays: whether this process holds the store, and so stays until nobody needs it any more.

    Raises:
        LostRankError: processes that did not come in time, or were lost meanwhile.
    """
    timeout, own = timedelta(seconds=join_s), distributed_c10d.PrefixStore(meeting, store)
    _call_the_roll(own, rank, size, timeout)
    gather = _through(distributed_c10d.PrefixStore("mesh", own), rank, size, timeout)
    connections = mesh.connect(rank, size, gather)
    try:
        group = _standalone_group(distributed_c10d.PrefixStore("gloo", own), name, rank, size, exchange_s)
        own.set(f"ready/{rank}", "")
    except RuntimeError as error:
        raise _lost_at_start(error, rank, [connections, mesh.Mesh({})], rank, 0, 1) from error
    if stays:
        with suppress(RuntimeError):  # a rank that is lost now is found out by the first exchange
            own.wait([f"ready/{i}" for i in range(size)], timeout)
    return ProcessGroupTransport(group, connections, lambda group: None, timeout_s=exchange_s, standalone=True)


def _standalone_group(
    store: distributed_c10d.Store, name: str, rank: int, size: int, timeout_s: float
) -> dist.ProcessGroup:
    """A gloo group that ends with the last reference to it."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    kind, cpu = dist.ProcessGroup.BackendType.GLOO, torch.device("cpu")
    group: Any = dist.ProcessGroup(store, rank, size)
    group._set_default_backend(kind)
    group._register_backend(cpu, kind, gloo(store, rank, size, options))
    group._set_group_name(name)
    return group


def _destroy(group: dist.ProcessGroup) -> None:
    with suppress(RuntimeError, ValueError, AssertionError):  # torch.distributed may have been closed before
        dist.destroy_process_group(group)


def _meet_as_torchrun(timeout: timedelta) -> tuple[distributed_c10d.Store, int, int]:
    """The store of a job that torchrun, or its environment variables, started; this process's number; their number.

    The store must not wait for the processes that come late: the roll call does, and knows who they are. It waits for
    as many as it is told, so it is told one; the true number stands in torchrun's own variable.
    """
    try:
        store, index, _ = next(rendezvous("env://", timeout=timeout, world_size=1))
        return store, index, int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise MissingArgumentError(
            "store",
            None,
            f"must be given outside torchrun ({error})",
            "start the processes with torchrun, or pass a store and this process's index",
        ) from error
    except RuntimeError as error:
        raise LostRankError(
            "the store where the processes meet could not be reached, so that it cannot be told which of them are "
            f"missing ({str(error).splitlines()[0]})"
        ) from error


def _call_the_roll(store: distributed_c10d.Store, index: int, size: int, timeout: timedelta) -> None:
    """Wait until every process has come.

    Raises:
        LostRankError: with those that did not come in time.
    """
    keys = [f"here/{i}" for i in range(size)]
    try:
        store.set(keys[index], "")
        with suppress(dist.DistStoreError, RuntimeError):
            store.wait(keys, timeout)
        absent = tuple(i for i, key in enumerate(keys) if not store.check([key]))
    except RuntimeError as error:
        raise LostRankError(
            f"rank {index} lost the store where the {size} processes meet, so that it cannot be told which of them are "
            f"missing ({str(error).splitlines()[0]})"
        ) from error
    if absent:
        with suppress(RuntimeError):
            # Rank 0 may hold the store, so it stays until the others have seen who is missing too.
            store.set(f"seen/{index}", "")
            if index == 0:
                present = [f"seen/{i}" for i in range(size) if i not in absent]
                store.wait(present, timedelta(seconds=_SEEN_S))
        raise LostRankError(
            f"rank {index} waited {timeout.total_seconds():g} s for the {size} processes of the world; "
            f"{_ranks(absent)} did not come",
            absent,
        )


def _through(
    store: distributed_c10d.Store, rank: int, size: int, timeout: timedelta
) -> Callable[[dict[str, object]], list[dict[str, object]]]:
    """Gather values of all ranks by way of a store."""
    rounds = itertools.count()

    def gather(value: dict[str, object]) -> list[dict[str, object]]:
        number = next(rounds)
        keys = [f"{number}/{i}" for i in range(size)]
        try:
            store.set(keys[rank], json.dumps(value))
            store.wait(keys, timeout)
            return [json.loads(store.get(key)) for key in keys]
        except RuntimeError as error:
            absent: tuple[int, ...] = ()
            with suppress(RuntimeError):
                absent = tuple(i for i, key in enumerate(keys) if not store.check([key]))
            raise LostRankError(
                f"rank {rank} lost {_ranks(absent) if absent else 'a rank, which cannot be told,'} of {size} while the "
                f"world was being opened ({str(error).splitlines()[0]})",
                absent,
            ) from error

    return gather


def _lost_at_start(
    error: RuntimeError, index: int, meshes: list[mesh.Mesh], e: int, t: int, tp_size: int
) -> LostRankError:
    """Who was gone while the groups were being made: numbers of the world, from those within the two groups."""
    across = meshes[0].stopped(1.0)
    beside = meshes[1].stopped(0.0)
    found = {other * tp_size + t: word for other, word in across.items()}
    found |= {e * tp_size + other: word for other, word in beside.items()}
    ranks = tuple(sorted(found))
    who = f"{_ranks(ranks)}, which {found[ranks[0]].reason}" if ranks else "a rank; which cannot be told"
    for one in meshes:
        one.say(mesh.LastWord("lost a rank while the world was being opened", by_itself=False, because_of=()))
    return LostRankError(
        f"rank {index} lost {who}, while the world was being opened ({str(error).splitlines()[0]})", ranks
    )


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
