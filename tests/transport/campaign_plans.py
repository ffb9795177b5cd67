"""Random worlds, steps and episodes of the fault campaign, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from tests.transport.campaign_batches import LAYERS, Batch
from tests.transport.campaign_episodes import Episode, Order, Step
from tests.transport.campaign_faults import DEADLY, ORDINARY, WRONG_ARGUMENTS, wrong_arguments

ALONE: Order = (("dispatch", 0), ("combine", 0))
IN_FLIGHT: tuple[Order, ...] = (
    (("dispatch", 0), ("dispatch", 1), ("combine", 0), ("combine", 1)),
    (("dispatch", 0), ("dispatch", 1), ("combine", 1), ("combine", 0)),
)


@dataclass(frozen=True)
class Plan:
    """One world and its episodes; `kind` and `number` say which it is, for a repetition.

    Attributes: `harm`, what the parent does to processes in a "free" episode: "kill", "interrupt", "stop" or "";
    `transport`, by which processes exchange.
    """

    kind: str
    number: int
    size: int
    tp_size: int
    threads: bool
    store: str
    episodes: tuple[Episode, ...]
    harm: str = ""
    also_killed: int = -1
    transport: str = "process_group"

    def __str__(self) -> str:
        ranks = "threads" if self.threads else f"processes, {self.store} store, {self.transport}"
        return f"{self.kind}:{self.number} ({self.size} {ranks}, tp_size {self.tp_size})"


class Maker:
    """Makes steps for a world of `size` ranks."""

    def __init__(self, random: Random, size: int, tp_size: int) -> None:
        self.random, self.size, self.tp_size = random, size, tp_size

    def layer(self, layer: int, **changes: object) -> Batch:
        top_k = self.random.randint(1, min(4, self.size + 1))
        batch = Batch(self._seed(), "layer", layer, self._tokens(), self._hidden(1), top_k)
        return replace(batch, hot=self.random.random() < 0.2, **changes)

    def chain(self, **changes: object) -> Batch:
        ep_size = self.size // self.tp_size
        experts = ep_size if self.tp_size == 2 else 2 * ep_size
        comm_quant_mode = 0 if self.tp_size == 2 else self.random.choice([0, 2])
        batch = Batch(
            self._seed(),
            self.random.choice(["chain", "norm"]),
            0,
            self._tokens(),
            self._hidden(3),
            self.random.randint(1, min(4, experts)),
            self.random.choice([0, 2]),
            comm_quant_mode,
            self.random.random() < 0.2,
        )
        return replace(batch, **changes)

    def any_batch(self, layers: int = len(LAYERS)) -> Batch:
        if self.tp_size == 2 or self.random.random() < 0.4:
            return self.chain()
        return self.layer(self.random.randrange(layers))

    def step(self, layers: int = len(LAYERS)) -> Step:
        """One batch, or two in flight, of the first `layers` layers."""
        if self.random.random() < 0.3:
            return Step((self.any_batch(layers), self.any_batch(layers)), self.random.choice(IN_FLIGHT))
        return Step((self.any_batch(layers),), ALONE)

    def layer_pass(self) -> Step:
        """Four layers, one after the other, two of which have equal tables."""
        layers = [*self.random.sample(range(4), 2), 4, 5]
        self.random.shuffle(layers)
        shape = self.layer(0)  # one shape for all, as in a model: sizes alone must not tell the layers apart
        batches = tuple(replace(shape, layer=layer, seed=self._seed()) for layer in layers)
        return Step(batches, tuple((verb, i) for i in range(4) for verb in ("dispatch", "combine")))

    def after(self, step: Step, kind: str = "") -> tuple[Step, Step]:
        """Two steps, the first of which begins with a call that no rank makes in `step`, so that nobody mistakes it.

        Often its shapes are those of `step`, as a model's next layer has them: rows that are late would fit.
        """
        layers = {batch.layer for batch in step.batches if batch.kind == "layer"}
        alike = self.random.random() < 0.6
        if self.tp_size == 2:
            used = [batch.hidden for batch in step.batches]
            first = replace(self.chain(), hidden=next(hidden for hidden in (5, 12, 26) if hidden not in used))
        elif len(layers) < len(step.batches) and layers:  # both kinds
            first = self.layer(self._layer_other_than(layers))
        elif layers:
            other = replace(step.batches[-1], layer=self._layer_other_than(layers), seed=self._seed())
            first = other if alike else self.chain()
        elif len(step.batches) == 1 and kind != "line":
            # An exception in the first line of a call is before all that it could tell the others, and then they would
            # take the next dispatch of equal sizes for this one; so not after "line".
            first = replace(step.batches[0], seed=self._seed()) if alike else self.layer(self._layer_other_than(layers))
        else:
            first = self.layer(self._layer_other_than(layers))
        return Step((first,), ALONE), self.step()

    def _layer_other_than(self, layers: set[int]) -> int:
        return self.random.choice([layer for layer in range(len(LAYERS)) if layer not in layers])

    def _seed(self) -> int:
        return self.random.randrange(2**40)

    def _tokens(self) -> tuple[int, ...]:
        way = self.random.random()
        if way < 0.3:
            return (self.random.choice([1, 3, 8]),) * self.size
        if way < 0.4:
            lonely = self.random.randrange(self.size)
            return tuple(5 * (rank == lonely) for rank in range(self.size))
        if way < 0.5:
            return (self.random.randint(64, 160),) * self.size
        return tuple(self.random.randint(0, 6) for _ in range(self.size))

    def _hidden(self, least: int) -> int:
        return self.random.choice([hidden for hidden in (1, 3, 7, 16, 33, 64) if hidden >= least])


def make_plan(kind: str, number: int, seed: int, episodes: int, count: int, sizes: Sequence[int]) -> Plan:
    """World `number` of a kind of fault.

    Args:
        kind: a key of `KINDS`, with "local-" in front for ranks that are threads, "shared-" for processes that share
            memory.
        episodes: in this world, of the `count` of this kind in all.
        sizes: of worlds, to choose from.
    """
    random = Random(f"{seed} {kind} {number}")
    threads = kind.startswith("local-")
    fault = kind.removeprefix("local-").removeprefix("shared-")
    transport = "shared_memory" if kind.startswith("shared-") else "process_group"
    size = random.choice(sizes)
    tp_size = 2 if size % 2 == 0 and fault in ("exception", "argument", "kill") and random.random() < 0.2 else 1
    maker = Maker(random, size, tp_size)
    made = tuple(
        KINDS[fault](maker, number * episodes + position, count, random.randrange(size)) for position in range(episodes)
    )
    harm = fault if fault in ("kill", "interrupt", "stop") else ""
    also = -1
    if fault == "kill" and size > 3 and random.random() < 0.1:
        also = random.choice([rank for rank in range(size) if rank != made[0].guilty])
    store = random.choice(["file", "tcp"])
    return Plan(kind, number, size, tp_size, threads, store, made, harm, also, transport)


def _exception(maker: Maker, number: int, count: int, guilty: int) -> Episode:
    random = maker.random
    step = maker.step()
    call, kind = random.randrange(len(step.order)), random.choice(["operation", "operation", "line", "exchange"])
    # Every point of a call has its turn: the numbers of the episodes divide the call evenly.
    fraction = ((number * 7919) % count + random.random()) / count
    if maker.tp_size == 2:
        # A rank that fails after its last exchange leaves its two groups in different calls, which one more call cannot
        # mend; so not there, unless no call of the step is left.
        step = Step((maker.chain(),), ALONE)
        call = random.randrange(2)
        kind = "exchange" if call == 0 else random.choice(["exchange", "operation"])
        fraction *= 0.85 if call == 0 else 1.0
    return Episode(
        number,
        kind,
        guilty,
        (_rehearsal(step),),
        step,
        maker.after(step, kind),
        call,
        fraction,
        random.choice(ORDINARY),
    )


def _last_exception(maker: Maker, number: int, count: int, guilty: int) -> Episode:
    """KeyboardInterrupt or SystemExit, after which the group is closed."""
    episode = _exception(maker, number, count, guilty)
    return replace(episode, what=maker.random.choice(DEADLY), deadly=True)


def _argument(maker: Maker, number: int, count: int, guilty: int) -> Episode:
    random = maker.random
    step = Step((maker.chain(),), ALONE) if maker.tp_size == 2 else maker.step()
    # Wrong arguments need a token to be wrong for.
    batches = tuple(replace(b, tokens=tuple(max(1, tokens) for tokens in b.tokens)) for b in step.batches)
    step = replace(step, batches=batches)
    position = random.randrange(len(batches))
    possible = wrong_arguments(batches[position].kind)
    what = possible[number % len(possible)]
    call = step.order.index((WRONG_ARGUMENTS[what][0], position))
    return Episode(number, "argument", guilty, (_rehearsal(step),), step, maker.after(step), call, what=what)


def _order(maker: Maker, number: int, count: int, guilty: int) -> Episode:
    """A rank that skips, repeats or reorders calls.

    Without layers nothing tells two dispatches of equal sizes apart, so there only combines are moved or left out.
    """
    random = maker.random
    way = random.choice(["pass", "layers", "one layer", "operators"])
    if way == "pass":
        step = maker.layer_pass()
    elif way == "operators":
        first = maker.chain()
        step = Step((first, replace(first, seed=first.seed + 1)), random.choice(IN_FLIGHT))
    else:
        first = maker.layer(random.randrange(4))
        second = replace(first, seed=first.seed + 1)
        if way == "layers":
            first, second = replace(first, layer=4), replace(second, layer=random.choice([0, 5]))
        step = Step((first, second), random.choice(IN_FLIGHT))
    order, batches = list(step.order), range(len(step.batches))
    kind = ("skip", "repeat", "reorder")[number % 3]
    if kind == "repeat":
        # Two dispatches in a row are one call more only where their layers differ.
        call = random.randrange(len(order)) if way in ("pass", "layers") else random.randrange(1, len(order))
        guilty_order, what = [*order[: call + 1], *order[call:]], f"calls {order[call]} once more"
    elif kind == "skip":
        whole = way in ("pass", "layers") and random.random() < 0.6
        left_out = random.choice(batches)
        skipped = {("combine", left_out), *([("dispatch", left_out)] if whole else [])}
        guilty_order, what = [call for call in order if call not in skipped], f"skips {sorted(skipped)}"
    elif way == "pass":
        one, other = sorted(random.sample(batches, 2))
        swapped = {one: other, other: one}
        guilty_order = [(verb, swapped.get(batch, batch)) for verb, batch in order]
        what = f"exchanges layers {one} and {other}"
    else:
        verb = random.choice(["dispatch", "combine"]) if way == "layers" else "combine"
        guilty_order = [(v, 1 - batch if v == verb else batch) for v, batch in order]
        what = f"calls {verb} in another order"
    return Episode(
        number,
        kind,
        guilty,
        (_rehearsal(step),),
        step,
        maker.after(step),
        what=f"{way}: {what}",
        guilty_order=tuple(guilty_order),
    )


def _free(maker: Maker, number: int, count: int, guilty: int) -> Episode:
    steps = tuple(maker.step(len(LAYERS) - 1) for _ in range(6))
    # The last layer is kept for afterwards, so that nobody takes its call for one of the steps.
    after = Step((maker.chain() if maker.tp_size == 2 else maker.layer(len(LAYERS) - 1),), ALONE)
    return Episode(number, "free", guilty, steps, steps[0], (after, maker.step()), deadly=True)


def _rehearsal(step: Step) -> Step:
    return step.with_seed(step.batches[0].seed + 10)


KINDS = {
    "exception": _exception,
    "last-exception": _last_exception,
    "argument": _argument,
    "order": _order,
    "kill": _free,
    "interrupt": _free,
    "stop": _free,
}
