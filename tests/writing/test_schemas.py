"""Schemas of several ranks and runs are one that all of them can go on with."""

from typing import Any

import pytest
import torch

from lightning_hpu_infer.writing.columns import Columns
from lightning_hpu_infer.writing.schemas import united

RANKS: dict[str, list[Any]] = {
    "nothing": [None, [None, None]],
    "a value": [[{"v": 1}, {"v": 2}], None],
    "no value": [[{"v": 1, "c": None}] * 2],
    "only no value": [[{"c": None}] * 2],
    "nothing in a part": [[{"v": 1, "prediction": None}] * 2],
    "a value in a part": [[{"v": 1, "c": 1}, {}]],
    "values": [[{"v": 1, "c": 2}, None], [{"v": 1}, None]],
    "structs": [[{"v": 1, "s": {"x": None}}, {}]],
    "other structs": [[{"v": 1, "s": {"y": 1}}, {}]],
    "tensors": [[{"v": 1, "s": None}, {"t": torch.ones(2)}]],
}


@pytest.mark.parametrize("one", RANKS)
@pytest.mark.parametrize("two", RANKS)
@pytest.mark.parametrize("three", [[], [None]], ids=["two ranks", "three"])
def test_what_two_ranks_have_written_each_can_go_on_with(one: str, two: str, three: list[Any]) -> None:
    """If they go together, whatever part the samples of one have and those of the other lack."""
    schemas = []
    for rank in (RANKS[one], RANKS[two], three):
        columns = Columns()
        for batch in rank:
            columns.batch(batch, 2, range(2), 0)
        schemas.append(columns.schema)
    schema = united(schemas)
    assert schema is not None
    for rank in (RANKS[one], RANKS[two], three):
        columns = Columns(schema=schema)
        for batch in rank:
            columns.batch(batch, 2, range(2), 0)
