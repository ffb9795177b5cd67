"""`patch()`: what it puts in place, in whatever order patches begin and end, and that nothing of it is left behind."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.ascend import patch, patching, torch_npu
from evenmoe.ascend.cann_ops_transformer import ops
from evenmoe.ascend.emulated import devices
from evenmoe.ascend.patching import NotEmulatedError, Replacements
from evenmoe.errors import ConstraintError
from tests.patience import HANG_S

EXTENSION, PARTS = "cann_ops_transformer", ("deep_ep", "elastic_buffer", "comm_context")

# Everything that is replaced, as far as it has a name.
REPLACED = [(torch, name) for name in ("device", "Generator", "load", "npu", *devices._FACTORIES)]
REPLACED += [(torch.Tensor, name) for name in ("to", "cpu", "npu", "is_npu", "record_stream", *devices._METHODS)]
REPLACED += [(torch.nn.Module, name) for name in ("to", "npu")]
REPLACED += [(dist.Backend, "HCCL"), (dist, "is_hccl_available"), (dist, "init_process_group"), (dist, "new_group")]
REPLACED += [(dist.distributed_c10d, "init_process_group"), (torch.ops, "npu")]


def state() -> dict:
    """Everything that a patch may touch."""
    seen = {f"{owner}.{name}": vars(owner).get(name, "absent") for owner, name in REPLACED}
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("torch_npu", EXTENSION)}
    seen |= {f"ops.{name}": value for name, value in vars(ops).items() if isinstance(value, ModuleType)}
    return seen | modules | {"torch.npu": sys.modules.get("torch.npu"), "limits": patching.limits_in_effect()}


@pytest.fixture(autouse=True)
def nothing_is_left():
    importlib.import_module("evenmoe.ascend.torch_npu")
    before = state()
    yield
    assert state() == before


def test_a_plain_patch_adds_torch_npu_and_nothing_else():
    before = state()
    with patch() as patched:
        after = state()
        assert after.pop("torch_npu") is sys.modules["evenmoe.ascend.torch_npu"]
        assert {name for name in after if name not in before} == {
            *(EXTENSION, f"{EXTENSION}.ops"),
            *(f"{place}.{part}" for part in PARTS for place in ("ops", f"{EXTENSION}.ops")),
        }
        assert {name: value for name, value in after.items() if name in before} == before
        assert patched.active
        with pytest.raises(RuntimeError, match="npu"):
            torch.device("npu")
        with pytest.raises(AttributeError, match=r"`torch_npu.npu` is not in place: it needs patch\(npu=True\)"):
            _ = sys.modules["torch_npu"].npu
    assert not patched.active


@pytest.mark.parametrize("part", PARTS)
def test_the_extension_is_found_as_upstream_has_it(part):
    with patch():
        package = importlib.import_module(EXTENSION)
        inner = importlib.import_module(f"{EXTENSION}.ops.{part}")
        assert getattr(package.ops, part) is inner is sys.modules[f"evenmoe.ascend.cann_ops_transformer.{part}"]
        assert package.MoeDistributeBuffer is importlib.import_module(f"{EXTENSION}.ops").MoeDistributeBuffer
    for name in (EXTENSION, f"{EXTENSION}.ops", f"{EXTENSION}.ops.{part}"):
        with pytest.raises(ModuleNotFoundError, match=EXTENSION):
            importlib.import_module(name)


def test_limits_are_those_of_the_last_patch_that_names_some():
    names = []
    with patch(limits="atlas-a3-2025") as outer:
        names.append(patching.limits_in_effect().name)
        with patch(), patch(limits="atlas-a3-2026"):
            names.append(patching.limits_in_effect().name)
            outer.undo()
            names.append(patching.limits_in_effect().name)
        names.append(patching.limits_in_effect().name)
    assert names == ["atlas-a3-2025", "atlas-a3-2026", "atlas-a3-2026", "atlas-a3"]


@pytest.mark.parametrize("limits", ["relaxed", "atlas-a3-2024", "", 3])
def test_limits_have_names(limits):
    with pytest.raises(ConstraintError) as caught:
        patch(limits=limits)
    assert str(caught.value) == (
        f'`limits` is {limits!r}: it must be "atlas-a3", "atlas-a3-2025" or "atlas-a3-2026"; use one of these names, '
        "or evenmoe's own functions."
    )
    assert "torch_npu" not in sys.modules


@pytest.mark.parametrize(("limits", "taken"), [(None, True), ("atlas-a3-2025", True), ("atlas-a3-2026", False)])
def test_what_the_functions_take_is_what_the_limits_take(limits, taken):
    """Two tensor-parallel peers, which the release of 2026 has not."""

    def step(rank):
        x, ids = torch.ones(1, 1024, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32)
        group = {"group_ep": rank.ep.name, "ep_world_size": 2, "ep_rank_id": rank.ep.rank, "moe_expert_num": 2}
        peers = {"group_tp": rank.tp.name, "tp_world_size": 2, "tp_rank_id": rank.tp.rank}
        try:
            return len(torch_npu.npu_moe_distribute_dispatch_v2(x, ids, **group, **peers)[0])
        except torch_npu.NpuCallError as error:
            return str(error)

    with em.local_world(2, 2, timeout_s=HANG_S) as world, patch(limits=limits):
        said = world.run(step)
    assert said == [4] * 4 if taken else all("`tp_world_size` is 2: it must be 0 to 1" in text for text in said)


def test_importing_the_package_touches_nothing():
    code = (
        "import torch\n"
        "before = torch.device, torch.zeros, torch.Tensor.to\n"
        "import evenmoe.ascend, evenmoe.ascend.torch_npu\n"
        "from evenmoe.ascend.emulated import devices, hccl, npu, testing\n"
        "assert before == (torch.device, torch.zeros, torch.Tensor.to)\n"
        "assert type(torch.device) is type and not hasattr(torch, 'npu') and not hasattr(torch.Tensor, 'npu')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_patch_without_torch_npu_needs_no_torch():
    code = "import sys, evenmoe.ascend; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers()), min_size=1, max_size=5))
def test_patches_may_end_in_any_order(wanted):
    before = state()
    begun = [(patch(npu=npu, check_values=checked), npu, checked) for npu, checked, _ in wanted]
    held = [begun[number] for number in sorted(range(len(wanted)), key=lambda number: wanted[number][2])]
    while held:
        assert hasattr(torch, "npu") == any(npu for _, npu, _ in held)
        assert patching.in_effect(patching.UNCHECKED) == any(not checked for *_, checked in held)
        one, *_ = held.pop()
        one.undo()
        one.undo()  # which does nothing the second time
    assert state() == before


def test_patches_of_many_threads_leave_nothing_behind():
    wrong, start = [], threading.Barrier(8)

    def work():
        start.wait()
        for _ in range(20):
            with patch(npu=True):
                if not torch.zeros(1, device="npu").is_npu:
                    wrong.append("not in effect")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_patch_holds_in_threads_that_ran_before():
    asked, done, seen = threading.Event(), threading.Event(), []

    def work():
        asked.wait()
        seen.append(torch.zeros(2, device="npu:1").device.type)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with patch(npu=True):
        asked.set()
        done.wait()
    thread.join()
    assert seen == ["cpu"]


def test_the_patch_ends_with_the_block_that_raises():
    with pytest.raises(ZeroDivisionError), patch(npu=True):
        _ = 1 / 0


def test_a_patch_that_fails_half_way_leaves_nothing(monkeypatch):
    def fail(_):
        raise MemoryError

    monkeypatch.setattr("evenmoe.ascend.emulated.hccl.install", fail)
    with pytest.raises(MemoryError):
        patch(npu=True)
    assert not hasattr(torch, "npu")
    assert "torch_npu" not in sys.modules


def test_names_kept_from_a_patch_do_afterwards_what_the_originals_do():
    with patch(npu=True):
        device, zeros, to = torch.device, torch.zeros, torch.Tensor.to
        assert device("npu") == zeros(1, device="npu").device
    for call in (lambda: device("npu"), lambda: zeros(1, device="npu"), lambda: to(torch.ones(1), "npu")):
        with pytest.raises(RuntimeError, match="npu"):
            call()
    assert device("meta") == torch.device("meta")
    one = torch.ones(1)
    assert to(one, "cpu") is one


def test_what_others_have_put_in_place_since_stays(monkeypatch):
    monkeypatch.setattr(torch, "zeros", torch.zeros)  # to be put back after the test

    def mine(*size: int) -> torch.Tensor:
        return torch.ones(*size)

    with patch(npu=True):
        torch.zeros = mine
    assert torch.zeros is mine


def test_the_real_package_is_left_alone(monkeypatch):
    real = ModuleType("torch_npu")
    monkeypatch.setitem(sys.modules, "torch_npu", real)
    before = state()
    with patch(npu=True, check_values=False, limits="atlas-a3-2025") as patched:
        assert not patched.active
        assert state() == before
        assert not patching.in_effect(patching.UNCHECKED)


def test_what_is_not_emulated_is_named():
    with patch(npu=True):
        with pytest.raises(NotEmulatedError) as caught:
            torch_npu.npu_swiglu(torch.ones(2))
        assert str(caught.value).startswith(
            "`torch_npu.npu_swiglu` is not emulated: it must be one of _npu_distribute_barrier, npu_moe_"
        )
        assert str(caught.value).endswith("; write it with torch's own functions, or run this part on the chip.")
        with pytest.raises(NotEmulatedError, match=r"^`torch\.npu\.mem_get_info` is not emulated: it must be one of "):
            torch.npu.mem_get_info()
        assert not hasattr(torch_npu, "npu_swiglu")
        assert not hasattr(torch.npu, "mem_get_info")
        assert torch.ops.npu.npu_moe_update_expert is torch_npu.npu_moe_update_expert


def test_replacements_end_in_reverse():
    owner, replacements = ModuleType("owner"), Replacements()
    owner.first = 1
    for value in (2, 3):
        replacements.put(owner, "first", value)
    replacements.put(owner, "second", 4)
    replacements.put_module("owner.part", owner)
    assert sys.modules["owner.part"] is owner
    replacements.take_back()
    assert owner.first == 1
    assert not hasattr(owner, "second")
    assert "owner.part" not in sys.modules
