"""What is compiled of a batch: recorded tokens on source ranks, or random counts where only loads are known."""

from __future__ import annotations

import math

import numpy as np

from evenmoe.compiled import compiled

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_GUIDES = 64  # entries of the table that says where to begin looking; one per top six bits of a number
# Beyond, a binomial count has probability below 1e-14, and numbers of 32 bits cannot tell it from zero.
_SIGMAS, _FURTHER = 8.0, 12.0
_TABLES = 64  # chances whose weights are made together


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
    num_ranks, columns = counts.shape[1], chance.shape[1]
    key = layer_key(seed, step, layer)
    chances = chance.ravel()
    reach = min(num_tokens, int(_SIGMAS / 2 * math.sqrt(num_tokens) + _FURTHER) + 3)
    weight = np.empty((2 * reach + 1, min(_TABLES, chances.size)))
    total = np.empty(2 * reach + 1)
    table = np.empty(2 * reach + 1, np.int64)
    guide = np.empty(_GUIDES, np.int64)
    state = bits = np.uint64(0)
    for entry in range(chances.size):
        expert, column = entry // columns, entry % columns
        if entry % _TABLES == 0:
            _weigh(chances[entry : entry + _TABLES], num_tokens, reach, weight)
        if column == 0:
            state = mix(key + np.uint64(expert) * _GOLDEN)
        least = _tabulate(chances[entry], num_tokens, weight[:, entry % _TABLES], total, table, guide)
        for rank in range(column, num_ranks if columns == 1 else column + 1):
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
def _range_of(chance, num_tokens):
    """The least, likeliest and largest value of a binomial number, of those that numbers of 32 bits can tell apart."""
    mean = num_tokens * chance
    reach = _SIGMAS * math.sqrt(mean * (1.0 - chance)) + _FURTHER
    most = min(num_tokens, int(mean + reach) + 1)
    return max(0, int(mean - reach)), min(int(mean), most), most


@compiled
def _weigh(chances, num_tokens, reach, weight):
    """Fill `weight` (2 reach + 1, C): row reach + i has how likely the likeliest value + i is, over how likely that is.

    By ratios from the likeliest outwards, as (1 − chance)^tokens itself underflows for long batches: each step waits
    for the division of the one before, so many chances take it together. Only what is in `_range_of` is filled.
    """
    number = chances.size
    odds, high, low = np.ones(number), np.zeros(number), np.zeros(number)
    up = down = 0
    for i in range(number):
        if 0.0 < chances[i] < 1.0:
            least, center, most = _range_of(chances[i], num_tokens)
            odds[i] = chances[i] / (1.0 - chances[i])
            high[i] = low[i] = center
            up, down = max(up, most - center), max(down, center - least)
    here = weight[reach]
    here[:] = 1.0
    for step in range(up):
        before, here = weight[reach + step], weight[reach + step + 1]
        for i in range(number):
            here[i] = np.divide(before[i] * odds[i] * (num_tokens - high[i]), high[i] + 1.0)
            high[i] += 1.0
    for step in range(down):
        before, here = weight[reach - step], weight[reach - step - 1]
        for i in range(number):
            here[i] = np.divide(np.divide(before[i], odds[i]) * low[i], num_tokens - low[i] + 1.0)
            low[i] -= 1.0


@compiled
def _tabulate(chance, num_tokens, weight, total, table, guide):
    """Cumulative probabilities × 2³² of a binomial number from the returned least value on, and where to look first."""
    if chance <= 0.0 or chance >= 1.0:
        table[0] = 1 << 32
        guide[:] = 0
        return 0 if chance <= 0.0 else num_tokens
    least, center, most = _range_of(chance, num_tokens)
    size = most - least + 1
    first = weight.size // 2 + least - center
    below = 0.0
    for above in range(size):
        below += weight[first + above]
        total[above] = below
    scale = 4294967296.0 / below
    for above in range(size - 1):
        table[above] = np.int64(total[above] * scale)
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
