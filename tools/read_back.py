"""Placements that `evenmoe plan --for ENGINE` writes, read back by the engines' own code; development only.

    python tools/read_back.py --sglang expert_location.py --vllm-ascend eplb_utils.py --tensorrt-llm llm_args.py

The files are `sglang/srt/eplb/expert_location.py` of SGLang's wheel, `vllm_ascend/eplb/core/eplb_utils.py` and
`tensorrt_llm/llmapi/llm_args.py` of the repositories; each may be left out. Of each the functions that read a placement
run on a CPU, with stubs for the server around them. What they make of the file is compared with the placement, slot by
slot, and for SGLang and vllm-ascend the replica that every rank takes with the rule that evenmoe assumes. vLLM 0.33 has
no such code. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import subprocess
import sys
import tempfile
import types
import typing
from collections import defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml

from evenmoe import formats
from evenmoe.engines.modulo import RULE as MODULO
from evenmoe.placement import Placement

RANKS, EXPERTS, SLOTS, FIRST, LAYERS = 4, 16, 20, 3, 5


def planned(engine: str, folder: Path, suffix: str) -> tuple[Path, Placement]:
    """The file of `plan --for`, and the placement in it as evenmoe reads it."""
    load = np.random.default_rng(0).poisson(900 / np.arange(1, EXPERTS + 1), (9, LAYERS, EXPERTS))
    np.savez(folder / "l.npz", load=load, layer_ids=np.arange(FIRST, FIRST + LAYERS))
    out = folder / f"{engine}{suffix}"
    call = ["plan", folder / "l.npz", "--ranks", RANKS, "--slots", SLOTS, "--for", engine, "-o", out, "--all", "--json"]
    subprocess.run([sys.executable, "-m", "evenmoe", *map(str, call)], check=True, stdout=subprocess.DEVNULL)
    found = formats.read(out, num_ranks=RANKS, num_experts=EXPERTS, first_layer=FIRST).placement
    assert found is not None
    return out, found


def definitions(source: Path, names: tuple[str, ...], known: dict[str, object]) -> dict[str, object]:
    """Functions and classes of a file, without the rest of it."""
    tree = ast.parse(source.read_text("utf-8"))
    body = [node for node in tree.body if getattr(node, "name", "") in names]
    known = {**known}
    exec(compile(ast.Module(body, []), str(source), "exec"), known)  # the engine's own code is what is tried
    return known


def sglang(source: Path, folder: Path) -> str:
    """`init_by_mapping` on what `--init-expert-location` names, for every rank."""
    path, placement = planned("sglang", folder, ".json")
    moe = types.SimpleNamespace(
        ep_num_redundant_experts=SLOTS - EXPERTS,
        ep_dispatch_algorithm="static",
        ep_join_mode="none",
        moe_a2a_backend="deepep",
        init_expert_location=str(path),
    )
    context = types.SimpleNamespace(
        get_exec=lambda: types.SimpleNamespace(moe=moe),
        get_device=lambda: types.SimpleNamespace(device="cpu"),
        get_parallel=lambda: types.SimpleNamespace(ep_size=RANKS, elastic_ep_initial_size=None, nnodes=1),
        get_resources=mock.MagicMock(),
    )
    stubs = {name: mock.MagicMock() for name in ("sglang", "sglang.srt", "sglang.srt.elastic_ep")}
    stubs["sglang.srt.runtime_context"] = mock.MagicMock(**vars(context))
    elastic = mock.MagicMock(elastic_expanded_world_enabled=lambda: False)
    stubs["sglang.srt.elastic_ep.elastic_ep"] = elastic
    with mock.patch.dict(sys.modules, stubs):
        module = types.ModuleType("expert_location")
        sys.modules[module.__name__] = module
        exec(compile(source.read_text("utf-8"), str(source), "exec"), vars(module))
        sizes = types.SimpleNamespace(num_layers=FIRST + LAYERS, num_logical_experts=EXPERTS, num_groups=None)
        vars(module)["ModelConfigForExpertLocation"] = types.SimpleNamespace(from_model_config=lambda _: sizes)
        taken = np.zeros((LAYERS, SLOTS))
        for rank in range(RANKS):
            found = module.compute_initial_expert_location_metadata(None, rank)
            assert (found.physical_to_logical_map[FIRST:].numpy() == placement.slot_to_expert).all()
            chosen = found.logical_to_rank_dispatch_physical_map[FIRST:].numpy()
            for layer in range(LAYERS):
                assert (placement.slot_to_expert[layer, chosen[layer]] == np.arange(EXPERTS)).all()
                taken[layer] += np.bincount(chosen[layer], minlength=SLOTS)
    assert (taken >= 1).all()  # no rank holds an expert twice, so every replica has the tokens of its own rank
    even = RANKS / np.take_along_axis(placement.num_replicas, placement.slot_to_expert, axis=1)
    return (
        f"every slot; every replica is taken, by at most {np.abs(taken - even).max():.2f} ranks more or less than even"
    )


def vllm_ascend(source: Path, folder: Path) -> str:
    """`expert_file_to_tensor` and `generate_log2phy_map`, for every layer and rank."""
    path, placement = planned("vllm-ascend", folder, ".json")
    known = {"json": json, "torch": torch, "np": np, "defaultdict": defaultdict, "logger": mock.MagicMock()}
    own = definitions(source, ("expert_file_to_tensor", "generate_log2phy_map"), known)
    for layer in range(LAYERS):
        table, count = own["expert_file_to_tensor"](str(path), layer)  # pyright: ignore[reportCallIssue]
        assert count == SLOTS
        assert (table.numpy().ravel() == placement.slot_to_expert[layer]).all()
        held = torch.full((RANKS, EXPERTS), -1, dtype=torch.int32)
        for rank in range(RANKS):
            held[rank, table[rank].long()] = torch.arange(table.shape[1], dtype=torch.int32)
        for rank in range(RANKS):
            theirs = own["generate_log2phy_map"](held, rank)  # pyright: ignore[reportCallIssue]
            ours = MODULO.prepare(placement.eplb_table(layer), SLOTS, rank, RANKS)(torch.arange(EXPERTS)[:, None])
            assert (theirs.numpy() == ours[:, 0].numpy()).all()
    return "every slot; the replica of every rank is that of the rule modulo"


def tensorrt_llm(source: Path, folder: Path) -> str:
    """`MoeLoadBalancerConfig`, for every layer and rank."""
    import pydantic

    path, placement = planned("tensorrt-llm", folder, ".yaml")
    strict = pydantic.create_model("StrictBaseModel", __config__=pydantic.ConfigDict(extra="forbid"))
    known = {name: getattr(typing, name) for name in ("Optional", "Dict", "List")}
    known |= {"StrictBaseModel": strict, "Field": pydantic.Field, "PrivateAttr": pydantic.PrivateAttr}
    made = definitions(source, ("MoeLoadBalancerConfig",), {**known, "__name__": "llm_args"})["MoeLoadBalancerConfig"]
    made.model_rebuild(_types_namespace=known)  # pyright: ignore[reportAttributeAccessIssue]
    config = made(**yaml.safe_load(path.read_text()))  # pyright: ignore[reportCallIssue]
    for rank in range(RANKS):
        config.setup(rank, RANKS)
        for row in range(LAYERS):
            slots = config.get_layer_initial_global_assignments(FIRST + row)
            assert slots == placement.slot_to_expert[row].tolist()
    return "every slot of every layer, by the model's numbers"


def main() -> int:
    """Try those whose source is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    engines = {"sglang": sglang, "vllm-ascend": vllm_ascend, "tensorrt-llm": tensorrt_llm}
    for name in engines:
        parser.add_argument(f"--{name}", type=Path)
    given = vars(parser.parse_args())
    failed = 0
    random.seed(0)
    for name, tried in engines.items():
        source = given[name.replace("-", "_")]
        if source is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"{name}: {tried(source, Path(folder))}")
            except AssertionError as error:
                failed, line = 1, error.__traceback__
                print(f"{name}: differs, line {line.tb_next.tb_lineno if line and line.tb_next else '?'}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
