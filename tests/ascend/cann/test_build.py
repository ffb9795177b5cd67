"""`evenmoe cann --out DIR`: what it writes, twice over, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from evenmoe.ascend.cann import build
from evenmoe.ascend.cann.build import c_names, digest, header_texts, source_texts
from evenmoe.cli import app
from evenmoe.contract.operators import SIGNATURES
from evenmoe.errors import ConstraintError

from .conftest import LIBRARIES, PROGRAMS, Run, run_in_tree, statuses

OPERATORS = {
    "aclnn_moe_eplb_update_expert.h": "MoeEPLBUpdateExpert",
    "aclnn_moe_update_expert.h": "MoeUpdateExpert",
    "aclnn_moe_distribute_dispatch.h": "MoeDistributeDispatch",
    "aclnn_moe_distribute_combine.h": "MoeDistributeCombine",
    "aclnn_moe_distribute_dispatch_v2.h": "MoeDistributeDispatchV2",
    "aclnn_moe_distribute_dispatch_v3.h": "MoeDistributeDispatchV3",
    "aclnn_moe_distribute_dispatch_v4.h": "MoeDistributeDispatchV4",
    "aclnn_moe_distribute_combine_v2.h": "MoeDistributeCombineV2",
    "aclnn_moe_distribute_combine_v3.h": "MoeDistributeCombineV3",
    "aclnn_moe_distribute_combine_v4.h": "MoeDistributeCombineV4",
    "aclnn_moe_distribute_dispatch_v5.h": "MoeDistributeDispatchV5",
    "aclnn_moe_distribute_combine_v5.h": "MoeDistributeCombineV5",
    "aclnn_moe_distribute_combine_add_rms_norm.h": "MoeDistributeCombineAddRmsNorm",
    "aclnn_moe_distribute_combine_add_rms_norm_v2.h": "MoeDistributeCombineAddRmsNormV2",
    "aclnn_moe_distribute_dispatch_setup.h": "MoeDistributeDispatchSetup",
    "aclnn_moe_distribute_dispatch_teardown.h": "MoeDistributeDispatchTeardown",
    "aclnn_moe_distribute_combine_setup.h": "MoeDistributeCombineSetup",
    "aclnn_moe_distribute_combine_teardown.h": "MoeDistributeCombineTeardown",
}
# Specification §2.1 and §3.1, and the declaration of aclnnMoeUpdateExpert.
UPDATE = """expertIds eplbTable expertScalesOptional pruningThresholdOptional activeMaskOptional localRankId worldSize
    balanceMode balancedExpertIds balancedActiveMask"""
DISPATCH_V2 = """x expertIds scalesOptional xActiveMaskOptional expertScalesOptional groupEp epWorldSize epRankId
    moeExpertNum groupTp tpWorldSize tpRankId expertShardType sharedExpertNum sharedExpertRankNum quantMode globalBs
    expertTokenNumsType commAlg expandXOut dynamicScalesOut assistInfoForCombineOut expertTokenNumsOut
    epRecvCountsOut tpRecvCountsOut expandScalesOut"""
COMBINE_V2 = """expandX expertIds assistInfoForCombine epSendCounts expertScales tpSendCountsOptional
    xActiveMaskOptional activationScaleOptional weightScaleOptional groupListOptional expandScalesOptional
    sharedExpertXOptional groupEp epWorldSize epRankId moeExpertNum groupTp tpWorldSize tpRankId expertShardType
    sharedExpertNum sharedExpertRankNum globalBs outDtype commQuantMode groupListType commAlg xOut"""


@pytest.mark.parametrize(
    ("operator", "names"),
    [("MoeUpdateExpert", UPDATE), ("MoeDistributeDispatchV2", DISPATCH_V2), ("MoeDistributeCombineV2", COMBINE_V2)],
)
def test_c_names_are_the_specifications(operator: str, names: str) -> None:
    assert list(c_names(operator).values()) == names.split()


def test_headers_declare_both_stages_of_every_operator() -> None:
    headers = header_texts()
    assert {name.removeprefix("aclnnop/") for name in headers if name.startswith("aclnnop/")} == set(OPERATORS)
    assert set(OPERATORS.values()) == set(SIGNATURES)
    for name, operator in OPERATORS.items():
        declared = re.findall(r"^aclnnStatus (\w+)\(", headers[f"aclnnop/{name}"], re.MULTILINE)
        sizes = [f"aclnn{operator}TeardownCalcOutputSize"] if operator.endswith("Setup") else []
        assert declared == [f"aclnn{operator}GetWorkspaceSize", f"aclnn{operator}", *sizes]


def test_the_c_functions_are_those_of_the_golden_file() -> None:
    """They are written from the table of operators; `generated/opapi.cpp` shows them, and shows what changes."""
    golden = Path(__file__).parent / "generated" / "opapi.cpp"
    assert source_texts()["opapi.cpp"] == golden.read_text(), "if this is meant, write the new text into the file"


def test_setups_say_how_large_their_outputs_are(run_program: Run) -> None:
    """§14.2: rows·columns of a message, entries, 128 per row that may arrive, 16 commands per row and expert."""
    found = statuses(run_program("output_sizes"))
    assert found == {
        "plain": (0, f"4096 48 {128 * 32 * 6} {16 * (48 + 32)}"),
        "quantized": (0, f"4608 48 {128 * 32 * 6} {16 * (8 * 7 + 32)}"),
        "shared": (0, f"4096 48 {128 * 16} {16 * (8 * 7 + 4)}"),
        "null": (161001, "0 0 0 0"),
        "flat": (161002, "0 0 0 0"),
        "all shared": (161002, "0 0 0 0"),
        "combine": (0, f"6144 {16 * (8 + 4)}"),
    }


def test_every_header_stands_alone_in_c_and_cpp(tree: Path, tmp_path: Path) -> None:
    paths = sorted(str(path.relative_to(tree / "include")) for path in (tree / "include").rglob("*.h"))
    for name, standard in (("all.c", "c11"), ("all.cpp", "c++11")):
        for i, path in enumerate(paths):
            (tmp_path / f"{i}_{name}").write_text(f'#include "{path}"\n')
        files = [str(tmp_path / f"{i}_{name}") for i in range(len(paths))]
        flags = [
            f"-std={standard}",
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-fsyntax-only",
            f"-I{tree / 'include'}",
        ]
        subprocess.run(["g++" if name.endswith("cpp") else "gcc", *flags, *files], check=True)


def test_half_precision_on_the_host_is_numpys(tree: Path, tmp_path: Path) -> None:
    """`op::fp16_t`, with which the operators' published samples fill x: every half and what lies between two."""
    program = (
        '#include "aclnn/opdev/fp16_t.h"\n#include <cstdio>\nint main() { double d; while (std::fread(&d, 8, 1, stdin)'
    )
    program += " == 1) { const op::fp16_t half(d); const float back = half; std::fwrite(&half.val, 2, 1, stdout);"
    program += " std::fwrite(&back, 4, 1, stdout); } return 0; }\n"
    (tmp_path / "half.cpp").write_text(program)
    subprocess.run(["g++", "-O1", "half.cpp", "-o", "half", f"-I{tree / 'include'}"], cwd=tmp_path, check=True)
    halves = np.arange(2**15, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].astype(np.float64)
    between = (halves[1:] + halves[:-1]) / 2  # ties to even
    given = np.concatenate([halves, between, np.nextafter(between, 0), np.nextafter(between, np.inf)])
    given = np.concatenate([given, -given, [65519.99, 65520, 1e300, np.inf, -np.inf]])
    done = subprocess.run([tmp_path / "half"], input=given.tobytes(), capture_output=True, check=True)
    got = np.frombuffer(done.stdout, dtype=[("bits", "<u2"), ("back", "<f4")])
    with np.errstate(over="ignore"):
        want = given.astype(np.float16)
    assert np.array_equal(got["bits"], want.view(np.uint16))
    assert np.array_equal(got["back"], want.astype(np.float32))


def test_a_tree_has_what_the_pages_name(tree: Path) -> None:
    assert {path.name for path in tree.iterdir()} >= {"include", "lib64", "bin"}
    assert {path.name for path in (tree / "include").iterdir()} >= {"acl", "hccl", "aclnnop"}
    libraries = {f"lib{name}.so" for name in ("ascendcl", "nnopbase", "opapi", "op_common", "hccl")}
    assert {path.name for path in (tree / "lib64").iterdir()} >= libraries
    assert [path.name for path in tree.parent.iterdir()] == ["latest"], "nothing is left beside it"


#: As the operators' pages, the upstream build script (its own and a custom package) and its CMake page have them.
LINK_LINES = {
    "pages of V2": "-lascendcl -lnnopbase -lopapi -lop_common -lpthread -lhccl",
    "pages of V3 and V4": "-lascendcl -lnnopbase -lopapi_math -lop_common -lpthread -lhccl",
    "build script": "-L$ASCEND_HOME_PATH/lib64 -lopapi_math -lopapi_transformer -lascendcl -lnnopbase -lc_sec "
    "-lpthread -Wl,--no-as-needed -lhccl -lhccl_fwk",
    "custom package": "-L$ASCEND_OPP_PATH/vendors/custom_transformer/op_api/lib -L$ASCEND_HOME_PATH/lib64 -lopapi_math "
    "-lcust_opapi -lascendcl -lnnopbase -lc_sec -lpthread -Wl,--no-as-needed -lhccl -lhccl_fwk "
    "-Wl,-rpath=$ASCEND_OPP_PATH/vendors/custom_transformer/op_api/lib",
    "CMake": "$ASCEND_HOME_PATH/lib64/libascendcl.so $ASCEND_HOME_PATH/lib64/libnnopbase.so "
    "$ASCEND_HOME_PATH/lib64/libopapi_math.so $ASCEND_HOME_PATH/lib64/libopapi_transformer.so -Wl,--no-as-needed "
    "$ASCEND_HOME_PATH/lib64/libhccl.so $ASCEND_HOME_PATH/lib64/libhccl_fwk.so -lpthread",
    "opapi_nn": "-lopapi_nn -lascendcl -lnnopbase -lhccl -lpthread",
}


@pytest.mark.parametrize("line", LINK_LINES.values(), ids=LINK_LINES)
def test_every_published_link_line_links_and_runs(tree: Path, tmp_path: Path, line: str) -> None:
    """With one copy of each library in the process: its own and its other names."""
    program = (
        '#include "acl/acl.h"\n#include "hccl/hccl.h"\n#include "aclnnop/aclnn_moe_update_expert.h"\n#include <cstdio>'
    )
    program += (
        "\nint main() { uint64_t size; aclOpExecutor *executor; int status = aclnnMoeUpdateExpertGetWorkspaceSize("
    )
    program += "nullptr, nullptr, nullptr, nullptr, nullptr, 0, 2, 0, nullptr, nullptr, &size, &executor);"
    program += ' std::printf("%d %d\\n", status, HcclCommDestroy(nullptr)); return 0; }\n'
    (tmp_path / "one.cpp").write_text(program)
    done = run_in_tree(tree, f"g++ one.cpp -o one {line} && ./one && LD_TRACE_LOADED_OBJECTS=1 ./one", tmp_path)
    assert done.returncode == 0, done.stderr
    first, *loaded = done.stdout.splitlines()
    assert first == "161001 15", "null expertIds; aclInit not called"
    files = [str(Path(path).resolve()) for path in re.findall(rf"=> ({re.escape(str(tree))}\S+)", "\n".join(loaded))]
    assert len(files) == len(set(files))
    assert {"libopapi.so", "libhccl.so"} <= {Path(path).name for path in files}


@pytest.mark.parametrize("script", ["bin/setenv.bash", "bin/set_env.sh", "set_env.sh"])
def test_each_script_sets_the_same_environment(tree: Path, tmp_path: Path, script: str) -> None:
    command = f'source "{tree}/{script}" && echo "$ASCEND_TOOLKIT_HOME $ASCEND_HOME_PATH $ASCEND_OPP_PATH $CPATH"'
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert done.stdout.decode() == f"{tree} {tree} {tree}/opp {tree}/include\n"


def test_folders_that_builds_look_into_are_those_of_the_tree(tree: Path) -> None:
    for name in ("opp/vendors/custom_transformer/op_api/include", f"{platform.machine()}-linux/include"):
        assert (tree / name / "aclnnop" / "aclnn_moe_update_expert.h").is_file()
    assert (tree / f"{platform.machine()}-linux" / "lib64" / "libascendcl.so").is_file()


def test_a_second_run_replaces_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_compile", lambda compiler, tree, scratch, limits: (tree / "lib64" / "new").touch())
    latest = build.build_tree(tmp_path)
    before = sorted(path.relative_to(latest) for path in latest.rglob("*"))
    (latest / "lib64" / "stray").touch()
    assert build.build_tree(tmp_path) == latest
    assert sorted(path.relative_to(latest) for path in latest.rglob("*")) == before


def test_a_tree_works_where_it_was_copied_to_but_not_with_another_evenmoe(tree: Path, tmp_path: Path) -> None:
    copied = tmp_path / "else where" / "latest"
    shutil.copytree(tree, copied)
    program = '#include "acl/acl.h"\n#include <cstdio>\nint main() { int s = aclInit(nullptr); const char *m = '
    program += 'aclGetRecentErrMsg(); std::printf("%d %s", s, m ? m : ""); return 0; }\n'
    (tmp_path / "init.cpp").write_text(program)
    flags = [f"-I{copied / 'include'}", f"-L{copied / 'lib64'}", *LIBRARIES]
    subprocess.run(["g++", "init.cpp", "-o", "init", *flags], cwd=tmp_path, check=True)
    assert run_in_tree(copied, "./init", tmp_path).stdout == "0 "
    core = copied / "lib64" / f"lib{build.CORE}.so"
    core.write_bytes(core.read_bytes().replace(digest().encode(), b"0" * 16))
    done = run_in_tree(copied, "./init", tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("500000 evenmoe does not start in Python")
    assert "write it again with `evenmoe cann`" in done.stdout


def test_the_interpreter_that_is_gone_is_named(tree: Path, tmp_path: Path) -> None:
    copied = tmp_path / "latest"
    shutil.copytree(tree, copied)
    core = copied / "lib64" / f"lib{build.CORE}.so"
    # A Python whose packages are gone: the same length, another place, and no fallback paths.
    content = core.read_bytes()
    for path in {sys.executable, *build.package_homes()}:
        content = content.replace(path.encode() + b"\0", b"/" + b"x" * (len(path.encode()) - 1) + b"\0")
    core.write_bytes(content)
    flags = [f"-I{copied / 'include'}", f"-L{copied / 'lib64'}", *LIBRARIES]
    subprocess.run(
        ["g++", "-std=c++17", str(PROGRAMS / "strided.cpp"), "-o", "strided", *flags], cwd=tmp_path, check=True
    )
    done = run_in_tree(copied, "./strided", tmp_path)
    assert done.returncode == 3
    assert "evenmoe does not start in Python /xxx" in done.stdout


def test_without_a_compiler_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ConstraintError, match=r"^`g\+\+` is not found: it must be on PATH; install a C\+\+ compiler"
    ) as error:
        build.build_tree(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_without_a_shared_python_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path) if name == "LIBDIR" else None)
    with pytest.raises(ConstraintError, match="--enable-shared"):
        build.build_tree(tmp_path / "out")
    assert not (tmp_path / "out" / "latest").exists()


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'cc1plus: error: unrecognized option' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConstraintError, match="cc1plus: error: unrecognized option"):
        build.build_tree(tmp_path / "out")
    assert not (tmp_path / "out").exists()  # nor is the folder left that was made for it


def test_a_directory_that_cannot_be_written_is_an_error_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["cann", "--out", str(tmp_path / "file" / "out")])
    assert isinstance(result.exception, ConstraintError)
    assert "must be a directory that can be written (Not a directory)" in str(result.exception)


def test_the_command_says_where_the_tree_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_tree", lambda out, limits: out / "latest")  # that it builds one, the others show
    text = CliRunner().invoke(app, ["cann", "--out", str(tmp_path)])
    assert text.output == f"source {tmp_path}/latest/bin/setenv.bash\n"
    found = json.loads(CliRunner().invoke(app, ["cann", "--out", str(tmp_path), "--json"]).output)
    assert found == {"schema": 1, "tree": f"{tmp_path}/latest", "setenv": f"{tmp_path}/latest/bin/setenv.bash"}


def test_limits_have_names(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["cann", "--out", str(tmp_path / "new"), "--limits", "relaxed"])
    assert isinstance(result.exception, ConstraintError)
    assert '`--limits` is \'relaxed\': it must be "atlas-a3", "atlas-a3-2025" or "atlas-a3-2026"' in str(
        result.exception
    )
    assert not (tmp_path / "new").exists()


def test_anothers_latest_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "mine").touch()
    with pytest.raises(ConstraintError, match="must not hold another `latest`"):
        build.build_tree(tmp_path)
    assert (tmp_path / "latest" / "mine").exists()
