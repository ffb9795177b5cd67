"""Which tokens count, and whose they are: the cases that `generate` and a trainer make."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="this machine lacks transformers, which needs Python 3.11")

from evenmoe.integrations.transformers.batch_rows import BatchRows


class Cache:
    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


def passes(rows: BatchRows, *given: dict) -> list[tuple[list[bool], list[int], bool]]:
    found = []
    for arguments in given:
        rows.begin(arguments)
        batch, length = arguments["input_ids"].shape
        counted, request, decoded = rows.of_tokens(batch * length)
        found.append((counted.tolist(), request.tolist(), decoded))
    return found


def test_a_finished_row_is_padding_from_its_end_on():
    rows = BatchRows(frozenset([7]))
    prompt, steps = torch.tensor([[3, 4], [5, 6]]), [[[8], [7]], [[9], [1]], [[7], [1]]]
    decode = [{"input_ids": torch.tensor(step), "past_key_values": Cache(2 + i)} for i, step in enumerate(steps)]
    found = passes(rows, {"input_ids": prompt}, *decode)
    assert found[0] == ([True] * 4, [0, 0, 1, 1], False)
    assert [counted for counted, _, _ in found[1:]] == [[True, False], [True, False], [False, False]]
    assert all(request == [0, 1] and decoded for _, request, decoded in found[1:])
    assert rows.num_requests == 2


def test_an_end_inside_a_prompt_counts():
    found = passes(BatchRows(frozenset([7])), {"input_ids": torch.tensor([[3, 7, 4]])})
    assert found == [([True] * 3, [0, 0, 0], False)]


class LinearCache(Cache):
    def get_seq_length(self) -> int:
        raise ValueError("there are no attention layers in this cache")


def test_positions_tell_where_the_cache_cannot():
    prompt, step = torch.tensor([[3, 4]]), torch.tensor([[5]])
    found = passes(
        BatchRows(frozenset()),
        {"input_ids": prompt, "cache": LinearCache(0), "position_ids": torch.tensor([[0, 1]])},
        {"input_ids": step, "cache": LinearCache(2), "position_ids": torch.tensor([[2]])},
    )
    assert [(request, decoded) for _, request, decoded in found] == [([0, 0], False), ([0], True)]


def test_every_pass_without_a_cache_is_new_requests():
    ids = torch.tensor([[3, 4]])
    found = passes(BatchRows(frozenset()), {"input_ids": ids}, {"input_ids": ids})
    assert [request for _, request, _ in found] == [[0, 0], [1, 1]]


def test_a_prompt_in_parts_is_one_request_and_no_decoding():
    part = torch.tensor([[3, 4]])
    found = passes(BatchRows(frozenset([3])), {"input_ids": part}, {"input_ids": part, "past_key_values": Cache(2)})
    assert found[1] == ([True, True], [0, 0], False)


def test_masks_of_other_shapes_leave_nothing_out():
    ids = torch.tensor([[3, 4]])
    for mask in (torch.zeros(1, 1, 2, 2), {"full_attention": None}, None, torch.zeros(1, 1)):
        assert passes(BatchRows(frozenset()), {"input_ids": ids, "attention_mask": mask})[0][0] == [True, True]


def test_tokens_that_are_no_rows_are_one_request():
    rows = BatchRows(frozenset())
    rows.begin({"inputs_embeds": torch.zeros(2, 3, 4), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])})
    counted, request, _ = rows.of_tokens(3)  # packed without its padding
    assert (counted.tolist(), request.tolist()) == ([True] * 3, [0] * 3)
