"""`evenmoe`, called as on the command line."""

from __future__ import annotations

import pytest

from evenmoe.cli import chain
from tests.cli.running import SMALL, Run, runner


@pytest.fixture
def evenmoe(monkeypatch, capsys) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture
def small_demo(monkeypatch, evenmoe) -> Run:
    """`small_demo(*options)`: the demo on small worlds."""
    for name, size in SMALL.items():
        monkeypatch.setattr(chain, name, size)
    return lambda *options: evenmoe("demo", *options)
