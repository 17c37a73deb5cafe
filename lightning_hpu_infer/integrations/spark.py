"""Spark: functions for `DataFrame.mapInArrow` and `predict_batch_udf`, with a model per Python worker.

Checked with Spark 4.3.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from torch import nn

from lightning_hpu_infer.arrays import as_tensors
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.integrations.tables import beside, check_columns, columns_of, pieces, rows_of, tensors
from lightning_hpu_infer.pipeline import InferencePipeline

if TYPE_CHECKING:
    import pyarrow as pa

_loaded: tuple[str, InferencePipeline] | None = None


@dataclass(frozen=True)
class _Model:
    """What a worker loads. A worker knows by the key whether it has."""

    key: str
    factory: Callable[[], nn.Module]
    config: InferenceConfig | None

    def pipeline(self) -> InferencePipeline:
        """The pipeline of this process, which has one: a worker outlives its task, and with it the model."""
        global _loaded
        if _loaded is None or _loaded[0] != self.key:
            if _loaded is not None:
                _loaded[1].close()
                _loaded = None
            _loaded = self.key, InferencePipeline(self.factory, config=self.config)
        return _loaded[1]


def arrow_predictor(
    factory: Callable[[], nn.Module],
    *,
    batch_size: int | None = None,
    preprocess: "Callable[[pa.RecordBatch], Any] | None" = None,
    columns: Sequence[str] | None = None,
    config: InferenceConfig | None = None,
) -> "Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]":
    """A function for `DataFrame.mapInArrow`, which returns the rows it gets with predictions beside them.

    Several batches are in flight over the whole of a partition. Predictions of more than one number per row become
    lists: `df.mapInArrow(arrow_predictor(factory), "id long, prediction array<float>")`.

    Args:
        factory: Makes the module, which takes a batch and returns tensors, or a LightningModule with a `predict_step`.
            Called once per Python worker. It is pickled, so it should load weights rather than hold them.
        batch_size: Rows of a batch for the module, 1 or more. None takes those of Spark's batches
            (`spark.sql.execution.arrow.maxRecordsPerBatch`).
        preprocess: Turns rows into a batch for the module, such as a tokenizer; by default columns of numbers become a
            dict of tensors, and all others lists. Runs beside the device where the config prefetches.
        columns: The columns that are returned beside the predictions; None means all. Spark wants those of the schema
            that it was given, in its order.
        config: The flags of the pipeline. Its `postprocess` makes what is stored of an output.

    Returns:
        The function.

    Raises:
        ValueError: If `batch_size` is out of its range, or `columns` is no list.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be 1 or more, or None, got {batch_size!r}.")
    check_columns(columns)
    model = _Model(uuid4().hex, factory, config)
    # A partial of a function of this module: what is pickled by value would have a copy of `_loaded`.
    return partial(_predict_partition, model, batch_size, preprocess or tensors, columns)


def _predict_partition(
    model: _Model,
    batch_size: int | None,
    preprocess: "Callable[[pa.RecordBatch], Any]",
    columns: Sequence[str] | None,
    batches: "Iterator[pa.RecordBatch]",
) -> "Iterator[pa.RecordBatch]":
    under_way: deque[pa.RecordBatch] = deque()

    def inputs() -> Iterator[Any]:
        for batch in batches:
            for piece in pieces(batch, batch_size):
                under_way.append(piece)
                yield preprocess(piece)

    for output in model.pipeline().predict(inputs()):
        yield beside(under_way.popleft(), output, columns, lists=True)


def predict_function(
    factory: Callable[[], nn.Module],
    *,
    batch_size: int,
    preprocess: Callable[..., Any] | None = None,
    config: InferenceConfig | None = None,
) -> Callable[[], Callable[..., Any]]:
    """What `pyspark.ml.functions.predict_batch_udf` takes as its `make_predict_fn`.

    Spark calls it for one batch after the other and waits for each. So give Spark a `batch_size` that is a multiple of
    this one: several batches are in flight within a call.

    Args:
        factory: As `arrow_predictor`'s.
        batch_size: Rows of a batch for the module, 1 or more.
        preprocess: Turns arrays, `(rows, ...)`, into a batch for the module. Spark looks at its parameters: with one it
            gives all columns of the UDF in one array, with several an array for each. By default the array as a tensor.
        config: As `arrow_predictor`'s. Outputs are tensors or dicts of them, unless `postprocess` makes arrays.

    Returns:
        A function without arguments.

    Raises:
        ValueError: If `batch_size` is out of its range.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be 1 or more, got {batch_size!r}.")
    return partial(_load, _Model(uuid4().hex, factory, config), batch_size, preprocess or as_tensors)


def _load(model: _Model, batch_size: int, preprocess: Callable[..., Any]) -> Callable[..., Any]:
    model.pipeline()
    # Not of that pipeline: Spark keeps the function when another model has taken its place, and calls it again.
    predict = partial(_predict_arrays, model, batch_size, preprocess)
    predict.__signature__ = signature(preprocess)  # type: ignore[attr-defined]
    return predict


def _predict_arrays(
    model: _Model, batch_size: int, preprocess: Callable[..., Any], *columns: "np.ndarray[Any, Any]"
) -> Any:
    named = {str(index): column for index, column in enumerate(columns)}
    # For no rows the model says what none of its predictions look like.
    cut = list(pieces(named, batch_size)) or [named]
    outputs = list(model.pipeline().predict(preprocess(*piece.values()) for piece in cut))
    found = [columns_of(output, rows_of(piece)) for piece, output in zip(cut, outputs, strict=True)]
    joined = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
    return joined if isinstance(outputs[0], Mapping) else joined["prediction"]
