"""The compiled loops of "occurrence" and "batch" read any view, and raise for what a table does not hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evenmoe.errors import ConstraintError
from evenmoe.reference import update_expert as reference
from evenmoe.rules import batch, occurrence
from tests.rules.sampled import same


def test_views_are_read_as_they_are():
    table = torch.tensor([[2, 0, 1], [1, 2, -7]], dtype=torch.int32)
    ids = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]])
    wide = torch.cat([table, table], dim=1)[:, :3]
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    for view in (ids.T, ids[:, ::2], ids[::2].T):
        same(occurrence.choose(view, wide, 1), reference.occurrence(view, table, 1))
        counts = torch.bincount(view.reshape(-1), minlength=2)[None]
        expected = reference.batch(view, table, [3, 2, 9], counts.tolist(), 0)
        same(batch.choose(view, wide, torch.tensor([3, 2, 9]), counts, 0), expected)
    columns = torch.cat([mask, mask], dim=1)[:, :2]
    same(occurrence.choose(ids[:, ::2], table, 0, columns), reference.occurrence(ids[:, ::2], table, 0, mask))


TABLE = torch.tensor([[1, 0, 0], [2, 1, 2]], dtype=torch.int32)
QUOTAS, COUNTS = np.array([1, 1, 1]), torch.tensor([[1, 2]])


@pytest.mark.parametrize(
    ("expert", "table", "text"),
    [
        (2, TABLE, "`expert_ids` is 2 at assignment 1: it must be a row of eplb_table, 0 to 1"),
        (-1, TABLE, "`expert_ids` is -1 at assignment 1"),
        (
            1,
            torch.tensor([[1, 0, 0], [0, 1, 2]], dtype=torch.int32),
            "`eplb_table` is [0, 1, 2] in row 1: it must count",
        ),
        (
            1,
            torch.tensor([[1, 0, 0], [3, 1, 2]], dtype=torch.int32),
            "`eplb_table` is [3, 1, 2] in row 1: it must count",
        ),
    ],
)
def test_ids_without_a_row_and_wrong_tables_are_named(expert, table, text):
    ids = torch.tensor([[0], [expert]])
    with pytest.raises(ConstraintError) as caught:
        occurrence.choose(ids, table, 0)
    assert text in str(caught.value)
    with pytest.raises(ConstraintError) as caught:
        batch.choose(ids, table, QUOTAS, COUNTS, 0)
    assert text in str(caught.value)
