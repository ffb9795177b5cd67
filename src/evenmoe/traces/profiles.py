"""What the measured traces show, and the parameters of synthetic traces like them.

The figures are medians over layers of the functions in `statistics`, `common_factor_share` that of all layers together.
Those of synthetic traces are means over seeds 0 and 1, with windows of one request of the mean measured length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evenmoe.errors import ConstraintError
from evenmoe.traces.models import ModelShape


@dataclass(frozen=True)
class TraceParameters:
    """The four parameters of a trace.

    Attributes:
        skew: standard deviation of the experts' log-popularity, at least 0.
        drift: standard deviation, between requests, of one expert's log-popularity; at least 0.
        locality: mean probability, 0 to below 1, that an expert's luck with a token stays for the next token. Experts
            differ: the probability is Beta(a, 1) over experts, so that neighbors n tokens apart resemble each other
            as a / (a + n), which is as slow as measured.
        common_factor_share: 0 to 1, the part of drift's variance in the strongest of the factors that all layers have
            in common.
        ceiling: standard deviations above the mean at which an expert's constant popularity is cut off, as balancing
            losses do in some models; 4.0, the default, is as good as none.
    """

    skew: float
    drift: float
    locality: float
    common_factor_share: float
    ceiling: float = 4.0


@dataclass(frozen=True)
class Measurement:
    """Measured traces of one model, and the parameters fitted to them.

    Attributes:
        sources: what was measured: file of routing, its origin.
        shape: (MoE layers, experts, top-k) of the measured model.
        windows, tokens: requests, and their mean number of tokens.
        parameters: fitted parameters.
        figures: statistic -> (measured, synthetic, largest relative difference that a test lets through). The number
            behind a name is the factors of `common_factor_share` or the lag of `locality`.
    """

    sources: tuple[str, ...]
    shape: tuple[int, int, int]
    windows: int
    tokens: int
    parameters: TraceParameters
    figures: Mapping[str, tuple[float, float, float]]


MEASUREMENTS: dict[str, Measurement] = {
    # 89 requests of decoding: MMLU-Pro, fact completion, instructions. All four parameters and the ceiling fitted.
    "gpt-oss-20b": Measurement(
        ("gpt_oss_20b_mmlu_pro_and_other.npz (AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting, 72b368f60045)",),
        (24, 32, 4),
        89,
        330,
        TraceParameters(skew=1.037, drift=1.071, locality=0.243, common_factor_share=0.410, ceiling=1.137),
        {
            "gini": (0.383, 0.382, 0.02),
            "skew": (2.415, 2.42, 0.02),
            "drift": (0.908, 0.908, 0.02),
            "common_factor_share_1": (0.258, 0.258, 0.02),
            "common_factor_share_4": (0.494, 0.513, 0.05),
            "common_factor_share_16": (0.79, 0.756, 0.05),
            "locality_1": (1.389, 1.389, 0.02),
            "locality_2": (1.185, 1.2, 0.02),
            "locality_4": (1.143, 1.104, 0.05),
            "locality_8": (1.128, 1.039, 0.1),
        },
    ),
    # 173 samples of three tasks. Three tasks are two factors, and samples of one task share a template: the first
    # factor has 0.57 of the drift, which no power law reaches here (0.43 at most). Mixtral's parameter stands in.
    "deepseek-v2-lite": Measurement(
        tuple(
            f"deepseek_v2_lite_esft_{task}.npz (deepseek-ai/ESFT, 579a7711e4b3)"
            for task in ("intent", "law", "summary")
        ),
        (26, 64, 6),
        173,
        145,
        TraceParameters(skew=0.493, drift=0.44, locality=0.222, common_factor_share=0.504),
        {
            "gini": (0.257, 0.256, 0.02),
            "skew": (2.603, 2.689, 0.05),
            "drift": (0.515, 0.519, 0.02),
            "locality_1": (1.945, 1.943, 0.02),
            "locality_2": (1.436, 1.483, 0.05),
            "locality_4": (1.252, 1.222, 0.05),
            "locality_8": (1.196, 1.084, 0.1),
        },
    ),
    # Six requests of greedy decoding: too few for the common factors' share, which is gpt-oss-20b's.
    "deepseek-v4-flash": Measurement(
        ("deepseek_v4_flash_decode.npz (imanu86/reap-loop, 7c90f35d2196)",),
        (40, 256, 6),
        6,
        281,
        TraceParameters(skew=1.383, drift=1.731, locality=0.436, common_factor_share=0.410),
        {
            "gini": (0.691, 0.69, 0.02),
            "skew": (15.392, 13.545, 0.15),
            "drift": (1.228, 1.182, 0.05),
            "locality_1": (2.123, 2.166, 0.05),
            "locality_2": (1.784, 1.701, 0.05),
            "locality_4": (1.434, 1.369, 0.05),
            "locality_8": (1.331, 1.16, 0.15),
        },
    ),
    # One prompt of 109 tokens, so skew and drift are one figure; they are divided so that 1,027 steps, whose busiest
    # expert has 12.3 times the mean (cbx6664/sglang, branch oci, printed output), are about right: 10.2. Locality is
    # DeepSeek-V4-Flash's, the common factors' share gpt-oss-20b's.
    "deepseek-v3": Measurement(
        ("deepseek_v3_single_prompt.npz (cbx6664/sglang, b8efbccde668)",),
        (58, 256, 8),
        1,
        109,
        TraceParameters(skew=1.1, drift=0.6, locality=0.436, common_factor_share=0.410),
        {"gini": (0.673, 0.703, 0.05), "skew": (15.266, 14.312, 0.1)},
    ),
    # 14,042 prompts of MMLU. Only loads: locality is DeepSeek-V2-Lite's.
    "mixtral-8x7b": Measurement(
        ("mixtral_8x7b_mmlu.npz (ajtejankar/mixtral-vis-moe, 5c2f185d5797)",),
        (32, 8, 2),
        2000,
        762,
        TraceParameters(skew=0.180, drift=0.218, locality=0.222, common_factor_share=0.504),
        {
            "gini": (0.073, 0.073, 0.02),
            "skew": (1.221, 1.212, 0.02),
            "drift": (0.182, 0.182, 0.02),
            "common_factor_share_1": (0.324, 0.327, 0.02),
            "common_factor_share_4": (0.587, 0.579, 0.02),
            "common_factor_share_16": (0.822, 0.768, 0.1),
        },
    ),
    # Six domains of 205,000 tokens, three layers. Locality is DeepSeek-V2-Lite's, the share gpt-oss-20b's.
    "olmoe-1b-7b": Measurement(
        ("olmoe_1b7b_base.npz (allenai/OLMoE, 357454f4f647)",),
        (3, 64, 8),
        6,
        205_000,
        TraceParameters(skew=0.416, drift=1.130, locality=0.222, common_factor_share=0.410),
        {"gini": (0.254, 0.254, 0.02), "skew": (2.951, 2.45, 0.2), "drift": (0.714, 0.715, 0.02)},
    ),
}

#: Whose parameters a model without a measured trace takes: one with a router trained alike.
NEAREST: dict[str, str] = {
    "deepseek-v3.2": "deepseek-v3",  # sigmoid scores with a balancing bias
    "glm-4.5": "deepseek-v3",
    "kimi-k2": "deepseek-v3",
    "gpt-oss-120b": "gpt-oss-20b",
    "qwen3-30b-a3b": "olmoe-1b-7b",  # softmax with an auxiliary loss, many small experts
    "qwen3-235b-a22b": "olmoe-1b-7b",
    "llama-4-scout": "mixtral-8x7b",  # few large experts
    "llama-4-maverick": "mixtral-8x7b",
}


def parameters_of(shape: ModelShape) -> TraceParameters:
    """The parameters of a model, measured or its nearest's.

    Raises:
        ConstraintError: a shape that is not in MODELS.
    """
    measured = MEASUREMENTS.get(NEAREST.get(shape.name, shape.name))
    if measured is None:
        raise ConstraintError(
            "model",
            repr(shape.name),
            f"must be one that was measured or resembles one, {', '.join([*MEASUREMENTS, *NEAREST])}",
            "name your shape after the one it resembles, and pass parameters to differ",
        )
    return measured.parameters
