"""A user's rule works wherever a rule can be given, and what is derived for it is what evenmoe's own rules state."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evenmoe as em
from evenmoe.errors import ConstraintError, EvenmoeError
from evenmoe.rules import RULES
from evenmoe.rules.rule import EvenRule, Rule
from evenmoe.simulator.costs import CostModel
from evenmoe.simulator.replay import simulate
from evenmoe.traces.synthesis import small_trace
from evenmoe.traces.trace import Trace, save_trace
from tests.cli.running import runner
from tests.rules import toy_rule

FILE = f"py:{Path(toy_rule.__file__)}"
PLACEMENT = em.Placement([[0, 1, 0, 2, 3, 1, 4, 0]], 4)
TOKENS, EXPERTS, TOP_K = 6, 5, 2


def routed() -> torch.Tensor:
    """(ranks, tokens, k), each token's experts distinct, expert 0 hot; one assignment is none."""
    random = np.random.default_rng(5)
    ids = np.stack([random.permutation(EXPERTS)[:TOP_K] for _ in range(4 * TOKENS)]).reshape(4, TOKENS, TOP_K)
    ids[:, ::2, 0] = 0
    ids[:, ::2, 1] = random.integers(1, EXPERTS, (4, TOKENS // 2))
    ids[2, 1, 0] = -1
    return torch.from_numpy(ids)


def slots_by_hand(rule: Rule) -> list[list[tuple[int, int, int]]]:
    """By destination rank, (slot, source rank, token) of every assignment."""
    table = PLACEMENT.eplb_table(0).tolist()
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(4)]
    seen = [0] * EXPERTS
    for rank, tokens in enumerate(routed().tolist()):
        for token, experts in enumerate(tokens):
            for expert in experts:
                if expert >= 0:
                    turn = seen[expert] if rule.needs_counts else token + rank
                    seen[expert] += 1
                    slot = table[expert][1 + turn % table[expert][0]]
                    found[slot // 2].append((slot, rank, token))
    return [sorted(rank) for rank in found]


@pytest.mark.parametrize("rule", ["RULE", "COUNTING"])
def test_expert_parallel_over_threads(rule):
    found = RULES.get(f"{FILE}:{rule}")

    def step(rank):
        ep = em.ExpertParallel(rank.ep, PLACEMENT.eplb_table(0), num_slots=8, rule=found)
        assert ep.rule == found.name
        x = torch.full((TOKENS, 1), float(rank.index + 1))
        got = ep.dispatch(x, routed()[rank.index], torch.ones(TOKENS, TOP_K))
        slots = torch.arange(2).repeat_interleave(got.num_tokens_per_expert) + 2 * rank.index
        y = ep.combine(got, got.rows)
        return list(zip(slots.tolist(), got.source_rank.tolist(), got.source_token.tolist(), strict=True)), y

    with em.local_world(ep_size=4, timeout_s=60.0) as world:
        results = world.run(step)
    assert [sorted(rows) for rows, _ in results] == slots_by_hand(found)
    for rank, (_, y) in enumerate(results):
        assert y.flatten().tolist() == ((routed()[rank] >= 0).sum(dim=1) * (rank + 1.0)).tolist()


def test_ranks_with_other_rules_agree_on_an_error():
    def step(rank):
        rule = toy_rule.RULE if rank.index else "token"
        ep = em.ExpertParallel(rank.ep, PLACEMENT.eplb_table(0), num_slots=8, rule=rule)
        try:
            ep.dispatch(torch.ones(1, 1), torch.tensor([[0]]), torch.ones(1, 1))
        except EvenmoeError as error:
            return f"{type(error).__name__}: {error}"

    with em.local_world(ep_size=4, timeout_s=60.0) as world:
        told = world.run(step)
    assert told[0].startswith("RankDisagreementError: `rule` is another rule on ranks 1, 2, 3 and token on rank 0")
    assert told[1].startswith("RankDisagreementError: `rule` is toy on ranks 1, 2, 3 and token on rank 0")


def test_the_weights_of_another_expert_are_never_taken():
    choose = toy_rule.WRONG.prepare(PLACEMENT.eplb_table(0), 8, 0, 4)
    with pytest.raises(ConstraintError, match=r"the rule wrong chose` is slot 0 for expert 3 \(token 0, k 1\)"):
        choose(torch.tensor([[0, 3]]))
    assert choose(torch.tensor([[0, 0]])).tolist() == [[0, 0]]


def dispatched_by(rules: list[Rule]) -> list[object]:
    """What each rank gets from one dispatch, or its error as text."""

    def step(rank):
        ep = em.ExpertParallel(rank.ep, PLACEMENT.eplb_table(0), num_slots=8, rule=rules[rank.index])
        ids = routed()[rank.index]
        before = ids.clone()
        try:
            got = ep.dispatch(torch.ones(TOKENS, 1), ids, torch.ones(TOKENS, TOP_K))
        except EvenmoeError as error:
            return f"{type(error).__name__}: {error}"
        assert torch.equal(ids, before)
        return got.source_token.tolist(), got.num_tokens_per_expert.tolist()

    with em.local_world(ep_size=4, timeout_s=60.0) as world:
        return world.run(step)


class Careless(toy_rule.Counting):
    """Writes to everything that it is given, once it has chosen."""

    name = "counting"

    def choose(self, expert_ids, eplb_table, *, counted, counts_by_rank, **more):
        chosen = super().choose(expert_ids, eplb_table, counted=counted, counts_by_rank=counts_by_rank, **more)
        expert_ids.fill_(1)
        eplb_table.fill_(1)
        counts_by_rank[:] = 7
        if counted is not None:
            counted.fill_(True)
        return chosen


def test_a_rule_may_write_to_what_it_is_given():
    assert dispatched_by([Careless()] * 4) == dispatched_by([toy_rule.COUNTING] * 4)


def numbered(version: object = None) -> Rule:
    class Toy(toy_rule.Toy):
        pass

    rule = Toy()
    rule.version = version
    return rule


def typed(choice: str) -> Rule:
    """A rule that was typed into a console, where nobody can look its text up."""
    found: dict[str, type[Rule]] = {"Toy": toy_rule.Toy}
    exec(f"class Typed(Toy):\n    def choose(self, expert_ids, eplb_table, **_):\n        return {choice}", found)
    return found["Typed"]()


@pytest.mark.parametrize("case", ["code", "constant", "class", "version", "console"])
def test_two_rules_of_one_name_are_told_apart(case, tmp_path):
    changed = tmp_path / "toy_rule.py"
    changed.write_text(Path(toy_rule.__file__).read_text().replace("(row + rank) % count", "(row + rank + 1) % count"))
    one, other = {
        "code": (toy_rule.RULE, RULES.get(f"py:{changed}:RULE")),
        "constant": (type("Toy", (toy_rule.Toy,), {"turn": 1})(), type("Toy", (toy_rule.Toy,), {"turn": 2})()),
        "class": (toy_rule.RULE, type("Other", (toy_rule.Toy,), {})()),
        "version": (numbered("1"), numbered("2")),
        "console": (typed("eplb_table[expert_ids, 1].long()"), typed("(0 + eplb_table[expert_ids, 1]).long()")),
    }[case]
    told = dispatched_by([one, one, other, one])
    assert told == told[:1] * 4
    assert re.fullmatch(
        r"RankDisagreementError: `digest of the code and the settings of rule` is (\d+) on ranks 0, 1, 3 "
        r"and (\d+) on rank 2: it must be equal on every rank of a group; pass the same on all ranks\.",
        str(told[0]),
    )


def test_a_rule_is_the_same_wherever_it_was_made():
    assert isinstance(dispatched_by([toy_rule.Toy() for _ in range(4)])[0], tuple)
    for make in (lambda: numbered("1"), lambda: typed("expert_ids + 1"), lambda: toy_rule.RULE):
        assert make().identity() == make().identity()


class Turned(type(RULES.get("occurrence"))):
    """Of another choice than the rule that it is made from, whose kernel and shares are not its own."""

    name = "turned"

    def choose(self, expert_ids, eplb_table, **_):
        return eplb_table[expert_ids.long(), 1].to(expert_ids.dtype)


def test_a_choice_of_its_own_inherits_nothing_that_was_derived_from_another():
    rule = Turned()
    assert (rule.kernel, rule.balance_mode, rule.shares_evenly) == (None, None, False)
    assert rule.shares(PLACEMENT)[0].tolist() == [1, 1, 0, 1, 1, 0, 1, 0]
    choose = rule.prepare(PLACEMENT.eplb_table(0), 8, 3, 4)
    assert choose(torch.tensor([[0, 1]])).tolist() == [[0, 1]]


class Promising(EvenRule):
    name = "promising"
    choose = toy_rule.Toy.choose


def test_the_identity_is_the_same_in_every_process():
    """Though sets of texts have another order in each, and objects another address."""
    program = (
        "from evenmoe.rules.rule import Rule\n"
        "class Named(Rule):\n"
        "    name, thing, kinds = 'named', object(), frozenset('abcdef')\n"
        "    def choose(self, expert_ids, eplb_table, **more):\n"
        "        return (lambda: expert_ids)() if 'f' in {'a', 'b', 'c', 'd', 'e'} else None\n"
        "print(Named().identity())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    told = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**environment, "PYTHONHASHSEED": str(seed)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in range(3)
    }
    assert len(told) == 1


def test_what_is_derived_from_the_even_rule_is_one_by_which_ranks_choose():
    rule = Promising()
    assert (rule.shares_evenly, rule.kernel) == (True, None)
    np.testing.assert_array_equal(rule.shares(PLACEMENT), RULES.get("even").shares(PLACEMENT))
    assert dispatched_by([rule] * 4) == dispatched_by([toy_rule.RULE] * 4)


def test_what_a_plan_can_assume_is_checked():
    with pytest.raises(ConstraintError) as caught:
        type("Odd", (Rule,), {"name": "odd", "plan_for": "uneven"})
    assert str(caught.value) == (
        "`plan_for` is 'uneven' in Odd: it must be one of even, rank, batch; say what a plan is to assume."
    )


class Failing(toy_rule.Toy):
    """Fails in one of its methods."""

    name = "failing"
    fails = "choose"

    def _in(self, method: str) -> None:
        if method == self.fails:
            raise SystemExit("as scripts do") if method == "shares" else ZeroDivisionError("one by none")

    def choose(self, expert_ids, eplb_table, **more):
        self._in("choose")
        return super().choose(expert_ids, eplb_table, **more)

    def prepare(self, *given):
        self._in("prepare")
        return super().prepare(*given)

    def shares(self, placement):
        self._in("shares")
        return super().shares(placement)


FAILING = {method: type("Failing", (Failing,), {"fails": method})() for method in ("choose", "prepare", "shares")}
FAILING_CHOOSE, FAILING_PREPARE, FAILING_SHARES = FAILING.values()
SHARES_OF_A_LIST = type("Listed", (toy_rule.Toy,), {"name": "listed", "shares": lambda *_: [1.0]})()


class Shapeless(toy_rule.Toy):
    def choose(self, expert_ids, eplb_table, **_):
        return eplb_table[expert_ids, 1]


def test_what_a_rule_returns_is_checked():
    choose = Shapeless().prepare(PLACEMENT.eplb_table(0), 8, 0, 4)
    with pytest.raises(ConstraintError, match=r"is torch.int32 of shape \(1, 1\): it must be torch.int64 of shape"):
        choose(torch.tensor([[0]]))


def called(name: str) -> Rule:
    """A rule of evenmoe's as a user would have it: without a kernel, and without knowledge of its shares."""
    rule = type(RULES.get(name))
    return type("Called", (rule,), {"name": f"called-{name}", "kernel": None, "shares": Rule.shares})()


CALLED_RANK, CALLED_TOKEN, CALLED_OCCURRENCE, CALLED_BATCH = map(called, ["rank", "token", "occurrence", "batch"])


@pytest.mark.parametrize("name", ["rank", "token", "occurrence"])
def test_measured_shares_are_the_exact_ones(name):
    placement = em.plan([[900, 500, 300, 80, 80, 80, 80, 80]], num_ranks=6, num_slots=24, rule=name)
    assert placement.num_replicas.max() in range(4, 7)
    measured, exact = called(name).shares(placement), RULES.get(name).shares(placement)
    np.testing.assert_allclose(measured, exact, rtol=1e-15)


COSTS = CostModel.for_expert(64, 4e6, 1e7)
SIZES = {"num_ranks": 6, "num_nodes": 2, "tokens_per_rank": 8, "costs": COSTS, "num_slots": 42, "num_steps": 4}


def replayed(trace: Trace, rule: str):
    return simulate(trace, [f"evenmoe:rule={rule},plan-for=even,refresh=2"], details=True, **SIZES).policies[1]


def loads_only() -> Trace:
    return Trace("loads", np.random.default_rng(1).integers(1, 40, (3, 2, 32)), metadata={"top_k": 4})


@pytest.mark.parametrize("name", ["rank", "token", "occurrence", "batch"])
@pytest.mark.parametrize("trace", [small_trace(), loads_only()], ids=["tokens", "loads"])
def test_a_called_rule_is_replayed_as_its_kernel_is(name, trace):
    slow, fast = replayed(trace, f"py:{__name__}:CALLED_{name.upper()}"), replayed(trace, name)
    assert slow.rule == f"called-{name}"
    np.testing.assert_array_equal(slow.copies, fast.copies)
    if name == "token" and trace.routing is None:  # which tokens an expert gets is drawn, by other random numbers
        assert slow.rank_tokens.sum() == fast.rank_tokens.sum()
        np.testing.assert_allclose(slow.par.mean(), fast.par.mean(), rtol=0.1)
        return
    np.testing.assert_array_equal(slow.par, fast.par)
    np.testing.assert_array_equal(slow.details.rows, fast.details.rows)
    np.testing.assert_array_equal(slow.step_time, fast.step_time)


def test_drawn_tokens_take_turns():
    """Only counts are known; a rule that goes by rows still shares evenly, whatever is drawn."""
    found = simulate(loads_only(), [f"evenmoe:rule={FILE}:RULE"], **SIZES)
    again = simulate(loads_only(), [f"evenmoe:rule={FILE}:RULE"], workers=3, **SIZES)
    assert found.policies[1].rule == "toy"
    assert found.policies[1].rank_tokens.sum() == found.load.sum()
    np.testing.assert_array_equal(found.policies[1].par, again.policies[1].par)


@pytest.fixture
def evenmoe(monkeypatch, capsys):
    return runner(monkeypatch, capsys)


@pytest.fixture
def trace_file(tmp_path) -> Path:
    path = tmp_path / "trace.npz"
    save_trace(small_trace(), path)
    return path


def test_the_command_line_plans_for_it(evenmoe, trace_file):
    done = evenmoe("plan", trace_file, "--ranks", 8, "--slots", 40, "--rule", f"{FILE}:RULE", "--json")
    even = evenmoe("plan", trace_file, "--ranks", 8, "--slots", 40, "--json")
    assert (done.code, even.code) == (0, 0)
    mine, theirs = json.loads(done.out), json.loads(even.out)
    assert mine["replicas_per_expert"] == theirs["replicas_per_expert"]  # a plan for even shares
    assert mine["par_lower_bound"] is None  # which bounds even shares alone
    np.testing.assert_allclose(
        mine["par"]["planned"]["all_tokens"]["mean"],
        theirs["par"]["planned"]["all_tokens"]["mean"],
        rtol=1e-6,  # as rounded for JSON; its shares are even
    )


def test_the_command_line_simulates_it(evenmoe, trace_file):
    policy = f"evenmoe:rule={FILE}:RULE,plan-for={FILE}:RULE"
    sizes = ("--ranks", 8, "--tokens-per-rank", 8, "--steps", 4, "--model", "deepseek-v3")
    done = evenmoe("simulate", trace_file, *sizes, "--policy", policy, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["policies"][1]
    assert (found["name"], found["rule"]) == (policy, "toy")
    assert "evenmoe's plan for the toy rule" in found["description"]


@pytest.mark.parametrize(
    ("command", "rule", "said"),
    [
        (
            "plan",
            "FAILING_SHARES",
            "`--rule` is failing: it must not fail, and raised SystemExit: as scripts do; correct it",
        ),
        ("plan", "FAILING_CHOOSE", "`--rule` is failing: it must not fail, and raised ZeroDivisionError: one by none"),
        ("plan", "FAILING_PREPARE", "`--rule` is failing: it must not fail, and raised ZeroDivisionError: one by none"),
        ("plan", "SHARES_OF_A_LIST", "`shares of the rule listed` is a list: it must be numbers of shape (4, "),
        (
            "simulate",
            "FAILING_CHOOSE",
            "`rule` is failing: it must not fail, and raised ZeroDivisionError: one by none",
        ),
        (
            "simulate",
            "FAILING_PREPARE",
            "`rule` is failing: it must not fail, and raised ZeroDivisionError: one by none",
        ),
    ],
)
def test_a_rule_that_fails_is_no_mistake_in_evenmoe(evenmoe, trace_file, command, rule, said):
    options = {
        "plan": ("--slots", 40, "--rule", f"py:{__name__}:{rule}"),
        "simulate": (
            "--model",
            "deepseek-v3",
            "--tokens-per-rank",
            8,
            "--policy",
            f"identity:rule=py:{__name__}:{rule}",
        ),
    }
    done = evenmoe(command, trace_file, "--ranks", 8, *options[command])
    assert (done.code, done.err.startswith(f"evenmoe: {said}")) == (2, True), done.err


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_a_rule_that_is_not_there(evenmoe, trace_file, command):
    options = {
        "plan": ("--slots", 40, "--rule", f"{FILE}:NONE"),
        "simulate": ("--model", "deepseek-v3", "--policy", f"evenmoe:rule={FILE}:NONE"),
    }
    done = evenmoe(command, trace_file, "--ranks", 8, *options[command])
    assert done.code == 2
    assert "must be importable, and is not (AttributeError" in " ".join(done.err.split())
