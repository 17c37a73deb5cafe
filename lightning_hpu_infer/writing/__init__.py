"""Predictions on disk: Parquet files per rank, listed in a manifest, and how they are read."""

from collections.abc import Collection
from importlib.util import find_spec


def check_pyarrow() -> None:
    """Raise ImportError, in words, if pyarrow is not installed. Modules that import it are imported after this."""
    if find_spec("pyarrow") is None:
        raise ImportError("Predictions on disk need pyarrow: pip install 'lightning-hpu-infer[write]'")


def check_columns(columns: Collection[str] | None) -> None:
    """Raise TypeError or ValueError, in words, if these are no names of columns."""
    if isinstance(columns, str):
        raise TypeError(f"`columns` is the string {columns!r}. Pass a list of names: [{columns!r}].")
    if columns is not None and not columns:
        raise ValueError("`columns` is empty. Pass a list of names, or None for all.")
