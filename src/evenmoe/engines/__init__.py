"""Serving engines: the file that each reads, its options, its own replica rule and balancer; by name in `ENGINES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evenmoe.registry import Registry

if TYPE_CHECKING:
    from evenmoe.engines.engine import Engine

_KNOWN = "evenmoe.engines.known"

#: evenmoe's own, those of installed packages (entry points `evenmoe.engines`), and the user's.
ENGINES: Registry[Engine] = Registry(
    "engine",
    {
        "sglang": f"{_KNOWN}:SGLANG",
        "vllm": f"{_KNOWN}:VLLM",
        "tensorrt-llm": f"{_KNOWN}:TENSORRT_LLM",
        "vllm-ascend": f"{_KNOWN}:VLLM_ASCEND",
        "mindie": f"{_KNOWN}:MINDIE",
        "evenmoe": f"{_KNOWN}:EVENMOE",
    },
    "evenmoe.engines.engine:Engine",
    "an object of evenmoe.engines.engine.Engine",
    "evenmoe.engines",
)
