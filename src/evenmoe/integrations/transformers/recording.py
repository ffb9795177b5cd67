"""`record`: what the routers of a model of transformers choose, as a trace."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from evenmoe.errors import ConstraintError, require
from evenmoe.integrations.transformers.batch_rows import BatchRows
from evenmoe.integrations.transformers.expert_modules import experts_of
from evenmoe.traces.trace import Trace

IntArray = npt.NDArray[np.int64]
ExpertArray = npt.NDArray[np.integer]
Phase = Literal["all", "prefill", "decode"]


@dataclass(frozen=True)
class _Pass:
    """The tokens of one forward pass that count: their experts (tokens, L, K), and the request that each is of."""

    step: int
    experts: ExpertArray
    request: IntArray


class Recording:
    """What was recorded so far; made by `record`.

    Attributes:
        num_tokens: tokens that count.
        num_requests: rows of batches, each with all the tokens that were generated for it.
    """

    def __init__(self, name: str, metadata: dict[str, Any], layers: Sequence[int], num_experts: int) -> None:
        self._name, self._metadata = name, metadata
        self._layers, self._num_experts = list(layers), num_experts
        self._passes: list[_Pass] = []
        self.num_tokens = self.num_requests = 0

    def trace(self, tokens_per_window: int = 1024) -> Trace:
        """Return what this process recorded, as `record` writes it.

        Raises:
            ConstraintError: no token was recorded.
        """
        return self._trace_of([self._passes], tokens_per_window)

    def _add(self, step: int, experts: ExpertArray, request: IntArray) -> None:
        self._passes.append(_Pass(step, experts, request))
        self.num_tokens += len(experts)

    def _trace_of(self, by_rank: list[list[_Pass]], tokens_per_window: int) -> Trace:
        """The trace of what these ranks recorded; passes of one number are of one step of all."""
        passes = [(rank, one) for rank, passes in enumerate(by_rank) for one in passes if len(one.experts)]
        if not passes:
            raise ConstraintError(
                "model",
                f"{self._name}, of which no token was recorded",
                "must be called itself while it is recorded",
                "call the model that was passed to record, not a part of it, inside the with block",
            )
        experts = np.concatenate([one.experts for _, one in passes])
        lengths = [len(one.experts) for _, one in passes]
        step = np.repeat([one.step for _, one in passes], lengths)
        rank = np.repeat([rank for rank, _ in passes], lengths)
        request = np.concatenate([one.request for _, one in passes])
        order = np.lexsort((step, request, rank))  # the tokens of a request follow each other, as they came
        starts = np.flatnonzero(np.diff(rank[order], prepend=-1) | np.diff(request[order], prepend=-1))
        window = _windows(step, tokens_per_window)
        layers, ranks = len(self._layers), len(by_rank)
        load = np.empty((int(window.max()) + 1, ranks, layers, self._num_experts), np.int64)
        for layer in range(layers):
            cell = (window * ranks + rank)[:, None] * self._num_experts + experts[:, layer]
            load[:, :, layer] = np.bincount(cell.ravel(), minlength=load[:, :, 0].size).reshape(load[:, :, 0].shape)
        return Trace(
            self._name,
            load.sum(axis=1),
            routing=experts[order],
            seq_start=np.append(starts, len(order)),
            load_by_rank=load if ranks > 1 else None,
            layer_ids=np.array(self._layers),
            metadata=self._metadata,
        )


@contextmanager
def record(
    model: nn.Module,
    path: str | Path | None = None,
    *,
    phase: Phase = "all",
    tokens_per_window: int = 1024,
    named: str = "",
    together: bool = True,
) -> Iterator[Recording]:
    """Record the experts that a model's routers choose, in every layer and for every token, while the block runs.

    Padding does not count: tokens that a two-dimensional attention mask leaves out, and what `generate` feeds a
    request after its end. A request is one row of a batch, from its prompt to its last token.

    Args:
        model: a model of transformers, with or without expert parallelism; it must be called itself, or `generate`.
        path: the trace file (.npz) to write at the end of the block; None writes none. If the block raises, nothing
            is written.
        phase: "prefill" keeps the tokens of prompts alone, "decode" those that were generated.
        tokens_per_window: forward passes are joined to windows of at least so many tokens.
        named: as in `experts_of`, for models with several stacks of layers.
        together: where torch.distributed runs, the block's end is a collective of all its ranks, which gathers their
            tokens, those of ranks that hold the same batch once, and rank 0 writes the file. False: every process
            keeps to itself and writes its own.

    Raises:
        ConstraintError: no experts, an unknown phase, a layer that was called twice or not at all in one pass, or no
            token at all.
        OSError: the file cannot be written.

    A prompt of three tokens, two experts each, in two layers:

    >>> import torch, transformers
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1)
    >>> config = transformers.MixtralConfig(vocab_size=9, num_hidden_layers=2, num_local_experts=4, **sizes)
    >>> model = transformers.MixtralForCausalLM(config)
    >>> with record(model) as recording:
    ...     _ = model(torch.tensor([[1, 2, 3]]))
    >>> recording.trace().routing.shape
    (3, 2, 2)
    """
    phases = get_args(Phase)
    require(phase in phases, "phase", repr(phase), f"must be one of {', '.join(phases)}", "choose one of them")
    whole = isinstance(tokens_per_window, int) and tokens_per_window >= 1
    require(whole, "tokens_per_window", repr(tokens_per_window), "must be a whole number from 1", "use 1024")
    found = experts_of(model, named)
    name = Path(path).stem if path is not None else type(model).__name__
    recording = Recording(name, _metadata(model), [one.layer for one in found], num_experts_of(found[0].module))
    recorder = _Recorder(model, recording, phase, len(found))
    handles = [
        model.register_forward_pre_hook(recorder.begin, with_kwargs=True),
        model.register_forward_hook(recorder.end),
    ]
    for index, one in enumerate(found):
        handles.append(one.module.register_forward_pre_hook(recorder.hook_of(index, one.name), with_kwargs=True))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()
    gathered = _gathered(model, recording) if together else [recording._passes]
    if path is not None and gathered is not None:
        recording._trace_of(gathered, tokens_per_window).save(path)


def num_experts_of(experts: nn.Module) -> int:
    """E, of a module of experts, whichever of them this rank holds."""
    return next(parameter.shape[0] for parameter in experts.parameters(recurse=False))


class _Recorder:
    """The hooks: `begin` and `end` of a forward pass of the model, and one for each module of experts in between."""

    def __init__(self, model: nn.Module, recording: Recording, phase: Phase, num_layers: int) -> None:
        self._recording, self._phase, self._num_layers = recording, phase, num_layers
        self._signature = inspect.signature(model.forward)
        self._rows = BatchRows(_ends(model))
        self._chosen: dict[int, torch.Tensor] | None = None
        self._step = -1

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._chosen = {}
        self._step += 1
        given = self._signature.bind_partial(*args, **kwargs).arguments
        self._rows.begin({**given, **given.get("kwargs", {})})

    def hook_of(self, index: int, name: str) -> Any:
        def chosen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._chosen is None:
                return  # activations that are computed again for a backward pass
            if index in self._chosen:
                raise ConstraintError(
                    "model",
                    f"one that calls {name!r} twice in a forward pass",
                    "must call its experts once for each token",
                    "record a model without loops over its layers",
                )
            ids = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            self._chosen[index] = ids.detach().to("cpu", torch.int32, copy=True)

        return chosen

    def end(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        chosen, self._chosen = self._chosen, None
        if not chosen:
            return
        if len(chosen) != self._num_layers:
            missing = next(index for index in range(self._num_layers) if index not in chosen)
            raise ConstraintError(
                "model",
                f"one that left out the experts of the {missing + 1}. of {self._num_layers} layers in a forward pass",
                "must call all of them",
                "name the layers that are called by named=",
            )
        experts = torch.stack([chosen[index] for index in range(self._num_layers)], dim=1).numpy()
        counted, request, decoded = self._rows.of_tokens(len(experts))
        if self._phase != "all" and decoded != (self._phase == "decode"):
            counted = np.zeros_like(counted)
        self._recording.num_requests = self._rows.num_requests
        self._recording._add(self._step, experts[counted].astype(np.uint16, copy=False), request[counted])


def _gathered(model: nn.Module, recording: Recording) -> list[list[_Pass]] | None:
    """What every rank recorded that holds a batch of its own, on rank 0; None on the others."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [recording._passes]
    mesh = getattr(model, "_mesh_manager", None)
    first = mesh is None or mesh.get_mesh("tp").get_local_rank() == 0
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(recording._passes if first else None, parts)
    return None if parts is None else [part for part in parts if part is not None]


def _windows(step: IntArray, tokens_per_window: int) -> IntArray:
    """The window of each token: whole steps, in order, at least so many tokens each; what is left joins the last."""
    per_step = np.bincount(step)
    window_of_step, window, tokens = np.zeros(len(per_step), np.int64), 0, 0
    for index, count in enumerate(per_step):
        window_of_step[index] = window
        tokens += count
        if tokens >= tokens_per_window:
            window, tokens = window + 1, 0
    if tokens < tokens_per_window and window:
        window_of_step[window_of_step == window] = window - 1
    return window_of_step[step]


def _metadata(model: nn.Module) -> dict[str, Any]:
    """The model's name, if it came from somewhere."""
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    return {"model": name.rstrip("/").rpartition("/")[2]} if name else {}


def _ends(model: nn.Module) -> frozenset[int]:
    """The ids of tokens that end a request."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset()
