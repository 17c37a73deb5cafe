"""How many samples a batch has is found from its prediction, and where that does not tell, from the batch."""

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from lightning_hpu_infer.writing.rows import rows_of

Pair = namedtuple("Pair", ["a", "b"])
X = torch.ones(3, 4)
TEXTS = [("a", "b", "c"), ("d", "e", "f")]  # as Lightning's and torch's default has pairs of strings


@pytest.mark.parametrize(
    ("prediction", "batch", "rows"),
    [
        (X, X, 3),
        (X.numpy(), TEXTS, 3),
        (["a", "b", "c"], TEXTS, 3),
        ([None, "a"], ["a", "b"], 2),
        ([], TEXTS, 0),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged), TEXTS, 2),
        ({"loss": torch.tensor(1.0), "scores": X}, TEXTS, 3),
        ({"states": (torch.ones(2, 3),), "scores": X}, TEXTS, 3),
        ({"names": ["a", "b", "c"], "none": None}, TEXTS, 3),
        (Pair(["a"] * 5, torch.ones(5)), object(), 5),
        ({"a": {"b": X}}, object(), 3),
        ([{"box": torch.ones(7, 4)}] * 3, TEXTS, 3),
        # The prediction does not tell.
        (None, X, 3),
        (None, TEXTS, 3),
        (None, {"meta": {"key": ["a", "b"]}, "text": ["a", "b"]}, 2),
        (None, [[1, 2, 3], [4, 5, 6]], 3),
        (None, object(), None),
        (torch.tensor(1.0), X, 3),
        ("text", "text", None),
        ((torch.ones(3), torch.ones(3)), TEXTS, 3),  # more likely fields than samples
        # It does not fit to the batch, and is told so.
        (torch.ones(4), X, 3),
        ([torch.ones(3), torch.ones(3)], X, 3),
        (torch.ones(12), {"x": X, "names": ["a"] * 3}, 3),
        # Batches that are no one tensor per field.
        ([1, 2], [torch.ones(3, 5, 5), torch.ones(3, 7, 7)], 2),
        (torch.ones(2), {"tokens": torch.ones(9), "ends": torch.ones(3)}, 2),
    ],
)
def test_rows(prediction: Any, batch: Any, rows: int | None) -> None:
    assert rows_of(prediction, batch) == rows


def test_a_sample_that_is_no_batch_does_not_tell() -> None:
    assert rows_of(torch.ones(1), X, collated=False) == 1
    assert rows_of(None, X, collated=False) == 3


def test_only_what_is_written_counts() -> None:
    prediction = {"cache": torch.ones(8, 2), "scores": np.ones(3)}
    assert rows_of(prediction, TEXTS, ["scores"]) == 3
    assert rows_of(prediction, TEXTS, {"cache": "kept"}) == 8
