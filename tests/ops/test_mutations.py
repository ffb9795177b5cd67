"""Bugs planted one at a time: the checks below, small cousins of the suite's, must go red for every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch

import evenmoe as em
from evenmoe.ops.exchange import received_order
from evenmoe.ops.update_expert import prepare
from evenmoe.reference.update_expert import update_expert as reference
from tests.mutations import fails, mutated
from tests.ops import test_disagreement as disagreement
from tests.transport import test_blocks as blocks
from tests.transport import test_transport as contract
from tests.worlds import Case, Spec, assert_equal_worlds, assert_same_bits, run_rank, run_reference

WORLDS = [
    Spec(
        seed=1,
        shared_experts=2,
        shared_ranks=4,
        experts_per_rank=2,
        top_k=3,
        mask="assignments",
        hidden=17,
        max_bs=6,
        quant_mode=2,
        smooth=True,
        dtype="float32",
    ),
    Spec(seed=2, tp=2, moe_ranks=3, hidden=8, dtype="float16", max_bs=6, sizes="unequal", nums_type=0),
    Spec(
        seed=3,
        experts_per_rank=3,
        virtual=(1, 2, 2),
        top_k=5,
        hidden=24,
        dtype="float32",
        max_bs=6,
        shared_x="flat",
        mask="tokens",
    ),
    Spec(seed=4, moe_ranks=3, experts_per_rank=2, top_k=4, hidden=64, max_bs=6, comm_quant_mode=2, nums_type=0),
    Spec(seed=5, moe_ranks=5, experts_per_rank=2, shared_ranks=2, top_k=3, max_bs=4, elastic="scaled", gates=True),
    Spec(seed=6, tp=2, shared_ranks=2, max_bs=5, mask="tokens", hidden=8),
    Spec(seed=9, virtual=(1, 2, 2), top_k=4, max_bs=6, mask="assignments", factors=True, gates=True),
    Spec(seed=12, dtype="float16", moe_ranks=3, experts_per_rank=2, top_k=4, max_bs=6, hidden=64),
    # 65536 / 8192 = 8 tokens of float16 at a time are summed on a CPU, so ten take two turns.
    Spec(
        seed=11,
        dtype="float16",
        hidden=8192,
        max_bs=10,
        virtual=(0, 1, 1),
        top_k=3,
        mask="assignments",
        shared_x="flat",
    ),
    Spec(seed=7, quant_mode=2, experts_per_rank=2, hidden=64, dtype="float16", max_bs=5, values="special"),
    Spec(seed=8, hidden=200, dtype="float32", max_bs=6, roomy=True, strided=True, shared_x="cube", mask="assignments"),
]


@cache
def expected(spec: Spec) -> list:
    return run_reference(Case(spec))


def worlds() -> None:
    """dispatch, combine and combine_add_rms_norm against the reference."""
    for spec in WORLDS:
        case = Case(spec)
        with em.local_world(spec.ep, max(spec.tp, 1), timeout_s=60.0) as world:
            results = world.run(lambda rank, case=case: run_rank(rank, case))
        assert_equal_worlds(results, expected(spec))


TABLE = torch.tensor([[2, 0, 1, 9], [3, 2, 3, 4], [1, 5, 9, 9], [3, 6, 7, 8]], dtype=torch.int32)


def mapping() -> None:
    """update_expert in both modes for growing and shrinking batches, prepared and not."""
    by_token = prepare(TABLE, 0, 1, "token")
    for num_tokens in (3, 9, 2, 4):
        ids = torch.stack([torch.arange(num_tokens) % 4, (torch.arange(num_tokens) + 1) % 4], dim=1)
        assert_same_bits(by_token(ids), reference(ids, TABLE, balance_mode=1)[0], "prepared, by token")
        assert_same_bits(em.update_expert(ids, TABLE, balance_mode=1)[0], by_token(ids), "by token")
        for rank in range(8):
            want = reference(ids, TABLE, local_rank_id=rank, world_size=8)[0]
            assert_same_bits(em.update_expert(ids, TABLE, rank, 8)[0], want, f"by rank, {rank}")
    scales = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [1.0, 2.0**-9, 2.0**-9]])
    threshold, ids = torch.tensor([0.998, 0.25, 0.1]), torch.tensor([[0, 1, 2]] * 4)
    for kind in (torch.bfloat16, torch.float32):
        for share in (threshold, threshold.flip(0), torch.tensor([0.5, 0.25, 0.25])):
            call = {"expert_scales": scales.to(kind), "pruning_threshold": share}
            call |= {"active_mask": torch.tensor([True, True, False, True])}
            want = reference(ids, TABLE, local_rank_id=0, world_size=4, **call)[1]
            assert_same_bits(em.update_expert(ids, TABLE, 0, 4, **call)[1], want, "mask")
    tiny = {"expert_scales": torch.tensor([[1.0, 2.0**-24, 2.0**-24]]), "pruning_threshold": torch.tensor([1.0, 0, 0])}
    assert em.update_expert(ids[:1], TABLE, 0, 4, **tiny)[1].all()
    own = TABLE.clone()
    prepared = prepare(own, 0, 1, "token")
    own.zero_()
    assert_same_bits(prepared(ids), reference(ids, TABLE, balance_mode=1)[0], "a table of its own")


def disagreements() -> None:
    """A size that differs, a call that is refused, rows that the peers count differently: everybody raises."""
    for shape, job, told in (
        ((4, 1), lambda rank: disagreement.differ(rank, "dispatch", "hidden"), "`hidden size of x` is 3 on ranks 0"),
        ((4, 1), lambda rank: disagreement.differ(rank, "combine", "wrong dtype"), "is refused there (`expert_scales`"),
        ((2, 2), lambda rank: disagreement.differ(rank, "combine", "virtual experts"), "zero_expert_num"),
        ((2, 2), lambda rank: disagreement.differ(rank, "dispatch", "a list"), "is refused there (`"),
        ((2, 2), disagreement.miscount, "is refused there (`"),
    ):
        with em.local_world(*shape, timeout_s=60.0) as world:
            results = world.run(job)
            for kind, _, _ in results:
                assert kind in {"RankDisagreementError", "ConstraintError", "UnsupportedTypeError"}
            assert told in results[0][1]
            assert all(world.run(disagreement.works))


def peers_that_miscount() -> None:
    """Both peers say what one of them got wrong."""
    with em.local_world(2, 2, timeout_s=5.0) as world:
        assert [kind for kind, _, _ in world.run(disagreement.miscount)][2:] == ["ConstraintError"] * 2


def other_orders() -> None:
    """Two dispatches in flight, combined in another order on one rank."""
    with em.local_world(4, timeout_s=5.0) as world:
        assert {kind for kind, _, _ in world.run(disagreement.combine_in_another_order)} == {"RankDisagreementError"}


def transports() -> None:
    """Rows between four ranks, between some of them under new numbers, and many exchanges in a row."""
    counts = [[(s + 2 * d) % 4 for d in range(4)] for s in range(4)]
    with em.local_world(4, timeout_s=60.0) as world:
        assert all(world.run(lambda rank: contract.send_to_each(rank, counts, (3,), "int32")))
        assert all(world.run(lambda rank: contract.transpose_counts(rank, 3)))
        assert all(world.run(lambda rank: contract.send_remapped(rank, [2, 0, 3], counts, "int32", 0)))
        assert world.run(lambda rank: contract.exchange_many(rank, 20)) == [0] * 4


def orders() -> None:
    """What threads on the CPU do not use: the order of rows on other devices, and packets between processes."""
    assert received_order(torch.tensor([[1, 1], [2, 0]]))[0].tolist() == [0, 2, 3, 1]
    blocks.round_trip(torch.int8, [(2, 3), (0, 1), (3, 0)], 5)


OPS, RULES, TRANSPORT = "evenmoe.ops.", "evenmoe.rules.", "evenmoe.transport."


@dataclass(frozen=True)
class Bug:
    """`changes`: the source's text -> the mutant's."""

    check: Callable[[], None]
    module: str
    changes: dict[str, str]


def bug(check: Callable[[], None], module: str, *changes: str) -> Bug:
    return Bug(check, module, dict(zip(changes[::2], changes[1::2], strict=True)))


BUGS = {
    # §1: ids and pruning
    "replica of the next rank": bug(mapping, RULES + "rank", "rank // -(-world", "(rank + 1) // -(-world"),
    "floor for ceiling": bug(mapping, RULES + "rank", "-(-world_size // eplb_table", "(world_size // eplb_table"),
    "replica 2 for token 0": bug(mapping, RULES + "token", "[None, :] %", "[None, :].add(1) %"),
    "count for first slot": bug(mapping, RULES + "table", "1 + replica.long()", "replica.long()"),
    "lookup never grows": bug(
        mapping, RULES + "token", "self._slots.numel() < rows * num_experts", "self._slots.numel() == 0"
    ),
    "old lookup after growth": bug(mapping, RULES + "token", "self._by_dtype.clear()", "pass"),
    "old offsets for fewer tokens": bug(
        mapping, RULES + "token", "self._row_offsets.shape[0] != num", "self._row_offsets.shape[0] < num"
    ),
    "period one too long": bug(mapping, RULES + "token", "% self._period", "% (self._period + 1)"),
    "table shared with its owner": bug(mapping, OPS + "update_expert", "call.eplb_table.clone()", "call.eplb_table"),
    "strict threshold": bug(mapping, OPS + "update_expert", "scales >= threshold", "scales > threshold"),
    "active mask ignored": bug(mapping, OPS + "update_expert", "keep & active_mask[:, None]", "keep"),
    "total in descending k": bug(
        mapping, OPS + "update_expert", "in range(scales.shape[1])", "in reversed(range(scales.shape[1]))"
    ),
    "total in bfloat16": bug(mapping, OPS + "update_expert", "scales = scales.float()", "pass"),
    # §2.5, §2.6, §2.9: who sends what where
    "mask ignored": bug(
        worlds, OPS + "exchange", "torch.where(active_assignments(expert_ids, x_active_mask), key, physical)", "key"
    ),
    "one token too many": bug(
        worlds, OPS + "exchange", "(tokens < x_active_mask.sum())", "(tokens <= x_active_mask.sum())"
    ),
    "local assignments sent to expert 0": bug(
        worlds, OPS + "exchange", "key = expert_ids\n", "key = torch.where(expert_ids < physical, expert_ids, 0)\n"
    ),
    "wrong copy of a shared expert": bug(
        worlds, OPS + "exchange", "layout.rank % layout.ranks_per_shared", "layout.rank // layout.ranks_per_shared"
    ),
    "k of a shared expert": bug(worlds, OPS + "exchange", "[top_k + shared, k]", "[shared, k]"),
    "smooth scale of a shared expert": bug(worlds, OPS + "exchange", "expert + layout.shared_experts", "expert"),
    "shared only if all assignments are active": bug(worlds, OPS + "exchange", "mask.any(dim=1)", "mask.all(dim=1)"),
    "rows stay ordered by source": bug(
        orders, OPS + "exchange", "counts.T.flatten()\n    stops", "counts.flatten()\n    stops"
    ),
    # one row per rank on the wire
    "one smooth scale for all experts": bug(worlds, OPS + "exchange", "if rows_differ_by_expert:", "if False:"),
    "rows of the first source": bug(
        worlds,
        OPS + "exchange",
        "order_received(counted, incoming.first,",
        "order_received(counted, 0 * incoming.first,",
    ),
    "head taken for a row": bug(
        orders, TRANSPORT + "blocks", "self.first.append(self.total + head)", "self.first.append(self.total)"
    ),
    "numbers of the next rank": bug(
        orders, TRANSPORT + "blocks", "    taken = 0\n    for rank", "    taken = 1\n    for rank"
    ),
    "numbers over the head": bug(orders, TRANSPORT + "blocks", "at += HEAD_BYTES", "at += 0"),
    # §2.7, §2.12: what dispatch returns
    "exclusive prefix sums": bug(worlds, OPS + "dispatch", "= ordered.cumsum(0)", "= ordered.cumsum(0) - ordered"),
    "counts by source": bug(worlds, OPS + "dispatch", "received.counts.T.flatten()", "received.counts.flatten()"),
    "peer's sums go on": bug(worlds, OPS + "dispatch", "peer.ep_counts.cumsum(0)", "peer.ep_counts.cumsum(0) + own"),
    "peer's rows first": bug(worlds, OPS + "dispatch", "[received.rows, peer.rows]", "[peer.rows, received.rows]"),
    "peer's rows not counted": bug(worlds, OPS + "dispatch", "per_expert + len(peer.rows)", "per_expert"),
    "own rows counted for TP rank 0": bug(
        worlds, OPS + "dispatch", "tp_recv_counts[call.tp_rank_id]", "tp_recv_counts[0]"
    ),
    "counts for sums": bug(
        worlds, OPS + "dispatch", "call.expert_token_nums_type == 1", "call.expert_token_nums_type == 0"
    ),
    # §2.3: the weights that travel
    "the first k's weight": bug(worlds, OPS + "exchange", "routing.token * top_k + ", "routing.token * top_k + 0 * "),
    "a weight for shared experts": bug(
        worlds, OPS + "exchange", "weights.flatten()[at], 0.0", "weights.flatten()[at], 1.0"
    ),
    # §2.8, §3.5: int8
    "scale not a reciprocal": bug(worlds, OPS + "numerics", "torch.ones_like(factor) / factor", "largest / 127.0"),
    "smooth scale forgotten": bug(worlds, OPS + "numerics", "values * smooth", "values"),
    "truncation": bug(worlds, OPS + "numerics", "scaled.round()", "scaled"),
    "no step through float16": bug(worlds, OPS + "numerics", "quotient.half().round()", "quotient.round()"),
    "division by the rounded scale": bug(
        worlds, OPS + "numerics", "blocks / scale[:, :, None]", "blocks / scale[:, :, None].to(rows.dtype).float()"
    ),
    # §3.3: the way home
    "own rows for the peer's": bug(worlds, OPS + "combine", "expand_x[own : own + theirs]", "expand_x[:theirs]"),
    "no sum over the peers": bug(worlds, OPS + "combine", "(rows.float() + received.float())", "rows.float()"),
    "places without shared experts": bug(worlds, OPS + "combine", "(token * each + k)", "(token * layout.top_k + k)"),
    "rows of the first expert only": bug(
        worlds, OPS + "combine", "layout.ep * layout.local_experts - 1", "layout.ep - 1"
    ),
    "one peer checks alone": bug(peers_that_miscount, OPS + "combine", "or theirs != held", "or False"),
    "dispatches not told apart": bug(
        other_orders, OPS + "combine", "else int(call.dispatch_number[group])", "else UNKNOWN"
    ),
    # §3.4: the sum
    "descending k": bug(
        worlds,
        OPS + "weighted_sum",
        "add(bits.numpy(), _addresses(incoming, position), weights",
        "add(bits.numpy(), _addresses(incoming, position.flip(1)), weights.flip(1)",
    ),
    "descending k in float16": bug(
        worlds,
        OPS + "weighted_sum",
        "in range(position.shape[1]):\n            where",
        "in reversed(range(position.shape[1])):\n            where",
    ),
    "descending k with virtual experts": bug(
        worlds, OPS + "weighted_sum", "in range(top_k):", "in reversed(range(top_k)):"
    ),
    "shared experts first": bug(
        worlds,
        OPS + "weighted_sum",
        "sum_rows(rows, position, _weights(layout, call))",
        "sum_rows(rows, *(each.roll(layout.shared_experts, 1) for each in (position, _weights(layout, call))))",
    ),
    "first tokens twice": bug(worlds, OPS + "weighted_sum", "slice(start, min(", "slice(0, min("),
    "no shared_expert_x": bug(worlds, OPS + "weighted_sum", "if call.shared_expert_x is not None:", "if False:"),
    "masked virtual experts count": bug(worlds, OPS + "weighted_sum", "torch.where(mask[:, k], ids, -1)", "ids"),
    "a const expert copies": bug(
        worlds, OPS + "weighted_sum", "(ids < call.copy_expert_num)", "(ids <= call.copy_expert_num)"
    ),
    "factors as rows of a softmax": bug(worlds, OPS + "weighted_sum", "if p1.dim() == 2:", "if p1.dim() > 2:"),
    "const experts unweighted": bug(worlds, OPS + "weighted_sum", "weights[where] * mixed", "mixed"),
    "torch's order in const experts": bug(
        worlds, OPS + "weighted_sum", "softmax_of_two(tree_sum(p1 * x)", "softmax_of_two((p1 * x).sum(-1)"
    ),
    "neighbours added first": bug(
        worlds, OPS + "numerics", "values[..., :width] + values[..., width:]", "values[..., ::2] + values[..., 1::2]"
    ),
    "inactive tokens get shared_expert_x": bug(worlds, OPS + "combine", "torch.where(active[:, None], y, 0.0)", "y"),
    # §4: the norm
    "residual after rounding": bug(
        worlds, OPS + "combine_add_rms_norm", "x32 = total +", "x32 = total.to(dtype).float() +"
    ),
    "norm of the rounded sum": bug(
        worlds, OPS + "combine_add_rms_norm", "(x32 * rstd[:, None])", "(x32.to(dtype).float() * rstd[:, None])"
    ),
    "one rounding for two": bug(
        worlds, OPS + "combine_add_rms_norm", "(x32 * rstd[:, None]).to(dtype)", "x32 * rstd[:, None]"
    ),
    "torch's order in the mean": bug(
        worlds, OPS + "combine_add_rms_norm", "tree_sum(x32 * x32", "torch.sum(dim=-1, input=x32 * x32"
    ),
    "no epsilon": bug(worlds, OPS + "combine_add_rms_norm", "mean_square + call.norm_eps", "mean_square"),
    "one rounding in the reciprocal root": bug(
        worlds, OPS + "numerics", "torch.ones_like(root) / root", "(1.0 / values.double().sqrt()).float()"
    ),
    # ranks that differ
    "sizes not compared": bug(disagreements, TRANSPORT + "agreement", "if len(np.unique(values)) <= 1:", "if True:"),
    "an error without a status": bug(
        disagreements, TRANSPORT + "agreement", 'getattr(error, "status", FAILED), 0', "0, 0"
    ),
    "an error that the others do not hear of": bug(
        disagreements, TRANSPORT + "call", "if not self._heard or", "if True or"
    ),
    # how bytes cross
    "exchanges share a number": bug(
        transports, TRANSPORT + "world", "self.number(members)\n        self._meeting", "0\n        self._meeting"
    ),
    "everybody reads the first rows": bug(
        transports, TRANSPORT + "world", "start = sum(counts[: self.rank])", "start = 0"
    ),
    "columns for rows": bug(transports, TRANSPORT + "world", "theirs[self.rank]", "theirs[source]"),
    "old run's departures": bug(disagreements, TRANSPORT + "world", "rendezvous.reset()", "pass"),
    "blocks sent in new order": bug(
        transports, TRANSPORT + "process_group", "key=self._old_rank_of.__getitem__", "key=lambda new: new"
    ),
    "blocks kept in old order": bug(
        transports,
        TRANSPORT + "process_group",
        "[self._members.index(old) for old in self._old_rank_of]",
        "list(range(len(in_old_order)))",
    ),
    "counts under old numbers": bug(
        transports, TRANSPORT + "process_group", "full[self._old_rank_of] = counts", "full[: len(counts)] = counts"
    ),
}


@pytest.mark.parametrize("check", [worlds, mapping, disagreements, transports])
def test_the_checks_pass_without_a_bug(check):
    check()


@pytest.mark.parametrize("name", BUGS)
def test_the_bug_is_found(name):
    planted = BUGS[name]
    with mutated(planted.module, planted.changes):
        assert fails(planted.check), f"no check noticed: {name}"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"no such text": "x"}, "has 0 times, not once"),
        ({"layout": "x"}, "times, not once"),
        ({'"""The exchange of token rows': '"""'}, "runs the same"),
        ({"k: torch.Tensor\n    expert:": "k: int\n    expert:"}, "runs the same"),
    ],
)
def test_a_mutation_that_tests_nothing_is_refused(changes, reason):
    with pytest.raises(AssertionError, match=reason), mutated(OPS + "exchange", changes):
        pass


def test_a_mutant_is_gone_afterwards():
    with mutated(OPS + "exchange", {"[top_k + shared, k]": "[shared, k]"}):
        assert fails(worlds)
    assert not fails(worlds)
