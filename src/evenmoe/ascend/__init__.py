"""Ascend's APIs: the functions of torch_npu, the two-stage aclnn calls, C headers and libraries.

`evenmoe.ascend.torch_npu` and `evenmoe.ascend.aclnn` are imported when they are used; `import torch_npu` finds the
first of them only after `patch()`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import TracebackType

_NAME = "torch_npu"


class Patch:
    """What `patch()` returns: in effect from then on, and taken back by `undo()` or at the end of a `with` block.

    Attributes: `active` (bool), whether `import torch_npu` finds this package's functions because of this patch.
    """

    def __init__(self) -> None:
        self.active = _NAME not in sys.modules and importlib.util.find_spec(_NAME) is None
        if self.active:
            sys.modules[_NAME] = importlib.import_module("evenmoe.ascend.torch_npu")

    def undo(self) -> None:
        """Take the patch back; names that were imported meanwhile stay with who imported them."""
        if self.active:
            sys.modules.pop(_NAME, None)
            self.active = False

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch() -> Patch:
    """Let `import torch_npu` find `evenmoe.ascend.torch_npu`; does nothing where the real package is installed.

    Returns:
        A `Patch`. Keep nothing to let it stay, call its `undo()`, or use it in a `with` statement.

    >>> import torch
    >>> with patch():
    ...     import torch_npu
    ...     table = torch.tensor([[1, 0, 0], [2, 1, 7]], dtype=torch.int32)
    ...     torch_npu.npu_moe_update_expert(torch.tensor([[0, 1]]), table, local_rank_id=4, world_size=8)[0].tolist()
    [[0, 7]]
    """
    return Patch()
