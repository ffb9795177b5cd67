"""`import evenmoe` stays light, and all its names are there."""

from __future__ import annotations

import builtins
import importlib
import json
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

import evenmoe as em

HEAVY = ("torch", "numba", "typer", "rich", "scipy", "matplotlib", "transformers", "triton", "llvmlite")


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has imported after `code`."""
    program = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import evenmoe",
        "import evenmoe; dir(evenmoe); evenmoe.__version__; evenmoe.__all__",
        "import evenmoe as em; em.Placement([[0, 1]], 2); em.peak_to_average; em.count_copies",
        "import evenmoe.errors, evenmoe.metrics, evenmoe.placement, evenmoe.dispatched, evenmoe.traces.trace",
    ],
)
def test_nothing_heavy_is_imported(code):
    loaded = modules_after(code)
    assert "evenmoe" in loaded
    assert not loaded & set(HEAVY)


def test_numpy_too_is_left_until_used():
    assert "numpy" not in modules_after("import evenmoe")


@pytest.mark.parametrize("name", em.__all__)
def test_every_name_resolves(name):
    value = getattr(em, name)
    assert vars(em)[name] is value  # found without a detour from now on
    if name == "__version__":
        return
    home = importlib.import_module(em._HOME[name])
    if name == "errors":
        assert value is home
        return
    assert value is getattr(home, name)
    assert value.__module__ == em._HOME[name]


def test_every_error_that_is_documented_can_be_named():
    """The errors of the public docstrings are public, and importing one is as light as the rest."""
    code = "import evenmoe as em; em.errors.ConstraintError; em.LostRankError"
    assert not modules_after(code) & {*HEAVY, "numpy"}
    documented = set()
    for name in em.__all__:
        value = getattr(em, name)
        texts = (
            [value.__doc__ or "", *(getattr(v, "__doc__", None) or "" for v in vars(value).values())]
            if isinstance(value, type)
            else [getattr(value, "__doc__", None) or ""]
        )
        documented |= {word for text in texts for word in re.findall(r"\b[A-Z][A-Za-z]+Error\b", text)}
    documented -= set(dir(builtins))
    assert {"ConstraintError", "MissingArgumentError"} <= documented
    assert documented <= set(em.__all__)
    assert all(getattr(em, name) is getattr(em.errors, name) for name in documented)


def test_the_list_is_the_design():
    assert sorted(em.__all__) == [
        "Advice",
        "ConstraintError",
        "CostModel",
        "Dispatched",
        "EvenmoeError",
        "ExpertParallel",
        "FileFormatError",
        "LostRankError",
        "MissingArgumentError",
        "Placement",
        "RankDisagreementError",
        "Simulation",
        "Trace",
        "UnsupportedTypeError",
        "__version__",
        "advise",
        "combine",
        "combine_add_rms_norm",
        "convert",
        "count_copies",
        "dispatch",
        "errors",
        "load_simulation",
        "load_trace",
        "local_world",
        "lower_bound",
        "peak_to_average",
        "plan",
        "process_world",
        "read",
        "save_placement",
        "save_simulation",
        "save_trace",
        "simulate",
        "split_batch",
        "synthesize",
        "update_expert",
    ]


def test_dir():
    listed = dir(em)
    assert listed == sorted(listed)
    assert set(em.__all__) <= set(listed)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match=r"^module 'evenmoe' has no attribute 'torch_npu'$"):
        em.torch_npu  # noqa: B018
    assert not hasattr(em, "numpy")


def test_the_version_is_the_packages():
    assert em.__version__ == version("evenmoe")
