"""Gradients of replicas, added up: what training with replicas needs so that it equals training without them.

Each expert's slots send their gradients to one of them, the owner, which adds them up by slot and sends the sum back.
So all replicas get the same bits, and a row for every slot but the owner's goes each way.

Shapes: E experts, L slots of this rank, W ranks, P elements of a parameter of one slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from evenmoe.errors import ConstraintError, UnsupportedTypeError
from evenmoe.ops.weighted_sum import sum_dtype
from evenmoe.transport.agreement import LAYER, Header, digest, dtype_code
from evenmoe.transport.call import GroupCall, together
from evenmoe.transport.packets import Outgoing
from evenmoe.transport.transport import Transport

OPERATOR = "ExpertParallel.reduce_replica_gradients"
ROWS = f"rows of {OPERATOR}"
#: A parameter of all slots of a rank: stacked (L, …), or one tensor for each slot.
OfSlots: TypeAlias = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True)
class Replicas:
    """Which of a rank's slots have replicas, and which slot adds up for each of them.

    Attributes:
        owner_of: {slot: its expert's owner}, ascending, of all slots whose expert has more than one.
        layer, rank, per_rank: the layer's number, this rank, and L.
    """

    owner_of: dict[int, int]
    layer: int
    rank: int
    per_rank: int

    def rank_of(self, slot: int) -> int:
        return slot // self.per_rank


def find_replicas(eplb_table: torch.Tensor, layer: int, rank: int, per_rank: int) -> Replicas:
    """The replicas of a table, int32 (E, F), row e = [count, slot ids …]."""
    owner_of = {}
    for expert, (count, *slots) in enumerate(eplb_table.tolist()):
        if count > 1:
            replicas = sorted(slots[:count])
            owner = replicas[expert % count]  # not always the first, so that owners are spread over the ranks
            owner_of |= dict.fromkeys(replicas, owner)
    return Replicas(dict(sorted(owner_of.items())), layer, rank, per_rank)


class _Parameter:
    """A parameter of all slots of a rank, one row for each of them.

    Attributes: shape, dtype, device of one slot's part, and `size`, its elements.
    """

    def __init__(self, given: OfSlots) -> None:
        self._given = given
        self._of_slots = list(given.detach()) if isinstance(given, torch.Tensor) else list(given)
        first = self._of_slots[0]
        self.shape, self.dtype, self.device, self.size = first.shape, first.dtype, first.device, first.numel()

    def gradient(self, slot: int) -> torch.Tensor | None:
        """(P,), or None where there is none; it may share memory with the gradient itself."""
        owner = self._given if isinstance(self._given, torch.Tensor) else self._of_slots[slot]
        if owner.grad is None:
            return None
        return (owner.grad[slot] if owner is self._given else owner.grad).detach().reshape(-1)

    def replace(self, slot: int, gradient: torch.Tensor) -> None:
        """Make `gradient`, (P,), that of a slot."""
        given = self._given
        if not isinstance(given, torch.Tensor):
            self._of_slots[slot].grad = gradient.view(self.shape).clone()
            return
        if given.grad is None:
            given.grad = torch.zeros_like(given)
        given.grad[slot] = gradient.view(self.shape)


def reduce_gradients(group: Transport, replicas: Replicas, parameters: Iterable[OfSlots]) -> None:
    """Replace the gradients of replicas by their sums; a collective of the group.

    Args:
        parameters: as in `ExpertParallel.reduce_replica_gradients`.
    """
    with torch.no_grad():
        with together(GroupCall(group, OPERATOR)):
            given = _checked(parameters, replicas.per_rank)
        present = _agree(group, replicas, given)
        for parameter, slots in zip(given, present, strict=True):
            # An expert that no token has used has no gradient anywhere, and keeps none.
            used = {owner for slot, owner in replicas.owner_of.items() if slots[slot]}
            taking_part = {slot: owner for slot, owner in replicas.owner_of.items() if owner in used}
            if taking_part:
                _reduce(group, replicas, taking_part, parameter)


def _checked(parameters: Iterable[OfSlots], per_rank: int) -> list[_Parameter]:
    given = []
    fix = "pass stacked parameters, or zip(*(expert.parameters() for expert in experts))"
    for number, one in enumerate(parameters):
        name = f"parameters[{number}]"
        slots = [one] if isinstance(one, torch.Tensor) else list(one)
        for tensor in slots:
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                what = tensor.dtype if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
                raise UnsupportedTypeError(name, what, "must be of tensors of a float dtype", fix)
        held = _length(one) if isinstance(one, torch.Tensor) else len(slots)
        if held != per_rank:
            value, rule = f"of {held} slots", f"must be of the {per_rank} slots of this rank"
            raise ConstraintError(name, value, rule, fix)
        kinds = {(tensor.dtype, tensor.shape, tensor.device) for tensor in slots}
        if len(kinds) > 1:
            rule = "must be of tensors of one shape, dtype and device"
            raise ConstraintError(name, f"of {len(kinds)} kinds of tensors", rule, fix)
        given.append(_Parameter(one if isinstance(one, torch.Tensor) else slots))
    return given


def _length(tensor: torch.Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0


def _agree(group: Transport, replicas: Replicas, given: list[_Parameter]) -> list[list[int]]:
    """For every parameter, which slots of all ranks have a gradient."""
    kinds = (number for one in given for number in (dtype_code(one.dtype), len(one.shape), *one.shape))
    sizes = {
        LAYER: replicas.layer,
        "number of parameters": len(given),
        "digest of the parameters' shapes and dtypes": digest(kinds),
    }
    mine = [int(one.gradient(slot) is not None) for one in given for slot in range(replicas.per_rank)]
    call = GroupCall(group, OPERATOR, torch.empty(0, device=given[0].device) if given else None)
    with together(call):
        told = call.agree(Header(OPERATOR, sizes), torch.tensor(mine, dtype=torch.int64).expand(group.world_size, -1))
    return told.view(group.world_size, len(given), replicas.per_rank).transpose(0, 1).flatten(1).tolist()


def _reduce(group: Transport, replicas: Replicas, owner_of: dict[int, int], parameter: _Parameter) -> None:
    """There, summed up by slot in `sum_dtype` and rounded once, and back."""
    first, rank_of = replicas.rank * replicas.per_rank, replicas.rank_of
    mine = [slot for slot in owner_of if rank_of(slot) == replicas.rank]
    nothing = torch.zeros(parameter.size, dtype=parameter.dtype, device=parameter.device)

    def rows_of(slots: list[int], found: dict[int, torch.Tensor]) -> torch.Tensor:
        return torch.stack([found[slot] for slot in slots]) if slots else nothing[None][:0]

    gradients = {slot: parameter.gradient(slot - first) for slot in mine}
    gradients = {slot: nothing if gradient is None else gradient for slot, gradient in gradients.items()}
    mine.sort(key=lambda slot: rank_of(owner_of[slot]))  # as they travel; those for one rank stay ascending
    owned = [slot for slot, owner in owner_of.items() if rank_of(owner) == replicas.rank]
    received = _exchange(group, replicas, rows_of(mine, gradients), [rank_of(owner_of[s]) for s in mine])
    sums: dict[int, torch.Tensor] = {}
    for slot, row in zip(owned, received, strict=True):  # by source rank, hence by slot
        row = row.to(sum_dtype(parameter.dtype))
        sums[owner_of[slot]] = sums[owner_of[slot]] + row if owner_of[slot] in sums else row
    rounded = {slot: sums[owner_of[slot]].to(parameter.dtype) for slot in owned}
    # Back in the order in which they came, so that this rank's slots return in the order in which it sent them.
    returned = _exchange(group, replicas, rows_of(owned, rounded), [rank_of(slot) for slot in owned])
    for slot, row in zip(mine, returned, strict=True):
        parameter.replace(slot - first, row)


def _exchange(group: Transport, replicas: Replicas, rows: torch.Tensor, destination: list[int]) -> torch.Tensor:
    """Send row i to rank destination[i], which ascends; what comes, by source rank."""
    counts = [0] * group.world_size
    for rank in destination:
        counts[rank] += 1
    call = GroupCall(group, ROWS, rows)
    with together(call):
        outgoing = Outgoing([0] * group.world_size, counts, tuple(rows.shape[1:]), rows)
        nothing = torch.zeros((group.world_size, 0), dtype=torch.int64)
        _, incoming = call.send(Header(ROWS, {LAYER: replicas.layer}), nothing, outgoing, rows)
        return incoming.take()
