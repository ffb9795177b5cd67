"""Where the ranks of a command run: threads of this process, or the processes that torchrun started."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from evenmoe.errors import ConstraintError
from evenmoe.transport.process_world import process_world
from evenmoe.transport.world import Rank, local_world

Result = TypeVar("Result")


def num_processes() -> int:
    """Processes that torchrun started, 0 without it."""
    if not dist.is_torchelastic_launched():
        return 0
    if not dist.is_initialized():
        torch.set_num_threads(1)  # the processes share the cores
        dist.init_process_group("gloo")
    return dist.get_world_size()


def is_first_process() -> bool:
    """True without torchrun."""
    return not dist.is_initialized() or dist.get_rank() == 0


def run_world(ep_size: int, tp_size: int, fn: Callable[[Rank], Result]) -> list[Result]:
    """`fn` on every rank; the results of all ranks, in rank order, on every process."""
    processes = num_processes()
    if not processes:
        with local_world(ep_size, tp_size) as world:
            return world.run(fn)
    if processes != ep_size * tp_size:
        raise ConstraintError(
            "--nproc-per-node", processes, f"must be {ep_size * tp_size}", "start as many processes as ranks"
        )
    rank = process_world(ep_size, tp_size)
    results: list[Result | None] = [None] * processes
    try:
        dist.all_gather_object(results, fn(rank))
    finally:
        rank.close()
    return results  # pyright: ignore[reportReturnType]


def finish() -> None:
    """Leave the processes' group, so that torchrun ends without a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()
