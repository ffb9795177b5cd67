"""Ascend's faces: the functions of torch_npu, the two-stage aclnn calls, and the C headers and libraries behind them.

`evenmoe.ascend.torch_npu` and `evenmoe.ascend.aclnn` are imported when they are used.
"""

from __future__ import annotations
