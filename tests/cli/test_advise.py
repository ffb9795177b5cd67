"""`evenmoe advise`: what it prints, and what it says is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest


@pytest.fixture
def skewed(tmp_path):
    """Eight experts in four layers, of which the same ones are always busy."""
    shares = np.arange(1, 9) ** 2 / 204
    np.savez(tmp_path / "load.npz", load=np.random.default_rng(0).multinomial(50_000, shares, (24, 4)))
    return tmp_path / "load.npz"


def test_the_table_ends_in_a_sentence_whose_command_runs(evenmoe, skewed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = ("advise", skewed, "--engine", "vllm", "--ranks", 4, "--model", "mixtral", "--tokens", "64,8192")
    done = evenmoe(*call)
    assert done.code == 0, done.err
    assert done.out.startswith("phase    tokens")
    verdict = done.out.splitlines()[-1]
    assert verdict.startswith("It pays: on 4 H100, a prefill step of 8,192 tokens")
    command = verdict.partition("Plan it with: evenmoe ")[2].split()
    planned = evenmoe(*command)
    assert planned.code == 0, planned.err
    found = json.loads(evenmoe(*call, "--json").out)
    assert found["sentence"] == verdict
    assert found["plan"].split()[1:] == command


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--gpu", "V100"), "--gpu is 'V100': it must be an accelerator that is known"),
        (("--nodes", 3), "--nodes is 3: it must divide the 4 ranks evenly"),
        (("--phase", "train"), "'train'"),
        (("--tokens", "0"), "--tokens"),
        (("--phase", "decode", "--tokens", "4096"), "must have one of at most 128 tokens a rank"),
    ],
)
def test_what_is_wrong_is_named(evenmoe, skewed, options, text):
    done = evenmoe("advise", skewed, "--engine", "vllm", "--ranks", 4, "--model", "mixtral", *options)
    assert done.code == 2
    assert text in done.err.replace("`", "")


def test_sizes_must_be_known(evenmoe, skewed):
    done = evenmoe("advise", skewed, "--engine", "vllm", "--ranks", 4, "--model", "olmoe")
    assert done.code == 2
    assert "must have the trace's 8" in done.err
