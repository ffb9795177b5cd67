"""Shapes of published Mixture-of-Experts models, as their configurations state them."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evenmoe.errors import ConstraintError

if TYPE_CHECKING:
    from evenmoe.traces.trace import Trace

_BF16, _FP8 = 2.0, 1.0
_MXFP4 = 17 / 32  # 32 weights of 4 bits share a scale of 8 bits


@dataclass(frozen=True)
class ModelShape:
    """One model's MoE layers.

    Attributes:
        name: as `--model` takes it.
        num_layers: L, MoE layers; `num_experts`: E, routed experts per layer; `top_k`: K, of them per token.
        hidden: width of a token; `intermediate`: inner width of one routed expert.
        shared_experts: experts that every token passes besides.
        num_groups, top_groups: a token's experts come from so many of so many equal runs of ids; 1, 1 without groups.
        first_layer: number of the first MoE layer in the model's own numbering, from 0; `layer_step`: to the next.
        weight_bytes: bytes of one weight of a routed expert as published, scales of whole blocks left out.
        source: whose configuration states it.

    DeepSeek-V3: three matrices of 7,168 × 2,048 weights of one byte are 44,040,192 bytes an expert, and two FLOPs per
    weight and token are 88,080,384.

    >>> shape = find_model("DeepSeek-R1")
    >>> shape.name, shape.expert_bytes, shape.expert_flops_per_token
    ('deepseek-v3', 44040192, 88080384)
    >>> shape.layer_ids[0], shape.layer_ids[-1]
    (3, 60)
    """

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    shared_experts: int = 0
    num_groups: int = 1
    top_groups: int = 1
    first_layer: int = 0
    layer_step: int = 1
    weight_bytes: float = _BF16
    source: str = ""

    @property
    def layer_ids(self) -> range:
        """The model's own numbers of its MoE layers."""
        return range(self.first_layer, self.first_layer + self.layer_step * self.num_layers, self.layer_step)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert's three matrices in one layer: what one copy moves."""
        return round(3 * self.hidden * self.intermediate * self.weight_bytes)

    @property
    def expert_flops_per_token(self) -> int:
        """FLOPs of one routed expert for one token: three matrices, two per multiply-add."""
        return 2 * 3 * self.hidden * self.intermediate


_DEEPSEEK_V3 = {
    "num_layers": 58,
    "num_experts": 256,
    "top_k": 8,
    "hidden": 7168,
    "intermediate": 2048,
    "shared_experts": 1,
    "num_groups": 8,
    "top_groups": 4,
    "first_layer": 3,
    "weight_bytes": _FP8,
}

#: By name. Every figure is from the `config.json` of the repository on huggingface.co that `source` names.
MODELS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape(
            "deepseek-moe-16b", 27, 64, 6, 2048, 1408, 2, first_layer=1, source="deepseek-ai/deepseek-moe-16b-base"
        ),
        ModelShape("deepseek-v2-lite", 26, 64, 6, 2048, 1408, 2, first_layer=1, source="deepseek-ai/DeepSeek-V2-Lite"),
        ModelShape("deepseek-v3", **_DEEPSEEK_V3, source="deepseek-ai/DeepSeek-V3"),
        ModelShape("deepseek-v3.2", **_DEEPSEEK_V3, source="deepseek-ai/DeepSeek-V3.2-Exp"),
        ModelShape(
            "deepseek-v4-flash", 43, 256, 6, 4096, 2048, 1, weight_bytes=_MXFP4, source="deepseek-ai/DeepSeek-V4-Flash"
        ),
        ModelShape("glm-4.5", 89, 160, 8, 5120, 1536, 1, first_layer=3, source="zai-org/GLM-4.5"),
        ModelShape("gpt-oss-20b", 24, 32, 4, 2880, 2880, weight_bytes=_MXFP4, source="openai/gpt-oss-20b"),
        ModelShape("gpt-oss-120b", 36, 128, 4, 2880, 2880, weight_bytes=_MXFP4, source="openai/gpt-oss-120b"),
        ModelShape(
            "kimi-k2", 60, 384, 8, 7168, 2048, 1, first_layer=1, weight_bytes=_FP8, source="moonshotai/Kimi-K2-Instruct"
        ),
        ModelShape("llama-4-scout", 48, 16, 1, 5120, 8192, 1, source="meta-llama/Llama-4-Scout-17B-16E"),
        ModelShape(
            "llama-4-maverick",
            24,
            128,
            1,
            5120,
            8192,
            1,
            first_layer=1,
            layer_step=2,
            source="meta-llama/Llama-4-Maverick-17B-128E",
        ),
        ModelShape("mixtral-8x7b", 32, 8, 2, 4096, 14336, source="mistralai/Mixtral-8x7B-v0.1"),
        ModelShape("olmoe-1b-7b", 16, 64, 8, 2048, 1024, source="allenai/OLMoE-1B-7B-0924"),
        ModelShape("qwen3-30b-a3b", 48, 128, 8, 2048, 768, source="Qwen/Qwen3-30B-A3B"),
        ModelShape("qwen3-235b-a22b", 94, 128, 8, 4096, 1536, source="Qwen/Qwen3-235B-A22B"),
    )
}

#: Other names of the same shapes.
ALIASES: dict[str, str] = {
    "deepseek-r1": "deepseek-v3",
    "deepseek-v3-r1": "deepseek-v3",
    "dsv3": "deepseek-v3",
    "deepseek-v3.2-exp": "deepseek-v3.2",
    "gpt-oss": "gpt-oss-20b",
    "kimi": "kimi-k2",
    "llama-4": "llama-4-maverick",
    "maverick": "llama-4-maverick",
    "scout": "llama-4-scout",
    "mixtral": "mixtral-8x7b",
    "olmoe": "olmoe-1b-7b",
    "qwen3-30b": "qwen3-30b-a3b",
    "qwen3-235b": "qwen3-235b-a22b",
}


def find_model(name: str) -> ModelShape:
    """The shape of this name or alias; case and underscores do not matter.

    Raises:
        ConstraintError: no such model; the text names the nearest and all that there are.

    >>> find_model("Mixtral").num_experts
    8
    >>> find_model("mixtrall")
    Traceback (most recent call last):
    ...
    evenmoe.errors.ConstraintError: `model` is 'mixtrall': it must be one of deepseek-moe-16b, \
deepseek-v2-lite, deepseek-v3, deepseek-v3.2, deepseek-v4-flash, glm-4.5, gpt-oss-20b, gpt-oss-120b, kimi-k2, \
llama-4-scout, llama-4-maverick, mixtral-8x7b, olmoe-1b-7b, qwen3-30b-a3b, qwen3-235b-a22b; the nearest is mixtral.
    """
    wanted = name.strip().lower().replace("_", "-").rpartition("/")[2]

    shape = MODELS.get(ALIASES.get(wanted, wanted))
    if shape is None:
        near = difflib.get_close_matches(wanted, [*MODELS, *ALIASES], n=1, cutoff=0)
        raise ConstraintError("model", repr(name), f"must be one of {', '.join(MODELS)}", f"the nearest is {near[0]}")
    return shape


def shape_of(trace: Trace, model: ModelShape | str | None = None) -> ModelShape | None:
    """The shape of a trace's model: as given, or as the trace names it, or of the only one that can have recorded it.

    That has its experts, the experts of a token where they are known, and its layers: all of them, or else those that
    the trace numbers. Of several the one counts whose name stands in the trace's.

    Args:
        model: as it is given; a name is looked up.

    Returns:
        None where nothing says it.

    Raises:
        ConstraintError: a name that is not known.

    >>> import numpy as np
    >>> from evenmoe.traces.trace import Trace
    >>> part = Trace("olmoe_base", np.ones((1, 2, 64), np.int64), layer_ids=np.array([0, 15]))
    >>> shape_of(part).name
    'olmoe-1b-7b'
    """
    if isinstance(model, ModelShape):
        return model
    if model is not None:
        return find_model(model)
    named = trace.metadata.get("model")
    if isinstance(named, str):
        try:
            return find_model(named)
        except ConstraintError:
            pass  # a trace may be of a model that is not listed
    top_k = trace.top_k if trace.top_k is not None else trace.metadata.get("top_k")
    alike = [
        shape for shape in MODELS.values() if shape.num_experts == trace.num_experts and top_k in (None, shape.top_k)
    ]
    whole = [shape for shape in alike if shape.num_layers == trace.num_layers]
    part = [] if trace.layer_ids is None else [s for s in alike if set(trace.layer_ids.tolist()) <= set(s.layer_ids)]
    return _only(whole, trace.name) or _only(part, trace.name)


def layers_of_model(
    num_layers: int, num_experts: int, *, top_k: int | None = None, title: str = "", model: object = None
) -> tuple[str, tuple[int, ...]] | None:
    """The name of the model that has so many MoE layers of so many experts, and its own numbers of them.

    Args:
        top_k: experts per token, where that is known.
        title: of a recording, in which a name may stand.
        model: the name that a recording states, if it does.

    Returns:
        None where no known model has them, or several that number them otherwise.

    >>> name, numbers = layers_of_model(58, 256)
    >>> name, numbers[0], numbers[-1]
    ('deepseek-v3 or deepseek-v3.2', 3, 60)
    >>> layers_of_model(57, 256) is None
    True
    """
    alike = [
        shape
        for shape in MODELS.values()
        if (shape.num_layers, shape.num_experts) == (num_layers, num_experts) and top_k in (None, shape.top_k)
    ]
    if isinstance(model, str):
        try:
            alike = [shape for shape in alike if shape == find_model(model)]
        except ConstraintError:
            return None  # it is another, which is not listed
    alike = _named_in(title, alike) or alike
    if len({shape.layer_ids for shape in alike}) != 1:
        return None
    return " or ".join(shape.name for shape in alike), tuple(alike[0].layer_ids)


def _named_in(title: str, shapes: list[ModelShape]) -> list[ModelShape]:
    """Those whose name begins like a part of the title."""
    letters = re.sub("[^a-z0-9]", "", title.lower())
    return [shape for shape in shapes if re.sub("[^a-z]", "", shape.name.partition("-")[0]) in letters]


def _only(shapes: list[ModelShape], title: str) -> ModelShape | None:
    """The one of these shapes, up to their names, or the one whose name begins like a part of the title."""
    for fitting in (shapes, _named_in(title, shapes)):
        if len({(shape.hidden, shape.intermediate, shape.weight_bytes, shape.top_k) for shape in fitting}) == 1:
            return fitting[0]
    return None
