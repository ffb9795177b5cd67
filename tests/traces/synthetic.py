"""Synthetic files with all that measured ones have, stand-ins for those that lie beside the checkout."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from evenmoe.traces import synthesize
from tests.beside import TRACES

#: name -> the arguments of `synthesize`; as many windows as requests, one of which each window holds.
SYNTHETIC = {
    "synthetic_gpt_oss_20b": {"model": "gpt-oss-20b", "num_windows": 9, "tokens_per_window": 40, "requests": 1},
    "synthetic_deepseek_v2_lite": {
        "model": "deepseek-v2-lite",
        "num_windows": 7,
        "tokens_per_window": 60,
        "requests": 1,
    },
}


def trace_file(name: str, folder: Path) -> Path:
    """The measured trace of that name, or the synthetic one, written into `folder` with what recorders add besides."""
    if name not in SYNTHETIC:
        return TRACES / f"{name}.npz"
    trace = synthesize(**SYNTHETIC[name], routing=True, seed=3)
    assert trace.routing is not None
    np.savez_compressed(
        folder / f"{name}.npz",
        load=trace.load,
        routing=trace.routing.astype(np.uint16),
        seq_start=trace.seq_start,
        layer_ids=trace.layer_ids,
        seq_name=np.array([f"request {i}" for i in range(trace.num_windows)]),
        token_pos=np.arange(len(trace.routing), dtype=np.int32),
    )
    return folder / f"{name}.npz"
