"""How often the contract looks at a call: once, in the first stage or in the operator, and not again for its shapes."""

from __future__ import annotations

from collections import Counter

import pytest

import evenmoe as em
from evenmoe.contract import combine, dispatch, update_expert
from tests.ascend.calls import Chain
from tests.ascend.test_executor import NEWEST, Stream, launch_chain
from tests.ascend.test_torch_npu import run_api
from tests.patience import HANG_S


@pytest.fixture
def checked(monkeypatch):
    """The types of the calls that the contract has looked at."""
    seen = []

    def counting(original):
        def check_wrapper(call):
            seen.append(type(call).__name__)
            original(call)

        return check_wrapper

    for module in (update_expert, dispatch, combine):
        monkeypatch.setattr(module, "check_wrapper", counting(module.check_wrapper))
    return seen


def test_in_the_two_stage_calls(checked):
    chain = Chain()
    with em.local_world(chain.ep, timeout_s=HANG_S) as world:
        for _ in range(2):
            checked.clear()
            streams = [Stream() for _ in world.ranks]
            for rank, stream in zip(world.ranks, streams, strict=True):
                launch_chain(chain, rank, stream, NEWEST)
            for stream in streams:
                stream.synchronize(HANG_S)
                stream.destroy()
    assert Counter(checked) == dict.fromkeys(("UpdateExpertCall", "DispatchCall", "CombineCall", "AddRmsNormCall"), 2)


def test_in_the_functions_of_torch_npu(checked):
    """The older update expert has narrower bounds than the operator behind it, so each of its calls is checked."""
    chain = Chain()
    with em.local_world(chain.ep, timeout_s=HANG_S) as world:
        for _ in range(2):
            checked.clear()
            world.run(lambda rank: run_api(chain, rank))
    assert Counter(checked) == {"UpdateExpertCall": 2}
