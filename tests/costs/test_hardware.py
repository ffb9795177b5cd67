"""What is known of every accelerator, and how it is marked."""

from __future__ import annotations

import json
from importlib import resources

import pytest

from evenmoe.costs import find_hardware, hardware_names
from evenmoe.errors import ConstraintError

KINDS = {
    "H100": "measured",
    "H200": "sibling",
    "B200": "measured",
    "GB200": "sibling",
    "A100": "sibling",
    "Atlas A3": "data sheet",
}


def told() -> dict:
    return json.loads(resources.files("evenmoe.costs").joinpath("constants.json").read_text("utf-8"))


def test_every_accelerator_says_what_its_constants_rest_on():
    assert hardware_names() == tuple(KINDS)
    for name, basis in KINDS.items():
        hardware = find_hardware(name)
        for phase in ("decode", "prefill"):
            assert hardware.kernels[phase].basis == basis
            assert hardware.exchanges[phase].basis == basis
            assert ("scaled by the data sheets of both" in hardware.kernels[phase].source) == (basis != "measured")


def test_every_constant_has_its_key_and_its_unit():
    found = told()
    for entry in found["kernels"]:
        assert {"gpu", "phase", "engine", "version", "kernel", "dtype", "table", "values"} == entry.keys()
        assert entry["table"].startswith(entry["gpu"].lower())
        assert entry["values"].keys() <= found["units"].keys()
    for entry in found["exchanges"]:
        assert {"gpu", "phase", "engine", "version", "kernel", "table", "values"} == entry.keys()
        assert entry["values"].keys() <= found["units"].keys()
    for sheet in found["hardware"].values():
        assert sheet.keys() - {"sibling", "basis", "source"} <= found["units"].keys()


def test_no_kernel_is_faster_than_its_data_sheet():
    """A bandwidth beyond the memory's shows a fit that went astray: uniform rows alone hardly part some terms."""
    for name in KINDS:
        hardware = find_hardware(name)
        for fit in hardware.kernels.values():
            assert 0.4 * hardware.memory_bytes_per_s < fit.model.memory_bytes_per_s < hardware.memory_bytes_per_s
            assert 0.2 * hardware.flops_per_s[1.0] < fit.model.flops_per_s < hardware.flops_per_s[1.0]


def test_a_sibling_is_scaled_by_hand():
    h100, h200 = find_hardware("H100").kernel("decode").model, find_hardware("H200").kernel("decode").model
    assert h200.memory_bytes_per_s == pytest.approx(h100.memory_bytes_per_s * (4.8 / 3.35) ** 0.95, rel=1e-14)
    assert (h200.flops_per_s, h200.start_us, h200.tile) == (h100.flops_per_s, h100.start_us, h100.tile)
    a100 = find_hardware("A100").kernel("decode").model
    # The arithmetic of H100's constants, 1.3e15 · (624 / 1979)^0.6, would be more than A100 has.
    assert a100.flops_per_s == 0.7 * 6.24e14


def test_names_are_found_in_any_case_and_wrong_ones_are_named():
    assert find_hardware("atlas_a3") is find_hardware("Atlas A3")
    assert find_hardware(" gb200 ").node_ranks == 72
    with pytest.raises(ConstraintError) as caught:
        find_hardware("V100")
    assert str(caught.value) == (
        "`gpu` is 'V100': it must be an accelerator that is known; use H100, H200, B200, GB200, A100, Atlas A3, cpu."
    )
