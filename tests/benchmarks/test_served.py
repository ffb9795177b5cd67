"""The benchmark of a served model on a tiny one: both implementations generate what one process generates."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="this machine lacks transformers, which needs Python 3.11")

from benchmarks import transformers_served
from benchmarks.exchange import results


def test_both_implementations_are_measured(tmp_path):
    path = tmp_path / "served.json"
    sizes = ["--hidden", "32", "--layers", "1", "--experts", "4", "--top-k", "2", "--rows", "4", "--prompt", "5"]
    assert transformers_served.main([*sizes, "--new", "2", "--turns", "1", "--json", str(path)]) == 0
    found = results.read(path)
    assert found["model"]["new"] == 2
    for mode in transformers_served.MODES:
        assert found["modes"][mode].keys() == {"transformers", "evenmoe"}
        for figures in found["modes"][mode].values():
            assert figures["tokens_per_s"] > 0
            assert figures["cpu_ms_per_token"] > 0
