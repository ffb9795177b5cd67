"""Three ranks of a program for the chip, each a process; `python -m tests.ascend.emulated.ranks FOLDER` runs them.

Each writes what it saw into a file of the folder, which the tests compare.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import Process

from evenmoe.ascend import patch
from tests.patience import HANG_S

RANKS = 3


def told(call: Callable[[], object]) -> str:
    try:
        return str(call())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def seen_by(rank: int, folder: str) -> dict[str, object]:
    import torch_npu

    seen: dict[str, object] = {}
    meeting = dist.FileStore(f"{folder}/store", RANKS)
    wait, device = timedelta(seconds=HANG_S), torch.device("npu:1")
    dist.init_process_group("cpu:gloo,npu:hccl", store=meeting, rank=rank, world_size=RANKS, timeout=wait)
    whole = dist.new_group(backend="hccl", device_id=device)
    pair = dist.new_group([0, 2], backend="HCCL")
    seen["available"] = [dist.is_hccl_available(), dist.is_backend_available("hccl"), dist.get_backend(whole)]
    backend = whole._get_backend(torch.device("npu"))
    name = backend.get_hccl_comm_name(rank)
    seen["names"] = [name == whole.group_name, backend.get_hccl_comm_name(7, init_comm=False) == name]
    seen["negative"] = told(lambda: backend.get_hccl_comm_name(-1))
    total = torch.tensor([rank + 1.0]).npu()
    dist.all_reduce(total, group=whole)
    seen["sum"] = total.item()
    mesh = init_device_mesh("npu", (RANKS,), mesh_dim_names=("ep",))
    seen["mesh"] = mesh.get_group("ep")._get_backend(torch.device("npu")).get_hccl_comm_name(rank) != name

    barrier = torch_npu._npu_distribute_barrier
    x, late = torch.ones(2, 3), torch.tensor([100], dtype=torch.int32)
    seen["barrier"] = barrier(x, name, RANKS, time_out=late) is x
    if rank != 1:
        left = torch.tensor([1, 2, 0, 4, 0, -1, 1, 0, 2, -1], dtype=torch.int32)
        seen["elastic"] = barrier(x, name, RANKS, elastic_info=left) is x
        pair_name = pair._get_backend(torch.device("npu")).get_hccl_comm_name(rank)
        seen["pair"] = barrier(x, pair_name, 2) is x
    unused = torch.zeros(4 + 2 * RANKS, dtype=torch.int32)
    seen["not scaled down"] = barrier(x, name, RANKS, elastic_info=unused) is x
    seen["wrong size"] = told(lambda: barrier(x, name, 5))
    seen["no group"] = told(lambda: barrier(x, "no group", RANKS))
    seen["time_out"] = told(lambda: barrier(x, name, RANKS, time_out=late.long() if rank == 1 else late))
    info = torch.tensor([1, 4, 0, 4, 0, 1, 2, 0, 1, 2], dtype=torch.int32)
    seen["too many"] = told(lambda: barrier(x, name, RANKS, elastic_info=info))
    info[1] = 2
    seen["lost"] = told(lambda: barrier(x, name, RANKS, elastic_info=info)) if rank == 2 else ""
    other = unused + (2 if rank == 1 else 0)
    seen["disagree"] = told(lambda: barrier(x, name, RANKS, elastic_info=other))
    seen["after it"] = barrier(x, name, RANKS) is x

    tokens, weights = torch.full((1, 1024), rank + 1.0, dtype=torch.bfloat16), torch.tensor([[0.5, 0.25]])

    def with_ids(ids: list[int], experts_per_rank: int = 2) -> str:
        count = experts_per_rank * RANKS
        group = {"group_ep": name, "ep_world_size": RANKS, "ep_rank_id": rank, "moe_expert_num": count}
        return told(lambda: chain(tokens, torch.tensor([ids], dtype=torch.int32), weights, group))

    seen["checked"] = with_ids([4, 4])
    with patch(check_values=False):
        seen["repeated"] = with_ids([4, 4])
        seen["out of range"] = with_ids([4, 6])
        seen["no room"] = dispatch_only(tokens, rank, name)
    dist.destroy_process_group()
    seen["destroyed"] = told(lambda: backend.get_hccl_comm_name(rank))
    return seen


def chain(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, group: dict) -> float:
    """A token through its experts, which leave it as it is: its sum of weights times itself."""
    import torch_npu

    rows, _, assist, _, ep_counts, tp_counts, _ = torch_npu.npu_moe_distribute_dispatch_v2(x, ids, **group)
    combine = torch_npu.npu_moe_distribute_combine_v2
    return combine(rows, ids, assist, ep_counts, weights, tp_send_counts=tp_counts, **group)[0, 0].item()


def dispatch_only(x: torch.Tensor, rank: int, name: str) -> str:
    """Every token twice to one expert of the last rank, which has room for each once."""
    import torch_npu

    ids = torch.tensor([[2, 2]], dtype=torch.int32)
    return told(lambda: len(torch_npu.npu_moe_distribute_dispatch_v2(x, ids, name, RANKS, rank, RANKS)))


def rank_main(rank: int, folder: str) -> None:
    with patch(npu=True):
        seen = seen_by(rank, folder)
    seen["left"] = hasattr(dist.Backend, "HCCL") or hasattr(torch, "npu")
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    processes = [Process(target=rank_main, args=(rank, sys.argv[1])) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(process.exitcode or 0 for process in processes))
