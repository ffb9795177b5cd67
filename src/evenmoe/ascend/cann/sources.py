"""The texts of the tree: headers as they lie here, and those of the operators, written from the table of operators."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from evenmoe.contract.operators import SIGNATURES, Kind, Signature

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
"""
