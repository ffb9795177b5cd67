"""The list of public programs is well formed, and the script that runs them tells what they do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.published_programs import LINK_LINES, OUTCOMES, expected_outcomes, main, programs_in, programs_of, source_at

from .cann.conftest import tree  # noqa: F401

CALL = "aclnnMoeUpdateExpertGetWorkspaceSize(nullptr, nullptr, nullptr, nullptr, nullptr, 0, 2, 0, nullptr, nullptr, "
PROGRAM = """#include <cstdio>
#include "acl/acl.h"
#include "hccl/hccl.h"
#include "../op_api/mine.h"
int main() {{ uint64_t size = 0; aclOpExecutor *executor = nullptr; {body} return 0; }}
"""
REFUSED = PROGRAM.format(body=f'std::printf("[ERROR] failed, ret %d\\n", {CALL}&size, &executor));')
RIGHT = PROGRAM.format(body=f'if ({CALL}&size, &executor) == 161001) std::printf("execute successfully.\\n");')
BROKEN = PROGRAM.format(body=f"{CALL}&size, &executor); no_such_function();")
PAGE = f"""Text.

    ```cpp
{"".join("    " + line for line in RIGHT.splitlines(keepends=True))}    ```

```cpp
{CALL}&size, &executor);
```

```Cpp
int main() {{ return 0; }}
```
"""
needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="this machine lacks tomllib, which Python 3.11 has")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder of programs as upstream lays them out."""
    folder = tmp_path / "sources"
    for name, text in {
        "op/examples/refused.cpp": REFUSED,
        "op/examples/broken.cpp": BROKEN,
        "op/examples/again.cpp": BROKEN,
        "op/examples/another.cpp": "int main() { return 0; }\n",
        "op/docs/page.md": PAGE,
        "op/op_api/mine.h": '#include "aclnnop/aclnn_moe_update_expert.h"\n',
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_programs_are_those_that_call_an_operator_and_are_complete() -> None:
    assert [(one.label, one.text) for one in programs_in("page.md", PAGE)] == [("page.md #0", RIGHT)]
    assert [one.label for one in programs_in("x.cpp", REFUSED)] == ["x.cpp"]
    barrier = REFUSED.replace("[ERROR]", "aclnnDistributeBarrier")
    assert list(programs_in("x.cpp", barrier)) == []


def test_a_folder_and_a_repository_have_the_same_programs(sources: Path) -> None:
    of_folder = programs_of(source_at(sources))
    assert [one.label for one in of_folder] == [
        "op/docs/page.md #0",
        "op/examples/again.cpp",
        "op/examples/refused.cpp",
    ]
    who = ["-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "c"]):
        subprocess.run(["git", *command], cwd=sources, check=True)
    source = source_at(sources)
    assert re.fullmatch("[0-9a-f]{40}", source.commit())
    assert {one.sha256 for one in programs_of(source)} == {one.sha256 for one in of_folder}


@needs_toml
def test_the_script_says_what_each_program_does(sources: Path, tree: Path, tmp_path: Path) -> None:  # noqa: F811
    first = programs_of(source_at(sources))[0]
    listed = tmp_path / "list.toml"
    listed.write_text(f'[[program]]\nsha256 = "{first.sha256}"\noutcome = "succeeds"\n')
    said: list[str] = []
    given = [str(sources), "--cann", str(tree.parent), "--list", str(listed)]
    assert main(given, said.append) == 1, "two are not in the list"
    assert [line[:16].strip() for line in said[:-1]] == ["succeeds", "does not compile", "is refused"]
    assert "no_such_function" in said[1]
    assert said[2].endswith("[ERROR] failed, ret 161001")
    assert said[-1] == "2 compiled, 1 succeeded, 1 as expected, 3 programs"
    assert main([*given, "--only", "docs"], said.append) == 0


@needs_toml
def test_the_list_is_well_formed() -> None:
    entries = expected_outcomes()
    assert len(entries) >= 49
    for digest, entry in entries.items():
        assert re.fullmatch("[0-9a-f]{64}", digest)
        assert re.fullmatch("[0-9a-f]{40}", entry["commit"])
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry["repository"])
        assert entry["path"].endswith((".cpp", ".md"))
        assert ("block" in entry) == entry["path"].endswith(".md")
        assert entry["outcome"] in OUTCOMES
        assert (entry["outcome"] == "succeeds") != bool(entry.get("reason")), "what does not succeed has a reason"
    succeeding = [entry for entry in entries.values() if entry["outcome"] == "succeeds"]
    assert len(succeeding) >= 42


def test_link_lines_are_those_of_the_tree() -> None:
    assert set(LINK_LINES) == {"opapi", "opapi_math", "opapi_transformer", "cust_opapi"}
