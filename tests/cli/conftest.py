"""`evenmoe`, called as on the command line."""

from __future__ import annotations

import pytest

from tests.cli.running import DEMO, SMALL, Run, runner


@pytest.fixture
def evenmoe(monkeypatch, capsys) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture
def small_demo(monkeypatch, evenmoe) -> Run:
    """`small_demo(*options)`: the demo on small worlds."""
    for name, size in SMALL.items():
        monkeypatch.setattr(DEMO, name, size)
    return lambda *options: evenmoe("demo", *options)
