"""`import evenmoe` stays light, and all its names are there."""

from __future__ import annotations

import importlib
import json
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
    assert value is getattr(home, name)
    assert value.__module__ == em._HOME[name]


def test_the_list_is_the_design():
    assert sorted(em.__all__) == [
        "Dispatched",
        "ExpertParallel",
        "Placement",
        "__version__",
        "combine",
        "combine_add_rms_norm",
        "count_copies",
        "dispatch",
        "local_world",
        "lower_bound",
        "peak_to_average",
        "plan",
        "process_world",
        "split_batch",
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
