"""Training with replicas is training in one process."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.transformers.models import MODES, RANKS, dense, et, on_ranks, parallel, prompts, whole
from tests.integrations.transformers.test_placing import planned

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch, about themselves

STEPS, RATE = 5, 0.5
#: Gradients are sums over 36 tokens and 32 features in float32 in another order, relative error 36 * 32 * 2**-24 = 7e-5
#: at worst, of gradients below 0.1; five steps of rate 0.5 add up to 2e-5.
CLOSE = 2e-5


def trained(rank: int, mode: str, slots: int, checkpointing: bool) -> tuple[float, float]:
    """The largest difference of weights from those that one process has after as many steps; and how far they went."""
    model, alone = parallel(mode).train(), dense().train()
    if slots:
        et.place(model, planned(slots))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    before = {name: value.clone() for name, value in alone.state_dict().items()}
    optimizers = [torch.optim.SGD(one.parameters(), lr=RATE, foreach=False) for one in (model, alone)]
    batches = [prompts(0)] if mode == "tp" else [prompts(seed) for seed in range(RANKS)]
    for _ in range(STEPS):
        mine = batches[rank % len(batches)]
        model(mine, labels=mine, use_cache=False).loss.backward()
        et.reduce_replica_gradients(model)
        sum(alone(batch, labels=batch, use_cache=False).loss for batch in batches).div(len(batches)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = model.state_dict()
    off = [float((whole(state[name]) - value).abs().max()) for name, value in alone.state_dict().items()]
    gone = [float((before[name] - value).abs().max()) for name, value in alone.state_dict().items() if "expert" in name]
    return max(off), min(gone)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("slots", "checkpointing"), [(0, False), (12, False), (16, True)])
def test_weights_are_those_of_one_process(mode, slots, checkpointing):
    for off, gone in on_ranks(trained, mode, slots, checkpointing):
        assert off <= CLOSE
        assert gone > 20 * CLOSE  # the experts learned something
