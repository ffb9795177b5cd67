"""`Rule`: how the tokens of every rank choose among the replicas of their experts, and all that follows from it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from evenmoe.errors import ConstraintError
from evenmoe.metrics import FloatArray, as_load_of, slots_by_rank
from evenmoe.placement import Placement
from evenmoe.registry import blaming

if TYPE_CHECKING:
    import torch

IntArray = npt.NDArray[np.int64]
Mask: TypeAlias = "torch.Tensor | None"
Counts: TypeAlias = IntArray | None

#: What a plan can assume of a rule.
PLANNED_FOR = ("even", "rank", "batch")

_NUMBERED = ("balance_mode", "kernel")  # what is computed elsewhere by a number
_DERIVED = (*_NUMBERED, "prepare", "shares", "shares_evenly", "_slot_loads", "reachable")
_SAMPLE = 840  # tokens of a rank from which shares are measured: a multiple of every number of replicas up to 8


class Rule:
    """One rule; a subclass with a name, a description and `choose` is complete, and everything else follows from that.

    Operators, `ExpertParallel`, planner, simulator and command line find rules in `evenmoe.rules.RULES`.

    Attributes:
        name: what it is called wherever a rule can be given.
        description: one line of what it does.
        plan_for: the shares that a plan assumes: "even", "rank", or "batch" (the best split of every batch).
        shares_evenly: whether every replica gets an equal share, so that `lower_bound` bounds its plans.
        needs_counts: whether `choose` needs the assignments of all ranks, which then have to be exchanged before.
        balance_mode: its number in `update_expert`, or None; 0 and 1 are Ascend's, others have a name there alone.
        kernel: its number in the simulator's compiled kernels, or None: then the simulator calls `choose`.
        version: what ranks compare to know that theirs are the same rule; see `identity`. State one where the code of
            the class does not tell rules apart, such as those of one class that are made with different numbers.

    A subclass with a `choose` of its own inherits nothing that was derived from another's: shares are measured anew,
    unless it is derived from `EvenRule` and so promises that they are even.

    A rule by which every token takes the first replica:

    >>> class First(Rule):
    ...     name, description = "first", "Every token takes the first replica."
    ...     def choose(self, expert_ids, eplb_table, **_):
    ...         return eplb_table[expert_ids.long(), 1].to(expert_ids.dtype)
    >>> First().rank_loads([[6, 1, 3]], Placement([[0, 1, 0, 2]], num_ranks=2)).tolist()
    [[7.0, 3.0]]
    """

    name: ClassVar[str]
    description: ClassVar[str]
    plan_for: ClassVar[str] = "even"
    shares_evenly: ClassVar[bool] = False
    needs_counts: ClassVar[bool] = False
    balance_mode: ClassVar[int | None] = None
    kernel: ClassVar[int | None] = None
    version: str | None = None

    def __init_subclass__(cls) -> None:
        """Raise a ConstraintError for a class without a name, which a message would need first."""
        if not isinstance(getattr(cls, "name", None), str):
            value = f"{getattr(cls, 'name', 'missing')} in {cls.__name__}"
            raise ConstraintError("name", value, "must be what the rule is called, a str", "give the class one")
        if cls.plan_for not in PLANNED_FOR:
            value = f"{cls.plan_for!r} in {cls.__name__}"
            raise ConstraintError(
                "plan_for", value, f"must be one of {', '.join(PLANNED_FOR)}", "say what a plan is to assume"
            )
        own, promised = vars(cls), vars(cls.__base__).get("_promises", ())
        for name in _DERIVED if "choose" in own else _NUMBERED if "prepare" in own else ():
            if name not in own and name not in promised:
                setattr(cls, name, getattr(Rule, name))

    def blaming(self) -> AbstractContextManager[None]:
        """A block in which what fails is said to be this rule's, unless it is one of evenmoe's own."""
        return blaming("rule", self.name, own=type(self).__module__.startswith("evenmoe."))

    def identity(self) -> str:
        """What must be the same on all ranks beside the name: the class's name, and `version`, or else its code.

        The code of a class is its compiled methods and constants, and those of the classes that it is derived from; not
        functions that they call, nor what its objects are made with. Python versions compile differently.
        """
        cls = type(self)
        return f"{cls.__qualname__}\n{_code_of(cls) if self.version is None else self.version}"

    def choose(
        self,
        expert_ids: torch.Tensor,
        eplb_table: torch.Tensor,
        *,
        rank: int,
        world_size: int,
        counted: Mask = None,
        counts_by_rank: Counts = None,
    ) -> torch.Tensor:
        """The slot that each of a rank's token-expert assignments goes to.

        Args:
            expert_ids: int32 or int64 (T, K), logical experts 0…E-1.
            eplb_table: int32 (E, F), row e = [count, slot ids…, don't care].
            rank, world_size: the calling rank, and W.
            counted: bool (T, K), or None for all. Assignments that are False (padding, pruned) are not computed; they
                still need a slot of their expert.
            counts_by_rank: int64 (W, E), counted assignments of every rank, if the rule needs them.

        Returns:
            Slot ids, (T, K) of the dtype of `expert_ids`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `choose`")

    def prepare(self, eplb_table: torch.Tensor, num_slots: int, rank: int, world_size: int) -> Chooser:
        """Make a checked table, which must not change any more, ready for one rank."""
        return Chooser(self, eplb_table, rank, world_size)

    def shares(self, placement: Placement) -> FloatArray | None:
        """The share of its expert's tokens that each slot gets, float64 (L, S); None where it depends on the load.

        The source ranks hold equally many tokens of every expert. Unless a rule says what the shares are, they are
        measured: each rank chooses for 840 tokens, every one of which goes to every expert that has replicas.
        """
        import torch

        shares = np.ones(placement.slot_to_expert.shape)
        for layer, (counts, slots) in enumerate(zip(placement.num_replicas, shares, strict=True)):
            replicated = np.flatnonzero(counts > 1)
            if not replicated.size:
                continue
            experts = torch.from_numpy(replicated).expand(_SAMPLE, -1)
            by_rank = np.zeros((placement.num_ranks, placement.num_experts), np.int64)
            by_rank[:, replicated] = _SAMPLE
            table = placement.eplb_table(layer)
            taken = np.zeros(placement.num_slots, np.int64)
            for rank in range(placement.num_ranks):
                chooser = prepared(self, table, placement.num_slots, rank, placement.num_ranks)
                chosen = chooser(experts, torch.ones_like(experts, dtype=torch.bool), by_rank)
                taken += np.bincount(chosen.numpy().reshape(-1), minlength=placement.num_slots)
            shared = counts[placement.slot_to_expert[layer]] > 1
            slots[shared] = taken[shared] / (placement.num_ranks * _SAMPLE)
        return shares

    def slot_loads(self, load: npt.ArrayLike, placement: Placement) -> FloatArray:
        """Tokens that each slot gets: load (L, E) or (T, L, E) -> float64 (L, S) or (T, L, S).

        Raises:
            ConstraintError: a load of another model, or no load.

        >>> from evenmoe.rules import RULES
        >>> placement = Placement([[0, 1, 0, 2]], num_ranks=2)
        >>> [RULES.get(name).slot_loads([[6, 1, 3]], placement).tolist() for name in ("even", "batch")]
        [[[3.0, 1.0, 3.0, 3.0]], [[4.0, 1.0, 2.0, 3.0]]]
        """
        return self._slot_loads(as_load_of(load, placement), placement)

    def _slot_loads(self, tokens: FloatArray, placement: Placement) -> FloatArray:
        with self.blaming():
            shares = self.shares(placement)
        expected = placement.slot_to_expert.shape
        is_array = isinstance(shares, np.ndarray)
        if not is_array or shares.shape != expected or shares.dtype.kind not in "iuf":
            what = f"an array of {shares.dtype}, shape {shares.shape}" if is_array else f"a {type(shares).__name__}"
            raise ConstraintError(
                f"shares of the rule {self.name}",
                what,
                f"must be numbers of shape {expected}, one per layer and slot",
                "return such an array, or give the rule slot loads of its own",
            )
        index = np.broadcast_to(placement.slot_to_expert, (*tokens.shape[:-1], placement.num_slots))
        return np.take_along_axis(tokens, index, axis=-1) * shares

    def rank_loads(self, load: npt.ArrayLike, placement: Placement) -> FloatArray:
        """Tokens that each rank computes: load (L, E) or (T, L, E) -> float64 (L, G) or (T, L, G).

        The load of a layer must be far from the ends of float64 (`metrics.within_range`).
        """
        with self.blaming():
            per_slot = self.slot_loads(load, placement)
        return slots_by_rank(per_slot, placement.rank_sizes)

    def reachable(self, num_replicas: npt.ArrayLike, world_size: int) -> IntArray:
        """How many of an expert's replicas some rank can choose, integers of the shape of `num_replicas`."""
        return np.asarray(num_replicas, np.int64)


def prepared(rule: Rule, eplb_table: torch.Tensor, num_slots: int, rank: int, world_size: int) -> Chooser:
    """What `rule.prepare` returns.

    Raises:
        ConstraintError: it returned no `Chooser`, or failed, which is said to be the rule's.
    """
    with rule.blaming():
        chooser = rule.prepare(eplb_table, num_slots, rank, world_size)
    if not isinstance(chooser, Chooser):
        what = f"a {type(chooser).__name__}"
        raise ConstraintError(
            f"what the rule {rule.name} prepared", what, "must be a Chooser", "return one, or leave `prepare` out"
        )
    return chooser


class Chooser:
    """A rule made ready for one table and one rank.

    Attributes:
        finds_wrong_ids: whether a call on the CPU raises for an id without a row in the table.
    """

    finds_wrong_ids: ClassVar[bool] = False

    def __init__(self, rule: Rule, eplb_table: torch.Tensor, rank: int, world_size: int) -> None:
        self._rule, self._table, self._rank, self._world_size = rule, eplb_table, rank, world_size

    def __call__(self, expert_ids: torch.Tensor, counted: Mask = None, counts_by_rank: Counts = None) -> torch.Tensor:
        """Slots of a batch's assignments; the arguments are those of `Rule.choose`, which gets copies of them.

        Raises:
            ConstraintError: the rule failed, or chose what is no replica of the expert, whose weights it would have
                replaced.
        """
        with self._rule.blaming():
            slots = self._rule.choose(
                expert_ids.clone(),  # copies, which a user's rule may write to
                self._table.clone(),
                rank=self._rank,
                world_size=self._world_size,
                counted=None if counted is None else counted.clone(),
                counts_by_rank=None if counts_by_rank is None else counts_by_rank.copy(),
            )
        self._check(expert_ids, slots)
        return slots

    def slot_counts(self, counts_by_rank: IntArray) -> IntArray | None:
        """Assignments that every rank sends to every slot, int64 (W, S), if they follow from the counts alone."""
        return None

    def _check(self, expert_ids: torch.Tensor, slots: torch.Tensor) -> None:
        """A user's rule may be wrong; that must not become another expert's weights."""
        if getattr(slots, "shape", None) != expert_ids.shape or slots.dtype != expert_ids.dtype:
            what = f"{slots.dtype} of shape {tuple(slots.shape)}" if hasattr(slots, "dtype") else type(slots).__name__
            raise ConstraintError(
                f"what the rule {self._rule.name} chose",
                what,
                f"must be {expert_ids.dtype} of shape {tuple(expert_ids.shape)}, like expert_ids",
                "return one slot for each assignment",
            )
        rows = self._table[expert_ids.long()]
        replicas = rows[..., 1:]
        number = 1 + slots.new_tensor(range(replicas.shape[-1]))
        found = ((replicas == slots[..., None]) & (number <= rows[..., :1])).any(-1)
        if not found.all():
            token, k = (~found).nonzero()[0].tolist()
            raise ConstraintError(
                f"what the rule {self._rule.name} chose",
                f"slot {int(slots[token, k])} for expert {int(expert_ids[token, k])} (token {token}, k {k})",
                "must be one of the expert's replicas",
                "choose among the slots that its row of eplb_table counts",
            )


@cache
def _code_of(cls: type[Rule]) -> str:
    # Not the text: to find that of a class Python parses its file, which fails in several threads at once (3.11), and
    # there is none of what was typed into a console.
    classes = cls.__mro__[: cls.__mro__.index(Rule)]
    return "\n".join(
        f"{name} {_compiled(value)}"
        for each in classes
        for name, value in sorted(vars(each).items())
        if not name.startswith("__")
    )


def _compiled(value: object) -> str:
    """A function, or a constant of one; what else there is may differ between processes, and counts as nothing."""
    value = getattr(value, "__func__", getattr(value, "fget", value))  # of methods and properties
    if isinstance(value, FunctionType):
        return _compiled(value.__code__)
    if isinstance(value, CodeType):
        return f"{value.co_code.hex()} {value.co_names} {_compiled(value.co_consts)}"
    if isinstance(value, frozenset):  # in no order
        return str(sorted(map(_compiled, value)))
    if isinstance(value, tuple):
        return str([_compiled(each) for each in value])
    return repr(value) if value is None or isinstance(value, str | bytes | int | float | complex) else ""


class EvenRule(Rule):
    """Every replica gets an equal share: what a plan assumes, and the frame of rules that come to it."""

    _promises = ("shares", "shares_evenly")  # by who derives a rule from it, whatever that chooses

    name = "even"
    description = "Equal shares for all replicas; for plans and simulations, since no rank alone can choose so."
    shares_evenly = True
    kernel = 4

    def prepare(self, eplb_table: torch.Tensor, num_slots: int, rank: int, world_size: int) -> Chooser:
        """Raise, as no rank can choose by this rule.

        Raises:
            ConstraintError: always.
        """
        raise ConstraintError(
            "rule",
            repr(self.name),
            "must be one by which a rank can choose, and this one only states what a plan assumes",
            "use the occurrence rule, whose shares are even",
        )

    def shares(self, placement: Placement) -> FloatArray:
        """Float64 (L, S), 1 over the number of the expert's replicas."""
        return 1.0 / np.take_along_axis(placement.num_replicas, placement.slot_to_expert, axis=1)


RULE = EvenRule()
