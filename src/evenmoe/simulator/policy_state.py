"""One policy on its way through the steps: the placement in use, and what has been found."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

from evenmoe.metrics import count_copies, peak_over_mean
from evenmoe.placement import Placement
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.costs import CostModel, route_copies
from evenmoe.simulator.policies import Policy
from evenmoe.simulator.policy_result import Details, PolicyResult, Traffic
from evenmoe.simulator.slot_choice import Scratch, StepLayers, StepResult, choose_by, num_padded_slots


class PolicyState:
    """A policy's placement and figures; `replay` moves it on."""

    def __init__(
        self,
        policy: Policy,
        cluster: Cluster,
        num_layers: int,
        num_experts: int,
        num_steps: int,
        *,
        copy_overlap: bool,
        tile: int = 1,
        details: bool = False,
    ) -> None:
        ranks = cluster.num_ranks
        self.policy, self.cluster = policy, cluster
        self._copy_overlap = copy_overlap
        self._coming: tuple[Placement, float] | None = None  # whose copies are under way, and their time left
        self._found = StepResult(num_layers, ranks, tile)
        self._copies = np.zeros((num_steps, num_layers), np.int64)
        self._copy_time, self._step_time = np.zeros((2, num_steps))
        self._par = np.zeros((num_steps, num_layers))
        self._rows = np.zeros((num_steps, 4))
        self._rank_tokens = np.zeros((num_layers, ranks), np.int64)
        self._judged_tokens = np.zeros((num_layers, ranks), np.int64)
        self._refreshes: list[int] = []
        self._details = None
        if details:
            loads = np.zeros((num_steps, num_layers, ranks), np.int64)
            self._details = Details(loads, np.zeros((num_steps, num_layers, 4)))
        self._has_planned = False
        self._initial = policy.first_placement(cluster, num_layers, num_experts)
        self._use(self._initial)

    def _use(self, placement: Placement) -> None:
        self.placement = placement
        self._choice = choose_by(self.policy.rule, placement, self.cluster)

    def begin_step(self, step: int) -> bool:
        """Use what has been copied; whether a plan is made now, which no policy does while copies are under way."""
        if self._coming is not None and self._coming[1] <= 0:
            self._use(self._coming[0])
            self._coming = None
        return self._coming is None and self.policy.is_due(step)

    def plan_key(self) -> Hashable:
        """Equal for policies whose next plans would be the same from the same steps."""
        anew = self.policy.starts_anew(self._has_planned)
        key = self.policy.plan_made_anew if anew else None
        return (id(self),) if key is None else key

    def plan(self, past: npt.NDArray[np.float64], seed: int) -> Placement:
        """The policy's next placement, from `past`, tokens (steps, L, E)."""
        previous = None if self.policy.starts_anew(self._has_planned) else self.placement
        return self.policy.plan(self.cluster, past, previous, seed)

    def replace(self, step: int, placement: Placement, costs: CostModel) -> None:
        """Use another placement from this step on. Before step 0 it becomes the first one, which costs nothing.

        The change from the default placement serves at once, since its copies are charged over the horizon. Those of
        later changes come before the step, or beside the steps, and then the placement serves once they are done.
        """
        self._has_planned = True
        if placement == self.placement:
            return
        if step == 0:
            self._initial = placement
        else:
            self._refreshes.append(step)
            self._copies[step] = count_copies(self.placement, placement)
            if not self.policy.sees_the_step:
                routed = route_copies(self.placement, placement, self.cluster.ranks_per_node)
                self._copy_time[step] = costs.copy_time(*routed)
                if self._copy_overlap and len(self._refreshes) > 1 and self._copy_time[step] > 0:
                    self._coming = placement, self._copy_time[step]
                    return
        self._use(placement)

    def new_scratch(self, top_k: int) -> Scratch:
        """`top_k` is 0 where only counts are known."""
        ranks = self.cluster.num_ranks
        return Scratch(
            np.zeros((num_padded_slots(self.placement), ranks), self.cluster.count_type),
            np.empty((ranks, self.cluster.tokens_per_rank, top_k), np.int32),
        )

    def run_layers(self, layers: StepLayers, scratch: Scratch) -> None:
        """Find what some layers of one step do under the placement in use."""
        self._choice.run(layers, scratch, self._found)

    def finish_step(self, step: int, costs: CostModel, *, judged: bool) -> None:
        """Enter what all layers of a step have found."""
        found = self._found
        way = 1 if costs.one_row_per_rank else 0
        self._par[step] = peak_over_mean(found.tokens.astype(np.float64))
        work = found.tokens, found.busy, found.padded, self.placement.rank_sizes
        self._step_time[step] = costs.layer_time(*work, found.sent[:, way], found.received[:, way]).sum()
        rows = found.sent.sum(axis=3).reshape(-1, 4)
        self._rows[step] = rows.sum(axis=0)
        self._rank_tokens += found.tokens
        if judged:
            self._judged_tokens += found.tokens
        if self._coming is not None:
            self._coming = self._coming[0], self._coming[1] - float(self._step_time[step])
        if self._details is not None:
            self._details.rank_loads[step], self._details.rows[step] = found.tokens, rows

    def result(self, baseline: PolicyState, costs: CostModel, judged: slice | None) -> PolicyResult:
        """Everything found; `baseline` is the default placement's state, `judged` None for all steps."""
        rows = np.rint(self._rows).astype(np.int64)
        placement = self.placement
        return PolicyResult(
            name=self.policy.name,
            description=self.policy.description,
            rule=self.policy.rule.name,
            par=self._par,
            rank_tokens=self._rank_tokens if judged is None else self._judged_tokens,
            copies=self._copies,
            refreshes=np.array(self._refreshes, np.int64),
            traffic=Traffic(*(np.ascontiguousarray(column) for column in rows.T)),
            step_time=self._step_time,
            copy_time=self._copy_time,
            initial=self._initial,
            final=placement,
            memory_per_rank=round(placement.num_layers * max(placement.rank_sizes) * costs.expert_bytes),
            break_even_steps=self._break_even(baseline, judged or slice(None)),
            details=self._details,
            own_of=self.policy.own_of,
        )

    def _break_even(self, baseline: PolicyState, judged: slice) -> float:
        """Mean time of a refresh's copies over the mean time that a judged step gains."""
        spent = self._copy_time.sum()
        if spent == 0:
            return 0.0
        gain = float((baseline._step_time[judged] - self._step_time[judged]).mean())
        return spent / len(self._refreshes) / gain if gain > 0 else np.inf
