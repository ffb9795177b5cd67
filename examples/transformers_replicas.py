"""A model of transformers on several processes: record its routing, plan replicas, place them.

    torchrun --nproc-per-node 4 examples/transformers_replicas.py [MODEL]

MODEL is a folder or a name that `from_pretrained` takes; without it a tiny random Mixtral is made.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.distributed import DistributedConfig

import evenmoe as em
import evenmoe.integrations.transformers as et


def tiny_model(folder: Path) -> str:
    """A random Mixtral of 8 experts, written by rank 0."""
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
        AutoModelForCausalLM.from_config(MixtralConfig(vocab_size=128, num_hidden_layers=2, **sizes)).save_pretrained(
            folder
        )
    dist.barrier()
    return str(folder)


def main() -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shared = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    name = sys.argv[1] if len(sys.argv) > 1 else tiny_model(folder / "model")

    et.register()
    config = DistributedConfig(ep_size=world_size, fsdp_size=world_size, tp_size=1, ep_implementation="evenmoe")
    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=config)

    prompts = torch.randint(3, 100, (8, 32), generator=torch.Generator().manual_seed(rank))  # your own traffic here
    with et.record(model, folder / "trace.npz"), torch.no_grad():
        before = model(prompts).logits
    dist.barrier()

    trace = em.load_trace(folder / "trace.npz")
    placement = em.plan(trace.load.sum(axis=0), num_ranks=world_size, num_slots=trace.num_experts + world_size)
    et.place(model, placement)
    with torch.no_grad():
        after = model(prompts).logits
    if rank == 0:
        default = em.Placement([range(trace.num_experts)] * trace.num_layers, num_ranks=world_size)
        loads = trace.load.sum(axis=0)
        par = [em.peak_to_average(loads, one).mean() for one in (default, placement)]
        print(f"peak-to-average load of the ranks: {par[0]:.2f} at first, {par[1]:.2f} with one more slot a rank")
        print(f"logits differ by {float((after - before).abs().max()):.0e} at most")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
