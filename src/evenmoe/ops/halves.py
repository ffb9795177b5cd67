"""What the halves of dispatch and of combine have in common: how a teardown finds its setup (specification §14.3).

A setup makes its exchange in the background and returns. It writes a number into `comm_cmd_info`, where the chip has
its commands; the teardown reads it. Nothing else in there means anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch

from evenmoe.contract.half_calls import HalfCall
from evenmoe.errors import ConstraintError, EvenmoeError, LostRankError
from evenmoe.ops.exchange import active_tokens, stable_order
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.transport import Transport, find_transport

Half = HalfCall[torch.Tensor]
_ALIKE = "pass the same to setup and teardown"
_MARK = 0x45_4D_4F_45  # in front of the number, so that other memory is not taken for one


def group_of(call: Half, find: Callable[[str, str, int, int], Transport] = find_transport) -> Transport:
    """The transport behind the name of a call's group."""
    return find("group_ep", call.group_ep or "", call.ep_rank_id, call.ep_world_size)


@contextmanager
def told(ep: Transport, operator: str) -> Iterator[None]:
    """Inside, an error of a setup is told to the other ranks, in its turn, while it is raised here at once."""
    try:
        yield
    except Exception as error:
        failure = error

        def fail() -> None:
            with (
                suppress(EvenmoeError, LostRankError),
                suppress(type(failure)),
                together(GroupCall(ep, f"setup of {operator}")),
            ):
                raise failure

        ep.setups.tell(fail)
        raise


def numbered(number: int, length: int, device: torch.device) -> torch.Tensor:
    """`comm_cmd_info`, int32 (length,), of the setup of this number."""
    info = torch.zeros(length, dtype=torch.int32, device=device)
    info[:2] = torch.tensor([_MARK, number])
    return info


def number_in(comm_cmd_info: torch.Tensor) -> int:
    """The number that a setup wrote.

    Raises:
        ConstraintError: no setup wrote it.
    """
    mark, number = comm_cmd_info[:2].tolist()
    if mark != _MARK:
        rule, fix = "must be what the setup wrote, unchanged", "pass the comm_cmd_info of the setup"
        raise ConstraintError("comm_cmd_info", f"[{mark}, {number}, …]", rule, fix)
    return number


def attributes_of(call: Half) -> dict[str, object]:
    """What setup and teardown must have alike, besides their tensors."""
    names = (
        "ep_world_size",
        "ep_rank_id",
        "moe_expert_num",
        "shared_expert_num",
        "shared_expert_rank_num",
        "global_bs",
    )
    return {name: getattr(call, name) for name in names}


def finished(ep: Transport, operator: str, call: Half, about: Mapping[str, object]) -> object:
    """What the exchange of a teardown's setup gave; the setup is over then.

    Args:
        about: what the teardown was called with, to be compared with the same of its setup.

    Raises:
        ConstraintError: there is no such setup, or it was called with something else; then it stays.
        RankDisagreementError, LostRankError: what became of the exchange.
    """
    number = number_in(call.comm_cmd_info)  # pyright: ignore[reportAttributeAccessIssue]
    before, pending = ep.setups.find(operator, number)
    assert isinstance(before, Mapping)
    if call.check_values:
        _check_alike(about, before)
    ep.setups.drop(number)
    return pending.result()


def _check_alike(teardown: Mapping[str, object], setup: Mapping[str, object]) -> None:
    for name, value in teardown.items():
        before = setup[name]
        if isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor):
            if value.shape == before.shape and torch.equal(value, before):
                continue
            raise ConstraintError(name, "another tensor", "must be that of the setup", _ALIKE)
        if value != before:
            raise ConstraintError(name, value, f"must be {before}, as in the setup", _ALIKE)


def places(expert_ids: torch.Tensor, mask: torch.Tensor | None, num_experts: int) -> torch.Tensor:
    """int32 (Bs·K,): for each entry how many before it, row by row, ask for the same expert; 0 where none is sent.

    >>> places(torch.tensor([[0, 1], [1, 0], [1, 2]]), None, 3).tolist()
    [0, 0, 1, 1, 2, 0]
    """
    active = active_tokens(len(expert_ids), mask, expert_ids.device)[:, None].expand(expert_ids.shape).flatten()
    key = torch.where(active, expert_ids.flatten().long(), num_experts)
    order = stable_order(key, num_experts + 1)
    counts = torch.bincount(key, minlength=num_experts + 1)
    first = counts.cumsum(0) - counts
    found = torch.zeros(len(key), dtype=torch.int64, device=key.device)
    found[order] = torch.arange(len(key), device=key.device) - first[key[order]]
    return torch.where(active, found, 0).int()
