"""What is compiled of a batch: recorded tokens on source ranks, or random counts where only loads are known."""

from __future__ import annotations

import math

import numpy as np

from evenmoe.compiled import compiled

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_GUIDES = 64  # entries of the table that says where to begin looking; one per top six bits of a number
_SIGMAS = 8.0  # beyond, a binomial count has probability below 1e-14, and numbers of 32 bits cannot tell it from zero


@compiled
def assign_tokens(seq_start, chunk, position, end, following, tokens):
    """Fill `tokens` int64 (streams, chunk) with the numbers of the tokens that every stream takes in the next step.

    A stream works on one request at a time and takes its next `chunk` tokens. Where the request ends it goes on at
    once with the request that nobody has taken yet; after the last request comes the first again. Streams take turns
    in order.

    Args:
        seq_start: int64 (requests + 1,), of which at least one is not empty.
        chunk: tokens of a stream per step.
        position, end: int64 (streams,), the next token of each stream and the end of its request; updated.
        following: the next request to be taken.
        tokens: int64 (streams, chunk), filled.

    Returns:
        The next request to be taken after this step.
    """
    requests = seq_start.size - 1
    for stream in range(position.size):
        for i in range(chunk):
            while position[stream] == end[stream]:
                position[stream] = seq_start[following]
                end[stream] = seq_start[following + 1]
                following = (following + 1) % requests
            tokens[stream, i] = position[stream]
            position[stream] += 1
    return following


@compiled
def count_assignments(experts, counts):
    """Count the assignments in `counts` int16 or int32 (E, G): experts integers (G, B, K)."""
    num_ranks, num_tokens, top_k = experts.shape
    counts[:] = 0
    for rank in range(num_ranks):
        for token in range(num_tokens):
            for k in range(top_k):
                counts[experts[rank, token, k], rank] += 1


@compiled
def mix(value):
    """SplitMix64's output function: 64 well-mixed bits of a counter (Steele, Lea, Flood, OOPSLA 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@compiled
def layer_key(seed, step, layer):
    """The state that the random numbers of one layer of one step start from."""
    key = mix(np.uint64(seed) + _GOLDEN)
    key = mix(key + np.uint64(step) + _GOLDEN)
    return mix(key + np.uint64(layer) + _GOLDEN)


@compiled
def draw_counts(chance, num_tokens, seed, step, layer, counts):
    """Fill `counts` (E, G) with binomial numbers: of `num_tokens` tokens of a rank, each goes to expert e by chance.

    Args:
        chance: float64 (E, R), R = 1 for the same chance on every rank, else one column per rank.
        num_tokens: tokens per rank.
        seed, step, layer: decide the random numbers.
        counts: int16 or int32 (E, G), filled.

    Inversion with numbers of 32 bits, so that probabilities are met within 2⁻³².
    """
    num_experts, num_ranks = counts.shape
    key = layer_key(seed, step, layer)
    table = np.empty(num_tokens + 1, np.int64)
    weight = np.empty(num_tokens + 1)
    guide = np.empty(_GUIDES, np.int64)
    for expert in range(num_experts):
        state = mix(key + np.uint64(expert) * _GOLDEN)
        least = 0
        bits = np.uint64(0)
        for rank in range(num_ranks):
            if rank == 0 or chance.shape[1] > 1:
                least = _tabulate(chance[expert, rank if chance.shape[1] > 1 else 0], num_tokens, weight, table, guide)
            if rank % 2 == 0:
                state += _GOLDEN
                bits = mix(state)
            number = np.int64(bits & np.uint64(0xFFFFFFFF))
            bits >>= np.uint64(32)
            above = guide[number >> 26]
            while number >= table[above]:
                above += 1
            counts[expert, rank] = least + above


@compiled
def _tabulate(chance, num_tokens, weight, table, guide):
    """Cumulative probabilities × 2³² of a binomial number from the returned least value on, and where to look first."""
    if chance <= 0.0 or chance >= 1.0:
        table[0] = 1 << 32
        guide[:] = 0
        return 0 if chance <= 0.0 else num_tokens
    mean = num_tokens * chance
    reach = _SIGMAS * math.sqrt(mean * (1.0 - chance)) + 12.0
    least = max(0, int(mean - reach))
    most = min(num_tokens, int(mean + reach) + 1)
    center = min(int(mean), most)
    odds = chance / (1.0 - chance)
    # By ratios from the center outwards: (1 − chance)^tokens itself underflows for long batches.
    weight[center - least] = 1.0
    high = low = center
    while high < most or low > least:  # both ways at once, since each step waits for the division of the one before
        if high < most:
            weight[high + 1 - least] = weight[high - least] * odds * (num_tokens - high) / (high + 1)
            high += 1
        if low > least:
            weight[low - 1 - least] = weight[low - least] / odds * low / (num_tokens - low + 1)
            low -= 1
    size = most - least + 1
    below = 0.0
    for above in range(size):
        below += weight[above]
        weight[above] = below
    scale = 4294967296.0 / below
    for above in range(size - 1):
        table[above] = np.int64(weight[above] * scale)
    table[size - 1] = 1 << 32
    above = 0
    for entry in range(_GUIDES):
        while table[above] <= entry << 26:
            above += 1
        guide[entry] = above
    return least


@compiled
def share_by_row(counts, num_tokens, first, slots, seed, step, layer, per_slot):
    """Fill `per_slot` int16 or int32 (S, G) by the token rule: row i of a rank's batch takes replica i mod count.

    Which rows go to an expert is drawn without replacement.

    Args:
        counts: int16 or int32 (E, G), rows that go to each expert on every rank, at most `num_tokens`.
        num_tokens: rows of a rank's batch.
        first, slots: the replicas, as in `layer_kernels`.
        seed, step, layer: decide the random numbers.
    """
    key = mix(layer_key(seed, step, layer))  # not the numbers that the counts were drawn with
    for expert in range(counts.shape[0]):
        replicas = slots[first[expert] : first[expert + 1]]
        if replicas.size == 1:
            per_slot[replicas[0]] = counts[expert]
        else:
            residues = np.empty((replicas.size, counts.shape[1]), np.int32)
            _draw_rows(counts[expert], num_tokens, mix(key + np.uint64(expert)), residues)
            for replica in range(replicas.size):
                per_slot[replicas[replica]] = residues[replica]


@compiled
def _draw_rows(counts, num_tokens, key, residues):
    """Fill int32 (count, G): on every rank, the expert's rows by row mod count."""
    taken = np.full(num_tokens, -1, np.int64)
    state = key
    residues[:] = 0
    for rank in range(counts.size):
        for _ in range(counts[rank]):
            while True:
                state += _GOLDEN
                row = np.int64(((mix(state) >> np.uint64(32)) * np.uint64(num_tokens)) >> np.uint64(32))
                if taken[row] != rank:
                    break
            taken[row] = rank
            residues[row % residues.shape[0], rank] += 1
