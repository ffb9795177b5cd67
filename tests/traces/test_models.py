"""Model shapes are those of the published models, and are found by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evenmoe.errors import ConstraintError
from evenmoe.traces import MODELS, find_model
from evenmoe.traces.models import ALIASES, layers_of_model
from evenmoe.traces.sampling import MEASUREMENTS, NEAREST, parameters_of

# Parameters of all routed experts in billions, from the models' own announcements: nearly all of the total that each
# states, the rest being attention, dense layers, shared experts and embeddings.
TOTALS = {
    "deepseek-moe-16b": (16.4, 0.88),
    "deepseek-v2-lite": (15.7, 0.88),
    "deepseek-v3": (671, 0.97),
    "deepseek-v3.2": (671, 0.97),
    "deepseek-v4-flash": (284, 0.97),
    "glm-4.5": (355, 0.94),
    "gpt-oss-20b": (20.9, 0.90),
    "gpt-oss-120b": (116.8, 0.97),
    "kimi-k2": (1043, 0.97),
    "llama-4-scout": (109, 0.88),
    "llama-4-maverick": (402, 0.95),
    "mixtral-8x7b": (46.7, 0.96),
    "olmoe-1b-7b": (6.92, 0.92),
    "qwen3-30b-a3b": (30.5, 0.94),
    "qwen3-235b-a22b": (235, 0.96),
}


def test_every_model_is_checked():
    assert set(TOTALS) == set(MODELS)


@pytest.mark.parametrize("name", TOTALS)
def test_routed_experts_are_nearly_all_of_a_model(name):
    total, at_least = TOTALS[name]
    shape = MODELS[name]
    experts = shape.num_layers * shape.num_experts * 3 * shape.hidden * shape.intermediate / 1e9
    assert at_least * total <= experts < total
    assert shape.expert_flops_per_token == 6 * shape.hidden * shape.intermediate
    assert shape.expert_bytes == shape.expert_flops_per_token / 2 * shape.weight_bytes
    assert len(shape.layer_ids) == shape.num_layers
    assert shape.num_experts % shape.num_groups == 0
    assert shape.source


def test_layer_numbers():
    assert list(find_model("llama-4-maverick").layer_ids) == list(range(1, 48, 2))
    assert list(find_model("gpt-oss-20b").layer_ids) == list(range(24))
    assert find_model("kimi-k2").layer_ids[-1] == 60
    assert find_model("glm-4.5").layer_ids[-1] == 91


@pytest.mark.parametrize(
    ("sizes", "options", "found"),
    [
        ((26, 64), {}, ("deepseek-v2-lite", range(1, 27))),
        ((48, 128), {}, ("qwen3-30b-a3b", range(48))),
        ((24, 128), {}, ("llama-4-maverick", range(1, 48, 2))),
        ((58, 256), {"model": "deepseek-ai/DeepSeek-V3.2-Exp"}, ("deepseek-v3.2", range(3, 61))),
        ((58, 256), {"title": "loads_of_deepseek"}, ("deepseek-v3 or deepseek-v3.2", range(3, 61))),
        ((58, 256), {"top_k": 4}, None),
        ((58, 256), {"model": "mine"}, None),
        ((58, 256), {"model": "mixtral"}, None),
        ((58, 256), {"model": 3}, ("deepseek-v3 or deepseek-v3.2", range(3, 61))),
        ((57, 256), {}, None),
    ],
)
def test_layers_of_models(sizes, options, found):
    assert layers_of_model(*sizes, **options) == (None if found is None else (found[0], tuple(found[1])))


def test_two_models_that_are_numbered_otherwise_say_nothing(monkeypatch):
    other = replace(MODELS["mixtral-8x7b"], name="other-8x7b", first_layer=1)
    monkeypatch.setitem(MODELS, "other-8x7b", other)
    assert layers_of_model(32, 8) is None
    assert layers_of_model(32, 8, title="Other") == ("other-8x7b", tuple(range(1, 33)))


@pytest.mark.parametrize("name", ["DeepSeek-V3", "deepseek_v3", " dsv3 ", "deepseek-ai/DeepSeek-R1", "deepseek-v3-r1"])
def test_names(name):
    assert find_model(name) is MODELS["deepseek-v3"]


def test_aliases_lead_to_models():
    assert set(ALIASES.values()) <= set(MODELS)
    assert not set(ALIASES) & set(MODELS)


@pytest.mark.parametrize(
    ("name", "nearest"), [("qwen3-30b-a3", "qwen3-30b-a3b"), ("gpt_oss_20", "gpt-oss-20b"), ("OLMO", "olmoe"), ("", "")]
)
def test_unknown_names(name, nearest):
    with pytest.raises(ConstraintError) as caught:
        find_model(name)
    text = str(caught.value)
    assert text.startswith(f"`model` is {name!r}: it must be one of deepseek-moe-16b, deepseek-v2-lite, ")
    assert f"the nearest is {nearest}" in text


def test_every_model_behaves_like_a_measured_one():
    for shape in MODELS.values():
        assert parameters_of(shape).skew > 0
    assert set(NEAREST.values()) <= set(MEASUREMENTS)
    assert not set(NEAREST) & set(MEASUREMENTS)
