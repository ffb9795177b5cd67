"""`synthesize`: counts, tokens, requests, ranks and groups are what its docstring says; sizes awkward on purpose."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenmoe.errors import ConstraintError
from evenmoe.traces import ModelShape, Trace, load_trace, save_trace, synthesize
from evenmoe.traces.sampling import (
    TraceParameters,
    draw_tokens,
    layer_popularity,
)
from evenmoe.traces.statistics import common_factor_share, drift, gini, locality, skew
from evenmoe.traces.synthesis import small_trace
from tests.effort import effort


def counted(trace: Trace, windows: int, tokens: int, ranks: int) -> np.ndarray:
    """(T, R, L, E) by plain loops; rank r owns tokens r n / R, rounded down, to (r + 1) n / R of each window."""
    assert trace.routing is not None
    load = np.zeros((windows, ranks, trace.num_layers, trace.num_experts), np.int64)
    for window in range(windows):
        for rank in range(ranks):
            for token in range(rank * tokens // ranks, (rank + 1) * tokens // ranks):
                for layer, chosen in enumerate(trace.routing[window * tokens + token]):
                    load[window, rank, layer, chosen] += 1
    return load


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 2**62),
)
def test_counts_and_tokens(windows, tokens, requests, request_windows, ranks, experts, top_k, seed):
    requests, ranks, top_k = min(requests, tokens), min(ranks, tokens), min(top_k, experts)
    shape = ModelShape("olmoe-1b-7b", 2, experts, top_k, 1, 1)
    sizes = {
        "num_windows": windows,
        "tokens_per_window": tokens,
        "requests": requests,
        "request_windows": request_windows,
        "source_ranks": ranks,
        "seed": seed,
    }
    drawn = synthesize(shape, routing=True, **sizes)
    assert drawn.routing is not None
    assert drawn.routing.shape == (windows * tokens, 2, top_k)
    assert all(len(set(row)) == top_k for row in drawn.routing.reshape(-1, top_k).tolist())
    assert drawn.load_by_rank is not None
    assert drawn.load_by_rank.tolist() == counted(drawn, windows, tokens, ranks).tolist()
    assert drawn.seq_start is not None
    assert drawn.seq_start.tolist() == [
        *(w * tokens + r * tokens // requests for w in range(windows) for r in range(requests)),
        windows * tokens,
    ]
    owned = np.diff(np.arange(ranks + 1) * tokens // ranks)
    for trace in (drawn, synthesize(shape, **sizes)):
        assert trace.load_by_rank is not None
        assert (trace.load == trace.load_by_rank.sum(axis=1)).all()
        assert (trace.load_by_rank.sum(axis=3) == top_k * owned[:, None]).all()
        assert (trace.load_by_rank <= owned[:, None, None]).all()
        assert trace.load.min() >= 0
    alone = synthesize(shape, **{**sizes, "source_ranks": None})
    assert alone.load_by_rank is None
    assert (alone.load.sum(axis=2) == tokens * top_k).all()
    assert (alone.load <= tokens).all()


def test_the_same_arguments_give_the_same_trace(tmp_path):
    for number, routing in enumerate((False, True, False, True)):
        save_trace(
            synthesize("mixtral", num_windows=3, tokens_per_window=65, routing=routing), tmp_path / f"{number}.npz"
        )
    files = [(tmp_path / f"{number}.npz").read_bytes() for number in range(4)]
    assert files[0] == files[2]
    assert files[1] == files[3]
    trace = load_trace(tmp_path / "1.npz")
    assert trace.metadata["model"] == "mixtral-8x7b"
    assert trace.metadata["tokens_per_window"] == 65
    assert trace.metadata["seed"] == 0
    one, two = (synthesize("mixtral", num_windows=3, tokens_per_window=65, seed=seed).load for seed in (0, 1))
    assert (one != two).any()


@pytest.mark.parametrize("model", ["gpt-oss-20b", "mixtral-8x7b", "deepseek-v2-lite", "deepseek-v3"])
def test_counts_are_distributed_as_tokens_are(model):
    """The same popularity either way. A probability from 4,096 tokens has a standard deviation of at most 0.0078, so
    of two drawn apart at most 5.5 × 0.011 = 0.06 over some 3,000 experts, and `pick_probability` is off by 0.05."""
    sizes = {"num_windows": 4, "tokens_per_window": 4096, "requests": 1, "num_layers": 3, "locality": 0.0, "seed": 3}
    tokens, counts = (synthesize(model, skew=1.0, routing=routing, **sizes).load / 4096 for routing in (True, False))
    assert np.abs(tokens - counts).max() < 0.11
    assert np.abs(tokens.mean(axis=0) - counts.mean(axis=0)).mean() < 0.012


def test_extreme_popularity_is_no_trouble():
    load = synthesize("gpt-oss-20b", num_windows=2, tokens_per_window=50, requests=1, skew=8.0, num_layers=2).load
    assert (load.sum(axis=2) == 200).all()
    assert load.max() == 50
    even = synthesize("gpt-oss-20b", num_windows=2, tokens_per_window=50_000, skew=0, drift=0, locality=0).load
    # 96 × 16 binomial counts of mean 6,250 and standard deviation 74: none is six of them away.
    assert np.abs(even - 6250).max() < 6 * 74 + 1


def test_a_request_begins_afresh():
    """Sticky to the end within a run; the next run's first token owes nothing to the last one."""
    starts = np.arange(0, 2001, 4)
    chosen = draw_tokens(
        np.zeros((1, 64)), np.ones(64), np.zeros(500, np.int64), starts, 2, (1, 1), np.random.default_rng(4)
    )
    runs = np.sort(chosen).reshape(500, 4, 2)
    assert (runs == runs[:, :1]).all()
    assert (runs[1:, 0] == runs[:-1, 0]).all(axis=1).mean() < 0.05


def test_groups_limit_tokens():
    """DeepSeek-V3: the experts of a token are in 4 of 8 groups, and the first choice is the token's own first."""
    trace = synthesize("deepseek-v3", num_windows=1, tokens_per_window=300, num_layers=2, routing=True, skew=0.1)
    assert trace.routing is not None
    groups = np.sort(trace.routing // 32, axis=2)
    used = 1 + (groups[:, :, 1:] != groups[:, :, :-1]).sum(axis=2)
    assert used.max() == 4
    free = synthesize("kimi-k2", num_windows=1, tokens_per_window=300, num_layers=2, routing=True, skew=0.1)
    assert free.routing is not None
    groups = np.sort(free.routing // 48, axis=2)
    assert (1 + (groups[:, :, 1:] != groups[:, :, :-1]).sum(axis=2)).max() > 4


def test_first_choices_are_the_more_popular():
    trace = synthesize("gpt-oss-20b", num_windows=1, tokens_per_window=2000, num_layers=2, routing=True)
    assert trace.routing is not None
    share = trace.load[0] / trace.load[0].sum(axis=1, keepdims=True)
    popular = [np.take_along_axis(share.T, trace.routing[:, :, k].astype(np.intp), axis=0).mean() for k in (0, 3)]
    assert popular[0] > 1.05 * popular[1]


def test_requests_share_windows_and_live_on():
    """More requests at a time drift less together, about as 1 over the root of their number; requests that live longer
    make neighbouring windows alike."""
    sizes = {"num_windows": 96, "tokens_per_window": 8192, "num_layers": 4, "seed": 1, "locality": 0.0}
    alone, sixteen = (float(np.median(drift(synthesize("gpt-oss-20b", requests=n, **sizes).load))) for n in (1, 16))
    assert alone / sixteen == pytest.approx(4, rel=0.25)
    load = synthesize("gpt-oss-20b", requests=4, request_windows=8, **sizes).load.astype(float)
    load -= load.mean(axis=0)
    for apart, expected in ((1, 7 / 8), (4, 4 / 8), (8, 0.0), (12, 0.0)):
        together = (load[apart:] * load[:-apart]).sum() / (load**2).sum() * 96 / (96 - apart)
        assert together == pytest.approx(expected, abs=0.15), apart
    # They end one after the other: one of the four in every second window, not all four in every eighth.
    alike = [(a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()) for a, b in pairwise(load)]
    assert np.mean(np.array(alike) > 0.98) == pytest.approx(0.5, abs=0.06)


def test_many_requests_drift_as_little_as_many():
    """Drawn one by one (64) and as bundles of 16 (1,024); and one of a single token cannot clump."""
    sizes = {"num_windows": 200, "tokens_per_window": 1_000_000, "num_layers": 4, "seed": 1, "locality": 0.0}
    each, bundled = (float(np.median(drift(synthesize("gpt-oss-20b", requests=n, **sizes).load))) for n in (64, 1024))
    assert each / bundled == pytest.approx(4, rel=0.15)
    sizes.update(tokens_per_window=8192, locality=0.5, drift=0.0)
    for requests, least, most in ((8192, 0.95, 1.03), (1, 1.4, 9)):
        load = synthesize("gpt-oss-20b", requests=requests, **sizes).load
        share = load.mean(axis=0) / 8192
        wider = load.std(axis=0) / np.sqrt(8192 * share * (1 - share))
        assert least < wider.mean() < most, requests  # the fixed sum takes 1/32 off a variance


def test_parameters_do_what_they_say():
    def of(name: str, value: float) -> Trace:
        parameters = {"skew": 0.5, "drift": 0.5, "locality": 0.2, "common_factor_share": 0.3, name: value}
        return synthesize(
            "olmoe", num_windows=24, tokens_per_window=200, requests=1, num_layers=4, routing=True, seed=2, **parameters
        )

    for name, statistic in (
        ("skew", lambda t: np.median(gini(t.load))),
        ("skew", lambda t: np.median(skew(t.load))),
        ("drift", lambda t: np.median(drift(t.load))),
        ("locality", lambda t: np.median(locality(t.routing, t.seq_start))),
        ("common_factor_share", lambda t: common_factor_share(t.load, 1)),
    ):
        values = [statistic(of(name, value)) for value in (0.05, 0.4, 0.9)]
        assert values[0] < values[1] < values[2], name
    independent = of("locality", 0.0)
    # 24 requests × 199 pairs × 8 of 64 experts: the overlap is known to under 1 %.
    assert np.abs(locality(independent.routing, independent.seq_start) - 1).max() < 0.04


def test_ceiling_cuts_the_hottest():
    draws = []
    for ceiling in (4.0, 0.5):
        character = TraceParameters(1.0, 0.0, 0.0, 0.0, ceiling)
        draws.append(layer_popularity(4000, np.zeros((1, 64)), character, np.random.default_rng(0))[0][0])
    free, cut = (np.sort(d) for d in draws)
    assert (cut == 0).mean() == pytest.approx(0.31, abs=0.03)  # a normal number passes 0.5 in 31 % of draws
    assert (free == 0).sum() == 1


def test_real_scale_in_time_and_memory():
    """1,000 windows of 128 tokens on each of 320 ranks, in seconds and in less than a gigabyte."""
    made = []
    tracemalloc.start()
    spent = effort(
        lambda: made.append(
            synthesize("deepseek-v3", num_windows=1000, tokens_per_window=40_960, requests=16, request_windows=8)
        ),
        times=1,
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    (trace,) = made
    assert trace.load.shape == (1000, 58, 256)
    assert (trace.load.sum(axis=2) == 8 * 40_960).all()
    assert spent < 1600  # 370 to 430 where this was written (3 s), busy or idle
    assert peak < 1 << 30


ERRORS = [
    ({"num_windows": 0}, "`num_windows` is 0: it must be 1 to 1073741824, a count; pass a whole number in that range."),
    ({"num_windows": 2.0}, "`num_windows` is 2.0: it must be 1 to "),
    ({"tokens_per_window": True}, "`tokens_per_window` is True: it must be 1 to "),
    (
        {"requests": 9, "tokens_per_window": 8},
        "`requests` is 9: it must be 1 to 8, at most one for each token of a window",
    ),
    ({"source_ranks": 9, "tokens_per_window": 8}, "`source_ranks` is 9: it must be 1 to 8, "),
    ({"request_windows": 0}, "`request_windows` is 0: "),
    ({"num_layers": 59}, "`num_layers` is 59: it must be 1 to 58, the MoE layers of deepseek-v3; "),
    ({"seed": -1}, "`seed` is -1: "),
    ({"skew": -0.1}, "`skew` is -0.1: it must be 0 to 8; leave it out for the value of the measured traces."),
    ({"drift": float("nan")}, "`drift` is nan: it must be 0 to 8; "),
    ({"locality": 1.0}, "`locality` is 1.0: it must be 0 to 0.99; "),
    ({"common_factor_share": 1.1}, "`common_factor_share` is 1.1: it must be 0 to 1; "),
    ({"model": "deepseek"}, "`model` is 'deepseek': it must be one of deepseek-moe-16b, "),
    (
        {"model": ModelShape("olmoe-1b-7b", 1, 8, 9, 1, 1)},
        "`model` is of 8 experts in 1 groups, top-9: it must have equal ",
    ),
    ({"model": ModelShape("olmoe-1b-7b", 1, 1 << 17, 9, 1, 1)}, "`model` is of 131072 experts in 1 groups, top-9: "),
    ({"model": ModelShape("olmoe-1b-7b", 1, 8, 2, 1, 1, num_groups=3)}, "`model` is of 8 experts in 3 groups, top-2: "),
    ({"model": ModelShape("mine", 1, 8, 2, 1, 1)}, "`model` is 'mine': it must be one that was measured or resembles"),
    (
        {"num_windows": 10**6},
        "`num_windows` is 1000000, which makes an array of 14848000000 numbers: it must keep every array of the trace "
        "within 536870912 numbers; make fewer windows, ranks or layers, or leave out routing.",
    ),
    ({"num_windows": 1000, "source_ranks": 320}, "`num_windows` is 1000, which makes an array of 4751360000 numbers"),
    ({"tokens_per_window": 1 << 30, "routing": True}, "`num_windows` is 64, which makes an array of "),
]


@pytest.mark.parametrize(("arguments", "text"), ERRORS)
def test_wrong_arguments(arguments, text):
    with pytest.raises(ConstraintError) as caught:
        synthesize(**arguments)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_small_traces_loads_count_its_routing(seed):
    trace = small_trace(seed)
    assert trace.load.shape == (8, 4, 32)
    assert trace.routing is not None
    assert trace.routing.shape == (8 * 256, 4, 4)
    assert (trace.load.dtype, trace.routing.dtype) == (np.int64, np.uint16)
    for window in range(8):
        tokens = trace.routing[256 * window : 256 * (window + 1)]
        for layer in range(4):
            counted = [int((tokens[:, layer] == expert).sum()) for expert in range(32)]
            assert trace.load[window, layer].tolist() == counted
    assert all(len(set(row)) == 4 for row in trace.routing.reshape(-1, 4).tolist())  # distinct experts


def test_the_small_trace_is_skewed_as_real_routing_is():
    """ "About 4" times the mean; over seeds and layers."""
    ratios = [load.max() / load.mean() for seed in range(5) for load in small_trace(seed).load.sum(axis=0)]
    assert 3.3 <= np.median(ratios) <= 5.6
    assert min(ratios) > 2.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_small_traces_windows_drift(seed):
    """Without drift an expert's tokens in a window are binomial: variance over mean at most 7/8 over 8 windows.

    The mean of 128 such ratios scatters by √(2/7)/√128 = 0.05.
    """
    load = small_trace(seed).load.astype(float)
    assert (load.var(axis=0) / load.mean(axis=0)).mean() > 1.5


def test_the_seed_decides_the_small_trace():
    assert (small_trace(3).load == small_trace(3).load).all()
    assert (small_trace(3).routing == small_trace(3).routing).all()
    assert (small_trace(3).load != small_trace(4).load).any()
