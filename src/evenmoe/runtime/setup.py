"""What a layer of `ExpertParallel` is made of, checked once, and which slots its rule chooses.

Shapes: T tokens, K experts per token, E logical experts, F columns of the table, S slots, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from evenmoe.errors import ConstraintError, require
from evenmoe.ops.row_order import least_and_most
from evenmoe.rules import RULES
from evenmoe.rules.rule import Chooser, IntArray, Rule, prepared
from evenmoe.rules.table import check_table_of_slots
from evenmoe.transport.process_world import Group, transport_of
from evenmoe.transport.transport import Transport


@dataclass(frozen=True)
class LayerSetup:
    """One MoE layer on one group of ranks.

    Attributes:
        group: this rank's end of the group. rule: which replica a token uses.
        table: int32 (E, F), the EPLB table, a copy, since it is read at every step. num_slots: S.
        check_values: whether ids are looked at at every step.
        given_layer, layer: the number that was given, and the one that the layer has.
    """

    group: Transport
    rule: Rule
    table: torch.Tensor
    num_slots: int
    check_values: bool
    given_layer: int | None
    layer: int

    @property
    def numbers(self) -> tuple[int, int]:
        """E, and the number of the layer."""
        return self.table.shape[0], self.layer

    def chooser(self, rank: int) -> Chooser:
        """The rule as a rank of the group applies it."""
        return prepared(self.rule, self.table, self.num_slots, rank, self.group.world_size)

    def counted(self, topk_ids: torch.Tensor) -> torch.Tensor | None:
        """bool (T, K), where there is an expert to compute; None where that is known to be everywhere.

        Raises:
            ConstraintError: an id that is no expert's, unless values are not looked at.
        """
        if not self.check_values or not topk_ids.numel():
            return topk_ids >= 0
        if topk_ids.device.type == "cpu":
            low, high = least_and_most(topk_ids.numpy().reshape(-1))
        else:
            low, high = (int(one) for one in torch.aminmax(topk_ids))
        if low < -1 or high >= self.table.shape[0]:
            raise self._wrong_id(topk_ids)
        return topk_ids >= 0 if low < 0 else None

    def slots(
        self, choose: Chooser, topk_ids: torch.Tensor, counted: torch.Tensor | None, by_rank: IntArray | None
    ) -> torch.Tensor:
        """Integers (T, K), the slot of every assignment, S where `counted` is False."""
        if counted is None:
            return choose(topk_ids, None, by_rank)
        slots = choose(torch.where(counted, topk_ids, 0), counted, by_rank)
        return torch.where(counted, slots, self.num_slots)  # which `route` leaves here

    def _wrong_id(self, topk_ids: torch.Tensor) -> ConstraintError:
        num_experts = self.table.shape[0]
        token, k = ((topk_ids < -1) | (topk_ids >= num_experts)).nonzero()[0].tolist()
        return ConstraintError(
            "topk_ids",
            f"{int(topk_ids[token, k])} for token {token}, k {k}",
            f"must be a logical expert, 0 to {num_experts - 1}, or -1 for none",
            "route to the experts of the table",
        )


def set_up(
    group: Group,
    eplb_table: torch.Tensor,
    num_slots: int,
    rule: str | Rule,
    check_values: bool,
    layer: int | None,
    transport: str,
) -> LayerSetup:
    """Check what `ExpertParallel` is given.

    Raises:
        ConstraintError: a table, a number of slots or a rule that cannot work.
    """
    ep = transport_of(group, transport=transport)
    of_slots = RULES.get(rule)
    nearest = max(1, round(num_slots / ep.world_size)) * ep.world_size
    text, fix = f"must be a multiple of the {ep.world_size} ranks", f"use {nearest}, the nearest that is"
    require(num_slots >= 1 and num_slots % ep.world_size == 0, "num_slots", num_slots, text, fix)
    known = layer is None or (isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < 2**62)
    require(known, "layer", repr(layer), "must be a whole number from 0", "pass the layer's index")
    check_table_of_slots(eplb_table, num_slots)
    # A rule that does not work is an error before the layer has a number, which all ranks count.
    setup = LayerSetup(ep, of_slots, eplb_table.clone(), num_slots, check_values, layer, -1)
    setup.chooser(ep.rank)
    return replace(setup, layer=ep.next_layer() if layer is None else layer)
