"""Whatever mixture of values a list holds, what is read is what was returned, value and kind; or an error says why."""

import datetime as dt
import decimal
import enum
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from lightning_hpu_infer.writing.columns import Columns
from lightning_hpu_infer.writing.schemas import conform, united
from tests.writing.runs import read_again

EAST = dt.timezone(dt.timedelta(hours=5))
BERLIN = ZoneInfo("Europe/Berlin")


class Word(str, enum.Enum):
    A = "word"


class Number(enum.IntEnum):
    A = 3


VALUES: dict[str, Any] = {
    "bool": True,
    "np.bool": np.True_,
    "int": 2,
    "one": 1,
    "int64's least": -(2**63),
    "beyond double": 2**53 + 1,
    "beyond int64": 2**64 - 1,
    "enum of ints": Number.A,
    "np.int8": np.int8(-3),
    "np.uint8": np.uint8(255),
    "np.int64": np.int64(2**40),
    "np.int64 beyond double": np.int64(2**53 + 1),
    "np.uint64": np.uint64(2**63 + 1),
    "float": 0.1,
    "infinity": float("inf"),
    "nan": float("nan"),
    "np.float16": np.float16(1.5),
    "np.float32": np.float32(0.1),
    "np.float64": np.float64(2.5),
    "np.longdouble": np.longdouble(1) / 3,
    "complex": 1 + 2j,
    "Decimal": decimal.Decimal("1.5"),
    "Decimal, long": decimal.Decimal("1.23456789012345678901"),
    "str": "a",
    "empty str": "",
    "np.str": np.str_("b"),
    "enum of strings": Word.A,
    "surrogate": "\ud800",
    "bytes": b"a",
    "not UTF-8": b"\xff",
    "bytearray": bytearray(b"ab"),
    "memoryview": memoryview(b"abc")[::2],
    "date": dt.date(2020, 1, 1),
    "datetime": dt.datetime(2020, 1, 1, 12, 30, 0, 5),
    "datetime.min": dt.datetime.min,
    "datetime, east": dt.datetime(2020, 1, 1, 12, tzinfo=EAST),
    "datetime, UTC": dt.datetime(2020, 1, 1, 12, tzinfo=dt.timezone.utc),
    "datetime, Berlin": dt.datetime(2020, 10, 25, 2, 30, tzinfo=BERLIN),
    "datetime, Berlin, later": dt.datetime(2020, 10, 25, 2, 30, tzinfo=BERLIN, fold=1),
    "datetime, seconds off": dt.datetime(2020, 1, 1, tzinfo=dt.timezone(dt.timedelta(seconds=3601))),
    "time": dt.time(1, 2, 3, 4),
    "time, east": dt.time(1, 2, 3, tzinfo=EAST),
    "timedelta": dt.timedelta(days=1, microseconds=1),
    "timedelta.max": dt.timedelta.max,
    "Timestamp": pd.Timestamp("2020-01-01T00:00:00.123456"),
    "Timestamp of ns": pd.Timestamp("2020-01-01T00:00:00.123456789"),
    "Timestamp, east": pd.Timestamp("2020-01-01", tz=EAST),
    "Timestamp, far": pd.Timestamp(np.datetime64("9999-12-31T00:00:00", "s")),
    "Timedelta": pd.Timedelta(3, "us"),
    "Timedelta of ns": pd.Timedelta(1, "ns"),
    "NaT": pd.NaT,
    "NA": pd.NA,
    "datetime64[ns]": np.datetime64("2020-01-01T00:00:00.123456789", "ns"),
    "datetime64[s]": np.datetime64("9999-12-31T00:00:00", "s"),
    "datetime64[D]": np.datetime64("2020-01-01", "D"),
    "datetime64[D], far": np.datetime64("9000000-01-01", "D"),
    "datetime64[M]": np.datetime64("2020-01", "M"),
    "datetime64[h]": np.datetime64("2020-01-01T05", "h"),
    "datetime64 NaT": np.datetime64("NaT", "ns"),
    "timedelta64[ns]": np.timedelta64(5, "ns"),
    "timedelta64[s]": np.timedelta64(5, "s"),
    "timedelta64[D]": np.timedelta64(5, "D"),
    "UUID": uuid.UUID(int=5),
    "scalar of Arrow": pa.scalar(2),
    "scalar of Arrow, ns": pa.scalar(5, pa.timestamp("ns")),
    "scalar of Arrow, s": pa.scalar(5, pa.timestamp("s")),
    "list": [1],
    "tuple": ("a",),
    "set": {dt.date(2020, 1, 1)},
    "frozenset": frozenset([2.5]),
    "dict": {"a": 1},
    "tensor": torch.tensor(2.0),
    "tensor of ints": torch.tensor([1, 2]),
    "array": np.ones(2),
    "array of strings": np.array(["a"]),
    "array of times": np.array(["2020-01-01T00:00:00.5"], "M8[ns]"),
    "None": None,
}
NOT_A_TIME = (type(pd.NaT), np.datetime64, np.timedelta64)


def same(given: Any, read: Any) -> bool:
    """Whether a scalar of Arrow's is what was given: no other value, and no other kind."""
    if isinstance(given, pa.Scalar):
        return bool(given.equals(read)) or same(given.as_py(), read)
    if isinstance(given, torch.Tensor):
        given = given.numpy()[()]
    if given is None or (isinstance(given, NOT_A_TIME) and pd.isna(given)):
        return not read.is_valid
    if isinstance(given, list | tuple | np.ndarray):
        return len(given) == len(read) and all(map(same, given, read))
    if isinstance(given, set | frozenset):
        return len(given) == len(read) and all(any(same(each, other) for other in read) for each in given)
    if isinstance(given, dict):
        names = {field.name for field in read.type}
        return given.keys() <= names and all(same(given.get(name), read[name]) for name in names)
    if isinstance(given, np.datetime64 | np.timedelta64):
        unit = np.datetime_data(given.dtype)[0]
        number = read.cast(pa.int32() if pa.types.is_date32(read.type) else pa.int64()).as_py()
        return str(read.type) in (f"timestamp[{unit}]", f"duration[{unit}]", f"date32[{unit and 'day'}]") and (
            number == given.astype(np.int64).item()
        )
    value = read.as_py()
    given = given.item() if isinstance(given, np.generic) else given
    if isinstance(given, bool | str):
        return isinstance(value, bool | str) and value == given
    if isinstance(given, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool) and (value == given or value != value)
    if isinstance(given, bytes | bytearray | memoryview):
        return isinstance(value, bytes) and value == bytes(given)
    if isinstance(given, dt.datetime):
        if not isinstance(value, dt.datetime) or (value.tzinfo is None) != (given.tzinfo is None):
            return False
        utc = [each if each.tzinfo is None else each.astimezone(dt.timezone.utc) for each in (value, given)]
        return utc[0] == utc[1] and getattr(given, "nanosecond", 0) == getattr(value, "nanosecond", 0)
    return value == given and type(value) in type(given).__mro__ and getattr(value, "tzinfo", None) is None


def check(prediction: Any, given: list[Any], found: Callable[[Any], list[Any]]) -> str:
    """Refuse in words, or give back the same."""
    try:
        read = found(prediction)
    except ValueError as error:
        return "refused" if "cannot be written. Column '" in str(error) else f"refused without a column: {error}"
    assert all(map(same, given, read)), (given, [each.type for each in read], read)
    return "same"


def of_a_batch(prediction: Any, name: str = "x", **options: Any) -> list[Any]:
    return list(Columns().batch(prediction, 2, range(2), 0, **options)[name])


def of_batches(predictions: Any) -> list[Any]:
    columns = Columns()
    made = [columns.batch({"x": [each]}, 1, [0], 0) for each in predictions]
    schema = united(batch.schema for batch in made)
    assert schema is not None
    return [conform(batch["x"], schema.field("x").type)[0] for batch in made]


PLACES: dict[str, Callable[[Any, Any], str]] = {
    "list": lambda a, b: check({"x": [a, b]}, [a, b], of_a_batch),
    "dicts": lambda a, b: check([{"x": a}, {"x": b}], [a, b], of_a_batch),
    "lists": lambda a, b: check({"x": [[a], [b]]}, [[a], [b]], of_a_batch),
    "list and nothing": lambda a, b: check({"x": [[a, None, b], None]}, [[a, None, b], None], of_a_batch),
    "ids": lambda a, b: check(None, [a, b], lambda _: of_a_batch(None, "id", ids=[a, b])),
    "batches": lambda a, b: check([a, b], [a, b], of_batches),
}


@pytest.mark.parametrize("place", PLACES)
def test_any_two_values_are_read_as_they_were_returned_or_refused(place: str) -> None:
    found = {(a, b): PLACES[place](VALUES[a], VALUES[b]) for a in VALUES for b in VALUES}
    assert set(found.values()) == {"same", "refused"}
    # The law is not kept by refusing all.
    for a, b in [
        ("int", "float"),
        ("np.float16", "int"),
        ("np.float16", "np.float64"),
        ("np.int8", "int64's least"),
        ("str", "enum of strings"),
        ("bytes", "memoryview"),
        ("datetime", "Timestamp"),
        ("datetime, east", "datetime, UTC"),
        ("datetime64[ns]", "datetime64 NaT"),
        ("UUID", "None"),
        ("tensor", "tensor"),
    ]:
        assert found[a, b] == "same" or place == "batches", (a, b)
    for a, b in [("float", "bool"), ("date", "datetime"), ("datetime", "datetime, UTC"), ("str", "bytes")]:
        assert found[a, b] == found[b, a] == "refused"


@pytest.mark.parametrize("name", VALUES)
def test_values_of_one_kind_come_out_of_files_again(name: str, tmp_path: Path) -> None:
    value = VALUES[name]

    def from_files(prediction: Any) -> list[Any]:
        return list(read_again(tmp_path, [{"x": prediction}], 2)["x"])

    assert check([value, value], [value, value], from_files) in ("same", "refused")


@pytest.mark.parametrize("unit", ["D", "s", "ms", "us", "ns"])
@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 2, 1)])
def test_arrays_of_times(unit: str, shape: tuple[int, ...]) -> None:
    array = np.full(shape, "2020-01-01", f"M8[{unit}]")
    array.flat[-1] = np.datetime64("NaT")
    assert check({"x": array}, list(array), of_a_batch) == "same"
    assert check({"x": array.astype(array.dtype.newbyteorder())}, list(array), of_a_batch) == "same"
    assert check({"x": list(array)}, list(array), of_a_batch) == "same"
    if unit != "D":
        spans = array - np.array("2019-01-01", array.dtype)
        assert check({"x": spans}, list(spans), of_a_batch) == "same"


@pytest.mark.parametrize("unit", ["M", "h", "ps"])
def test_arrays_of_times_without_a_type(unit: str) -> None:
    with pytest.raises(ValueError, match=rf"'x' is an array of datetime64\[{unit}\], which has no type of Arrow's"):
        of_a_batch({"x": np.zeros(2, f"M8[{unit}]")})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([2.5, True], "'x' holds values of several kinds: booleans and numbers"),
        ([dt.datetime(2020, 1, 1), dt.date(2020, 1, 1)], "dates and datetimes without time zone"),
        ([np.datetime64("2020", "s"), np.datetime64("2020", "ms")], r"datetime64\[ms\] and datetime64\[s\]"),
        ([decimal.Decimal(1), 1], "Decimal and numbers"),
        ([pd.Timedelta(1, "ns"), pd.Timedelta(0)], r"nanoseconds of pandas.*`to_numpy\(\)`"),
        ([dt.time(1, tzinfo=EAST), None], "times of day with a time zone"),
    ],
)
def test_what_is_refused_is_told(values: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        of_a_batch({"x": values})
