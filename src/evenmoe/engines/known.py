"""The engines that evenmoe knows, as read from their source; docs/engines.md says where."""

from __future__ import annotations

from evenmoe.engines.engine import Engine
from evenmoe.engines.modulo import RULE as MODULO

SGLANG = Engine(
    name="sglang",
    version="SGLang 0.5.23",
    format="sglang-location",
    suffixes=(".json", ".pt"),
    rule="even",
    choice="a rank's own, else one that is drawn once for each rank, evenly (--ep-dispatch-algorithm static, default "
    "beside an all-to-all backend), or one drawn for each token (dynamic)",
    options=(
        "--ep-size {ranks}",
        "--ep-num-redundant-experts {redundant}",
        "--init-expert-location {path}",
    ),
    balancer_words="--enable-eplb with --eplb-algorithm deepseek",
    window=1000,
    interval=1000,
    notes=("with --enable-eplb the placement of the file lasts for --eplb-rebalance-num-iterations, 1000, steps",),
)

VLLM = Engine(
    name="vllm",
    version="vLLM 0.33.0",
    format="vllm-layer-map",
    rule="token",
    choice="by a hash of the token's row, the same on every rank",
    options=(
        "--enable-expert-parallel",
        "--enable-eplb",
        '--eplb-config \'{"num_redundant_experts": {redundant}, "window_size": 1000, "step_interval": 3000}\'',
    ),
    loads_file=False,
    balancer_words="policy default",
    window=1000,
    interval=3000,
    notes=(
        "vLLM 0.33.0 starts from no placement in a file (the format is that of pull request 53022): with these options "
        "it uses its own balancer",
    ),
)

TENSORRT_LLM = Engine(
    name="tensorrt-llm",
    version="TensorRT-LLM, main, read at 0e626045",
    format="tensorrt-llm",
    suffixes=(".yaml", ".yml", ".json"),
    uneven=True,
    rule="occurrence",
    choice="an expert's replicas in turn, counted over 1,024 assignments of a rank",
    options=(
        "moe_expert_parallel_size: {ranks}",
        "moe_config: {backend: WIDEEP, load_balancer: {path}}",
    ),
    balancer_words="its greedy replication and placement, offline (layer_updates_per_iter: 0)",
    notes=(
        "lines of the YAML file of LLM options; layers have the model's own numbers (--first-layer)",
        "layer_updates_per_iter above 0 rebalances online, from this placement on",
    ),
)

VLLM_ASCEND = Engine(
    name="vllm-ascend",
    version="vllm-ascend 182b75ea",
    format="ascend-map",
    suffixes=(".json",),
    rule=MODULO,
    choice="replica rank mod replicas (with tensor parallelism: (TP rank + DP rank + expert) mod replicas)",
    options=(
        "--enable-expert-parallel",
        '--additional-config \'{"eplb_config": {"expert_map_path": "{path}"}}\'',
    ),
    balancer_words='policy 1 of "dynamic_eplb" (the default, policy 2, also bounds what it moves)',
    window=600,
    interval=650,
    notes=('with "dynamic_eplb": true the environment needs DYNAMIC_EPLB=true, and the placement lasts for 650 steps',),
)

MINDIE = Engine(
    name="mindie",
    version="MindIE, as msit's documentation has it, for its source is not open",
    format="ascend-map",
    suffixes=(".json",),
    rule="rank",
    choice="that of Ascend's operator in balance mode 0: rank r takes replica r // ceil(ranks / replicas)",
    options=('models.deepseekv2.eplb: {"level": 1, "expert_map_file": "{path}"}',),
    balancer_words="msit's greedy algorithm, offline",
    notes=("replicas that the rank rule never reaches stay idle here: `evenmoe check` names them",),
)

EVENMOE = Engine(
    name="evenmoe",
    version="evenmoe",
    format="evenmoe-placement",
    rule="batch",
    choice="the best split of every batch",
    runs=("rank", "token", "occurrence"),
    balancer_words="the published greedy balancer, under the same rule",
    keeps_order=True,
    options=(
        'em.ExpertParallel(group, em.read("{path}").placement.eplb_table(layer), num_slots={slots}, rule="batch")',
    ),
)
