"""Ascend's APIs: the functions of torch_npu, the two-stage aclnn calls, C headers and libraries.

`evenmoe.ascend.torch_npu`, `evenmoe.ascend.cann_ops_transformer` and `evenmoe.ascend.aclnn` are imported when they are
used; `import torch_npu` and `import cann_ops_transformer` find the first two only after `patch()`, and `torch.npu` is
there only after `patch(npu=True)`.
"""

from __future__ import annotations

from types import TracebackType

from evenmoe.ascend import patching
from evenmoe.contract.limits import Limits, chip_limits


class Patch:
    """What `patch()` returns: in effect from then on, and taken back by `undo()` or at the end of a `with` block.

    Attributes: `active` (bool), whether the patch is in effect; False where the real torch_npu is installed.
    """

    def __init__(self, *, npu: bool = False, check_values: bool = True, limits: str | None = None) -> None:
        wanted = [patching.TORCH_NPU, *[patching.NPU] * npu, *[patching.UNCHECKED] * (not check_values)]
        chosen = None if limits is None else chip_limits(limits)
        self._needs: list[str] = []
        self._limits: list[Limits] = []
        if patching.real_package_is_here():
            return
        try:
            for need in wanted:
                patching.begin(need)
                self._needs.append(need)
            if chosen is not None:
                patching.begin_limits(chosen)
                self._limits.append(chosen)
        except BaseException:
            self.undo()
            raise

    @property
    def active(self) -> bool:
        return bool(self._needs)

    def undo(self) -> None:
        """Take the patch back; names that were imported meanwhile stay with who imported them."""
        while self._limits:
            patching.end_limits(self._limits.pop())
        while self._needs:
            patching.end(self._needs.pop())

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch(*, npu: bool = False, check_values: bool = True, limits: str | None = None) -> Patch:
    """Let `import torch_npu` and `import cann_ops_transformer` find evenmoe's; does nothing where the real torch_npu is
    installed.

    Args:
        npu: let programs that were written for the chip find its device, too, computed on the CPU: `torch.npu`,
            `torch_npu.npu`, `Tensor.npu()`, `torch.device("npu:3")` and `device="npu"`, backend "hccl" (gloo),
            `get_hccl_comm_name`, `torch_npu.testing`.
        check_values: True raises for a physical expert that occurs twice in one token, which the specification forbids;
            False takes it, as the chip does.
        limits: what the functions of torch_npu and `MoeDistributeBuffer` take: "atlas-a3-2025" or "atlas-a3-2026", the
            rules of one release, or "atlas-a3", what either takes. None for what the patches around this one say, and
            "atlas-a3" where none does.

    The patch holds in all threads of the process and in processes that are forked from it; one that is spawned runs the
    program's own first lines again, and so the patch in them. Patches may be nested: what several need stays until the
    last of them is undone.

    Returns:
        A `Patch`. Keep nothing to let it stay, call its `undo()`, or use it in a `with` statement.

    Raises:
        ConstraintError: `limits` is another name.

    >>> import torch
    >>> with patch(npu=True):
    ...     import torch_npu
    ...     table = torch.tensor([[1, 0, 0], [2, 1, 7]], dtype=torch.int32).npu()
    ...     ids = torch.tensor([[0, 1]], device="npu:0")
    ...     torch_npu.npu_moe_update_expert(ids, table, local_rank_id=4, world_size=8)[0].cpu().tolist()
    [[0, 7]]
    """
    return Patch(npu=npu, check_values=check_values, limits=limits)
