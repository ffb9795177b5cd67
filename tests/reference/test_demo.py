"""The demo of the original page, step by step (§7), at its real size.

16 devices: ep 8, tp 2, Bs 8, H 7168, K 3. Every token goes to the experts 0, 1, 2; the experts do nothing; weights 0.1.
The page fills its bf16 tensors with the integer 1, i.e. the subnormal u = 2⁻¹³³; true ones were surely meant. Both run.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evenmoe.reference.combine import accumulate, combine, combine_add_rms_norm
from evenmoe.reference.dispatch import dispatch
from evenmoe.reference.update_expert import update_expert

EP, BS, H, K = 8, 8, 7168, 3
U_BITS, ONE_BITS = 0x0001, 0x3F80


def filled(bits: int, *shape: int) -> torch.Tensor:
    return torch.full(shape, bits, dtype=torch.int16).view(torch.bfloat16)


def bits_of(tensor: torch.Tensor) -> set[int]:
    return set(tensor.view(torch.int16).flatten().tolist())


@pytest.fixture(scope="module")
def balanced_ids():
    table = torch.tensor([[1, expert] for expert in range(8)], dtype=torch.int32)
    ids = torch.tensor([[0, 1, 2]] * BS, dtype=torch.int32)
    return [update_expert(ids, table, local_rank_id=rank, world_size=EP)[0] for rank in range(EP)]


class Demo:
    """One run of the chain: dispatch, then combine_add_rms_norm of the rows as received."""

    def __init__(self, balanced_ids, bits: int, tp: int) -> None:
        self.tp, self.bits = tp, bits
        self.ids = [ids for ids in balanced_ids for _ in range(tp)]
        n = EP * tp
        self.dispatched = dispatch([filled(bits, BS, H)] * n, self.ids, global_bs=64, **self.sizes)
        self.rows = [result.expand_x for result in self.dispatched]
        self.scales = [torch.full((BS, K), 0.1)] * n
        self.shared = {"shared_expert_x": [filled(bits, BS, 1, H)] * n, **self.sizes}
        self.results = combine_add_rms_norm(
            self.rows,
            self.ids,
            self.dispatched,
            self.scales,
            [filled(bits, BS, 1, H)] * n,
            [filled(bits, BS, 1, H)] * n,
            norm_eps=1e-6,
            **self.shared,
        )

    @property
    def sizes(self):
        return {"num_experts": 8, "tp_world_size": self.tp, "shared_expert_num": 0, "shared_expert_rank_num": 0}


@pytest.fixture(scope="module", params=[U_BITS, ONE_BITS], ids=["u", "one"])
def tp2(request, balanced_ids):
    return Demo(balanced_ids, request.param, 2)


def test_step_1_the_ids_stay(balanced_ids):
    assert all(ids.tolist() == [[0, 1, 2]] * BS for ids in balanced_ids)


def test_step_2_dispatch(tp2):
    for d, result in enumerate(tp2.dispatched):
        rank = d // 2
        assert result.expand_x.shape == (128, H)
        assert result.assist_info_for_combine.shape == (8192,)
        assert not result.dynamic_scales.any()
        assert not result.expand_scales.any()
        if rank >= K:
            assert bits_of(result.expand_x) == {0}
            assert not result.assist_info_for_combine.any()
            assert result.ep_recv_counts.tolist() == [0] * 16
            assert (result.tp_recv_counts.tolist(), result.expert_token_nums.tolist()) == ([0, 0], [0])
            continue
        assert bits_of(result.expand_x) == {tp2.bits}
        assist = [number for source in range(EP) for token in range(BS) for number in (source, token, rank)]
        assert result.assist_info_for_combine[:192].tolist() == assist
        assert not result.assist_info_for_combine[192:].any()
        assert result.ep_recv_counts.tolist() == [8, 16, 24, 32, 40, 48, 56, 64] * 2
        assert (result.tp_recv_counts.tolist(), result.expert_token_nums.tolist()) == ([64, 64], [128])


def test_step_3_combine_add_rms_norm(tp2):
    want_x, want_rstd, want_y = {
        U_BITS: (0x0003, np.float32(999.99994), 0x0000),
        ONE_BITS: (0x4026, np.float32(0.38461536), 0x3F80),  # 2.59375 and 1.0; §7 prints 0.3846153
    }[tp2.bits]
    for y, rstd, x in tp2.results:
        assert (y.shape, rstd.shape, x.shape) == ((BS, 1, H), (BS, 1, 1), (BS, 1, H))
        assert bits_of(x) == {want_x}
        assert set(rstd.flatten().tolist()) == {float(want_rstd)}
        assert bits_of(y) == {want_y}


@pytest.mark.parametrize("tp2", [ONE_BITS], indirect=True)
def test_rstd_of_true_ones_is_close_to_the_exact_one(tp2):
    """Relative, u = 2⁻²⁴: 5 roundings make x32, so 10u in its square; square, share 1/H and product 3u, 13 levels of
    the tree: ms within 26u, its root within 13u; adding epsilon, root and quotient 3u."""
    for _, rstd, _ in tp2.results:
        assert rstd[0].item() == pytest.approx(1.0 / np.sqrt(6.76 + 1e-6), rel=16 * 2.0**-24)


@pytest.mark.parametrize("tp2", [U_BITS], indirect=True)
def test_the_sum_before_rounding(tp2):
    """x32 of the literal demo is 170393·2⁻¹⁴⁹ = 2.59999u (u = 65536·2⁻¹⁴⁹): fp32 keeps subnormals."""
    sums = accumulate(tp2.rows, tp2.ids, tp2.dispatched, tp2.scales, **tp2.shared)
    assert {value * 2.0**149 for value in sums[5].values.flatten().tolist()} == {170393.0 - 65536.0}


@pytest.mark.parametrize(("bits", "want_x", "want_y"), [(U_BITS, 0x0002, 0x0000), (ONE_BITS, 0x4013, 0x3F80)])
def test_without_tp(balanced_ids, bits, want_x, want_y):
    """0.3 + 1 + 1 = 2.3: 2u, or 2.296875 with true ones."""
    demo = Demo(balanced_ids, bits, 1)
    for y, _, x in demo.results:
        assert (bits_of(x), bits_of(y)) == ({want_x}, {want_y})
    assert all(result.expand_x.shape == (64, H) for result in demo.dispatched)
    assert all(result.tp_recv_counts.tolist() == [0] for result in demo.dispatched)


def test_plain_combine_rounds_the_sum_without_the_residual(tp2):
    """0.6 + 1: 1.6u → 2u; 1.6 → bf16 1.6015625."""
    want = {U_BITS: 0x0002, ONE_BITS: 0x3FCD}[tp2.bits]
    for result in combine(tp2.rows, tp2.ids, tp2.dispatched, tp2.scales, **tp2.shared):
        assert bits_of(result) == {want}
