"""Compiled dealing of recorded tokens to the source ranks."""

from __future__ import annotations

from evenmoe.compiled import compiled


@compiled
def deal_tokens(seq_start, chunk, position, end, following, tokens):
    """Fill `tokens` int64 (lanes, chunk) with the numbers of the tokens that every lane takes in the next step.

    A lane works on one request at a time and takes its next `chunk` tokens. Where the request ends it goes on at once
    with the request that nobody has taken yet; after the last request comes the first again. Lanes are served in order.

    Args:
        seq_start: int64 (requests + 1,), of which at least one is not empty.
        chunk: tokens of a lane per step.
        position, end: int64 (lanes,), the next token of each lane and the end of its request; updated.
        following: the next request to be taken.
        tokens: int64 (lanes, chunk), filled.

    Returns:
        The next request to be taken after this step.
    """
    requests = seq_start.size - 1
    for lane in range(position.size):
        for i in range(chunk):
            while position[lane] == end[lane]:
                position[lane] = seq_start[following]
                end[lane] = seq_start[following + 1]
                following = (following + 1) % requests
            tokens[lane, i] = position[lane]
            position[lane] += 1
    return following
