"""How often the contract looks at a call: once, in the first stage or in the operator, and not again for its shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import evenmoe as em
from evenmoe.ascend.executor import _PREPARED
from evenmoe.contract import combine, dispatch, update_expert
from evenmoe.transport.world import Rank
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


CALLS = ("UpdateExpertCall", "DispatchCall", "CombineCall", "AddRmsNormCall")


@contextmanager
def forgotten_shapes() -> Iterator[None]:
    """As if no call had been made before."""
    kept = [cache for prepared in _PREPARED.values() for cache in (prepared._layouts, prepared._plans)]
    before = [dict(cache) for cache in kept]
    for cache in kept:
        cache.clear()
    yield
    for cache, entries in zip(kept, before, strict=True):
        cache.update(entries)


class ElasticChain(Chain):
    def inputs(self, rank: Rank) -> dict[str, Any]:
        """With an `elastic_info` that says that no rank is gone."""
        return super().inputs(rank) | {"elastic_info": torch.zeros(4 + 2 * self.ep, dtype=torch.int32)}


@pytest.mark.parametrize("chain", [Chain(), ElasticChain()], ids=["all ranks", "elastic"])
def test_in_the_two_stage_calls(checked, chain):
    with forgotten_shapes(), em.local_world(chain.ep, timeout_s=HANG_S) as world:
        for _ in range(2):  # the first of its shapes, and one more
            checked.clear()
            streams = [Stream() for _ in world.ranks]
            for rank, stream in zip(world.ranks, streams, strict=True):
                launch_chain(chain, rank, stream, NEWEST)
            for stream in streams:
                stream.synchronize(HANG_S)
                stream.destroy()
            assert Counter(checked) == dict.fromkeys(CALLS, chain.ep)


def test_in_the_functions_of_torch_npu(checked):
    """The older update expert has narrower bounds than the operator behind it, so each of its calls is checked."""
    chain = Chain()
    with forgotten_shapes(), em.local_world(chain.ep, timeout_s=HANG_S) as world:
        world.run(lambda rank: run_api(chain, rank))
        assert Counter(checked) == dict.fromkeys(CALLS, chain.ep) | {"UpdateExpertCall": 2 * chain.ep}
        checked.clear()
        world.run(lambda rank: run_api(chain, rank))
    assert Counter(checked) == {"UpdateExpertCall": 2}
