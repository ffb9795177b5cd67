"""A hundred thousand random first stages: each gives a documented status and a message, none raises or hangs.

Calls start from valid ones and have some arguments replaced, so that the checks behind the first are reached too.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from math import prod

import numpy as np
import pytest
import torch

import evenmoe as em
from evenmoe.ascend import aclnn
from evenmoe.contract.operators import SIGNATURES
from tests.ascend.calls import valid_calls

CALLS_PER_OPERATOR = 11_000  # of ten operators
MESSAGE = re.compile(r"`(\w+)` is .*: it .*; .*\.", re.DOTALL)

EXTREMES = [
    -(2**63),
    -(2**31),
    -2,
    -1,
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    8,
    12,
    16,
    17,
    64,
    512,
    513,
    768,
    1024,
    2**31 - 1,
    2**63 - 1,
]
NO_INTEGERS = [None, True, 0.5, float("nan"), "2", 2**63, 10**400, np.int64(2), np.float32(1), [1], {}, torch.tensor(2)]
NAMES = [None, "", "nobody", "g" * 127, "g" * 128, "g" * 100_000, "fullmesh_v1", "fullmesh_v2", "ü", "\0", 7, b"ep"]
FLOATS = [0.0, -1.0, float("nan"), float("inf"), 1e-300, 3, 10**400, None, "small"]
SIZES = [0, 1, 2, 3, 4, 5, 8, 12, 16, 17, 512, 513, 1023, 1024, 1025, 8192, 8193, 2**20, 2**40]
DTYPES = [
    *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
]
NO_TENSORS = [[[0]], 3, "x", np.zeros((3, 2), np.int32), torch.zeros(2, 2).to_sparse(), object()]


def some_tensors(generator: random.Random) -> list[torch.Tensor]:
    """Tensors of any shape; as large as the numbers go, since all but one element are views of it."""
    tensors = []
    while len(tensors) < 600:
        shape = [generator.choice(SIZES) for _ in range(generator.choice([0, 1, 1, 2, 2, 2, 3, 4, 5]))]
        if prod(shape) < 2**60:
            tensors.append(torch.zeros((), dtype=generator.choice(DTYPES)).expand(shape))
    return [*tensors, torch.zeros((3, 1024), device="meta"), torch.zeros((3, 2)).requires_grad_()]


@pytest.fixture(scope="module")
def tensors():
    return some_tensors(random.Random(1))


def near(tensor: torch.Tensor, generator: random.Random) -> torch.Tensor:
    """Of the valid tensor's dtype or shape, with one of them changed a little."""
    if generator.random() < 0.3:
        return tensor.new_zeros(()).to(generator.choice(DTYPES)).expand(tensor.shape)
    shape = list(tensor.shape)
    if shape and generator.random() < 0.8:
        place = generator.randrange(len(shape))
        shape[place] = max(0, generator.choice([shape[place] - 1, shape[place] + 1, 2 * shape[place], 1]))
    else:
        shape.insert(0, 1)
    return tensor.new_zeros(()).expand(shape)


def changed(kind, value, tensors, generator):
    if kind in ("tensor", "output"):
        choice = generator.random()
        if choice < 0.15:
            return None
        if choice < 0.2:
            return generator.choice(NO_TENSORS)
        return near(value, generator) if choice < 0.6 and value is not None else generator.choice(tensors)
    if kind == "int":
        return generator.choice(EXTREMES if generator.random() < 0.9 else NO_INTEGERS)
    return generator.choice(NAMES if kind == "str" else FLOATS)


@pytest.mark.parametrize("operator", SIGNATURES)
def test_random_first_stages(operator, tensors):
    generator = random.Random(operator)
    kinds, first = SIGNATURES[operator].arguments, getattr(aclnn, f"aclnn{operator}GetWorkspaceSize")
    names, statuses, blamed = list(kinds), Counter(), Counter()
    with em.local_world(2) as world, em.local_world(8) as eight:
        valid = valid_calls(world.ranks[0], eight.ranks[0])[operator]
        for _ in range(CALLS_PER_OPERATOR):
            arguments = dict(valid)
            for name in generator.sample(names, generator.choice([1, 1, 1, 1, 2, 3, 6])):
                arguments[name] = changed(kinds[name], valid[name], tensors, generator)
            status, size, executor = first(*arguments.values())
            statuses[status] += 1
            if status == 0:
                assert size == executor.workspace_size
            else:
                assert (size, executor) == (0, None)
                match = MESSAGE.fullmatch(aclnn.aclGetRecentErrMsg())
                assert match is not None
                blamed[match[1]] += 1
        assert first(*valid.values())[0] == 0  # no call, wrong or right, has left a trace
    assert aclnn.aclGetRecentErrMsg() is None
    assert set(statuses) == {0, 161001, 161002, 561002}, statuses
    assert min(statuses.values()) > 50, statuses
    unexamined = {"out_dtype", "group_list_type"}
    assert set(blamed) <= set(names)
    assert len(blamed) >= len(set(names) - unexamined) - 3, set(names) - set(blamed)


def test_there_are_enough_of_them():
    assert CALLS_PER_OPERATOR * len(SIGNATURES) >= 100_000
