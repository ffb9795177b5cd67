"""`torch_npu.testing`: what op-plugin's own tests of these operators import of it.

Chips and devices are those of one Atlas A3 server. Comparisons are per element: each must be within the tolerance.
"""

from __future__ import annotations

import sys
import unittest
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from evenmoe.ascend.emulated.npu import device_count
from evenmoe.ascend.patching import Replacements
from evenmoe.errors import UnsupportedTypeError

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Values = npt.NDArray[Any]
_PARTS = ("testcase", "common_utils", "common_distributed")


def run_tests() -> None:
    """Run the tests of the program, as `unittest.main`."""
    unittest.main()


class TestCase(unittest.TestCase):
    """A test with torch_npu's comparisons."""

    def assertEqual(self, first: Any, second: Any, msg: Any = None, **tolerances: float) -> None:
        """Compare tensors by shape and values, whatever their dtypes, and anything else by `==`.

        Args:
            tolerances: `prec`, an absolute tolerance instead of equality.
        """
        if not isinstance(first, torch.Tensor) and not isinstance(second, torch.Tensor):
            super().assertEqual(first, second, msg)  # noqa: PT009
            return
        if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
            self.fail(msg or f"a tensor is compared with something else: {first}, {second}")
        prec = tolerances.get("prec", 0)
        torch.testing.assert_close(first, second, rtol=0, atol=prec, equal_nan=True, check_dtype=False, msg=msg)

    def assertRtolEqual(self, x: Any, y: Any, prec: float = 1e-4, prec16: float = 1e-3, message: Any = None) -> None:
        """Compare numbers that may differ by a share of the larger one, or by as much absolutely.

        Args:
            prec: of float32, float64 and integers.
            prec16: of 16 bits.
        """
        a, b = _array(x), _array(y)
        if a.shape != b.shape:
            self.fail(message or f"shapes {a.shape} and {b.shape}")
        tolerance = prec16 if 2 in (_itemsize(x), _itemsize(y)) else prec
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        same = (wide_a == wide_b) | (np.isnan(wide_a) & np.isnan(wide_b))
        with np.errstate(invalid="ignore"):
            difference, size = np.abs(wide_a - wide_b), np.maximum(np.abs(wide_a), np.abs(wide_b))
        near = np.isfinite(size) & (difference <= tolerance * np.maximum(size, 1))
        wrong = ~(same | near)
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            self.fail(message or f"{int(wrong.sum())} of {a.size} differ, the first at {first}: {a[first]}, {b[first]}")


def _itemsize(value: Any) -> int:
    return value.dtype.itemsize if isinstance(value, torch.Tensor | np.ndarray) and _is_float(value) else 0


def _is_float(value: Any) -> bool:
    return value.dtype.is_floating_point if isinstance(value, torch.Tensor) else value.dtype.kind == "f"


def _array(value: Any) -> _Values:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def create_common_tensor(item: Sequence[Any], minValue: float, maxValue: float, device: Any = None) -> tuple[Any, Any]:
    """Draw a tensor of evenly distributed numbers, and its copy on the device.

    Args:
        item: [NumPy dtype, storage format, shape]; the formats are -1, 0 and 2, which are plain ones.
        minValue, maxValue: the range.

    Raises:
        UnsupportedTypeError: a format of the chip's own.

    >>> on_host, on_device = create_common_tensor([np.float16, -1, [2, 3]], 0, 1)
    >>> on_host.shape == on_device.shape, bool((on_host < 0).any())
    (True, False)
    """
    dtype, storage, shape = item
    if storage not in (-1, 0, 2):
        raise UnsupportedTypeError("item", f"of format {storage}", "must be plain, -1, 0 or 2", "use -1")
    drawn = torch.from_numpy(np.asarray(np.random.uniform(minValue, maxValue, shape)).astype(dtype))  # noqa: NPY002
    return drawn, drawn.clone()


def SupportedDevices(supported_devices: Sequence[str]) -> Callable[[_Function], _Function]:
    """Skip a test that is for none of the chips whose values are emulated: Ascend 910B and 910_93, Atlas A2 and A3.

    Args:
        supported_devices: beginnings of chips' names.
    """
    here = any("Ascend910_93".startswith(name) or "Ascend910B".startswith(name) for name in supported_devices)
    return unittest.skipUnless(here, f"emulated is the Atlas A3, the test is for {', '.join(supported_devices)}")


def skipIfUnsupportMultiNPU(npu_number_needed: int) -> Callable[[_Function], _Function]:
    """Skip a test that needs more devices than there are."""
    missing = npu_number_needed > device_count()
    return unittest.skipIf(missing, f"{npu_number_needed} devices are needed, emulated are {device_count()}")


def install(replacements: Replacements) -> None:
    """Let `torch_npu.testing` and its parts be this module."""
    module, name = sys.modules[__name__], "torch_npu.testing"
    owner: ModuleType = sys.modules["torch_npu"]
    replacements.put(owner, "testing", module)
    replacements.put_module(name, module)
    for part in _PARTS:
        replacements.put(module, part, module)
        replacements.put_module(f"{name}.{part}", module)
