"""Runs every architecture of the installed transformers that has a door for expert parallelism, tiny and random.

    python tools/transformers_models.py [--only NAME …] [--markdown FILE]

For each of them, on two processes, under tensor parallelism and under FSDP: the largest difference of the outputs from
those of one process, with one slot for each expert and with 12 slots for 8 experts, and whether the state dict is that
of the model after it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import evenmoe as em
import evenmoe.integrations.transformers as et

EXPERTS, SLOTS, RANKS = 8, 12, 2
#: Sizes of a tiny model, by what configurations call them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_n_routed_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "num_groups"), 1),
    **dict.fromkeys(("hidden_size", "intermediate_size", "dense_intermediate_size", "mlp_intermediate_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "sliding_window": 16,
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 16),
    "qk_rope_head_dim": 8,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
}


def architectures() -> list[str]:
    """The model types whose plan of expert parallelism uses the door."""
    return [name for name in sorted(CONFIG_MAPPING) if "ep_dispatch_experts" in _plan(CONFIG_MAPPING[name]).values()]


def _plan(config_class: Any) -> dict[str, str]:
    return getattr(config_class, "base_model_ep_plan", None) or {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="these architectures alone")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    _quiet()
    lines = ["| architecture | tp | tp, 12 slots | fsdp | fsdp, 12 slots |", "|---|---|---|---|---|"]
    for name in arguments.only or architectures():
        cells = [name]
        for mode in ("tp", "fsdp"):
            cells += _run(name, mode)
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines) + "\n")
    return 0
