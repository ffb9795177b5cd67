"""The vocabulary of results: complete, unambiguous, and written alike wherever a figure stands."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from evenmoe.quantities import BYTES, QUANTITIES, ROWS, TIMES, common_unit
from evenmoe.simulator.replayed import PolicySummary
from tests.simulator.simulations import make_simulation

#: What identifies a policy, beside its figures.
IDENTITY = {"name", "description", "rule", "num_slots", "cannot_run"}


def test_every_figure_of_a_policy_is_defined():
    fields = {field.name for field in dataclasses.fields(PolicySummary)}
    assert fields - IDENTITY == QUANTITIES.keys()


def test_no_two_figures_look_alike():
    heads = [(quantity.label, quantity.unit) for quantity in QUANTITIES.values()]
    assert len(set(heads)) == len(heads)
    definitions = [quantity.definition for quantity in QUANTITIES.values()]
    assert len(set(definitions)) == len(definitions)


@pytest.mark.parametrize("name", QUANTITIES)
def test_a_figure_has_a_unit_and_one_sentence(name):
    quantity = QUANTITIES[name]
    assert quantity.name == name
    assert quantity.better in ("lower", "higher", "")
    assert re.fullmatch(r"[^.]+(\.\d[^.]*)*\.", quantity.definition)
    assert quantity.unit
    if quantity.scale:
        assert quantity.scale[0].name in quantity.unit
    for suffix, unit in (("_us", "µs"), ("_bytes_per_rank", "B"), ("_percent", "%"), ("_steps", "steps")):
        if name.endswith(suffix):
            assert quantity.unit.startswith(unit)


@pytest.mark.parametrize("units", [TIMES, BYTES, ROWS])
def test_the_unit_of_a_column_suits_its_largest_number(units):
    for unit in units:
        assert common_unit([0.0, math.inf, -unit.size], units) == unit
    assert common_unit([], units) == units[0]


def test_a_figure_is_written_alike_alone_and_beside_its_family():
    """One millisecond beside two seconds is 0.00100 s in both columns."""
    summary = make_simulation().summary
    slow = dataclasses.replace(summary.policies[0], step_time_us=2e6, copy_time_us=1e3, net_time_us=2.001e6)
    both = dataclasses.replace(summary, policies=(slow,))
    assert both.shown("step_time_us").texts == ("2.00",)
    assert both.shown("copy_time_us").texts == ("0.00100",)
    assert both.shown("copy_time_us").unit == both.shown("net_time_us").unit == "s per step"
    assert both.shown("refresh_copy_time_us").unit == "µs per refresh"
