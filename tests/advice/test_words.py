"""The three sentences, word for word."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from benchmarks.advice import asked, null, planted
from evenmoe.advice import Advice
from evenmoe.advice.words import as_json, plan_line, sentence, to_record
from evenmoe.evidence import PairedGain


@cache
def paying() -> Advice:
    found = asked(planted(0))
    gain = PairedGain(40.72, 40.41, 41.0, 8, 0.0001)
    best = replace(found.best, after_us=6_042.2, before_us=10_193.6, gain=gain, copies=61, break_even_steps=2.1)
    return replace(found, best=best, trials=(best,))


def test_it_pays():
    assert sentence(paying(), "load.npz") == (
        "It pays: on 8 H100, a prefill step of 16,384 tokens with 40 slots under vllm's rule takes 6,042 µs in place "
        "of 10,194 in the MoE layers, 40.7 % less (at least 40.4 %), and its 61 copies are paid after 3 steps. "
        "Plan it with: evenmoe plan load.npz --ranks 8 --slots 40 --for vllm -o placement.json"
    )


def test_it_does_not_pay():
    found = replace(paying(), kind="does not pay", reason="does not last")
    assert sentence(found) == (
        "It does not pay: what was busy in the part that plans were made from is not what is busy later; the nearest "
        "is 40.7 % less (from 40.4 to 41.0 %): on 8 H100, a prefill step of 16,384 tokens with 40 slots under vllm's "
        "rule takes 6,042 µs in place of 10,194."
    )


def test_too_close_to_call():
    found = replace(paying(), kind="too close to call", reason="the model cannot tell")
    assert sentence(found).endswith("Time both placements on the machine itself: no longer recording decides this.")
    few = asked(null(1))
    assert (few.kind, few.reason) == ("too close to call", "not enough evidence")
    assert "Too close to call: the recording is too short, or varies too much from part to part; " in sentence(few)
    assert to_record(few).startswith("Record ")
    assert to_record(few).endswith(f"there are {round(few.uneven.assignments / 4)}.")


def test_a_plan_for_decode_says_its_step():
    found = paying()
    decode = replace(found.best, phase="decode", objective="decode", tokens=64, num_slots=32, weight_rows=224)
    assert plan_line(replace(found, best=decode), "x.npz") == (
        "evenmoe plan x.npz --ranks 8 --slots 32 --for vllm -o placement.json --objective decode --tokens-per-step 64 "
        "--top-k 4 --weight-rows 224"
    )


def test_the_object_says_which_trial_is_best():
    found = as_json(paying(), "load.npz")
    trials = found["trials"]
    assert isinstance(trials, list)
    assert trials[found["best"]]["after_us"] == 6_042.2  # pyright: ignore
    assert found["plan"] == plan_line(paying(), "load.npz")
