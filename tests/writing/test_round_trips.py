"""Whatever a step returns is what is read again."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.writing.runs import read_again

LEAVES = st.sampled_from(
    [
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        st.binary(max_size=5),
        st.booleans(),
    ]
)
NAMES = st.text("abc.", min_size=1, max_size=3)


def values_of_one_type(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Strategies of strategies: each draws values that differ, and are of one type."""
    return st.one_of(
        inner.map(lambda each: st.lists(each | st.none(), max_size=3)),
        st.dictionaries(NAMES, inner, min_size=1, max_size=3).map(
            lambda fields: st.fixed_dictionaries({name: each | st.none() for name, each in fields.items()})
        ),
    )


KINDS = st.recursive(LEAVES, values_of_one_type, max_leaves=5)
DTYPES = st.sampled_from(["i1", "i8", "u4", "u8", "f2", "f4", "f8", "?"])


@settings(max_examples=60)
@given(data=st.data(), kind=KINDS)
def test_values_per_sample(data: st.DataObject, kind: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = data.draw(st.integers(1, 3))
    batches = data.draw(st.lists(st.lists(kind | st.none(), min_size=rows, max_size=rows), min_size=1, max_size=3))
    table = read_again(tmp_path_factory.mktemp("predictions"), [{"value": batch} for batch in batches], rows)
    assert table["value"].to_pylist() == [value for batch in batches for value in batch]


@settings(max_examples=40)
@given(data=st.data(), dtype=DTYPES, shape=st.lists(st.integers(1, 3), max_size=3), ragged=st.booleans())
def test_tensors(
    data: st.DataObject, dtype: str, shape: list[int], ragged: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = data.draw(st.integers(1, 3))
    batches = data.draw(st.lists(arrays.arrays(dtype, (rows, *shape)), min_size=1, max_size=3))
    given_batches = [torch.from_numpy(batch) for batch in batches]
    path = tmp_path_factory.mktemp("predictions")
    table = read_again(path, [list(batch) if ragged else {"prediction": batch} for batch in given_batches], rows)
    column, expected = table["prediction"], np.concatenate(batches)
    if shape and not ragged:
        found = column.combine_chunks().to_numpy_ndarray()
        assert np.array_equal(found, expected, equal_nan=dtype[0] == "f")
        assert found.dtype == (np.uint8 if dtype == "?" else expected.dtype)
    else:
        assert np.array_equal(np.array(column.to_pylist(), dtype), expected, equal_nan=dtype[0] == "f")


def test_tensors_within_dicts_and_beside_nothing(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(2, 2, 3).half()
    batches = [{"a": {"b": tensor}, "c": tensor}, {"a": None, "c": None}]
    table = read_again(tmp_path, batches, 2)
    assert table["a"].type == pa.struct([("b", pa.fixed_shape_tensor(pa.float16(), (2, 3)))])
    assert table["a"].to_pylist() == [{"b": row} for row in tensor.flatten(1).tolist()] + [None, None]
    assert table["c"].to_pylist() == [*tensor.flatten(1).tolist(), None, None]
