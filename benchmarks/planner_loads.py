"""The loads and shapes that planners are measured on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Load = npt.NDArray[np.float64]

TOKENS = 200_000  # a layer


def zipf(layers: int, experts: int, exponent: float, seed: int) -> Load:
    """Permuted 1 / rank^exponent per layer, times lognormal(0.1); Poisson counts."""
    random = np.random.default_rng(seed)
    weight = random.permuted(np.tile(1 / np.arange(1, experts + 1) ** exponent, (layers, 1)), axis=1)
    return counts(weight * random.lognormal(0, 0.1, weight.shape), seed)


def lognormal(layers: int, experts: int, sigma: float, seed: int) -> Load:
    return counts(np.random.default_rng(seed).lognormal(0, sigma, (layers, experts)), seed)


def hot(layers: int, experts: int, share: float, seed: int) -> Load:
    """One expert of every layer with `share` of the load, lognormal(0.7) the others."""
    random = np.random.default_rng(seed)
    weight = random.lognormal(0, 0.7, (layers, experts))
    first = random.integers(0, experts, (layers, 1))
    np.put_along_axis(weight, first, 0, axis=1)
    np.put_along_axis(weight, first, weight.sum(axis=1, keepdims=True) * share / (1 - share), axis=1)
    return counts(weight, seed)


def drift(load: Load, sigma: float, seed: int) -> Load:
    """The load a while later: times lognormal(sigma), the same number of tokens."""
    later = load * np.random.default_rng(seed).lognormal(0, sigma, load.shape)
    return later * (load.sum(axis=1) / later.sum(axis=1))[:, None]


def counts(weight: Load, seed: int) -> Load:
    share = weight / weight.sum(axis=1, keepdims=True)
    return np.random.default_rng(seed + 1).poisson(share * TOKENS).astype(float)


class Case(NamedTuple):
    name: str
    layers: int
    experts: int
    slots: int
    ranks: int
    kind: str  # zipf, lognormal or hot
    parameter: float
    nodes: int = 1
    groups: int = 1
    goal: str = ""

    def load(self, seed: int) -> Load:
        make = {"zipf": zipf, "lognormal": lognormal, "hot": hot}[self.kind]
        return make(self.layers, self.experts, self.parameter, seed)


CASES = (
    Case("DeepSeek-V3", 58, 256, 288, 32, "zipf", 1.0, goal="1.0008 in 10 ms"),
    Case("DeepSeek-V3", 58, 256, 288, 32, "lognormal", 0.7),
    Case("DeepSeek-V3, no redundancy", 58, 256, 256, 32, "lognormal", 0.7, goal="1.018"),
    Case("DeepSeek-V3, 4 nodes", 58, 256, 288, 32, "zipf", 1.0, nodes=4, groups=8, goal="1.33"),
    Case("DeepSeek-V3, one hot expert", 58, 256, 288, 32, "hot", 0.9, goal="the bound"),
    Case("DeepSeek-V3, 2 slots a rank", 58, 256, 288, 144, "lognormal", 0.7),
    Case("DeepSeek-V3, 8 ranks", 58, 256, 264, 8, "zipf", 1.0),
    Case("Kimi-K2", 60, 384, 416, 32, "zipf", 1.0),
    Case("Qwen3", 94, 128, 144, 16, "lognormal", 0.7),
    Case("gpt-oss-120b", 36, 128, 136, 8, "zipf", 1.0),
    Case("gpt-oss-20b", 24, 32, 40, 8, "zipf", 1.0),
    Case("Llama-4", 48, 16, 24, 8, "zipf", 1.0, goal="1.019"),
    Case("Mixtral", 32, 8, 16, 8, "zipf", 1.0, goal="1.049"),
)
