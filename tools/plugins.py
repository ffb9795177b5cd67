"""The plug-ins for vLLM and SGLang under these servers' own code, beside their own planners; development only.

    python -m pip download --no-deps vllm==0.33.0 sglang==0.5.23
    python tools/plugins.py --vllm vllm-….whl --sglang sglang-….whl

Of the wheels only the packages of policies, of algorithms and of hooks run, on a CPU, with stand-ins for what they
import of the server around them. The plug-in registers itself as the server would load it. Then ten loads that drift
from one to the next are planned one after the other, by the server's own planner and by evenmoe's: copies a layer and
step, the PAR of the load planned for and of the next one, and replicas that share a rank with another of their expert.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
import types
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import evenmoe as em

LAYERS, EXPERTS, SLOTS, RANKS, STEPS, DRIFT = 8, 256, 288, 32, 10, 0.15
Next = Callable[[np.ndarray, np.ndarray | None], np.ndarray]  # load (L, E), map in use -> the next map


def unpacked(wheel: Path, folder: Path, parts: tuple[str, ...]) -> None:
    """The parts of a wheel that are wanted, importable from `folder`; packages above them are empty."""
    with zipfile.ZipFile(wheel) as opened:
        for name in opened.namelist():
            if name.startswith(parts) and name.endswith(".py"):
                opened.extract(name, folder)
    sys.path.insert(0, str(folder))
    for part in parts:
        above = part.rstrip("/").split("/")[:-1]
        for depth in range(1, len(above) + 1):
            package = types.ModuleType(".".join(above[:depth]))
            package.__path__ = [str(folder.joinpath(*above[:depth]))]
            sys.modules.setdefault(package.__name__, package)


def of_vllm(wheel: Path, folder: Path) -> tuple[Next, Next]:
    """vLLM's own planner, and what is in its place once the plug-in is loaded."""
    option = types.ModuleType("vllm.config.parallel")
    option.EPLBPolicyOption = typing.Literal["default"]  # pyright: ignore[reportAttributeAccessIssue]
    unpacked(wheel, folder, ("vllm/distributed/eplb/policy/",))
    for name in ("vllm.config", "vllm.distributed.eplb"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["vllm.distributed.eplb"].__path__ = [str(folder / "vllm/distributed/eplb")]
    sys.modules["vllm.config.parallel"] = option
    policies = importlib.import_module("vllm.distributed.eplb.policy").EPLB_POLICIES
    own = policies["default"]
    importlib.import_module("evenmoe.integrations.vllm").register()
    assert policies["default"] is not own, "the plug-in is in place"

    def asked(policy: typing.Any) -> Next:
        def next_map(load: np.ndarray, used: np.ndarray | None) -> np.ndarray:
            old = None if used is None else torch.from_numpy(used)
            found = policy.rebalance_experts(torch.from_numpy(load), SLOTS, 1, 1, RANKS, old)
            assert found.device == torch.device("cpu"), "as vLLM's async worker asserts"
            return found.numpy().astype(np.int64)

        return next_map

    return asked(own), asked(policies["default"])


def of_sglang(wheel: Path, folder: Path) -> tuple[Next, Next]:
    """SGLang's own algorithm "auto", and "evenmoe", both through its hooks."""
    unpacked(wheel, folder, ("sglang/srt/eplb/eplb_algorithms/", "sglang/srt/plugins/"))
    location = types.SimpleNamespace(physical_to_logical_map_cpu=None)
    places = types.ModuleType("sglang.srt.eplb.expert_location")
    places.get_global_expert_location_metadata = (  # pyright: ignore[reportAttributeAccessIssue]
        lambda: None if location.physical_to_logical_map_cpu is None else location
    )
    sys.modules["sglang.srt.eplb.expert_location"] = places
    for name in ("sglang.srt.environ", "sglang.srt.elastic_ep", "sglang.srt.elastic_ep.elastic_ep"):
        sys.modules[name] = mock.MagicMock()
    algorithms = importlib.import_module("sglang.srt.eplb.eplb_algorithms")
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry").HookRegistry
    importlib.import_module("evenmoe.integrations.sglang").register()
    hooks.apply_hooks()

    def asked(name: str) -> Next:
        def next_map(load: np.ndarray, used: np.ndarray | None) -> np.ndarray:
            location.physical_to_logical_map_cpu = None if used is None else torch.from_numpy(used)
            chosen = algorithms.compute_algorithm(raw_algorithm=name, num_groups=None, num_nodes=1)
            slots, of_expert, count = algorithms.rebalance_experts(
                tokens_per_expert=torch.from_numpy(load)[None],
                num_physical_experts=SLOTS,
                num_local_physical_experts=SLOTS // RANKS,
                num_groups=None,
                num_nodes=1,
                algorithm=chosen,
            )
            assert (count.sum(dim=1) == SLOTS).all()
            assert ((of_expert >= 0).sum(dim=2) == count).all()
            return slots.numpy().astype(np.int64)

        return next_map

    return asked("auto"), asked("evenmoe")


def drifting() -> list[np.ndarray]:
    """Loads of a Zipf law whose experts grow and shrink by 15 % from one to the next."""
    random = np.random.default_rng(0)
    load = 1e5 / np.arange(1, EXPERTS + 1) ** 0.8
    load = np.stack([random.permutation(load) for _ in range(LAYERS)])
    loads = []
    for _ in range(STEPS + 1):
        loads.append(load.astype(np.int64))
        load = load * random.lognormal(0, DRIFT, load.shape)
    return loads


def follow(next_map: Next, loads: list[np.ndarray]) -> str:
    """What a planner does over the loads, after its first plan, which starts from none."""
    used, copies, now, later, shared, spent = None, [], [], [], [], []
    for step, load in enumerate(loads[:-1]):
        begin = time.process_time()
        found = next_map(load, used)
        placement = em.Placement(found, num_ranks=RANKS)
        if used is not None:
            spent.append(time.process_time() - begin)
            copies.append(em.count_copies(em.Placement(used, num_ranks=RANKS), placement).mean())
            now.append(em.peak_to_average(load, placement).mean())
            later.append(em.peak_to_average(loads[step + 1], placement).mean())
            ranks = np.sort(found.reshape(LAYERS, RANKS, -1), axis=2)
            shared.append((np.diff(ranks, axis=2) == 0).sum() / LAYERS)
        used = found
    return (
        f"{np.mean(copies):8.1f}{np.mean(now):9.4f}{np.mean(later):9.4f}{np.mean(shared):9.1f}"
        f"{1e3 * np.median(spent) / LAYERS:9.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, help="its wheel")
    parser.add_argument("--sglang", type=Path, help="its wheel")
    given = parser.parse_args()
    loads = drifting()
    print(f"{LAYERS} layers, {EXPERTS} experts on {SLOTS} slots of {RANKS} ranks, {STEPS} loads, drift {DRIFT}")
    print(f"{'':22}{'copies':>8}{'PAR':>9}{'next PAR':>9}{'shared':>9}{'ms':>9}   a layer and step")
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("vllm", of_vllm), ("sglang", of_sglang)):
            if wheel := getattr(given, name):
                own, ours = make(wheel, Path(folder))
                print(f"{name + ', its own':22}{follow(own, loads)}")
                print(f"{name + ', evenmoe':22}{follow(ours, loads)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
