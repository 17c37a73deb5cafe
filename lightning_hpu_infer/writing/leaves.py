"""Numbers, strings, times and the like, one per sample, as an Arrow array that gives them back."""

from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_ARROW_ERRORS = (pa.ArrowException, TypeError, ValueError, OverflowError)

# The first one that fits: some are classes of others.
_KINDS: dict[str, tuple[type, ...]] = {
    "times of NumPy": (np.datetime64, np.timedelta64),
    "numbers of more than 64 bits": (np.longdouble,),
    "booleans": (bool, np.bool_),
    "numbers": (int, float, np.integer, np.floating),
    "strings": (str,),
    "bytes": (bytes, bytearray, memoryview),
    "datetimes": (datetime,),
    "dates": (date,),
    "times": (time,),
    "durations": (timedelta,),
    "scalars of Arrow": (pa.Scalar,),
}


class UnfitError(ValueError):
    """A value that is no column, and why, in words."""


def leaves(values: list[Any], column: str) -> pa.Array:
    """Values as an array; None, and the "not a time" of NumPy and pandas, as null.

    Arrow alone makes values of several types those of one of them, and drops what this one lacks: fractions of a
    float16, times of day, time zones, nanoseconds.

    Args:
        values: Of one kind. Only numbers may be of several types, and are converted exactly.
        column: The column's name, for errors.

    Raises:
        UnfitError: If they are of several kinds, or Arrow has no type that holds them.
    """
    types = set(map(type, values)) - {type(None)}  # There may be very many values.
    if any(issubclass(each, _MAY_BE_NONE) or each.__name__ == _NO_TIME for each in types):
        values = [None if _is_no_time(value) else value for value in values]
        types = set(map(type, values)) - {type(None)}
    if len(kinds := set(_kinds_of(values, types))) > 1:
        raise UnfitError(f"Column {column!r} holds values of several kinds: {' and '.join(sorted(kinds))}.")
    if any(issubclass(each, _MAY_HAVE_MORE) for each in types) and any(map(_has_more, values)):
        raise UnfitError(
            f"Column {column!r} holds nanoseconds of pandas, or times of day with a time zone, which Arrow would drop."
            " Return NumPy's values (`to_numpy()`), or strings."
        )
    found = _like_typed(values, types)
    if isinstance(found, np.ndarray):
        return of_numpy(found, column)
    try:
        array = pa.array(found)
    except _ARROW_ERRORS as error:
        raise UnfitError(f"Column {column!r} has no type of Arrow's: {error}") from error
    if isinstance(array, pa.ChunkedArray):
        raise UnfitError(f"Column {column!r} holds more than 2 GiB in one batch. Predict smaller batches.")
    return array


def of_numpy(array: NDArray[Any], column: str, mask: NDArray[Any] | None = None) -> pa.Array:
    """An array of one dimension, of the numbers and times that Arrow has.

    Args:
        array: Its values.
        column: The column's name, for errors.
        mask: Which of them are null.

    Raises:
        UnfitError: If Arrow has no type that holds them.
    """
    try:
        made = pa.array(array, mask=mask)
    except _ARROW_ERRORS as error:
        raise UnfitError(f"Column {column!r} is an array of {array.dtype}, which has no type of Arrow's.") from error
    if pa.types.is_date32(made.type):  # days in 32 bits, which Arrow does not check
        days = array[~np.isnat(array)].astype(np.int64)
        if (days != days.astype(np.int32)).any():
            raise UnfitError(
                f"Column {column!r} holds a day that is too far for Arrow's dates. Return numbers of days."
            )
    return made


def _kinds_of(values: list[Any], types: set[type]) -> Iterator[str]:
    """A name for each kind that is there. Of most, the type tells."""
    for each in types:
        name = next((name for name, classes in _KINDS.items() if issubclass(each, classes)), each.__name__)
        if name in _DETAILS:
            yield from {_DETAILS[name](value) for value in values if type(value) is each}
        else:
            yield name


_DETAILS = {
    "times of NumPy": lambda value: str(value.dtype),
    "datetimes": lambda value: f"datetimes with{'out' if value.tzinfo is None else ''} time zone",
    "scalars of Arrow": lambda value: str(value.type),
}


_MAY_BE_NONE = (np.datetime64, np.timedelta64)
_NO_TIME = "NaTType"  # of pandas, which may not be there


def _is_no_time(value: Any) -> bool:
    return bool(np.isnat(value)) if isinstance(value, _MAY_BE_NONE) else type(value).__name__ == _NO_TIME


_MAY_HAVE_MORE = (datetime, time, timedelta)


def _has_more(value: Any) -> bool:
    """Whether a value has what Arrow drops without a word."""
    if isinstance(value, time):
        return value.tzinfo is not None
    name = {datetime: "nanosecond", timedelta: "nanoseconds"}
    return any(isinstance(value, kind) and getattr(value, attribute, 0) != 0 for kind, attribute in name.items())


def _like_typed(values: list[Any], types: set[type]) -> Any:
    """Values of one type, or what Arrow takes for such without loss."""
    first = next((value for value in values if value is not None), None)
    if isinstance(first, np.datetime64 | np.timedelta64):
        missing = type(first)("NaT")
        return np.array([missing if value is None else value for value in values], first.dtype)
    if isinstance(first, memoryview | bytes | bytearray):
        return [None if value is None else bytes(value) for value in values]
    if len(types) > 1:
        return [value.item() if isinstance(value, np.generic) else value for value in values]
    return values
