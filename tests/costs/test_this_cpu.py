"""What is measured here, as far as that can be said without a clock."""

from __future__ import annotations

from evenmoe.costs import find_hardware, measure_cpu


def test_it_is_measured_once_and_is_a_machine():
    found = find_hardware("cpu")
    assert found is measure_cpu() is find_hardware("this CPU")
    # Any machine that runs this reads and multiplies faster than 1 MB/s and 1 MFLOP/s.
    assert found.kernels["decode"].model.memory_bytes_per_s > 1e6
    assert found.kernel("prefill", 2.0).model.flops_per_s > 1e6
    assert found.kernels["decode"].basis == found.exchanges["decode"].basis == "this machine"
    assert found.memory_bytes > 1e8
