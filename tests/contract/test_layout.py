"""The derived numbers against the specification's worked examples, against loops over a world, and scaled down."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenmoe.contract.dispatch import infer_dispatch
from evenmoe.contract.layout import Layout, make_layout, scale_down
from evenmoe.errors import ConstraintError


def lengths(layout: Layout) -> dict[str, int]:
    """The first dimension of every output of dispatch."""
    return {name: spec.shape[0] for name, spec in infer_dispatch(layout, "bfloat16", 0).items()}


def test_the_worked_example_with_one_shared_rank():
    """§2.15: ep = 4, rank 0 shared, M = 6, Bs = 2, K = 2."""
    layouts = [
        make_layout(ep=4, rank=rank, num_experts=6, num_tokens=2, hidden=4, top_k=2, shared_experts=1, shared_ranks=1)
        for rank in range(4)
    ]
    assert [layout.is_shared for layout in layouts] == [True, False, False, False]
    assert [layout.local_experts for layout in layouts] == [1, 2, 2, 2]
    assert [layout.capacity for layout in layouts] == [8, 16, 16, 16]
    assert [lengths(layout)["expand_x"] for layout in layouts] == [8, 16, 16, 16]
    assert [lengths(layout)["dynamic_scales"] for layout in layouts] == [8, 16, 16, 16]
    assert [lengths(layout)["ep_recv_counts"] for layout in layouts] == [4, 8, 8, 8]
    assert [lengths(layout)["expert_token_nums"] for layout in layouts] == [1, 2, 2, 2]
    assert [layouts[3].rank_of_expert(expert) for expert in range(6)] == [1, 1, 2, 2, 3, 3]


def test_the_worked_example_with_two_shared_experts():
    """§2.15, second: ep = 8, two shared experts on two ranks each; a shared rank receives 4 of 8 sources."""
    layout = make_layout(ep=8, rank=3, num_experts=4, num_tokens=1, hidden=4, top_k=2, shared_experts=2, shared_ranks=4)
    assert (layout.ranks_per_shared, layout.experts_per_rank, layout.capacity) == (2, 1, 4)


def test_the_demo_of_the_first_page():
    """§7: the shapes that the demo allocates."""
    layout = make_layout(
        ep=8, rank=2, num_experts=8, num_tokens=8, hidden=7168, top_k=3, tp=2, tp_rank=1, shared_experts=0, global_bs=64
    )
    assert (layout.max_bs, layout.global_bs, layout.capacity) == (8, 64, 64)
    assert lengths(layout) == {
        "expand_x": 128,
        "dynamic_scales": 128,
        "assist_info_for_combine": 8192,
        "expert_token_nums": 1,
        "ep_recv_counts": 16,
        "tp_recv_counts": 2,
        "expand_scales": 64,
    }


def test_a_world_of_one_rank_without_tokens():
    """§5: max(Bs·K, 128·A)."""
    layout = make_layout(ep=1, rank=0, num_experts=1, num_tokens=0, hidden=1, top_k=1)
    assert (layout.capacity, layout.tp, layout.tp_rank) == (0, 0, 0)
    found = lengths(layout)
    assert (found["assist_info_for_combine"], found["ep_recv_counts"], found["tp_recv_counts"]) == (0, 1, 0)


def test_one_shared_expert_is_the_default():
    layout = make_layout(ep=4, rank=0, num_experts=2, num_tokens=1, hidden=1, top_k=1, shared_ranks=2)
    assert (layout.shared_experts, layout.ranks_per_shared, layout.capacity) == (1, 2, 2)


@st.composite
def worlds(draw):
    shared_experts = draw(st.integers(0, 3))
    ranks_per_shared = draw(st.integers(1, 3)) if shared_experts else 0
    moe_ranks = draw(st.integers(1, 4))
    experts_per_rank = draw(st.integers(1, 4))
    max_bs = draw(st.integers(0, 4))
    return {
        "ep": shared_experts * ranks_per_shared + moe_ranks,
        "num_experts": moe_ranks * experts_per_rank,
        "num_tokens": draw(st.integers(0, max_bs)),
        "hidden": 8,
        "top_k": draw(st.integers(1, moe_ranks * experts_per_rank)),
        "shared_experts": shared_experts,
        "shared_ranks": shared_experts * ranks_per_shared,
        "global_bs": max_bs * (shared_experts * ranks_per_shared + moe_ranks),
    }


def most_rows(world, rank, max_bs):
    """The most rows that can arrive: every source sends as many as it can to this rank (§2.5, §2.6), counted."""
    shared_ranks, ep = world["shared_ranks"], world["ep"]
    if rank < shared_ranks:
        per_shared = shared_ranks // world["shared_experts"]
        return sum(max_bs for source in range(ep) if source % per_shared == rank % per_shared)
    local = world["num_experts"] // (ep - shared_ranks)
    return sum(1 for _source in range(ep) for _token in range(max_bs) for _k in range(min(local, world["top_k"])))


@given(worlds(), st.booleans())
def test_every_rank_has_room_for_the_worst_case(world, elastic):
    layouts = [make_layout(**world, rank=rank, elastic=elastic) for rank in range(world["ep"])]
    max_bs = layouts[0].max_bs
    assert max_bs == (world["global_bs"] // world["ep"] if world["global_bs"] else world["num_tokens"])
    worst = [most_rows(world, rank, max_bs) for rank in range(world["ep"])]
    for layout in layouts:
        if elastic:
            assert layout.capacity == max(worst)
        else:
            # On a shared rank the ceiling counts for every replica what only the first ones may receive.
            assert worst[layout.rank] <= layout.capacity
            assert layout.capacity == max(
                w for w, other in zip(worst, layouts, strict=True) if other.is_shared == layout.is_shared
            )


@given(worlds())
def test_every_expert_lives_on_one_moe_rank(world):
    layouts = [make_layout(**world, rank=rank) for rank in range(world["ep"])]
    homes = [layouts[0].rank_of_expert(expert) for expert in range(world["num_experts"])]
    for layout in layouts:
        assert homes.count(layout.rank) == (0 if layout.is_shared else layout.local_experts)
    assert homes == sorted(homes)


@st.composite
def lost_ranks(draw):
    """A world, and an elastic_info after some of its MoE ranks are lost."""
    world = draw(worlds())
    shared, ep = world["shared_ranks"], world["ep"]
    alive = [*range(shared), *sorted(draw(st.sets(st.integers(shared, ep - 1), min_size=1)))]
    per_rank = draw(st.integers(1, world["num_experts"] // (ep - shared)))
    table1 = [alive.index(rank) if rank in alive else -1 for rank in range(ep)]
    table2 = alive + [draw(st.integers(-1, ep)) for _ in range(ep - len(alive))]  # the rest is don't care
    return (
        world,
        alive,
        [draw(st.sampled_from([1, 2, -1])), len(alive), shared, per_rank * (len(alive) - shared), *table1, *table2],
    )


@given(lost_ranks())
def test_scaled_down_the_rest_still_fits_its_buffers(case):
    world, alive, info = case
    for old in alive:
        before = make_layout(**world, rank=old, elastic=True)
        after = scale_down(before, info)
        assert after.active_ranks[after.rank] == old
        assert list(after.active_ranks) == alive
        assert after.original is before
        small = {"ep": after.ep, "num_experts": after.num_experts, "global_bs": after.max_bs * after.ep}
        fresh = make_layout(**world | small, rank=after.rank)
        for name in ("experts_per_rank", "local_experts", "is_shared", "ranks_per_shared", "shared_experts"):
            assert getattr(after, name) == getattr(fresh, name)
        assert lengths(after) == lengths(before)
        for name, length in lengths(fresh).items():
            assert not before.max_bs or length <= lengths(after)[name]
    for lost in set(range(world["ep"])) - set(alive):
        with pytest.raises(ConstraintError, match="must keep the rank that calls"):
            scale_down(make_layout(**world, rank=lost, elastic=True), info)


def test_without_scaling_nothing_changes():
    layout = make_layout(ep=2, rank=1, num_experts=2, num_tokens=1, hidden=1, top_k=1, elastic=True)
    assert scale_down(layout, [0, 99, -5, 7, 8, 8, 8, 8]) is layout


# Ranks 0 and 1 host the one shared expert, ranks 2…4 two MoE experts each.
WORLD = {"ep": 5, "num_experts": 6, "num_tokens": 2, "hidden": 8, "top_k": 2, "shared_experts": 1, "shared_ranks": 2}


def elastic_info(ep=4, shared=2, experts=4, table1=(0, 1, 2, -1, 3), table2=(0, 1, 2, 4, -1), scaled=1):
    return [scaled, ep, shared, experts, *table1, *table2]


@pytest.mark.parametrize(
    ("info", "rank", "text"),
    [
        (elastic_info()[:-1], 0, r"is 13 ints: it must have 4 \+ 2·5 ints"),
        (elastic_info(ep=0), 0, "is epNew 0: it must leave 1 to 5 ranks"),
        (elastic_info(ep=6), 0, "is epNew 6: it must leave 1 to 5 ranks"),
        (elastic_info(shared=-1), 0, "is SrNew -1 of epNew 4: it must leave at least one rank for MoE experts"),
        (elastic_info(shared=4), 0, "is SrNew 4 of epNew 4: .* use 0 to 3"),
        (elastic_info(shared=0), 0, "is SrNew 0: it must leave each of the 1 shared experts equally many ranks"),
        (elastic_info(experts=0), 0, "is MNew 0: it must be at least 1 and divide by the 2 ranks"),
        (elastic_info(experts=5), 0, "is MNew 5: .* use a multiple of 2"),
        (elastic_info(experts=6), 0, "is MNew 6: it must leave at most 2 experts per rank, .* use at most 4"),
        (elastic_info(ep=5, experts=9), 0, "is MNew 9: .* use at most 6"),
        (elastic_info(table2=(0, 1, 2, 5, -1)), 0, r"is table2\[3\] = 5: it must name an old rank, 0 to 4"),
        (elastic_info(table2=(0, 1, -1, 4, -1)), 0, r"is table2\[2\] = -1: it must name an old rank"),
        (elastic_info(table2=(0, 1, 3, 4, -1)), 0, r"is table2\[2\] = 3 but table1\[3\] = -1: .* set table1\[3\] to 2"),
        (elastic_info(table1=(0, 1, 2, 2, 3)), 0, r"is table1\[3\] = 2: it must have tables that are inverse"),
        (elastic_info(table1=(0, 1, 2, 4, 3)), 0, r"is table1\[3\] = 4: .* over 4 new ranks"),
        (elastic_info(table1=(0, 1, 2, -2, 3)), 0, r"is table1\[3\] = -2: .* use -1 for a lost rank"),
        (elastic_info(), 3, "is -1 for rank 3: it must keep the rank that calls"),
        (elastic_info(shared=1, experts=6), 1, "is rank 1 of 4 for rank 1: it must leave a rank at most the 1 experts"),
    ],
)
def test_what_contradicts_itself_is_named(info, rank, text):
    with pytest.raises(ConstraintError, match=f"`elastic_info` {text}"):
        scale_down(make_layout(**WORLD, rank=rank, elastic=True), info)


def test_a_shared_rank_may_become_a_rank_of_one_expert():
    after = scale_down(make_layout(**WORLD, rank=1, elastic=True), elastic_info(shared=1, experts=3))
    assert (after.is_shared, after.local_experts, after.ranks_per_shared, after.rank_of_expert(0)) == (False, 1, 1, 1)


def test_two_shared_experts_need_equally_many_ranks():
    world = WORLD | {"ep": 8, "shared_experts": 2, "shared_ranks": 4, "num_experts": 8}
    tables = [*range(6), -1, -1, *range(6), -1, -1]
    with pytest.raises(ConstraintError, match=r"SrNew 3: .* use a multiple of 2"):
        scale_down(make_layout(**world, rank=0, elastic=True), [1, 6, 3, 6, *tables])


def test_shared_ranks_cannot_appear_from_nowhere():
    world = WORLD | {"shared_experts": 0, "shared_ranks": 0, "num_experts": 10}
    with pytest.raises(ConstraintError, match="SrNew 1: it must be 0"):
        scale_down(make_layout(**world, rank=0, elastic=True), elastic_info(shared=1, experts=3))


def test_every_expert_left_needs_its_row_of_smooth_scales():
    layout = make_layout(**WORLD | {"num_experts": 3}, rank=1, elastic=True)
    grown = elastic_info(ep=5, shared=1, experts=4, table1=(0, 1, 2, 3, 4), table2=(0, 1, 2, 3, 4))
    assert scale_down(layout, grown).num_experts == 4
    with pytest.raises(ConstraintError, match="MNew 4: it must be at most 3, the MoE experts that have a row in `sc"):
        scale_down(layout, grown, smooth_scales=True)
