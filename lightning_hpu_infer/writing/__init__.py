"""Predictions on disk: Parquet files per rank, listed in a manifest, and how they are read."""

from importlib.util import find_spec


def check_pyarrow() -> None:
    """Raise ImportError, in words, if pyarrow is not installed. Modules that import it are imported after this."""
    if find_spec("pyarrow") is None:
        raise ImportError("Predictions on disk need pyarrow: pip install 'lightning-hpu-infer[write]'")
