"""`torch_npu.testing`: what passes, what fails, and what is skipped."""

from __future__ import annotations

import unittest

import numpy as np
import pytest
import torch

from evenmoe.ascend import patch
from evenmoe.ascend.emulated.testing import SupportedDevices, TestCase, create_common_tensor, skipIfUnsupportMultiNPU
from evenmoe.errors import UnsupportedTypeError

NAN = float("nan")


def test_every_part_is_found():
    with patch(npu=True):
        import torch_npu
        from torch_npu.testing import common_distributed, common_utils
        from torch_npu.testing.testcase import run_tests

        assert torch_npu.testing.testcase.TestCase is TestCase
        assert common_utils.create_common_tensor is create_common_tensor
        assert common_distributed.skipIfUnsupportMultiNPU is skipIfUnsupportMultiNPU
        assert callable(run_tests)


@pytest.mark.parametrize(
    ("x", "y", "options"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), {}),
        (torch.tensor([NAN]), torch.tensor([NAN]), {}),
        (torch.ones(2), torch.ones(2) + 0.01, {"prec": 0.02}),
        ([1, "a"], [1, "a"], {}),
    ],
)
def test_equal(x, y, options):
    TestCase().assertEqual(x, y, **options)  # noqa: PT009


@pytest.mark.parametrize(
    ("x", "y"), [(torch.ones(2), torch.ones(2) + 1e-6), (torch.ones(2), torch.ones(3)), (torch.ones(1), [1.0]), (1, 2)]
)
def test_not_equal(x, y):
    for first, second in ((x, y), (y, x)):
        with pytest.raises(AssertionError):
            TestCase().assertEqual(first, second)  # noqa: PT009


@pytest.mark.parametrize(
    ("x", "y", "options"),
    [
        (np.float32([1000]), np.float32([1000.09]), {}),  # a share of 1e-4 at most
        (np.float32([0]), np.float32([0.9e-4]), {}),  # or as much absolutely
        (torch.tensor([1000.0]).half(), torch.tensor([1000.5]).half(), {}),
        (torch.tensor([1.0]).bfloat16(), torch.tensor([1.0]).bfloat16(), {}),
        (np.float32([1]), np.float32([1.09]), {"prec": 0.1}),
        (np.float32([NAN, np.inf]), np.float32([NAN, np.inf]), {}),
        (np.int64([7]), np.int32([7]), {}),
    ],
)
def test_close(x, y, options):
    TestCase().assertRtolEqual(x, y, **options)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.float32([1000]), np.float32([1000.2])),
        (np.float16([1]), np.float16([1.01])),
        (np.float32([1]), np.float32([NAN])),
        (np.float32([np.inf]), np.float32([1])),
        (np.float32([1]), np.float32([1, 1])),
        (np.int32([1]), np.int32([2])),
    ],
)
def test_not_close(x, y):
    for first, second in ((x, y), (y, x)):
        with pytest.raises(AssertionError):
            TestCase().assertRtolEqual(first, second)


def test_the_message_says_where():
    with pytest.raises(AssertionError, match=r"^1 of 4 differ, the first at \(1, 0\): 1\.0, 3\.0$"):
        TestCase().assertRtolEqual(np.float32([[1, 1], [1, 1]]), np.float32([[1, 1], [3, 1]]))


def test_drawn_tensors():
    host, device = create_common_tensor([np.float16, 2, [4, 5]], 2, 3)
    assert (host.dtype, tuple(host.shape)) == (torch.float16, (4, 5))
    assert torch.equal(host, device)
    assert host.data_ptr() != device.data_ptr()
    assert bool((host >= 2).all() and (host <= 3).all())
    with pytest.raises(UnsupportedTypeError, match=r"^`item` is of format 29: it must be plain, -1, 0 or 2; use -1\.$"):
        create_common_tensor([np.float16, 29, [1]], 0, 1)


@pytest.mark.parametrize(
    ("decorator", "runs"),
    [
        (SupportedDevices(["Ascend910B"]), True),
        (SupportedDevices(["Ascend910_"]), True),
        (SupportedDevices(["Ascend950", "Ascend910_93"]), True),
        (SupportedDevices(["Ascend910_95", "Ascend950"]), False),
        (skipIfUnsupportMultiNPU(16), True),
        (skipIfUnsupportMultiNPU(17), False),
    ],
)
def test_what_is_skipped(decorator, runs):
    ran = []

    class Case(unittest.TestCase):
        @decorator
        def test(self):
            ran.append(True)

    result = unittest.TestResult()
    Case("test").run(result)
    assert (bool(ran), len(result.skipped)) == (runs, int(not runs))
