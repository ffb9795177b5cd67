"""The operators' published demo and our example, compiled against the tree and run."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from evenmoe.ascend.cann.build import build_tree
from tests.beside import REFERENCE

from .conftest import LIBRARIES, run_in_tree

ROOT = Path(__file__).resolve().parents[3]
PAGE = REFERENCE / "aclnnMoeEPLBUpdateExpert.md"


def block_from(text: str, first_line: str) -> str:
    """An indented code block of the page, from its first line to the last one that is indented."""
    lines = text[text.index(f"    {first_line}") :].splitlines()
    end = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("    ")), len(lines))
    return "\n".join(line.removeprefix("    ") for line in lines[:end]).rstrip() + "\n"


if PAGE.is_file():

    def test_the_published_demo_runs_unmodified(tree: Path, tmp_path: Path) -> None:
        page = PAGE.read_text()
        (tmp_path / "aclnnEPLBDemo.cpp").write_text(block_from(page, "#include <thread>"))
        script = block_from(page.split("编译与运行")[0], "#!/bin/bash").split("\n\n")[0]
        # The page's own words: "change this to the path of the cann environment".
        script = re.sub(r'cann_path="[^"]*"', f'cann_path="{tree.parent}"', script)
        assert '-L="$cann_path/latest/lib64/"' in script, "the page's own g++ line"
        (tmp_path / "buildEPLB.sh").write_text(script)
        subprocess.run(["bash", "buildEPLB.sh"], cwd=tmp_path, check=True)  # before setenv.bash, as below

        done = run_in_tree(tree, "./eplbDemo", tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        devices = {int(re.findall(r"device_(\d+)", line)[0]) for line in lines if "execute successfully." in line}
        assert devices == set(range(16))
        assert sum("execute successfully." in line for line in lines) == 16
        assert lines[-1] == "[INFO] aclFinalize success"
        assert "ERROR" not in done.stdout


def test_the_example_is_compiled_as_published_programs_are(tree: Path, tmp_path: Path) -> None:
    """Before setenv.bash, with both folders of headers, and the libraries' folder behind `-L=`."""
    latest = tree.parent / "latest"
    folders = [f"-I{latest}/include/", f"-I{latest}/include/aclnnop/", f"-L={latest}/lib64/"]
    source = ROOT / "examples" / "cann" / "moe_chain.cpp"
    command = ["g++", str(source), "-o", "chain", *folders, *LIBRARIES]
    subprocess.run(command, cwd=tmp_path, check=True, env={"PATH": os.environ["PATH"]})
    done = run_in_tree(tree, "./chain", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("16 of 16 devices: ")


def test_the_example_checks_its_values(tree: Path, tmp_path: Path) -> None:
    source = ROOT / "examples" / "cann"
    for name in ("Makefile", "moe_chain.cpp"):
        (tmp_path / name).write_text((source / name).read_text())
    done = run_in_tree(tree, f"make -s run CANN={tree.parent}", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "16 of 16 devices: xOut 2.59375, yOut 1, rstdOut 0.3846"


def test_a_tree_of_one_release_takes_what_that_takes(tmp_path: Path) -> None:
    """The example has two tensor-parallel peers, which the release of 2026 has not."""
    tree = build_tree(tmp_path / "cann", "atlas-a3-2026")
    for name in ("Makefile", "moe_chain.cpp"):
        (tmp_path / name).write_text((ROOT / "examples" / "cann" / name).read_text())
    done = run_in_tree(tree, f"make -s run CANN={tree.parent}", tmp_path)
    assert done.returncode != 0
    assert "returned 561002: `tpWorldSize` is 2: it must be 0 to 1" in done.stdout


def test_the_example_fails_where_a_value_is_wrong(tree: Path, tmp_path: Path) -> None:
    source = (ROOT / "examples" / "cann" / "moe_chain.cpp").read_text()
    wrong = source.replace("ACL_FLOAT, 0.1f);", "ACL_FLOAT, 0.11f);")
    assert wrong != source
    (tmp_path / "moe_chain.cpp").write_text(wrong)
    (tmp_path / "Makefile").write_text((ROOT / "examples" / "cann" / "Makefile").read_text())
    done = run_in_tree(tree, f"make -s run CANN={tree.parent}", tmp_path)
    assert done.returncode != 0
    assert "xOut is" in done.stdout
    assert "0 of 16 devices" in done.stdout
