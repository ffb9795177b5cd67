"""Files of known traffic as SGLang, vLLM and TensorRT-LLM record it, and `evenmoe plan` on each; development only.

    python -m pip download --no-deps sglang vllm    # or one of them
    python tools/recordings.py --wheels FOLDER

SGLang's recorder and vLLM's capturer are the programs' own classes, taken from their wheels and run on a CPU; what they
import of the servers around them is replaced by stubs. TensorRT-LLM's folder is written here, tensor by tensor, as its
documentation says. What evenmoe reads is compared with the traffic: every count, and where tokens are kept every token.
Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import save_file

from evenmoe import formats
from evenmoe.traces.synthesis import synthesize
from evenmoe.traces.trace import Trace

MODEL, FIRST, RANKS, SLOTS, PASSES, TOKENS = "deepseek-v2-lite", 1, 2, 72, 6, 96
_SGLANG = "sglang/srt/eplb/expert_distribution.py"
_VLLM = "vllm/model_executor/layers/fused_moe/routed_experts_capturer.py"


def traffic() -> Trace:
    """Tokens of six passes over the model's MoE layers, 48 on each of two ranks."""
    return synthesize(MODEL, num_windows=PASSES, tokens_per_window=TOKENS, requests=8, routing=True, seed=3)


def parts(trace: Trace) -> Iterator[tuple[int, int, np.ndarray]]:
    """(pass, rank, experts (tokens, MoE layers, K)), in the order in which they are recorded."""
    assert trace.routing is not None
    for number, tokens in enumerate(np.split(trace.routing, PASSES)):
        for rank, own in enumerate(np.split(tokens, RANKS)):
            yield number, rank, own


def source_of(wheels: Path, member: str) -> Path | None:
    """The file of a wheel, unpacked into a temporary folder that stays."""
    for wheel in sorted(wheels.glob(f"{member.partition('/')[0]}-*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(member, tempfile.mkdtemp()))
    return None


def module_of(path: Path, stubs: Mapping[str, object]) -> types.ModuleType:
    """The file as a module; what it imports of the server, now and later, is answered by stubs."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.update({**stubs, path.stem: module})  # pyright: ignore[reportArgumentType, reportCallIssue]
    spec.loader.exec_module(module)
    return module


class Withable:
    """A value that is set inside a `with`."""

    value = None

    @contextlib.contextmanager
    def with_value(self, value: object) -> Iterator[None]:
        self.value = value
        yield
        self.value = None


def sglang_dumps(path: Path, trace: Trace, mode: str, folder: Path) -> np.ndarray:
    """Record the traffic with SGLang's recorder into the folder; returns the slots' experts (layers, P)."""
    shape = trace.load.shape
    hidden = FIRST + shape[1]
    slots = np.random.default_rng(0).permuted(np.tile(np.arange(SLOTS) % shape[2], (hidden, 1)), axis=1)
    moe = types.SimpleNamespace(
        expert_distribution_recorder_mode=mode,
        expert_distribution_recorder_buffer_size=2 * RANKS * PASSES,  # a ring that is half empty
        moe_a2a_backend="none",
        eplb_min_rebalancing_utilization_threshold=1.0,
        expert_balancedness_report_mode=None,
    )
    settings = types.SimpleNamespace(moe=moe, overlap=types.SimpleNamespace(enable_two_batch_overlap=False))
    context = mock.MagicMock(
        get_exec=lambda: settings,
        get_device=lambda: types.SimpleNamespace(device="cpu"),
        get_platform=lambda: types.SimpleNamespace(is_hip=False),
        get_schedule=lambda: types.SimpleNamespace(chunked_prefill_size=TOKENS),
        reports_expert_balancedness=lambda: False,
    )
    environment = mock.MagicMock()
    environment.envs.SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR.get = lambda: str(folder)
    utils = mock.MagicMock(Withable=Withable, get_device=lambda: "cpu")
    stubs = {name: mock.MagicMock() for name in ("einops", "sglang", "sglang.srt", "sglang.srt.model_executor")}
    stubs |= {"sglang.srt.environ": environment, "sglang.srt.runtime_context": context, "sglang.srt.utils": utils}
    for name in (
        "layers",
        "layers.moe",
        "observability",
        "observability.metrics_collector",
        "model_executor.forward_batch_info",
    ):
        stubs[f"sglang.srt.{name}"] = mock.MagicMock()
    recorder = module_of(path, stubs)
    metadata = types.SimpleNamespace(
        num_layers=hidden,
        num_logical_experts=shape[2],
        num_physical_experts=SLOTS,
        num_local_physical_experts=SLOTS // RANKS,
        ep_size=RANKS,
        physical_to_logical_map=torch.from_numpy(slots),
    )
    made = [
        recorder.ExpertDistributionRecorder.init_new(metadata, rank) for rank in range(1 if mode == "stat" else RANKS)
    ]
    for each in made:
        each.start_record()
    rng = np.random.default_rng(1)
    for number, rank, experts in parts(trace):
        half = len(experts) // 2
        batch = types.SimpleNamespace(
            input_ids=torch.arange(len(experts)),
            positions=torch.arange(len(experts)),
            extend_seq_lens_cpu=[half, len(experts) - half],
            forward_mode=types.SimpleNamespace(value=1),
        )
        each = made[min(rank, len(made) - 1)]
        with each.with_forward_pass(number, batch):
            for row in range(shape[1]):
                with each.with_current_layer(FIRST + row):
                    held = [np.flatnonzero(slots[FIRST + row] == e) for e in range(shape[2])]
                    chosen = [[rng.choice(held[e]) for e in token] for token in experts[:, row]]
                    each.on_select_experts(torch.tensor(np.array(chosen), dtype=torch.int32))
    for each in made:
        each.stop_record()
        each.dump_record()
    return slots


def vllm_arrays(path: Path, trace: Trace, folder: Path) -> None:
    """Capture the traffic with vLLM's capturer, each rank's part of a pass as a request; .npz files in the folder."""
    assert trace.top_k is not None
    top_k = trace.top_k
    model = types.SimpleNamespace(
        get_total_num_hidden_layers=lambda: FIRST + trace.num_layers,
        get_num_experts=lambda: trace.num_experts,
        get_num_experts_per_tok=lambda: top_k,
        hf_text_config=types.SimpleNamespace(model_type=MODEL),
    )
    parallel = types.SimpleNamespace(data_parallel_rank=0, tensor_parallel_size=1)
    config = types.SimpleNamespace(model_config=model, parallel_config=parallel)
    here = types.SimpleNamespace(dp_metadata=None, batch_descriptor=None)
    names = ("vllm", "config", "distributed", "distributed.parallel_state", "forward_context", "model_executor")
    more = ("model_executor.layers", "model_executor.layers.fused_moe", "model_executor.layers.fused_moe.config")
    last = ("platforms", "v1", "v1.worker", "v1.worker.ubatching")
    stubs: dict[str, object] = {
        name if name == "vllm" else f"vllm.{name}": mock.MagicMock() for name in (*names, *more, *last)
    }
    stubs["vllm.forward_context"] = mock.MagicMock(get_forward_context=lambda: here)
    stubs["vllm.platforms"] = mock.MagicMock(current_platform=types.SimpleNamespace(device_type="cpu"))
    stubs["vllm.v1.worker.ubatching"] = mock.MagicMock(dbo_current_ubatch_token_offset=lambda: 0)
    capturer = module_of(path, stubs).RoutedExpertsCapturer(TOKENS, config)
    for request, (_, _, experts) in enumerate(parts(trace)):
        for row in range(trace.num_layers):
            capturer.capture(FIRST + row, torch.from_numpy(experts[:, row].astype(np.int32)))
        np.savez(folder / f"request_{request}.npz", routed_experts=capturer.snapshot_routing_data(len(experts)).numpy())


def sglang_responses(trace: Trace, file: Path) -> None:
    """The traffic as requests' answers: `meta_info` with the base64 of int32 that SGLang's detokenizer makes."""
    lines = []
    for _, _, experts in parts(trace):
        ids = np.concatenate([np.zeros_like(experts[:, :FIRST]), experts], axis=1).astype(np.int32)
        meta = {"prompt_tokens": 1, "completion_tokens": len(ids)}
        lines.append({"text": "", "meta_info": {**meta, "routed_experts": base64.b64encode(ids.tobytes()).decode()}})
    file.write_text("\n".join(map(json.dumps, lines)))


def tensorrt_llm_statistics(trace: Trace, folder: Path) -> None:
    """Each rank's counts of each iteration and model layer."""
    meta = {"num_experts": trace.num_experts, "num_experts_per_token": trace.top_k}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    for rank in range(RANKS):
        counts = {
            f"{100 + number}_{FIRST + row}": np.bincount(experts[:, row].ravel(), minlength=trace.num_experts)
            for number, owner, experts in parts(trace)
            if owner == rank
            for row in range(trace.num_layers)
        }
        save_file({name: row.astype(np.int32) for name, row in counts.items()}, folder / f"rank{rank}.safetensors")


def judge(name: str, source: Path, trace: Trace, told: dict, *, tokens: bool, folder: Path) -> bool:
    """Print what was read of a recording and what `evenmoe plan` says; whether it is the traffic."""
    contents = formats.read(source, **told)
    assert contents.load is not None
    right = np.array_equal(contents.load.sum(axis=0), trace.load.sum(axis=0))
    right = right and contents.layer_ids == tuple(range(FIRST, FIRST + trace.num_layers))
    found = None if contents.trace is None else contents.trace.routing
    if tokens:
        assert trace.routing is not None
        # The recorder keeps slots in the columns of a token, in the router's order, which is that of the traffic.
        right = right and found is not None and np.array_equal(found, trace.routing)
    target = folder / f"{name.replace(' ', '_')}.json"
    names = {"num_layers": "--num-layers", "num_experts": "--experts"}
    flags = [word for key, value in told.items() for word in (names[key], value)]
    plan = ["plan", source, "--ranks", 8, "--slots", SLOTS, "-o", target, "--to", "sglang-location", "--json", *flags]
    done = subprocess.run(
        [sys.executable, "-m", "evenmoe", *map(str, plan)], capture_output=True, text=True, check=False
    )
    written = done.returncode == 0 and formats.read(target, num_ranks=8, first_layer=FIRST).placement is not None
    kept = "no tokens" if found is None else f"{len(found)} tokens"
    print(f"{name:<28} {contents.format:<24} {len(contents.load):>3} windows, {kept:<11}", end=" ")
    print(
        "equal to the traffic" if right else "NOT THE TRAFFIC", "planned" if written else f"NOT PLANNED: {done.stderr}"
    )
    return right and written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the wheels sglang-*.whl and vllm-*.whl")
    options = parser.parse_args()
    folder, trace, right = Path(tempfile.mkdtemp()), traffic(), []
    recorder, capturer = source_of(options.wheels, _SGLANG), source_of(options.wheels, _VLLM)

    def record(name: str, write: Callable[[Path], object], told: dict, *, tokens: bool) -> None:
        target = folder / name.replace(" ", "_")
        target.mkdir()
        write(target)
        files = list(target.iterdir())
        source = files[0] if len(files) == 1 else target
        right.append(judge(name, source, trace, told, tokens=tokens, folder=folder))

    if recorder is not None:
        torch.cpu.empty_cache = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
        dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
        for mode in ("stat", "per_pass", "per_token"):
            write = lambda target, mode=mode: sglang_dumps(recorder, trace, mode, target)  # noqa: E731
            record(f"SGLang recorder {mode}", write, {}, tokens=mode == "per_token")
        dist.destroy_process_group()
    if capturer is not None:
        record("vLLM routed_experts", lambda target: vllm_arrays(capturer, trace, target), {}, tokens=True)
    shape = {"num_layers": FIRST + trace.num_layers}
    record("SGLang responses", lambda target: sglang_responses(trace, target / "r.jsonl"), shape, tokens=True)
    known = {"num_experts": trace.num_experts}
    record("TensorRT-LLM statistics", lambda target: tensorrt_llm_statistics(trace, target), known, tokens=False)
    missing = [name for name, path in (("sglang", recorder), ("vllm", capturer)) if path is None]
    print(f"no wheel of {' and '.join(missing)}: not run" if missing else "all programs' classes were run")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
