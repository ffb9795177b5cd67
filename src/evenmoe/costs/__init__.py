"""What a step's experts, exchanges and copies take in time, by constants fitted to public tables of measured kernels.

Every constant stands in `constants.json` with its unit, GPU, engine, version, kernel, weight type and table;
`tools/fit_costs.py` fits them again. docs/validation.md says how far they are right.
"""

from __future__ import annotations

from evenmoe.costs.hardware import Exchange, Hardware, KernelFit, find_hardware, hardware_names
from evenmoe.costs.kernel import KernelModel
from evenmoe.costs.this_cpu import measure_cpu

__all__ = ["Exchange", "Hardware", "KernelFit", "KernelModel", "find_hardware", "hardware_names", "measure_cpu"]
