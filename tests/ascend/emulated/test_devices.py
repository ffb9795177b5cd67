"""Devices of type "npu" in every place where torch takes one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.library import infer_schema

from evenmoe.ascend import patch
from evenmoe.ascend.emulated import devices

SIZES = {
    "arange": (3,),
    "as_tensor": ([1],),
    "asarray": ([1],),
    "bartlett_window": (3,),
    "blackman_window": (3,),
    "empty_permuted": ((2, 3), (1, 0)),
    "empty_strided": ((2, 3), (3, 1)),
    "eye": (2,),
    "full": ((2,), 1.0),
    "full_like": (torch.ones(2), 2.0),
    "hamming_window": (3,),
    "hann_window": (3,),
    "kaiser_window": (3,),
    "linspace": (0, 1, 3),
    "logspace": (0, 1, 3),
    "randint": (3, (2,)),
    "randint_like": (torch.ones(2), 3),
    "randperm": (3,),
    "range": (0, 2),
    "scalar_tensor": (1.0,),
    "sparse_coo_tensor": (torch.zeros((1, 1), dtype=torch.int64), torch.ones(1), (2,)),
    "sparse_csr_tensor": (torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1)),
    "tensor": ([1.0],),
    "tril_indices": (2, 2),
    "triu_indices": (2, 2),
}
METHODS = {
    "new_empty": ((2,),),
    "new_empty_strided": ((2,), (1,)),
    "new_full": ((2,), 1.0),
    "new_tensor": ([1.0],),
}
FORMS = ("npu", "npu:0", "npu:15")


@pytest.fixture(autouse=True)
def patched():
    with patch(npu=True):
        yield


@pytest.mark.filterwarnings("ignore:torch.range is deprecated", "ignore:Sparse ")
@pytest.mark.parametrize("name", devices._FACTORIES)
def test_every_factory_takes_the_device(name):
    arguments = SIZES.get(name, (torch.ones(2),) if name.endswith("_like") else ((2,),))
    for device in (*FORMS, torch.device("npu:1"), 3):
        assert getattr(torch, name)(*arguments, device=device).device == torch.device("cpu")
    assert getattr(torch, name)(*arguments).device.type == "cpu"


@pytest.mark.parametrize("name", devices._METHODS)
def test_every_method_takes_the_device(name):
    for device in (*FORMS, torch.device("npu:1")):
        assert getattr(torch.ones(1), name)(*METHODS.get(name, ((2,),)), device=device).device.type == "cpu"


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.device("npu"),
        lambda: torch.device("npu:3"),
        lambda: torch.device("npu", 3),
        lambda: torch.device(type="npu", index=3),
        lambda: torch.device("npu", index=3),
        lambda: torch.device(torch.device("npu")),
    ],
)
def test_device(make):
    device = make()
    assert isinstance(device, torch.device)
    assert device == torch.device("cpu") == torch.ones(1).device
    assert pickle.loads(pickle.dumps(device)) == copy.deepcopy(device) == device


def test_other_devices_are_what_they_were():
    assert torch.device("meta").type == "meta"
    assert torch.device("cuda", 1).index == 1
    assert torch.zeros(1, device="meta").is_meta
    for wrong in ("npu:x", "npus", "xnpu"):
        with pytest.raises(RuntimeError):
            torch.device(wrong)
        with pytest.raises(RuntimeError):
            torch.zeros(1, device=wrong)
    for wrong in (-1, True):
        with pytest.raises((RuntimeError, TypeError)):
            torch.zeros(1, device=wrong)


def test_the_stand_in_is_the_class_to_who_looks_it_up():
    real = type(torch.device("cpu"))
    assert torch.device == real
    assert {real: 1}[torch.device] == 1
    assert issubclass(real, torch.device)
    assert not isinstance("cpu", torch.device)
    assert pickle.loads(pickle.dumps(torch.device)) is torch.device

    def operator(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        return x

    assert infer_schema(operator, mutates_args=()) == "(Tensor x, Device device) -> Tensor"


def test_a_device_as_a_block():
    with torch.device("npu"):
        assert torch.ones(2).device.type == "cpu"


def test_moving_a_tensor_copies_it():
    """As between host and chip: what one side writes, the other does not see."""
    host = torch.ones(2)
    moves = [
        lambda t: t.npu(),
        lambda t: t.npu(3, non_blocking=True),
        lambda t: t.to("npu"),
        lambda t: t.to("npu:1", torch.float32),
        lambda t: t.to(device="npu"),
        lambda t: t.to(torch.device("npu")),
        lambda t: t.to(1),
        lambda t: t.cpu(),
        lambda t: t.to("cpu"),
    ]
    for move in moves:
        moved = move(host)
        moved.add_(1)
        assert torch.equal(host, torch.ones(2))
    assert host.to(torch.float32) is host
    assert host.to(torch.ones(1)) is host


def test_is_npu():
    assert torch.ones(1).npu().is_npu
    assert not torch.ones(1, device="meta").is_npu


def test_gradients_cross_the_move():
    x = torch.ones(2, requires_grad=True)
    (x.npu() * 3).to("npu").cpu().sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3, 3]


def test_modules():
    layer = torch.nn.Linear(2, 3, device="npu:1")
    assert layer.npu() is layer.npu(2) is layer.to("npu") is layer.to(device="npu:0", dtype=torch.float64) is layer
    assert layer.weight.dtype == torch.float64
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert torch.nn.Linear(2, 3, device="meta").to_empty(device="npu").weight.device.type == "cpu"


def test_generators():
    generator = torch.Generator(device="npu")
    assert isinstance(generator, torch.Generator)
    assert generator.device.type == torch.Generator("npu:2").device.type == torch.Generator().device.type == "cpu"
    drawn = torch.rand(3, generator=generator.manual_seed(1), device="npu")
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("where", [None, "npu:0", "cpu", torch.device("cpu"), {"npu:3": "cpu"}])
def test_files(where):
    written = io.BytesIO()
    torch.save({"a": torch.arange(3)}, written)
    # What a file of the chip says of its tensors: the same length, so that the archive keeps its offsets.
    for content in (written.getvalue(), _as_of_the_chip()):
        loaded = torch.load(io.BytesIO(content), map_location=where)
        assert loaded["a"].tolist() == [0, 1, 2]


def _as_of_the_chip() -> bytes:
    """A file whose tensors were on "npu:3"."""

    class Tagged(pickle.Pickler):
        pass

    original, written = torch.serialization.location_tag, io.BytesIO()
    torch.serialization.location_tag = lambda storage: "npu:3"
    try:
        torch.save({"a": torch.arange(3)}, written)
    finally:
        torch.serialization.location_tag = original
    return written.getvalue()


def test_compiled_functions():
    @torch.compile(backend="eager", fullgraph=True)
    def function(x):
        return x.npu() + torch.ones(2, device="npu").to("npu")

    assert function(torch.ones(2)).tolist() == [2, 2]
