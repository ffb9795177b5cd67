"""Runs every architecture of the installed transformers that has a door for expert parallelism, tiny and random.

    python tools/transformers_models.py [--only NAME …] [--markdown FILE]

For each of them, on two processes, under tensor parallelism and under FSDP: the largest difference of the outputs from
those of one process, relative to the largest output, with one slot for each expert, and with 12 slots for 8 experts
together with whether the state dict is that of the model then. What does not run in one process, or with transformers'
own implementation, says so with its error.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import evenmoe as em
import evenmoe.integrations.transformers as et

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.processes import run_once

EXPERTS, SLOTS, RANKS = 8, 12, 2
SAME = 1e-5  # of the largest output, in float32
MODES = {"tp": {"tp_size": RANKS}, "fsdp": {"tp_size": 1, "fsdp_size": RANKS}}
#: Sizes of a tiny model, by what configurations call them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups"), 1),
    **dict.fromkeys(("hidden_size", "intermediate_size", "dense_intermediate_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_hidden_layers"), 4),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "sliding_window"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    "qk_rope_head_dim": 8,
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4}
#: What else an architecture wants of so small a configuration.
ALSO: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "layer_group_size": 2},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", *["sparse"] * 3]},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "rope_parameters": {**_SECTIONS, "mrope_section": [2, 2, 4]},
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "glm4v_moe_text": {"rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hy_v4_vl_text": {"rope_parameters": {**_SECTIONS, "mrope_section": [2, 1, 1]}},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "qwen4_exp_text": {
        **dict.fromkeys(("indexer_n_heads", "indexer_kv_heads"), 1),
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "inkling2_loop_text": {"unpadded_vocab_size": 128},
    "inkling2_text": {"unpadded_vocab_size": 128},
    "inkling_text": {"unpadded_vocab_size": 128},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "step3p5": {"moe_layers_enum": [1, 2, 3]},
    "zaya": {"num_experts_per_tok": 1},
}
#: Parts of names that tell the stacks of experts apart, where a model has several.
STACKS = {"ernie4_5_vl_moe_text": ("text_moe", "vision_moe")}


def architectures() -> list[str]:
    """The model types whose plan of expert parallelism uses the door."""
    plans = {name: getattr(CONFIG_MAPPING[name], "base_model_ep_plan", None) or {} for name in CONFIG_MAPPING}
    return sorted(name for name, plan in plans.items() if "ep_dispatch_experts" in plan.values())


def tiny(name: str) -> Any:
    """A random model of this architecture, the same at every call."""
    config_class = CONFIG_MAPPING[name]
    known = inspect.signature(config_class.__init__).parameters
    config = config_class(**{key: value for key, value in SIZES.items() if key in known} | ALSO.get(name, {}))
    torch.manual_seed(0)
    model = _model_class(config_class)(config).eval()
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.ndim > 1:  # some have no initializer, and are what memory held
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def _model_class(config_class: Any) -> Any:
    if config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    fitting = [
        found
        for found in vars(module).values()
        if inspect.isclass(found)
        and issubclass(found, transformers.PreTrainedModel)
        and (found.config_class is config_class or found.__annotations__.get("config") == config_class.__name__)
        and "PreTrained" not in found.__name__
    ]
    if not fitting:
        raise LookupError(f"no model of transformers takes a {config_class.__name__} alone")
    return min(fitting, key=lambda found: ("CausalLM" not in found.__name__, len(found.__name__)))


def outcome(rank: int, store: str, name: str, mode: str, implementation: str, folder: str) -> list[str]:
    """What this rank found: the difference without and with replicas."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    et.register()
    alone = tiny(name)
    tokens = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0 if mode == "tp" else rank))
    config = DistributedConfig(ep_size=RANKS, ep_implementation=implementation, **MODES[mode])
    model = type(alone).from_pretrained(folder, distributed_config=config).eval()
    with torch.no_grad():
        wanted = run(alone, tokens)

        def difference() -> str:
            found = run(model, tokens)
            return f"{float((found - wanted).abs().max() / wanted.abs().max()):.1e}"

        cells = [difference()]
        if implementation != "evenmoe":
            return cells
        for named in STACKS.get(name, ("",)):
            layers = len(et.experts_of(model, named))
            placement = em.plan(np.ones((layers, EXPERTS)), num_ranks=RANKS, num_slots=SLOTS)
            try:
                et.place(model, placement, named=named)
            except ValueError as refused:
                return [*cells, f"refused: {refused}"]
        cells.append(difference())
        state, own = model.state_dict(), alone.state_dict()
        different = [key for key, value in own.items() if not _whole(state[key]).equal(value)]
        return [cells[0], cells[1] + (f", {different[0]} differs" if different else "")]


def run(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The first output of a forward pass, whole and in float32."""
    try:
        output = model(tokens)[0]
    except (AttributeError, TypeError, ValueError):
        embedded = torch.nn.functional.one_hot(tokens % model.config.hidden_size, model.config.hidden_size).float()
        output = model(inputs_embeds=embedded)[0]
    return _whole(output).float()


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def cells_of(name: str, mode: str, folder: str) -> list[str]:
    """Two cells of the table, or an error in the first."""
    found = _tried(name, mode, "evenmoe", folder)
    if isinstance(found, str):
        theirs = _tried(name, mode, "auto", folder)
        return [f"{found} ({'and so without evenmoe' if isinstance(theirs, str) else f'auto: {theirs[0]}'})", ""]
    if float(found[0]) > SAME:
        theirs = _tried(name, mode, "auto", folder)
        found[0] += f" (without evenmoe {theirs if isinstance(theirs, str) else theirs[0]})"
    return found


def _tried(name: str, mode: str, implementation: str, folder: str) -> list[str] | str:
    with tempfile.TemporaryDirectory() as beside:
        arguments = str(Path(beside) / "store"), name, mode, implementation, folder
        try:
            results = run_once(RANKS, outcome, *arguments, patience_s=120.0)
        except AssertionError as late:
            return str(late)
    for result in results:
        if not isinstance(result, list):
            return " ".join(f"{type(result).__name__}: {result}".split())[:400]
    return max(results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="these architectures alone")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    lines = ["| architecture | tp | tp, 12 slots | fsdp | fsdp, 12 slots |", "|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for name in arguments.only or architectures():
        with tempfile.TemporaryDirectory() as folder:
            try:
                model = tiny(name)
                run(model, torch.randint(3, 100, (2, 9)))
                model.save_pretrained(folder)
            except Exception as error:
                text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
                lines.append(f"| {name} | in one process: {text} | | | |")
            else:
                cells = [cell for mode in MODES for cell in cells_of(name, mode, folder)]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
