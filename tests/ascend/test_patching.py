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

from evenmoe.ascend import patch, patching
from evenmoe.ascend.emulated import devices
from evenmoe.ascend.patching import NotEmulatedError, Replacements

# Everything that is replaced, as far as it has a name.
REPLACED = [(torch, name) for name in ("device", "Generator", "load", "npu", *devices._FACTORIES)]
REPLACED += [(torch.Tensor, name) for name in ("to", "cpu", "npu", "is_npu", "record_stream", *devices._METHODS)]
REPLACED += [(torch.nn.Module, name) for name in ("to", "npu")]
REPLACED += [(dist.Backend, "HCCL"), (dist, "is_hccl_available"), (dist, "init_process_group"), (dist, "new_group")]
REPLACED += [(dist.distributed_c10d, "init_process_group"), (torch.ops, "npu")]


def state() -> dict:
    """Everything that a patch may touch."""
    seen = {f"{owner}.{name}": vars(owner).get(name, "absent") for owner, name in REPLACED}
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torch_npu"}
    return seen | modules | {"torch.npu": sys.modules.get("torch.npu")}


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
        assert after == before
        assert patched.active
        with pytest.raises(RuntimeError, match="npu"):
            torch.device("npu")
        with pytest.raises(AttributeError, match=r"`torch_npu.npu` is not in place: it needs patch\(npu=True\)"):
            _ = sys.modules["torch_npu"].npu
    assert not patched.active


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
    with patch(npu=True, check_values=False) as patched:
        assert not patched.active
        assert state() == before
        assert not patching.in_effect(patching.UNCHECKED)


def test_what_is_not_emulated_is_named():
    with patch(npu=True):
        torch_npu = sys.modules["torch_npu"]
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
