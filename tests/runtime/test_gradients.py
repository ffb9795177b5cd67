"""Gradients of `ExpertParallel` on random layers against plain loops, by finite differences, and on ranks unlike."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenmoe as em
from evenmoe.errors import ConstraintError, LostRankError, RankDisagreementError
from evenmoe.runtime import gradients
from evenmoe.transport.world import LocalTransport, Rank
from tests.mutations import fails, mutated
from tests.processes import TRANSPORTS
from tests.runtime.layers import FLOATS, RULES, Layer, Spec, expert_of, specs
from tests.worlds import assert_same_bits

Gradients = dict[str, torch.Tensor | None]


def values(seed: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def gradient_of_row(source: int, token: int, k: int, spec: Spec) -> torch.Tensor:
    return values((spec.seed, 1, source, token, k), (spec.hidden,), FLOATS[spec.x_dtype])


def gradient_of_y(layer: Layer, rank: int) -> torch.Tensor:
    shape = (len(layer.x[rank]), layer.spec.out_hidden)
    return values((layer.spec.seed, 2, rank), shape, FLOATS[layer.spec.out_dtype])


def leaf(tensor: torch.Tensor, needed: bool) -> torch.Tensor:
    return tensor.clone().requires_grad_(needed)


def backward_in_process(rank: Rank, spec: Spec, rule: str, needed: list[list[bool]]) -> tuple:
    return backward_of_one(rank, Layer(spec), rule, needed)


def backward_of_one(rank: Rank, layer: Layer, rule: str, needed: list[list[bool]]) -> tuple:
    """Gradients of x, of the weights and of the experts' outputs, which are leaves here; and whose rows they are."""
    spec, i = layer.spec, rank.index
    ep = em.ExpertParallel(rank.ep, layer.table, num_slots=layer.placement.num_slots, rule=rule)
    x, weights = leaf(layer.x[i], needed[i][0]), leaf(layer.weights[i], needed[i][1])
    rows = ep.dispatch(x, layer.ids[i], weights)
    slots = torch.arange(spec.per_rank).repeat_interleave(rows.num_tokens_per_expert) + i * spec.per_rank
    experts = layer.placement.slot_to_expert[0][slots.numpy()].tolist()
    out = [expert_of(expert, row, spec) for expert, row in zip(experts, rows.rows.detach(), strict=True)]
    shape = (len(out), spec.out_hidden)
    out = leaf(torch.stack(out) if out else torch.zeros(shape, dtype=FLOATS[spec.out_dtype]), needed[i][2])
    y = ep.combine(rows, out)
    served = list(zip(rows.source_rank.tolist(), rows.source_token.tolist(), rows.source_k.tolist(), strict=True))
    given = [gradient_of_row(*one, spec) for one in served]
    given = torch.stack(given) if given else torch.zeros((0, spec.hidden), dtype=x.dtype)
    recorded = [(y, gradient_of_y(layer, i)), (rows.rows, given)]
    recorded = [(tensor, grad) for tensor, grad in recorded if tensor.requires_grad]
    if recorded:
        torch.autograd.backward(*zip(*recorded, strict=True))
    return {"x": x.grad, "weights": weights.grad, "out": out.grad}, served, out.detach()


def folded(numbers: torch.Tensor) -> torch.Tensor:
    """The sum whose upper half is added to the lower half until one number is left."""
    parts = list(numbers)
    while len(parts) & (len(parts) - 1):
        parts.append(numbers.new_zeros(()))
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [one + other for one, other in zip(parts[:half], parts[half:], strict=True)]
    return parts[0]


def expected(layer: Layer, results: list[tuple]) -> list[Gradients]:
    """By loops over tokens, what all gradients are where they are needed."""
    spec = layer.spec
    x_dtype, out_dtype, weight_dtype = FLOATS[spec.x_dtype], FLOATS[spec.out_dtype], FLOATS[spec.weight_dtype]
    outputs = {served: out for _, of_rank, outs in results for served, out in zip(of_rank, outs, strict=True)}
    exact = {True: torch.float64, False: torch.float32}
    found: list[Gradients] = []
    for rank, ids in enumerate(layer.ids):
        of_x, of_weights = torch.zeros_like(layer.x[rank]), torch.zeros_like(layer.weights[rank])
        grads = gradient_of_y(layer, rank)
        for token in range(len(ids)):
            total = torch.zeros(spec.hidden, dtype=exact[x_dtype == torch.float64])
            for k in range(spec.top_k):
                if ids[token, k] < 0:
                    continue
                total = total + gradient_of_row(rank, token, k, spec).to(total.dtype)
                wide = exact[out_dtype == torch.float64]
                dot = folded(grads[token].to(wide) * outputs[rank, token, k].to(wide))
                of_weights[token, k] = dot.to(exact[weight_dtype == torch.float64]).to(weight_dtype)
            of_x[token] = total.to(x_dtype)
        found.append({"x": of_x, "weights": of_weights})
    for rank, (_, served, out) in enumerate(results):
        of_out = torch.zeros_like(out)
        wide = exact[out_dtype == torch.float64]
        for row, (source, token, k) in enumerate(served):
            weight = layer.weights[source][token, k].to(exact[weight_dtype == torch.float64]).to(wide)
            of_out[row] = (weight * gradient_of_y(layer, source)[token].to(wide)).to(out_dtype)
        found[rank]["out"] = of_out
    return found


def check(spec: Spec, needed: list[list[bool]], results: list[tuple]) -> None:
    layer = Layer(spec)
    everything = expected(layer, results)
    for rank, (grads, _, _) in enumerate(results):
        for name, need in zip(("x", "weights", "out"), needed[rank], strict=True):
            if need:
                assert_same_bits(grads[name], everything[rank][name], f"gradient of {name} on rank {rank}")
            else:
                assert grads[name] is None


def needs(ranks: int) -> st.SearchStrategy[list[list[bool]]]:
    """Which of x, the weights and the outputs need gradients on each rank."""
    each = st.lists(st.booleans(), min_size=3, max_size=3)
    return st.just([[True] * 3] * ranks) | st.lists(each, min_size=ranks, max_size=ranks)


def in_threads(spec: Spec, rule: str, needed: list[list[bool]]) -> list[tuple]:
    layer = Layer(spec)
    with em.local_world(spec.ranks, timeout_s=60.0) as world:
        return world.run(lambda rank: backward_of_one(rank, layer, rule, needed))


@settings(max_examples=60, deadline=None)
@given(specs(), st.sampled_from(RULES), st.data())
def test_threads(spec, rule, data):
    needed = data.draw(needs(spec.ranks))
    check(spec, needed, in_threads(spec, rule, needed))


@pytest.mark.parametrize("transport", TRANSPORTS)
@settings(max_examples=25, deadline=None)
@given(spec=specs(ranks=4), rule=st.sampled_from(RULES), needed=needs(4))
def test_processes(processes, transport, spec, rule, needed):
    results = processes.run((4, 1), backward_in_process, spec, rule, needed, transport=transport)
    check(spec, needed, results)


AWKWARD = {
    "one rank": Spec(ranks=1, per_rank=4, experts=2, most_tokens=7),
    "no token anywhere": Spec(ranks=3, most_tokens=0),
    "nothing to compute": Spec(ranks=3, absent=1.0, most_tokens=9),
    "one hot expert on every rank": Spec(ranks=8, per_rank=1, experts=1, top_k=1, most_tokens=9),
    "one hot expert, one rank": Spec(ranks=4, per_rank=1, experts=4, top_k=1, hot=True, most_tokens=9),
    "the same expert five times": Spec(ranks=3, per_rank=2, experts=2, top_k=5, repeats=True, most_tokens=9),
    "bfloat16 rows, half outputs": Spec(ranks=3, per_rank=2, experts=4, x_dtype=1, out_dtype=0, most_tokens=9),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_layers(name):
    spec = AWKWARD[name]
    needed = [[True] * 3] * spec.ranks
    check(spec, needed, in_threads(spec, "batch", needed))


def test_gradients_do_not_depend_on_where_experts_are():
    """Tokens on one rank, the experts on one, two or four: the same bits."""
    found = []
    for placement, ranks in (([[0, 1, 2]], 1), ([[0, 1, 2, 0]], 2), ([[2, 1, 0, 1]], 4)):
        table = em.Placement(placement, ranks).eplb_table(0)
        found.append(_of_rank_0(table, ranks, len(placement[0])))
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            assert_same_bits(ours, theirs, "gradient")


def _of_rank_0(table: torch.Tensor, ranks: int, num_slots: int) -> tuple[torch.Tensor, ...]:
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [-1, 1]])

    def step(rank: Rank) -> tuple[torch.Tensor, ...]:
        ep = em.ExpertParallel(rank.ep, table, num_slots=num_slots, rule="token")
        mine = slice(0, 4 if rank.index == 0 else 0)
        x = values((3,), (4, 5), torch.bfloat16)[mine].requires_grad_()
        weights = values((4,), (4, 2), torch.float32)[mine].requires_grad_()
        dispatched = ep.dispatch(x, ids[mine], weights)
        y = ep.combine(dispatched, dispatched.rows.tanh() * 3)
        y.backward(values((5,), (4, 5), torch.bfloat16)[mine])
        assert x.grad is not None
        assert weights.grad is not None
        return x.grad, weights.grad

    with em.local_world(ranks, timeout_s=60.0) as world:
        return world.run(step)[0]


# -- finite differences ------------------------------------------------------------------------------------------------


class WholeWorld(torch.autograd.Function):
    """All ranks as one function of the tensors of all ranks: forward and backward are runs of the world."""

    @staticmethod
    def forward(ctx: Any, world: Any, step: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        each = len(tensors) // len(world.ranks)
        ctx.world, ctx.leaves = (
            world,
            [
                [tensor.detach().clone().requires_grad_() for tensor in tensors[i * each : (i + 1) * each]]
                for i in range(len(world.ranks))
            ],
        )

        def run(rank: Rank) -> torch.Tensor:
            with torch.enable_grad():
                return step(rank, *ctx.leaves[rank.index])

        ctx.outputs = world.run(run)
        return tuple(y.detach() for y in ctx.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        def run(rank: Rank) -> tuple[torch.Tensor, ...]:
            i = rank.index
            return torch.autograd.grad(ctx.outputs[i], ctx.leaves[i], grads[i], retain_graph=True)

        return (None, None, *[grad for of_rank in ctx.world.run(run) for grad in of_rank])


@pytest.mark.parametrize("rule", RULES)
def test_finite_differences(rule):
    """x, weights, and experts that differ by slot; every output by every input, of every rank."""
    placement = em.Placement([[0, 1, 0, 2]], 2)
    ids = [torch.tensor([[0, 1], [2, 0], [-1, 2]]), torch.tensor([[0, 2]])]

    with em.local_world(2, timeout_s=60.0) as world:
        layers = [
            em.ExpertParallel(rank.ep, placement.eplb_table(0), num_slots=4, rule=rule, layer=0) for rank in world.ranks
        ]

        def step(rank: Rank, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
            layer = layers[rank.index]
            dispatched = layer.dispatch(x, ids[rank.index], weights)
            of_slot = dispatched.rows.split(dispatched.num_tokens_per_expert.tolist())
            return layer.combine(
                dispatched, torch.cat([torch.tanh(r @ e) for r, e in zip(of_slot, experts, strict=True)])
            )

        tensors = []
        for rank, own in enumerate(ids):
            shapes = ((len(own), 3), tuple(own.shape), (2, 3, 2))
            tensors += [values((rank, n), shape, torch.float64) for n, shape in enumerate(shapes)]
        assert torch.autograd.gradcheck(
            lambda *given: WholeWorld.apply(world, step, *given), [tensor.requires_grad_() for tensor in tensors]
        )


# -- ranks unlike, and what is refused ---------------------------------------------------------------------------------

PLACEMENT = em.Placement([[0, 1, 0, 2]], 2)


def layer_of(rank: Rank) -> em.ExpertParallel:
    return em.ExpertParallel(rank.ep, PLACEMENT.eplb_table(0), num_slots=4, rule="rank")


def batch(rank: Rank, tokens: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[0, 1], [2, 0], [1, 2]])[:tokens]
    x, weights = values((rank.index,), (tokens, 4), torch.float32), values((9, rank.index), (tokens, 2), torch.float32)
    return x.requires_grad_(), ids, weights.requires_grad_()


def run_two(step: Any) -> list:
    with em.local_world(2, timeout_s=60.0) as world:
        return world.run(step)


def error_of(call: Any) -> str:
    try:
        call()
    except (ConstraintError, RankDisagreementError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_gradients_on_one_rank_and_none_recorded_on_another():
    def step(rank: Rank) -> list[str]:
        layer, (x, ids, weights) = layer_of(rank), batch(rank)
        with torch.set_grad_enabled(rank.index == 0):
            first = error_of(lambda: layer.dispatch(x, ids, weights))
        dispatched = layer.dispatch(x, ids, weights)  # the ranks are in step
        with torch.set_grad_enabled(rank.index == 1):
            return [first, error_of(lambda: layer.combine(dispatched, dispatched.rows))]

    rule = "it must be recorded on every rank of a group or on none, as all take part in the backward pass"
    fix = "enable gradients on all ranks, or call under torch.no_grad() on all."
    told = [
        f"RankDisagreementError: `gradients of {name}` is {values}: {rule}; {fix}"
        for name, values in (
            ("x", "recorded on rank 0 and not recorded on rank 1"),
            ("expert_out", "not recorded on rank 0 and recorded on rank 1"),
        )
    ]
    assert run_two(step) == [told, told]


def test_nothing_is_recorded_where_nobody_needs_it():
    """A mode that records on one rank alone is no disagreement if no tensor needs a gradient."""

    def step(rank: Rank) -> bool:
        layer, (x, ids, weights) = layer_of(rank), batch(rank)
        with torch.set_grad_enabled(rank.index == 0):
            dispatched = layer.dispatch(x.detach(), ids, weights.detach())
            y = layer.combine(dispatched, dispatched.rows)
        return y.requires_grad or dispatched.rows.requires_grad or dispatched.link is not None

    assert run_two(step) == [False, False]


def test_a_rank_whose_experts_are_not_in_the_graph_takes_part():
    """Rank 1 has no tokens and answers with rows that are no function of what it was sent; it hangs nobody."""

    def step(rank: Rank) -> list:
        layer, (x, ids, weights) = layer_of(rank), batch(rank, 3 if rank.index == 0 else 0)
        dispatched = layer.dispatch(x.detach() if rank.index else x, ids, weights)
        out = torch.ones_like(dispatched.rows) if rank.index else dispatched.rows * 2
        y = layer.combine(dispatched, out)
        y.sum().backward()
        return [] if rank.index else [x.grad, weights.grad, x.detach(), weights.detach()]

    x_grad, weights_grad, x, weights = run_two(step)[0]
    # Experts 0 and 1 are on rank 0, expert 2 on rank 1, where nothing depends on x and every row is one.
    own = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert torch.equal(x_grad, (2 * weights[:, :, None] * own[:, :, None]).sum(1).expand(3, 4))
    dots = torch.where(own > 0, 2 * torch.stack([folded(row) for row in x])[:, None], 4.0)
    assert_same_bits(weights_grad, dots, "gradient of the weights")


def test_gradients_of_gradients_are_refused():
    def step(rank: Rank) -> list[str]:
        layer, (x, ids, weights) = layer_of(rank), batch(rank)
        dispatched = layer.dispatch(x, ids, weights)
        y = layer.combine(dispatched, dispatched.rows * 2)
        told = [
            error_of(lambda: torch.autograd.grad(y.sum(), x, create_graph=True)),
            error_of(lambda: torch.autograd.grad(dispatched.rows.sum(), x, create_graph=True)),
        ]
        y.sum().backward()
        return [*told, str(x.grad is not None)]

    sentence = (
        "ConstraintError: `create_graph` is True: it must be False, since gradients of gradients do not cross ranks; "
        "call backward without it, or keep the layer out of what is differentiated twice."
    )
    assert run_two(step) == [[sentence, sentence, "True"]] * 2


def test_a_backward_that_one_rank_leaves_out_names_it():
    def step(rank: Rank) -> tuple[int, ...]:
        layer, (x, ids, weights) = layer_of(rank), batch(rank)
        dispatched = layer.dispatch(x, ids, weights)
        y = layer.combine(dispatched, dispatched.rows)
        if rank.index == 1:
            return ()
        with pytest.raises(LostRankError) as lost:
            y.sum().backward()
        return lost.value.ranks

    assert run_two(step) == [(1,), ()]


def test_backwards_in_another_order_are_named():
    def step(rank: Rank) -> str:
        layers, (x, ids, weights) = [layer_of(rank), layer_of(rank)], batch(rank)
        sums = []
        for layer in layers:
            dispatched = layer.dispatch(x, ids, weights)
            sums.append(layer.combine(dispatched, dispatched.rows).sum())
        told = error_of(sums[rank.index].backward)
        for total in sums:  # in step again; what has raised keeps its graph
            torch.autograd.grad(total, x, retain_graph=True)
        return told

    of = "backward of ExpertParallel.combine of dispatch"
    sentence = (
        f"RankDisagreementError: `the call` is {of} 0 of layer 0 on rank 0 and {of} 2 of layer 1 on rank 1: it must be "
        "the same on every rank of a group; call the collective operators in the same order on all ranks."
    )
    assert run_two(step) == [sentence] * 2


def test_a_failure_in_the_backward_reaches_the_others():
    """A hook of rank 1 raises between the backward of combine and that of dispatch."""

    def step(rank: Rank) -> str:
        layer, (x, ids, weights) = layer_of(rank), batch(rank)
        dispatched = layer.dispatch(x, ids, weights)
        y = layer.combine(dispatched, dispatched.rows * 2)
        if rank.index == 1:
            dispatched.rows.register_hook(lambda grad: grad[:1])
        try:
            y.sum().backward()
        except Exception as error:
            return type(error).__name__
        return ""

    assert "" not in run_two(step)


def test_one_dispatch_may_be_combined_twice_and_go_back_twice():
    def step(rank: Rank) -> bool:
        layer, (x, ids, weights) = layer_of(rank), batch(rank)
        dispatched = layer.dispatch(x, ids, weights)
        first = layer.combine(dispatched, dispatched.rows * 2)
        second = layer.combine(dispatched, dispatched.rows * 3)
        (both,) = torch.autograd.grad((first + second).sum(), x, retain_graph=True)
        (again,) = torch.autograd.grad((first + second).sum(), x)
        return torch.equal(both, again) and torch.allclose(both, 5 * weights.sum(1, keepdim=True).expand(3, 4))

    assert run_two(step) == [True, True]


def test_the_graph_ends_with_its_tensors():
    """Neither the layer nor the nodes keep rows alive; without waiting for the collector of cycles."""

    def step(rank: Rank) -> list[bool]:
        layer, (x, ids, weights) = layer_of(rank), batch(rank)
        gc.disable()
        try:
            dispatched = layer.dispatch(x, ids, weights)
            y = layer.combine(dispatched, dispatched.rows * 2)
            held = [weakref.ref(dispatched.rows), weakref.ref(y), weakref.ref(dispatched.slots)]
            del dispatched
            y.sum().backward()
            del y
            return [one() is None for one in held]
        finally:
            gc.enable()

    assert run_two(step) == [[True] * 3] * 2


def test_threads_on_a_device_are_refused(monkeypatch):
    """torch computes the backward of all threads in one thread of a device, where they would wait for each other."""

    class Elsewhere:
        device, shape = torch.device("cuda", 0), (0, 4)

    def step(rank: Rank) -> str:
        layer, (x, ids, weights) = layer_of(rank), batch(rank)
        dispatched = layer.dispatch(x, ids, weights)
        object.__setattr__(dispatched, "rows", Elsewhere())
        assert isinstance(rank.ep, LocalTransport)
        return error_of(lambda: gradients.way_of(rank.ep, dispatched))

    sentence = (
        "ConstraintError: `x` is on the device cuda:0 with gradients, in a world of threads: it must be on the CPU "
        "there: torch computes the backward of all threads in one thread of the device; use processes, or wrap "
        "forward and backward in torch.autograd.set_multithreading_enabled(False)."
    )
    assert run_two(step) == [sentence] * 2


# -- planted bugs ------------------------------------------------------------------------------------------------------

BUGS = {
    "weights of another k": {"weights[routing.token, routing.k][": "weights[routing.token, routing.k - 1]["},
    "gradients of x weighted": {"torch.ones(position.shape": "2 * torch.ones(position.shape"},
    "rows of another token": {"first + theirs[:, 0])": "first)"},
    "dots of the wrong rows": {"expert_out[part].to": "expert_out.flip(0)[part].to"},
}


@pytest.mark.parametrize("name", BUGS)
def test_the_loops_find_a_planted_bug(name):
    spec = Spec(seed=5, ranks=2, per_rank=2, experts=3, top_k=2, most_tokens=9)
    needed = [[True] * 3] * 2
    check(spec, needed, in_threads(spec, "token", needed))
    with mutated("evenmoe.runtime.gradients", BUGS[name]):
        assert fails(lambda: check(spec, needed, in_threads(spec, "token", needed)))


def test_without_the_link_a_rank_would_stay_away():
    without = {"_anchor(y) if dispatched.link is None else dispatched.link": "_anchor(y)"}
    with mutated("evenmoe.runtime.gradients", without):
        assert fails(test_a_rank_whose_experts_are_not_in_the_graph_takes_part)
