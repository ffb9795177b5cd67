"""Properties of a replay: plans see only the past, and nothing depends on threads or on the other policies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import evenmoe as em
from evenmoe.errors import ConstraintError, MissingArgumentError, UnsupportedTypeError
from evenmoe.planner.plan import plan_with
from evenmoe.simulator import policies
from evenmoe.simulator.batches import Cluster
from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.replay import simulate
from evenmoe.simulator.store import save_simulation
from evenmoe.traces.synthesis import small_trace
from evenmoe.traces.trace import Trace
from tests.simulator.plain_loops import Setup, assign

COSTS = CostModel.for_expert(64, 4e6, 1e7)
WORLD = {"num_ranks": 6, "num_nodes": 2, "tokens_per_rank": 8}
POLICIES = (
    "identity",
    "static:pieces=2",
    "greedy:rule=token",
    "evenmoe:rule=occurrence,pieces=2",
    "evenmoe:rule=batch,max-copies=4",
    "oracle",
)
STEPS, REFRESH = 12, 3


def with_requests() -> Trace:
    return replace(small_trace(), seq_start=np.array([0, 5, 5, 300, 301, 777, 1500, 2048]))


def loads_only(windows: int = 12, by_rank: int = 0) -> Trace:
    rng = np.random.default_rng(1)
    load = rng.integers(0, 40, (windows, max(by_rank, 1), 3, 32)) * rng.integers(0, 9, (windows, 1, 3, 32))
    return Trace("loads", load.sum(axis=1), load_by_rank=load if by_rank else None)


def run(trace: Trace, policies=POLICIES, costs=COSTS, **options):
    options = {"num_slots": 42, "num_steps": STEPS, "refresh": REFRESH, "workers": 1} | WORLD | options
    if trace.routing is None:
        options.setdefault("top_k", 4)
    return simulate(trace, policies, costs=costs, details=True, **options)


def other_future(trace: Trace, last: int) -> Trace:
    """The trace with everything that is first used after step `last` changed."""
    if trace.routing is None:
        load = trace.load.copy()
        load[last + 1 :] = load[last + 1 :, :, ::-1]  # 12 windows on 12 steps
        return replace(trace, load=load)
    starts = (np.arange(len(trace.routing) + 1) if trace.seq_start is None else trace.seq_start).tolist()
    setup = Setup(6, 2, 8, 8, STEPS, 0, 0, 0, 0, 0, 0)
    dealt = assign(starts, setup)
    used = {token for step in dealt[: last + 1] for rank in step for token in rank}
    later = np.array([token not in used for token in range(len(trace.routing))])
    routing = trace.routing.copy()
    routing[later] = 31 - routing[later]
    return replace(trace, routing=routing)


@pytest.mark.parametrize("trace", [with_requests(), loads_only()], ids=["tokens", "loads"])
@pytest.mark.parametrize("last", [0, REFRESH - 1, REFRESH, 7])
def test_the_future_changes_nothing_before_it(trace, last):
    one, other = run(trace), run(other_future(trace, last))
    for policy, changed in zip(one.policies, other.policies, strict=True):
        now = slice(0, last + 1)
        for name in ("par", "step_time"):
            np.testing.assert_array_equal(getattr(policy, name)[now], getattr(changed, name)[now])
            if policy.name != "oracle":  # whose loads are even whatever comes
                assert (getattr(policy, name)[last + 1 :] != getattr(changed, name)[last + 1 :]).any()
        assert policy.details is not None
        assert changed.details is not None
        np.testing.assert_array_equal(policy.details.rank_loads[now], changed.details.rank_loads[now])
        # A plan is made before its step, so it is the same one step longer; the oracle's is made from its own step.
        planned = slice(0, last + 1 if policy.name == "oracle" else last + 2)
        np.testing.assert_array_equal(policy.copies[planned], changed.copies[planned])
        np.testing.assert_array_equal(policy.copy_time[planned], changed.copy_time[planned])
    oracle, theirs = one.policies[-1], other.policies[-1]
    assert (oracle.copies[last + 1] != theirs.copies[last + 1]).any()


@pytest.mark.parametrize(
    "trace", [with_requests(), loads_only(5), loads_only(4, by_rank=3)], ids=["tokens", "loads", "ranks"]
)
def test_threads_change_nothing(trace, tmp_path):
    for workers in (1, 2, 5):
        save_simulation(run(trace, workers=workers), tmp_path / str(workers))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() == (tmp_path / "5").read_bytes()


@pytest.mark.parametrize("trace", [with_requests(), loads_only(5)], ids=["tokens", "loads"])
def test_policies_do_not_touch_each_other(trace):
    together = {policy.name: policy for policy in run(trace).policies}
    for name in POLICIES[1:]:
        alone = run(trace, [name]).policies[1]
        np.testing.assert_array_equal(alone.par, together[name].par)
        np.testing.assert_array_equal(alone.copies, together[name].copies)
        assert alone.break_even_steps == together[name].break_even_steps


def test_policies_share_a_plan_that_would_be_the_same(monkeypatch):
    """Made anew of the same steps for rules that are planned for alike; a user's planner is asked by every policy."""
    asked: list[int] = []

    def counting(planner, load, options):
        asked.append(0 if options.previous is None else 1)
        return plan_with(planner, load, options)

    monkeypatch.setattr(policies, "plan_with", counting)
    names = ["static:rule=even", "evenmoe:rule=even,refresh=5", "evenmoe:rule=token,refresh=5", "greedy:refresh=5"]

    def plans(given):
        asked.clear()
        run(with_requests(), given, refresh=5, window=5)
        return asked.count(0), asked.count(1)

    alone = [plans([name]) for name in names]  # each is tried once before the replay, too
    assert plans(names) == (sum(anew for anew, _ in alone) - 2, sum(kept for _, kept in alone))

    def own(load, **options):
        return em.plan(load, **options)

    assert plans({"one": own, "two": own})[0] == 2 * plans({"one": own})[0]


def test_the_seed_decides_the_draws():
    first, again, other = (run(loads_only(), ["identity"], seed=seed).policies[0].par for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_every_policy_plans_when_it_says():
    policies = [*POLICIES, "greedy:refresh=5,window=2"]
    found = {policy.name: policy for policy in run(with_requests(), policies, copy_overlap=False).policies}
    assert found["identity"].refreshes.tolist() == []
    assert found["static:pieces=2"].refreshes.tolist() == [REFRESH]
    assert found["greedy:rule=token"].refreshes.tolist() == [3, 6, 9]
    assert found["greedy:refresh=5,window=2"].refreshes.tolist() == [5, 10]
    assert found["oracle"].refreshes.tolist() == list(range(1, STEPS))
    assert not found["oracle"].copy_time.any()
    assert found["oracle"].copies.any()
    for policy in found.values():
        assert set(np.flatnonzero(policy.copies.sum(axis=1))) <= set(policy.refreshes.tolist())


def test_a_limit_of_copies_is_kept():
    _, kept, first = run(
        with_requests(), ["evenmoe:rule=even,start=previous,max-copies=2", "evenmoe:rule=even,max-copies=2"]
    ).policies
    assert kept.copies.max() == 2
    assert first.copies[REFRESH].max() > 2
    assert first.copies[REFRESH + 1 :].max() == 2


def test_an_oracle_is_better_than_what_only_knows_the_past():
    found = run(loads_only(), ["greedy:rule=batch", "oracle"]).policies
    assert (found[2].par <= found[1].par + 1e-12).mean() > 0.9
    assert found[2].par.mean() < found[1].par.mean() < found[0].par.mean()


def test_drawn_totals_add_up():
    simulation = run(loads_only())
    for policy in simulation.policies:
        assert policy.rank_tokens.sum() == simulation.load.sum()
        assert policy.details is not None
        np.testing.assert_array_equal(policy.details.rank_loads[REFRESH:].sum(axis=0), policy.rank_tokens)
    # 3 layers × 48 tokens × 4 experts × 9 judged steps; each assignment is drawn, so the variance is below the mean
    expected = 3 * 48 * 4 * (STEPS - REFRESH)
    assert abs(simulation.load.sum() - expected) < 6 * np.sqrt(expected)


def test_large_batches_are_counted_in_larger_integers():
    """40,000 tokens of a rank that all use one expert do not fit 16 bits."""
    load = np.zeros((1, 1, 4), np.int64)
    load[0, 0, 1] = 1
    for tokens, counted in ((32767, np.int16), (40000, np.int32)):
        assert Cluster(2, 1, tokens).count_type is counted
        trace = Trace("one", load)
        (policy,) = simulate(
            trace, ["identity"], num_ranks=2, tokens_per_rank=tokens, costs=COSTS, num_steps=1, top_k=1, workers=1
        ).policies
        assert policy.rank_tokens.tolist() == [[2 * tokens, 0]]
        assert policy.traffic.within_node_once.tolist() == [tokens]


def test_a_trace_of_nothing_is_perfectly_balanced():
    simulation = run(Trace("nothing", np.zeros((2, 1, 32), np.int64)), num_steps=5)
    for policy in simulation.policies:
        assert (policy.par == 1.0).all()
        assert not policy.traffic.between_nodes.any()
        assert (policy.step_time == 2 * COSTS.latency_us).all()


def test_defaults():
    simulation = simulate(with_requests(), num_ranks=4, tokens_per_rank=32, costs=COSTS)
    assert len(simulation.tokens) == 16  # 2,048 tokens, 128 a step
    settings = {name: value for name, value, _ in simulation.settings}
    assert (settings["refresh every"], settings["window"], settings["slots"]) == ("3000", "5", "36")
    assert (settings["first plan before step"], settings["experts are copied"]) == ("5", "beside the steps")
    assert simulation.num_warmup_steps == 5
    names = [policy.name for policy in simulation.policies]
    assert "evenmoe:slots=32" in names
    assert "static" not in names  # which would repeat evenmoe:rule=rank


@pytest.mark.parametrize(("tokens", "steps"), [(1, 100), (45, 89), (3000, 1)])
def test_loads_alone_are_not_drawn_from_more_often_than_they_have_tokens(tokens, steps):
    """16,162 tokens with 2 experts each in 12 windows, on 4 ranks: no more than 100 steps."""
    trace = loads_only()
    recorded = int(trace.load.sum(axis=(0, 2)).max()) // 2
    found = simulate(trace, ["identity"], num_ranks=4, tokens_per_rank=tokens, costs=COSTS, top_k=2)
    assert len(found.tokens) == max(1, min(100, recorded // (4 * tokens))) == steps
    assert found.recorded_tokens == recorded


def test_the_warm_up_ends_when_the_last_policy_has_planned():
    trace = small_trace()  # requests of one token, so that none comes twice before all have come
    found = run(trace, ["static:window=2", "greedy:refresh=5,window=2", "evenmoe:rule=token"])
    assert (found.num_warmup_steps, found.num_judged_steps) == (5, STEPS - 5)
    summary = found.summary
    for policy, shown in zip(found.policies, summary.policies, strict=True):
        assert shown.worst_par == policy.par[5:].max()
        assert shown.mean_par == pytest.approx(policy.par[5:].mean(), rel=1e-13)
        assert shown.step_time_us == pytest.approx(policy.step_time[5:].mean(), rel=1e-13)
        np.testing.assert_array_equal(policy.rank_tokens, policy.details.rank_loads[5:].sum(axis=0))
    alone = run(trace, ["identity", "oracle"])
    assert (alone.num_warmup_steps, alone.num_judged_steps) == (0, STEPS)


@pytest.mark.parametrize(("tokens", "fresh"), [(12 * 48, 12), (12 * 48 - 1, 11), (5 * 48, 5), (3 * 48, 3)])
def test_tokens_that_come_again_are_not_judged(tokens, fresh):
    trace = small_trace()
    trace = replace(trace, routing=trace.routing[:tokens])
    found = run(trace, ["greedy"])
    assert (found.num_warmup_steps, found.num_judged_steps) == (REFRESH, fresh - REFRESH)
    if fresh == REFRESH:  # there is nothing to judge, so figures are of everything
        assert found.judged == slice(0, STEPS)
        assert found.policies[1].rank_tokens.sum() == found.load.sum() == STEPS * 48 * 4 * trace.num_layers
    else:
        assert found.load.sum() == (fresh - REFRESH) * 48 * 4 * trace.num_layers


def test_copies_beside_the_steps_take_effect_when_they_are_done():
    """Copies of about 2.5 steps serve from the third or fourth step on, and no plan is made meanwhile."""
    trace, policies = small_trace(), ["greedy:rule=token,refresh=1,window=1"]
    slow = replace(COSTS, within_bytes_per_s=1e9, between_bytes_per_s=1e9, latency_us=0.0)
    first = run(trace, policies, costs=slow, copy_overlap=False).policies[1]
    slow = replace(slow, copy_bytes=slow.copy_bytes * 2.5 * first.step_time.mean() / first.copy_time[2])
    policy = run(trace, policies, costs=slow).policies[1]
    assert policy.refreshes[0] == 1  # and serves at once, so that the next plan is made before step 2
    expected = [1]
    step = 2
    while step < STEPS:
        expected.append(step)
        left = policy.copy_time[step]
        while left > 0 and step < STEPS:
            left -= policy.step_time[step]
            step += 1
    assert policy.refreshes.tolist() == expected
    assert 3 < len(expected) < 7
    between = run(trace, policies, costs=slow, copy_overlap=False).policies[1]
    assert between.refreshes.tolist() == list(range(1, STEPS))


def test_redundancy_costs_memory():
    identity, greedy, more = run(with_requests(), ["greedy", "greedy:slots=60"]).policies
    assert identity.final.num_slots == 36  # 32 experts on 6 ranks
    assert [policy.memory_per_rank for policy in (identity, greedy, more)] == [
        4 * 6 * 4_000_000,
        4 * 7 * 4_000_000,
        4 * 10 * 4_000_000,
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "`num_steps` is 0"),
        ({"refresh": 0}, "`refresh` is 0"),
        ({"window": -1}, "`window` is -1"),
        ({"horizon": 0}, "`horizon` is 0"),
        ({"chunk": 3}, "use one of [1, 2, 4, 8]"),
        ({"seed": -1}, "`seed` is -1"),
        ({"workers": 0}, "`workers` is 0"),
        ({"top_k": 5}, "must be that of the trace, 4"),
        ({"num_slots": 43}, "has 43 slots for 32 experts on 6 ranks"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(ConstraintError) as caught:
        run(with_requests(), **options)
    assert words in str(caught.value)


def test_loads_need_to_know_the_experts_of_a_token():
    with pytest.raises(MissingArgumentError, match="experts a token has"):
        run(loads_only(), top_k=None)
    with pytest.raises(ConstraintError, match="must be 1 to 32"):
        run(loads_only(), top_k=33)
    told = replace(loads_only(), metadata={"top_k": 2})
    assert run(told, ["identity"], top_k=None).top_k == 2


def test_a_policy_that_cannot_be_planned_is_refused_before_the_replay():
    with pytest.raises(ConstraintError, match=r"'evenmoe:groups=4'.*must be one that can be planned"):
        run(with_requests(), ["evenmoe:groups=4"])


@pytest.mark.parametrize(
    "name",
    ["num_ranks", "tokens_per_rank", "num_slots", "num_groups", "num_steps", "refresh", "window", "chunk", "top_k"],
)
def test_what_is_no_whole_number(name):
    with pytest.raises(ConstraintError, match=f"`{name}` is 2.5 of type float: it must be a whole number; pass an int"):
        run(loads_only(), ["identity"], **{name: 2.5})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"trace": "trace.npz"},
            "`trace` is 'trace.npz' of type str: it must be an evenmoe.Trace; read a trace file with "
            "evenmoe.traces.load_trace.",
        ),
        ({"trace": np.ones((2, 3))}, "of type ndarray: it must be an evenmoe.Trace; read a trace file with"),
        (
            {"costs": 5},
            "`costs` is '5' of type int: it must be a CostModel, or a model's name or shape; name a model, or state "
            "your own figures.",
        ),
        ({"policies": 5}, "`policies` is of type int: it must be a sequence or a dict of policies; put each policy in"),
        (
            {"trace": Trace("t", np.ones((1, 1, 8), int), metadata={"top_k": "two"}), "top_k": None},
            "`trace` is one whose `top_k` is 'two': it must have a whole number there; correct its metadata.",
        ),
    ],
)
def test_what_is_of_another_type_is_named(change, text):
    given = {"trace": loads_only(), "policies": ["identity"], "costs": COSTS, "num_steps": 2, "top_k": 2, **WORLD}
    with pytest.raises(ConstraintError) as caught:
        simulate(**(given | change))
    assert text in str(caught.value)


def test_policies_are_a_sequence():
    with pytest.raises(ConstraintError, match="'identity': it must be a sequence or a dict of policies; put each"):
        run(loads_only(), "identity")
    with pytest.raises(UnsupportedTypeError, match="with something of type int: it must hold texts, placements"):
        run(loads_only(), [1])
