"""Ascend's faces: the functions of torch_npu, the two-stage aclnn calls, C headers and libraries.

`evenmoe.ascend.torch_npu` and `evenmoe.ascend.aclnn` are imported when they are used; `import torch_npu` finds the
first of them only after `patch()`.
"""

from __future__ import annotations

from evenmoe.ascend.patching import Patch as Patch
from evenmoe.ascend.patching import patch as patch
