"""The API of `evenmoe.formats`, and that every format is what its entry says."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

from evenmoe import formats
from evenmoe.formats.catalogue import ENTRIES, FORMATS

#: What other programs write and do not read.
READ_ONLY = {"routed-experts", "vllm-payload", "dlblas-load", "megatron-load"}


def test_no_module_hides_a_function_of_the_same_name():
    """A submodule becomes an attribute of its package when it is imported."""
    for module in pkgutil.iter_modules(formats.__path__):
        importlib.import_module(f"evenmoe.formats.{module.name}")
    fresh = importlib.reload(formats)
    for name in ("read", "write", "check", "convert", "diff"):
        assert callable(getattr(fresh, name)), name


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_format_has_the_three_functions(name):
    entry = FORMATS.get(name).entry
    assert entry is ENTRIES[name]
    assert importlib.import_module(entry.object.partition(":")[0]).__doc__
    assert all(callable(getattr(FORMATS.get(name), function)) for function in ("matches", "read"))
    assert (FORMATS.get(name).write is None) == (name in READ_ONLY)


def modules_after(code: str) -> set[str]:
    """evenmoe's modules, and the heavy ones, that a fresh interpreter has imported after `code`."""
    code = f"import sys; from evenmoe import formats; {code}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split() if name.startswith("evenmoe.") or name in ("numpy", "torch")}


def test_reading_text_imports_no_torch():
    assert "torch" not in modules_after("formats.read('{\"0\": [0, 1]}', num_ranks=1)")


def test_descriptions_need_no_numpy():
    assert "numpy" not in modules_after(
        "from evenmoe.formats.catalogue import ENTRIES; formats.FORMATS, formats.Format"
    )


@pytest.mark.parametrize(
    ("file", "save", "tools"),
    [
        ("load.npz", "np.savez(path, load=np.ones((2, 1, 4), int))", {"own"}),
        ("load.pt", "torch.save({'logical_count': torch.ones(2, 1, 4)}, path)", {"sglang"}),
        ("load.pt", "torch.save(torch.full((2, 4), 9), path)", {"ascend_tensors", "omni", "routed_experts"}),
        ("load.json", "open(path, 'w').write('{\"logical_count\": [[[1, 2]]]}')", {"sglang"}),
    ],
)
def test_a_file_leads_to_one_tool(file, save, tools, tmp_path):
    """Detection imports the modules of formats that the file may be of, and no others."""
    code = f"import numpy as np, torch; path = {str(tmp_path / file)!r}; {save}; formats.read(path)"
    loaded = modules_after(code)
    known = {entry.object.partition(":")[0] for entry in ENTRIES.values()}
    assert known & loaded == {f"evenmoe.formats.{tool}" for tool in tools}
