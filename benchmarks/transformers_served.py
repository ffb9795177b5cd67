"""Tokens per second of a small Mixtral that 4 processes serve: evenmoe beside transformers' own expert parallelism.

    python benchmarks/transformers_served.py [--json FILE]

Both implementations are loaded in the same processes and take turns in `generate` with a KV cache, greedy, in float32;
what they generate is compared with one process's first. `tp`: all ranks hold one batch, for which transformers' own
choice at inference is to run every rank's experts on the whole batch and to add up; `fsdp`: each holds a batch of its
own, and rows travel. Medians over the turns; a turn is as long as its slowest rank.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig

import evenmoe.integrations.transformers as et

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.exchange import results
from benchmarks.exchange.measure import PATIENCE_S, prepare
from tests.processes import run_once

RANKS, WARM_UP = 4, 1
MODES = {"tp": {"tp_size": RANKS}, "fsdp": {"tp_size": 1, "fsdp_size": RANKS}}
IMPLEMENTATIONS = {"transformers": "auto", "evenmoe": "evenmoe"}


@dataclass(frozen=True)
class Served:
    """The model and what is generated: rows of a batch, tokens of a prompt and generated tokens of each row."""

    hidden: int = 256
    layers: int = 2
    experts: int = 32
    top_k: int = 4
    rows: int = 8
    prompt: int = 32
    new: int = 16

    def save(self, folder: str) -> None:
        """A random model, the same at every call."""
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            vocab_size=512,
            hidden_size=self.hidden,
            intermediate_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=self.experts,
            num_experts_per_tok=self.top_k,
            max_position_embeddings=self.prompt + self.new,
            eos_token_id=None,
        )
        transformers.MixtralForCausalLM(config).save_pretrained(folder)

    def prompts(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 512, (self.rows, self.prompt), generator=generator)

    def generate(self, model: Any, prompts: torch.Tensor) -> torch.Tensor:
        options = {"max_new_tokens": self.new, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        with torch.no_grad():
            return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)


def serve(index: int, store: str, folder: str, served: Served, mode: str, turns: int) -> dict[str, list[Any]] | str:
    """(seconds of the slowest rank, CPU seconds of all ranks) of each turn, by implementation; or what is wrong."""
    transformers.logging.set_verbosity_error()
    load = transformers.AutoModelForCausalLM.from_pretrained
    prompts = served.prompts(0 if mode == "tp" else index)
    expected = served.generate(load(folder).eval(), prompts)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=RANKS)
    et.register()
    models = {}
    for name, implementation in IMPLEMENTATIONS.items():
        config = DistributedConfig(ep_size=RANKS, ep_implementation=implementation, **MODES[mode])
        models[name] = load(folder, distributed_config=config).eval()
    found: dict[str, list[Any]] = {name: [] for name in models}
    for turn in range(WARM_UP + turns):
        for name, model in models.items():
            dist.barrier()
            begin, before = time.perf_counter(), time.process_time()
            generated = served.generate(model, prompts)
            cost = torch.tensor([time.perf_counter() - begin, time.process_time() - before], dtype=torch.float64)
            ranks = [torch.empty_like(cost) for _ in range(RANKS)]
            dist.all_gather(ranks, cost)
            differ = torch.tensor([int(not generated.equal(expected))])
            dist.all_reduce(differ)
            if differ.item():
                return f"{name}, {mode}: {differ.item()} ranks generate other tokens than one process"
            if turn >= WARM_UP:
                costs = torch.stack(ranks)
                found[name].append((float(costs[:, 0].max()), float(costs[:, 1].sum())))
    dist.destroy_process_group()
    return found


def measure(served: Served, mode: str, turns: int) -> dict[str, dict[str, float]]:
    """Tokens per second, and CPU ms of all ranks for a token, of each implementation.

    Raises:
        AssertionError: they generate other tokens than one process, or a process failed.
    """
    transformers.logging.disable_progress_bar()
    prepare([])
    with tempfile.TemporaryDirectory() as folder:
        served.save(folder)
        import_module("transformers.models.mixtral.modeling_mixtral")
        arguments = f"{folder}/store", folder, served, mode, turns
        answers = run_once(RANKS, serve, *arguments, patience_s=PATIENCE_S)
    assert all(isinstance(answer, dict) for answer in answers), answers
    tokens = served.rows * served.new * (1 if mode == "tp" else RANKS)
    return {
        name: {
            "tokens_per_s": tokens / statistics.median(seconds for seconds, _ in costs),
            "cpu_ms_per_token": 1e3 / tokens * statistics.median(cpu for _, cpu in costs),
        }
        for name, costs in answers[0].items()
    }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="turns that are counted")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--json", type=Path, help="write the figures here")
    for name, default in asdict(Served()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    given = parser.parse_args(words)
    served = Served(**{name: getattr(given, name) for name in asdict(Served())})
    load, measured = os.getloadavg()[0], {}
    for mode in given.modes:
        measured[mode] = measure(served, mode, given.turns)
        for name, one in measured[mode].items():
            figures = f"{one['tokens_per_s']:8.0f} tokens/s {one['cpu_ms_per_token']:8.2f} CPU ms per token"
            print(f"{mode:6}{name:14}{figures}", flush=True)
    if given.json:
        results.write(given.json, results.about(given.turns, load) | {"model": asdict(served), "modes": measured})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
