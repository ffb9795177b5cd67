"""Tiny random models of transformers, saved to a folder, and processes that load them expert-parallel."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.processes import run_once

pytest.importorskip("transformers", reason="this machine lacks transformers, which needs Python 3.11")

import transformers
from transformers.distributed import DistributedConfig

import evenmoe.integrations.transformers as et

RANKS, EXPERTS, LAYERS, VOCABULARY = 2, 8, 2, 50
MODES = {"tp": {"tp_size": RANKS}, "fsdp": {"tp_size": 1, "fsdp_size": RANKS}}
#: Outputs in float32 of one process and of several differ by the order of additions: 32 products of inputs below 4
#: through four matrices are within 32 * 4 * 4 * 2**-24 = 3e-5 of each other, measured below 1e-7.
SAME = 1e-5


@functools.cache
def saved_model() -> str:
    """The folder of a tiny Mixtral, which lasts as long as the tests' process."""
    folder = tempfile.mkdtemp(prefix="evenmoe-model-")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(mixtral())
    model.save_pretrained(folder)
    return folder


def mixtral() -> transformers.MixtralConfig:
    return transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        eos_token_id=None,
    )


def dense() -> Any:
    """The model in one process."""
    return transformers.AutoModelForCausalLM.from_pretrained(saved_model()).eval()


def parallel(mode: str, **options: Any) -> Any:
    """The model of this process of `on_ranks`, expert-parallel with evenmoe."""
    et.register(**options)
    config = DistributedConfig(ep_size=RANKS, ep_implementation="evenmoe", **MODES[mode])
    return transformers.AutoModelForCausalLM.from_pretrained(saved_model(), distributed_config=config).eval()


def prompts(seed: int, rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def on_ranks(job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`job(rank, *arguments)` in processes that share a group of torch.distributed; the first error is raised."""
    saved_model()
    with tempfile.TemporaryDirectory() as folder:
        results = run_once(RANKS, _in_group, str(Path(folder) / "store"), job, arguments, patience_s=120.0)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _in_group(rank: int, store: str, job: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        return job(rank, *arguments)
    finally:
        dist.destroy_process_group()
