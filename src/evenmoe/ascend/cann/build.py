"""`evenmoe cann --out DIR`: writes the tree that a CANN program is compiled and run against.

Its texts are headers as they lie here, and those of the operators, written from the table of operators.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from evenmoe.contract.argument import Kind, Signature
from evenmoe.contract.limits import ATLAS_A3, chip_limits
from evenmoe.contract.operators import SIGNATURES
from evenmoe.errors import ConstraintError
from evenmoe.io.commands import run
from evenmoe.io.output import made_folder, scratch_folder, whole_folder

CORE = "evenmoe_cann"
LIBRARIES = ("ascendcl", "nnopbase", "opapi", "op_common", "hccl", "c_sec")
#: Other names of libraries, as releases divide and package them; relative to the tree.
_ALIASES = {
    "lib64/libopapi_math.so": "opapi",
    "lib64/libopapi_nn.so": "opapi",
    "lib64/libopapi_transformer.so": "opapi",
    "lib64/libhccl_fwk.so": "hccl",
    "opp/vendors/custom_transformer/op_api/lib/libcust_opapi.so": "opapi",
}
#: Where else builds look for folders of the tree.
_FOLDERS = {
    "opp/vendors/custom_transformer/op_api/include/aclnnop": "include/aclnnop",
    f"{platform.machine()}-linux/include": "include",
    f"{platform.machine()}-linux/lib64": "lib64",
}
_MARKER = "evenmoe.txt"
#: What a compiler says, or a shell of the program that it started, where it could not write its files.
_NO_ROOM = {
    errno.ENOSPC: (os.strerror(errno.ENOSPC),),
    errno.EDQUOT: (os.strerror(errno.EDQUOT),),
    errno.EFBIG: (os.strerror(errno.EFBIG), "File size limit exceeded"),
}
_SETENV = """\
# Sourced by bash: lets programs be compiled against this tree, and find its libraries when they run.
ASCEND_TOOLKIT_HOME="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export ASCEND_TOOLKIT_HOME
export ASCEND_HOME_PATH="$ASCEND_TOOLKIT_HOME"
export ASCEND_OPP_PATH="$ASCEND_TOOLKIT_HOME/opp"
export LD_LIBRARY_PATH="$ASCEND_TOOLKIT_HOME/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export LIBRARY_PATH="$ASCEND_TOOLKIT_HOME/lib64${LIBRARY_PATH:+:$LIBRARY_PATH}"
export CPATH="$ASCEND_TOOLKIT_HOME/include${CPATH:+:$CPATH}"
"""
_SET_ENV = """\
# Sourced by bash, as bin/setenv.bash, which it calls.
. "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/%s"
"""
#: What a setup's second function gives: how large the tensors between the halves are.
_SIZES = {
    "MoeDistributeDispatchSetup": (
        "tokenMsgSize",
        "expandIdxOutSize",
        "assistInfoForCombineOutSize",
        "commCmdInfoOutSize",
    ),
    "MoeDistributeCombineSetup": ("tokenMsgSize", "commCmdInfoOutSize"),
}
_HERE = Path(__file__).parent
_TYPES: dict[Kind, str] = {
    "tensor": "const aclTensor *",
    "output": "aclTensor *",
    "str": "const char *",
    "int": "int64_t ",
    "float": "float ",
}


def c_names(operator: str) -> dict[str, str]:
    """The C names of an operator's arguments by their names here, in C order.

    >>> c_names("MoeUpdateExpert")["active_mask"], c_names("MoeDistributeDispatchV2")["expand_x"]
    ('activeMaskOptional', 'expandXOut')
    """
    return {name: argument.c_name for name, argument in SIGNATURES[operator].arguments.items()}


def file_stem(operator: str) -> str:
    """The name of an operator's header, without its ending.

    >>> file_stem("MoeEPLBUpdateExpert"), file_stem("MoeDistributeCombineAddRmsNormV2")
    ('aclnn_moe_eplb_update_expert', 'aclnn_moe_distribute_combine_add_rms_norm_v2')
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", operator)
    return "aclnn_" + words.lower()


def header_texts() -> dict[str, str]:
    """{path under include/: text}."""
    include = _HERE / "include"
    texts = {str(path.relative_to(include)): path.read_text() for path in sorted(include.rglob("*.h"))}
    for operator, signature in SIGNATURES.items():
        texts[f"aclnnop/{file_stem(operator)}.h"] = _operator_header(operator, signature)
    return texts


def source_texts() -> dict[str, str]:
    """{file name: text} of the libraries' sources."""
    texts = {path.name: path.read_text() for path in sorted((_HERE / "csrc").iterdir())}
    includes = "".join(f'#include "aclnnop/{file_stem(operator)}.h"\n' for operator in SIGNATURES)
    functions = "\n".join(_operator_source(operator, signature) for operator, signature in SIGNATURES.items())
    texts["opapi.cpp"] = (
        "// libopapi.so: both stages of every operator.\n#pragma GCC visibility push(default)\n"
        f'{includes}#pragma GCC visibility pop\n\n#include "core.h"\n\n{functions}'
    )
    return texts


def digest() -> str:
    """What a tree and the Python it embeds must agree on.

    >>> len(digest())
    16
    """
    texts = repr((sorted(header_texts().items()), sorted(source_texts().items())))
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


def _parameters(signature: Signature) -> str:
    declared = [f"{_TYPES[argument.kind]}{argument.c_name}" for argument in signature.arguments.values()]
    return ",\n    ".join([*declared, "uint64_t *workspaceSize", "aclOpExecutor **executor"])


def _operator_header(operator: str, signature: Signature) -> str:
    guard = f"EVENMOE_ACLNNOP_{file_stem(operator).upper()}_H"
    return f"""/* aclnn{operator}: the first stage checks and makes an executor, the second puts it on a stream. */
#ifndef {guard}
#define {guard}

#include "aclnn/aclnn_base.h"

#ifdef __cplusplus
extern "C" {{
#endif

aclnnStatus aclnn{operator}GetWorkspaceSize(
    {_parameters(signature)});

aclnnStatus aclnn{operator}(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream);
{_sizes_declaration(operator, signature)}
#ifdef __cplusplus
}}
#endif

#endif
"""


def _operator_source(operator: str, signature: Signature) -> str:
    passed = ", ".join(c_names(operator).values())
    return f"""aclnnStatus aclnn{operator}GetWorkspaceSize(
    {_parameters(signature)})
{{
    return evenmoe::stage_one("{operator}", {{{passed}}}, workspaceSize, executor);
}}

aclnnStatus aclnn{operator}(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream)
{{
    return evenmoe::stage_two("{operator}", workspace, workspaceSize, executor, stream);
}}
{_sizes_source(operator, signature)}"""


def _sizes_function(operator: str, signature: Signature) -> str:
    """The head of a setup's second function; the sizes are references, so only C++ sees it."""
    declared = []
    for argument in signature.arguments.values():
        if argument.kind != "output":
            declared.append(f"{_TYPES[argument.kind]}{argument.c_name}")
        if (argument.name, signature.operator) == ("global_bs", "dispatch_setup"):
            declared.append("int64_t expertTokenNumsType")
    declared += [f"uint64_t &{name}" for name in _SIZES[operator]]
    return f"aclnnStatus aclnn{operator}TeardownCalcOutputSize(\n    " + ",\n    ".join(declared) + ")"


def _sizes_declaration(operator: str, signature: Signature) -> str:
    if operator not in _SIZES:
        return ""
    return f"\n#ifdef __cplusplus\n{_sizes_function(operator, signature)};\n#endif\n"


def _sizes_source(operator: str, signature: Signature) -> str:
    if operator not in _SIZES:
        return ""
    names = c_names(operator)
    passed = ", ".join(names[name] for name in signature.names("tensor", "str", "int"))
    written = "".join(f"        {name} = reply.numbers[{i}];\n" for i, name in enumerate(_SIZES[operator]))
    unused = "    (void)expertTokenNumsType;\n" if signature.operator == "dispatch_setup" else ""
    return f"""
{_sizes_function(operator, signature)}
{{
{unused}    const evenmoe::Reply reply = evenmoe::ask("output_sizes", {{"{operator}", {passed}}});
    if (reply.status == 0) {{
{written}    }}
    return reply.status;
}}
"""


def build_tree(out: Path, limits: str = ATLAS_A3.name) -> Path:
    """Write `out`/latest with include, lib64, opp, set_env.sh and bin/setenv.bash, in place of one already there.

    The libraries embed the Python that runs this function, with its packages; they find it wherever they are used on
    this machine, without an environment variable.

    Args:
        limits: what the operators take: "atlas-a3", or "atlas-a3-2025" or "atlas-a3-2026" for the rules of one release.

    Returns:
        The path of the tree, `out`/latest.

    Raises:
        ConstraintError: no C++ compiler, no Python headers or shared Python library, a directory that cannot be
            written, or `out`/latest is something else; or the compiler fails, with its first words;
            or another name of limits.
    """
    limits = chip_limits(limits).name
    compiler = _compiler()
    latest = out / "latest"
    if latest.exists() and not (latest / _MARKER).is_file():
        raise ConstraintError(
            "out", out, f"must not hold another `{latest.name}` than one written by this command", "use another DIR"
        )
    try:
        with made_folder(out), whole_folder(latest, replace=True) as tree, scratch_folder(out) as scratch:
            _write_texts(tree)
            _compile(compiler, tree, scratch, limits)
    except OSError as error:
        raise ConstraintError(
            "out", out, f"must be a directory that can be written ({error.strerror})", "use another DIR"
        ) from error
    return latest


def _write_texts(tree: Path) -> None:
    for name, text in header_texts().items():
        _write(tree / "include" / name, text)
    _write(tree / "bin" / "setenv.bash", _SETENV)
    _write(tree / "bin" / "set_env.sh", _SET_ENV % "setenv.bash")
    _write(tree / "set_env.sh", _SET_ENV % "bin/setenv.bash")
    _write(tree / _MARKER, f"Written by `evenmoe cann` for {sys.executable}\n")
    (tree / "lib64").mkdir()
    for name, folder in _FOLDERS.items():
        _link(tree, name, folder)


def _link(tree: Path, name: str, target: str) -> None:
    """Make `name` another name of `target`, both relative to the tree; the tree can be moved."""
    path = tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(tree / target, path.parent))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _compile(compiler: str, tree: Path, scratch: Path, limits: str) -> None:
    sources = scratch / "csrc"
    for name, text in source_texts().items():
        _write(sources / name, text)
    libpython = _libpython()
    _write(sources / "python_home.h", _python_home(libpython, limits))
    common = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    common += [f"-I{tree / 'include'}", f"-I{sources}"]
    python = [f"-I{_python_include()}", str(libpython), f"-Wl,-rpath,{libpython.parent}", "-ldl"]
    lib64 = tree / "lib64"
    for name, own in [(CORE, python), *((name, [f"-L{lib64}", f"-l{CORE}"]) for name in LIBRARIES)]:
        source = sources / ("core.cpp" if name == CORE else f"{name}.cpp")
        target = lib64 / f"lib{name}.so"
        soname = [f"-Wl,-soname,{target.name}", "-Wl,-rpath,$ORIGIN", "-Wl,--no-undefined"]
        command = [*common, str(source), "-o", str(target), *soname, *own]
        # Its temporary files go with the scratch folder, however it ends.
        done = run(command, env={**os.environ, "TMPDIR": str(scratch)})
        if done.returncode:
            errors = done.stderr
            for number, texts in _NO_ROOM.items():
                if any(text in errors for text in texts):
                    raise OSError(number, os.strerror(number))
            first = next((line for line in errors.splitlines() if "error" in line), errors.strip())
            raise ConstraintError("g++", f"{compiler}: {first}", "must compile C++17", "use a newer compiler")
    # A program linked to one of these asks the loader for the library's own name, and so finds one copy of it.
    for name, library in _ALIASES.items():
        _link(tree, name, f"lib64/lib{library}.so")


def _compiler() -> str:
    for name in ("g++", "c++"):
        found = shutil.which(name)
        if found:
            return found
    raise ConstraintError("g++", "not found", "must be on PATH", "install a C++ compiler, as `apt-get install g++`")


def _python_include() -> str:
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        raise ConstraintError(
            "Python.h", f"not in {include}", "must be there to embed Python", "install Python's development package"
        )
    return include


def _libpython() -> Path:
    """The shared library of the Python that runs here; its file name is what the loader asks for."""
    directory = sysconfig.get_config_var("LIBDIR") or ""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    names = (sysconfig.get_config_var("INSTSONAME"), f"libpython{version}.so.1.0", f"libpython{version}.so")
    for name in names:
        if name and ".so" in name and Path(directory, name).is_file():
            return Path(directory, name)
    raise ConstraintError(
        "Python",
        f"{sys.executable} without a shared libpython in {directory}",
        "must have one to be embedded",
        "use a Python configured with --enable-shared",
    )


def package_homes() -> list[str]:
    """Where the packages of this run came from, should the site packages of its Python not have them later."""
    specs = [importlib.util.find_spec(package) for package in ("evenmoe", "torch", "numpy")]
    return list(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin))


def _python_home(libpython: Path, limits: str) -> str:
    paths = ", ".join(map(_c_string, package_homes()))
    return (
        f"constexpr const char *kPython = {_c_string(sys.executable)};\n"
        f"constexpr const char *kLibpython = {_c_string(str(libpython))};\n"
        f"constexpr const char *kLimits = {_c_string(limits)};\n"
        f"constexpr const char *kDigest = {_c_string(digest())};\n"
        f"constexpr const char *kPaths[] = {{{paths}}};\n"
    )


def _c_string(text: str) -> str:
    """A C string literal; octal escapes for whatever is not plain, each of them three digits long.

    >>> print(_c_string('a"é'))
    "a\\042\\303\\251"
    """
    plain = re.compile(rb"[\w/. -]", re.ASCII)
    encoded = text.encode("utf-8", "surrogateescape")
    return '"' + "".join(chr(byte) if plain.match(bytes([byte])) else f"\\{byte:03o}" for byte in encoded) + '"'
