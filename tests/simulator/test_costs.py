"""Times and copies, by hand; the routes of copies against plain loops are in `plain_loops`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evenmoe.errors import ConstraintError
from evenmoe.placement import Placement
from evenmoe.simulator.costs import CostModel, route_copies

# One FLOP, byte or row a second each way, so that every figure below is a number of seconds.
UNIT = CostModel(
    expert_flops_per_token=1,
    expert_bytes=1,
    dispatch_row_bytes=1,
    combine_row_bytes=1,
    copy_bytes=1,
    flops_per_s=1,
    memory_bytes_per_s=1,
    within_bytes_per_s=1,
    between_bytes_per_s=1,
    latency_us=0,
    start_us=0,
    slot_us=0,
    floor_us=0,
    token_us=0,
    norm=1e30,  # the longer of reading and computing
    tile=1,
)
NONE = np.zeros((1, 2, 2))


def seconds(costs=UNIT, tokens=(0, 0), busy=(0, 0), sent=NONE, received=NONE) -> float:
    work = np.array([tokens]), np.array([busy]), costs.kernel.padded([tokens])
    return float(costs.layer_time(*work, 1, sent, received)[0] / 1e6)


def rows(link: int, *numbers: int) -> np.ndarray:
    found = np.zeros((1, 2, 2))
    found[0, link] = numbers
    return found


def test_the_busiest_rank_decides():
    assert seconds(tokens=(7, 3)) == 7
    assert seconds(replace(UNIT, expert_flops_per_token=4, flops_per_s=2), tokens=(7, 3)) == 14


def test_reading_weights_takes_over_where_rows_are_few():
    costs = replace(UNIT, expert_bytes=10)
    assert seconds(costs, tokens=(7, 3), busy=(0, 2)) == 20
    assert seconds(costs, tokens=(25, 3), busy=(1, 2)) == 25
    assert seconds(replace(costs, memory_bytes_per_s=5), busy=(0, 3)) == 6


def test_a_link_sends_and_receives_at_once_and_the_links_do_not_wait():
    assert seconds(sent=rows(0, 3, 0), received=rows(0, 0, 3)) == 6  # dispatch and combine
    assert seconds(sent=rows(0, 3, 0) + rows(1, 5, 0), received=rows(0, 4, 0)) == 10
    assert seconds(sent=rows(0, 3, 3), received=rows(0, 0, 6)) == 12
    assert seconds(replace(UNIT, within_bytes_per_s=0.5), sent=rows(0, 3, 0) + rows(1, 5, 0)) == 12
    assert seconds(replace(UNIT, dispatch_row_bytes=3), sent=rows(1, 0, 2)) == 8


def test_experts_then_wire_then_two_latencies():
    costs = replace(UNIT, latency_us=1e6)
    assert seconds(costs, tokens=(7, 3), sent=rows(1, 0, 2)) == 7 + 4 + 2


def test_copies_take_the_busiest_link_and_one_latency():
    costs = replace(UNIT, copy_bytes=10, between_bytes_per_s=0.5, latency_us=5)
    sent, received = np.array([[3, 0], [0, 1]]), np.array([[0, 3], [1, 0]])
    assert costs.copy_time(sent, received) == pytest.approx(30e6 + 5)
    assert costs.copy_time(sent * 0, received * 2) == pytest.approx(60e6 + 5)
    assert costs.copy_time(sent * 0, received * 0) == 0.0


def test_figures_of_an_expert():
    costs = CostModel.for_expert(7168, 44_040_192, 88_080_384, dispatch_row_bytes=7168.0)
    assert (costs.dispatch_row_bytes, costs.combine_row_bytes) == (7168.0, 14336.0)
    assert costs.copy_bytes == 44_040_192
    assert costs.one_row_per_rank


@pytest.mark.parametrize(
    ("figure", "value", "words"),
    [
        ("flops_per_s", "fast", "finite and more than 0"),
        ("flops_per_s", 0.0, "finite and more than 0"),
        ("between_bytes_per_s", -1.0, "finite and more than 0"),
        ("latency_us", -1.0, "finite and 0 or more"),
        ("expert_bytes", float("nan"), "finite and 0 or more"),
        ("memory_bytes_per_s", float("inf"), "finite and more than 0"),
        ("norm", 0.5, "finite and 1 or more"),
        ("tile", 1.5, "a whole number of rows"),
    ],
)
def test_wrong_figures_are_named(figure, value, words):
    with pytest.raises(ConstraintError) as caught:
        replace(UNIT, **{figure: value})
    assert figure in str(caught.value)
    assert words in str(caught.value)


def test_an_expert_comes_from_its_own_node_if_it_can_and_senders_take_turns():
    before = Placement([[0, 1, 2, 0]], 4)  # nodes {0, 1} and {2, 3}
    after = Placement([[0, 0, 1, 2]], 4)
    sent, received = route_copies(before, after, ranks_per_node=2)
    # Expert 0 to rank 1 from rank 0; expert 1 to rank 2 from rank 1, over nodes; expert 2 to rank 3 from rank 2.
    assert sent.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]
    assert received.tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]
    # Expert 0 is on ranks 0 and 2, and rank 3 gets it from its neighbour.
    sent, _ = route_copies(Placement([[0, 1, 0, 2]], 4), Placement([[0, 1, 2, 0]], 4), ranks_per_node=2)
    assert sent.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    # Rank 0 has sent over its inner link, which does not count on the outer one.
    before = Placement([[0, 1, 1, 2, 2, 0, 1, 2], [0, 1, 0, 1, 2, 1, 2, 2]], 4)
    after = Placement([[0, 1, 0, 2, 2, 0, 1, 2], [0, 1, 0, 1, 2, 0, 2, 2]], 4)
    sent, received = route_copies(before, after, ranks_per_node=2)
    assert sent.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert received.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    layers = Placement([[0, 1, 2, 3, 4, 0]] * 2, 6), Placement([[1, 2, 3, 0, 4, 0]] * 2, 6)
    sent, _ = route_copies(*layers, ranks_per_node=6)
    assert sent[0].tolist() == [1, 2, 2, 2, 0, 1]  # expert 0 came from rank 0 in one layer, from rank 5 in the other


def test_the_experts_of_an_accelerator_by_hand():
    """One call; five slots, of which two have 65 and 3 rows; weights, rows in turn, received rows; then a floor."""
    costs = replace(UNIT, norm=1, tile=64, start_us=2e6, slot_us=3e6, token_us=5e6)
    work = np.array([[68]]), np.array([[2]]), costs.kernel.padded([[65, 3]]).sum(axis=1, keepdims=True)
    assert costs.expert_time(*work, 5)[0, 0] / 1e6 == pytest.approx(2 + 3 * 5**0.8 + 2 + 192 + 5 * 68)
    high = replace(costs, floor_us=1e9)
    assert high.expert_time(*work, 5)[0, 0] / 1e6 == pytest.approx(1000.0, rel=0.001)
    assert costs.expert_time(np.array([0]), np.array([0]), np.array([0]), 5)[0] == 0


def test_the_words_say_whose_figures_they_are():
    usual = CostModel.for_model("deepseek-v3", gpu="B200", phase="prefill")
    assert usual.hardware.startswith(
        "a B200's prefill kernels (measured: SGLang 0.5.10, deepepmoe, fp8_block, b200_sxm"
    )
    assert CostModel.for_model("deepseek-v3", start_us=1.0).hardware == "the figures in the settings"
    with pytest.raises(ConstraintError, match="`phase` is 'train': it must be a kind of step; use decode or prefill"):
        CostModel.for_model("deepseek-v3", phase="train")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConstraintError, match="use H100, H200, B200, GB200, A100, Atlas A3, cpu"):
        CostModel.for_model("deepseek-v3", gpu="H1000")
