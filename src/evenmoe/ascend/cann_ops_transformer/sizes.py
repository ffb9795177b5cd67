"""How large a communication buffer must be, in MB: the formulas of the torch extension (§15, §16)."""

from __future__ import annotations

from evenmoe.errors import require

MEBIBYTE = 1 << 20
COMM_ALGS = ("", "fullmesh_v1", "fullmesh_v2")
_COMM_ALG_RULE = 'must be "", "fullmesh_v1" or "fullmesh_v2"'


def low_latency_megabytes(
    world_size: int,
    num_max_dispatch_tokens_per_rank: int,
    hidden: int,
    num_moe_expert: int,
    topk: int,
    num_shared_expert: int,
    num_shared_expert_ranks: int,
    comm_alg: str,
) -> int:
    """What `HCCL_BUFFSIZE` must be for `MoeDistributeBuffer`, in MB; HCCL allocates twice that.

    >>> low_latency_megabytes(16, 8, 7168, 32, 8, 1, 1, "fullmesh_v1")
    6
    """
    for name, value, low, high in (
        ("world_size", world_size, 2, 768),
        ("hidden", hidden, 1024, 8192),
        ("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 1, 512),
        ("num_moe_expert", num_moe_expert, 1, 1024),
        ("topk", topk, 1, 16),
        ("num_shared_expert", num_shared_expert, 0, 4),
    ):
        _check_range(name, value, low, high)
    rule, fix = f"must be below world_size {world_size}", "leave a rank for the MoE experts"
    require(num_shared_expert_ranks < world_size, "num_shared_expert_ranks", num_shared_expert_ranks, rule, fix)
    local = num_moe_expert // (world_size - num_shared_expert_ranks)
    value = f"{num_moe_expert}, {local} on each rank, times {world_size} ranks = {local * world_size}"
    rule, fix = "must keep experts per rank times world_size at 1 to 2048", "use another number of experts"
    require(1 <= local * world_size <= 2048, "num_moe_expert", value, rule, fix)
    require(comm_alg in COMM_ALGS, "comm_alg", repr(comm_alg), _COMM_ALG_RULE, 'use ""')
    sent = _aligned(2 * hidden, 32) + 44
    # fullmesh_v2 carries 480 bytes in each block of 512.
    sent = _aligned(sent, 480) // 480 * 512 if comm_alg == "fullmesh_v2" else _aligned(sent, 512)
    returned = _aligned(2 * hidden, 512) * (topk + num_shared_expert)
    per_token = sent * world_size * local + returned
    return _halved(2 * num_max_dispatch_tokens_per_rank * per_token + MEBIBYTE)


def elastic_megabytes(world_size: int, num_max_tokens_per_rank: int, hidden: int, num_experts: int, topk: int) -> int:
    """What `HCCL_BUFFSIZE` must be for `ElasticBuffer`, in MB; HCCL allocates twice that.

    >>> elastic_megabytes(2, 128, 4096, 8, 4)
    4
    """
    _check_range("num_experts", num_experts, 2, 2048)
    _check_range("topk", topk, 1, 32)
    state = world_size * (_aligned(num_experts // world_size * 4, 512) + 3 * 512) + num_max_tokens_per_rank * topk * 512
    row = _aligned(2 * hidden, 32)
    slot = _aligned(row + 2 * _aligned(4 * topk, 32) + 32, 512)
    back = _aligned(row + 32, 512) * topk
    return _halved(state + num_max_tokens_per_rank * (world_size * slot + back))


def engram_bytes(num_entries: int, hidden: int, element_size: int) -> int:
    """Bytes of host memory for a table: rows of whole 32 bytes, all of them whole 2 MiB.

    >>> engram_bytes(10000, 4096, 2)
    83886080
    """
    rule, fix = "must be 0 or more", "use 0 for an empty table"
    require(num_entries >= 0, "num_entries", num_entries, rule, fix)
    rule = "must be a positive multiple of 128"
    require(hidden > 0 and hidden % 128 == 0, "hidden", hidden, rule, "pad the rows of the table")
    return _aligned(_aligned(hidden * element_size, 32) * num_entries, 2 * MEBIBYTE)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    require(low <= value <= high, name, value, f"must be {low} to {high}", f"use {low} to {high}")


def _aligned(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _halved(size: int) -> int:
    """Bytes as whole MB, an even number of them, and half of that."""
    return _aligned(_aligned(size, MEBIBYTE) // MEBIBYTE, 2) // 2
