"""Accelerators by name: what their data sheets say, and what was fitted to tables of measured kernels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Literal

from evenmoe.costs.kernel import KernelModel
from evenmoe.errors import ConstraintError

Phase = Literal["decode", "prefill"]
Basis = Literal["measured", "sibling", "data sheet", "this machine"]

#: What a kernel's constants rest on, from the best: tables of this accelerator; another's, scaled by the data sheets of
#: both, where its kernels are those of the other's engine; the same where they are not.
BASES: tuple[Basis, ...] = ("measured", "this machine", "sibling", "data sheet")


@dataclass(frozen=True)
class KernelFit:
    """A kernel model and what it was fitted on.

    Attributes:
        model: the constants.
        basis: "measured", or what stands in for a measurement (`BASES`).
        source: engine, version, kernel, weight type and table, in words.
    """

    model: KernelModel
    basis: Basis
    source: str


@dataclass(frozen=True)
class Exchange:
    """Dispatch and combine of one layer, both together.

    Attributes:
        latency_us: microseconds of one of the two besides its bytes, their mean.
        bytes_per_s: bytes/s of a rank, over both.
        basis, source: as of `KernelFit`.
    """

    latency_us: float
    bytes_per_s: float
    basis: Basis
    source: str


@dataclass(frozen=True)
class Hardware:
    """One accelerator and its node.

    Attributes:
        name: as `--gpu` takes it.
        memory_bytes: of the accelerator, in bytes.
        memory_bytes_per_s: bytes/s, by the data sheet.
        flops_per_s: dense FLOP/s by the bytes of a weight, by the data sheet: 1.0 is fp8 (or int8), 2.0 bf16.
        within_bytes_per_s: bytes/s one way to ranks of the same node or rack, by the data sheet.
        between_bytes_per_s: bytes/s one way to others, by the usual network of such a node.
        node_ranks: ranks that reach each other by the faster link.
        kernels: `KernelFit` of "decode" and "prefill", for weights of one byte.
        exchanges: `Exchange` of "decode" and "prefill".
        source: where the data sheet's figures are from.
    """

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: Mapping[float, float]
    within_bytes_per_s: float
    between_bytes_per_s: float
    node_ranks: int
    kernels: Mapping[Phase, KernelFit]
    exchanges: Mapping[Phase, Exchange]
    source: str

    def kernel(self, phase: Phase, weight_bytes: float = 1.0) -> KernelFit:
        """The kernel model for weights of so many bytes.

        The constants were fitted on weights of one byte, computed with in eight bits. Weights of two bytes compute at
        the data sheet's share of that speed; smaller ones are taken to be computed with in eight bits.

        >>> h100 = find_hardware("H100")
        >>> fp8, bf16 = h100.kernel("decode"), h100.kernel("decode", 2.0)
        >>> fp8.basis, bf16.basis, round(bf16.model.flops_per_s / fp8.model.flops_per_s, 2)
        ('measured', 'sibling', 0.5)
        """
        fit = self.kernels[phase]
        if weight_bytes <= 1.0 or self.kernels[phase].basis == "this machine":
            return fit
        share = self.flops_per_s[2.0] / self.flops_per_s[1.0]
        model = replace(fit.model, flops_per_s=fit.model.flops_per_s * share)
        basis: Basis = "sibling" if fit.basis == "measured" else fit.basis
        return KernelFit(model, basis, f"{fit.source}; bf16 at {share:.2g} of the speed of fp8, by the data sheet")


def find_hardware(name: str) -> Hardware:
    """The accelerator of this name; case does not matter. "cpu" is this machine, which is measured in a second.

    Raises:
        ConstraintError: no such accelerator; the text names all that there are.

    >>> find_hardware("h200").kernels["decode"].basis
    'sibling'
    """
    wanted = name.strip().casefold().replace("-", " ").replace("_", " ")
    if wanted in ("cpu", "this cpu"):
        from evenmoe.costs.this_cpu import measure_cpu

        return measure_cpu()
    known = _read()
    for key, hardware in known.items():
        if wanted == key.casefold():
            return hardware
    raise ConstraintError(
        "gpu", repr(name), "must be an accelerator that is known", f"use {', '.join((*known, 'cpu'))}"
    )


def hardware_names() -> tuple[str, ...]:
    """The names that `find_hardware` knows, but that of this machine.

    >>> hardware_names()
    ('H100', 'H200', 'B200', 'GB200', 'A100', 'Atlas A3')
    """
    return tuple(_read())


def constants() -> dict:
    """Everything that is in `constants.json`."""
    return json.loads(resources.files("evenmoe.costs").joinpath("constants.json").read_text("utf-8"))


@cache
def _read() -> dict[str, Hardware]:
    told = constants()
    sheets, found = told["hardware"], {}
    for name, sheet in sheets.items():
        sibling = sheet.get("sibling", name)
        found[name] = Hardware(
            name=name,
            memory_bytes=sheet["memory_bytes"],
            memory_bytes_per_s=sheet["memory_bytes_per_s"],
            flops_per_s={float(size): speed for size, speed in sheet["flops_per_s"].items()},
            within_bytes_per_s=sheet["within_bytes_per_s"],
            between_bytes_per_s=sheet["between_bytes_per_s"],
            node_ranks=sheet["node_ranks"],
            kernels={phase: _kernel(told, name, sibling, phase) for phase in ("decode", "prefill")},
            exchanges={phase: _exchange(told, name, sibling, phase) for phase in ("decode", "prefill")},
            source=sheet["source"],
        )
    return found


def _kernel(told: dict, name: str, sibling: str, phase: str) -> KernelFit:
    entry = next(row for row in told["kernels"] if row["gpu"] == sibling and row["phase"] == phase)
    model = KernelModel(**entry["values"])
    words = "{engine} {version}, {kernel}, {dtype}, {table}".format(**entry)
    if sibling == name:
        return KernelFit(model, "measured", words)
    mine, other = told["hardware"][name], told["hardware"][sibling]
    model = scaled(model, mine, other)
    basis: Basis = mine["basis"]
    return KernelFit(model, basis, f"{sibling}'s ({words}), scaled by the data sheets of both")


# H100 and B200 are the only pair of which both were measured. B200's data sheet has 2.39 and 2.27 times the bandwidth
# and the fp8 FLOP/s; its decode kernels read 2.28 and compute 1.6 times as fast: powers 0.95 and 0.6 of the ratios.
_MEMORY_POWER, _FLOPS_POWER = 0.95, 0.6
# No fitted kernel reads at more than 0.89 of its data sheet's bandwidth, or computes at more than 0.68 of its FLOP/s.
_MOST_MEMORY, _MOST_FLOPS = 0.9, 0.7


def scaled(model: KernelModel, mine: Mapping, other: Mapping) -> KernelModel:
    """The model of a sibling, `other`, for another data sheet, `mine`; its launches take as long.

    Data sheets are entries of "hardware" in `constants.json`.

    >>> sheet = {"memory_bytes_per_s": 4e12, "flops_per_s": {"1": 2e15}}
    >>> scaled(KernelModel(3e12, 1e15, start_us=5.0), sheet, sheet) == KernelModel(3e12, 1e15, start_us=5.0)
    True
    >>> slow = {"memory_bytes_per_s": 1e12, "flops_per_s": {"1": 1e14}}
    >>> scaled(KernelModel(3e12, 1e15), slow, sheet).flops_per_s < 0.71e14  # its data sheet says 1e14
    True
    """
    memory, flops = mine["memory_bytes_per_s"], mine["flops_per_s"]["1"]
    read = model.memory_bytes_per_s * (memory / other["memory_bytes_per_s"]) ** _MEMORY_POWER
    compute = model.flops_per_s * (flops / other["flops_per_s"]["1"]) ** _FLOPS_POWER
    read, compute = min(read, _MOST_MEMORY * memory), min(compute, _MOST_FLOPS * flops)
    return replace(model, memory_bytes_per_s=read, flops_per_s=compute)


def _exchange(told: dict, name: str, sibling: str, phase: str) -> Exchange:
    entry = next(row for row in told["exchanges"] if row["gpu"] == sibling and row["phase"] == phase)
    speed, words = entry["values"]["bytes_per_s"], "{engine} {version}, {kernel}, {table}".format(**entry)
    if sibling == name:
        return Exchange(entry["values"]["latency_us"], speed, "measured", words)
    mine, other = told["hardware"][name], told["hardware"][sibling]
    speed *= mine["within_bytes_per_s"] / other["within_bytes_per_s"]
    basis: Basis = mine["basis"]
    words = f"{sibling}'s ({words}), scaled by the data sheets of both"
    return Exchange(entry["values"]["latency_us"], speed, basis, words)
