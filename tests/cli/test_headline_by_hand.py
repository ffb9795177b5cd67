"""The headline of `simulate`, recomputed by a script that shares no code with it."""

from __future__ import annotations

import json

import pytest

from tests.beside import measured_names
from tests.traces.synthetic import SYNTHETIC, trace_file
from tools.recompute_headline import Recomputed, t_quantile

NAMES = measured_names(
    "gpt_oss_20b_mmlu_pro_and_other",
    "deepseek_v2_lite_esft_intent",
    "deepseek_v2_lite_esft_law",
    "deepseek_v2_lite_esft_summary",
    "olmoe_1b7b_base",
    "deepseek_v4_flash_decode",
    "deepseek_moe_16b_cdmoe",
    "deepseek_v3_single_prompt",
)


GIVEN = ("--no-copy-overlap", "--refresh", 2, "--horizon", 50)
CALLS = {
    "auto": (),
    "given": (*GIVEN, "-p", "evenmoe", "-p", "greedy", "-p", "evenmoe:rule=even"),
    "sglang": ("--for", "sglang"),
    "vllm": (*GIVEN, "--for", "vllm", "-p", "own", "-p", "evenmoe", "-p", "evenmoe:rule=batch", "-p", "identity"),
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", [*SYNTHETIC, *NAMES])
def test_the_headline_is_what_plain_loops_find(evenmoe, tmp_path, name, options):
    out = tmp_path / "out.sim"
    world = ("--ranks", 8, "--tokens-per-rank", 64, "--workers", 1)
    done = evenmoe("simulate", trace_file(name, tmp_path), *world, *options, "--out", out, "--json")
    assert done.code == 0, done.err
    said, found = json.loads(done.out)["headline"], Recomputed(out).headline()
    for key in ("kind", "policy"):
        assert said[key] == found[key], key
    for key in ("net_gain_percent", "lower_percent", "upper_percent"):
        assert said[key] == close(found[key]), key
    beside = said["beside_own"]
    assert (beside is not None) == ("own_policy" in found)
    if beside is not None:
        assert (beside["own_policy"], beside["policy"]) == (found["own_policy"], found["beside"])
        for key in ("gain_over_own_percent", "gain_over_own_lower_percent", "gain_over_own_upper_percent"):
            assert beside[key] == close(found.get(key)), key


def close(value):
    """Sums in another order, and quantiles by another integral, of 4,000 parts: within 1e-9 of their value."""
    return None if value is None else pytest.approx(value, rel=1e-7, abs=1e-9)


def test_the_quantiles_are_those_of_tables():
    assert [round(t_quantile(0.01, degrees), 3) for degrees in (1, 2, 11)] == [31.821, 6.965, 2.718]
