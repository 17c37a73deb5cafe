"""Predictions on disk: Parquet files per rank, listed in a manifest, and how they are read."""

from importlib.util import find_spec

if find_spec("pyarrow") is None:
    raise ImportError("Predictions on disk need pyarrow: pip install 'lightning-hpu-infer[write]'")
