"""Predictions of a batch as a batch of Arrow's, with one schema for the whole run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from lightning_hpu_infer.nested import parts_of
from lightning_hpu_infer.writing import check_columns
from lightning_hpu_infer.writing.arrays import array_of, by_name, is_sequence
from lightning_hpu_infer.writing.leaves import UnfitError
from lightning_hpu_infer.writing.schemas import ID, INDEX, LOADER, PREDICTION, conform, widened, without_placeholder


class Columns:
    """Makes record batches of predictions. The first one fixes the schema, and every other has to fit.

    A prediction that is a tensor, or a list of values, becomes the column `prediction`. A mapping, dataclass or
    namedtuple, and a list of such with one per sample, becomes one column for each of its parts; see `array_of`. What a
    sample lacks, or all of a prediction that is None, is null.

    Args:
        columns: Which parts become columns: their names, or a mapping from their names to those of the columns. All by
            default.
        schema: The schema of an earlier run, which the first batch has to fit too.
    """

    def __init__(
        self, columns: Sequence[str] | Mapping[str, str] | None = None, schema: pa.Schema | None = None
    ) -> None:
        check_columns(columns)
        if columns is not None and not isinstance(columns, Mapping):
            columns = {name: name for name in columns}
        self._names = columns
        self._schema = schema

    @property
    def schema(self) -> pa.Schema | None:
        """The columns and their types; None before the first batch. A type without values yet is null until then."""
        return self._schema

    def batch(
        self,
        prediction: Any,
        rows: int,
        index: Sequence[int],
        dataloader_idx: int,
        ids: Any = None,
        *,
        where: str = "this batch",
    ) -> pa.RecordBatch:
        """A batch's predictions, which share no memory with it. From one thread at a time.

        Args:
            prediction: What the step, or post-processing, returned for the batch.
            rows: Samples of the batch.
            index: Where each sample is in its dataset.
            dataloader_idx: The dataloader that the samples came from.
            ids: One value per sample for the column `id`; None for no such column.
            where: The batch, as errors name it.

        Raises:
            ValueError: If the prediction does not fit: which column of which batch, what was expected and found.
        """
        try:
            arrays = {
                INDEX: pa.array(np.asarray(index), pa.int64()),
                LOADER: pa.array(np.full(rows, dataloader_idx), pa.int32()),
            }
            if ids is not None:
                arrays[ID] = array_of(ids, rows, ID)
            chosen, each = self._chosen(prediction, rows, set(arrays))
            arrays |= chosen
            if len(arrays[INDEX]) != rows:
                raise UnfitError(f"{len(arrays[INDEX])} positions in the dataset were given for {rows} samples.")
            return self._fitted(arrays, each)
        except (UnfitError, pa.ArrowException) as error:
            raise ValueError(f"The predictions of {where} cannot be written. {error}") from error

    def _chosen(self, prediction: Any, rows: int, taken: set[str]) -> tuple[dict[str, pa.Array], bool]:
        """The columns, and whether those that are missing have no values, since each sample has parts of its own."""
        known = [] if self._schema is None else [name for name in self._schema.names if name not in taken]
        parts, each = _parts(prediction, rows)
        if not parts:
            columns = known or [PREDICTION] if self._names is None else self._names.values()
            return {name: pa.nulls(rows) for name in columns}, True
        names = dict(zip(parts, parts, strict=True)) if self._names is None else self._names
        if lost := [old for old, new in names.items() if old not in parts and not (each and new in known)]:
            raise UnfitError(
                f"`columns` asks for {', '.join(map(repr, lost))}, and there is only {', '.join(map(repr, parts))}."
            )
        if clash := [name for name in names.values() if name in taken]:
            raise UnfitError(
                f"Column {clash[0]!r} is the writer's own. Give the prediction's another name, as with"
                f" `columns={{{clash[0]!r}: 'other', ...}}`."
            )
        if len(set(names.values())) < len(names):
            raise UnfitError(f"`columns` gives one name to several columns: {names}.")
        return {new: array_of(parts.get(old), rows, new) for old, new in names.items()}, each

    def _known(self, arrays: dict[str, pa.Array]) -> pa.Schema:
        """The schema so far. If all predictions were None, this batch says which columns they have."""
        schema = self._schema or pa.schema([])
        fields = list(schema if PREDICTION in arrays else without_placeholder(schema))
        if self._schema is not None and len(fields) == len(schema):
            return self._schema
        names = {field.name for field in fields}
        return pa.schema([*fields, *((name, array.type) for name, array in arrays.items() if name not in names)])

    def _fitted(self, arrays: dict[str, pa.Array], each: bool) -> pa.RecordBatch:
        known = self._known(arrays)
        if each:
            arrays = {name: pa.nulls(len(arrays[INDEX])) for name in known.names if name != ID} | arrays
        if set(known.names) != set(arrays):
            raise UnfitError(
                f"They have the columns {', '.join(map(repr, arrays))}; those before had"
                f" {', '.join(map(repr, known.names))}. Return the same in every batch, None where there is no value."
            )
        types = [(field.name, field.type, widened(field.type, arrays[field.name].type)) for field in known]
        for name, expected, kind in types:
            if kind is None:
                raise UnfitError(_misfit(name, expected, arrays[name].type))
        if self._schema is None or [kind for _, _, kind in types] != self._schema.types:
            self._schema = pa.schema([(name, kind) for name, _, kind in types])
        fitted = [_conformed(arrays[field.name], field) for field in self._schema]
        return pa.RecordBatch.from_arrays(fitted, schema=self._schema)


def _parts(prediction: Any, rows: int) -> tuple[dict[str, Any], bool]:
    """The parts of a prediction that may become columns, each for the whole batch; none if it is None for all.

    Returns:
        And whether each sample has its own, so that one may lack some.
    """
    if prediction is None:
        return {}, True
    if is_sequence(prediction):
        _refuse_ambiguous(prediction, rows)
        fits = (each is None or not (is_sequence(each) or parts_of(each) is None) for each in prediction)
        if len(prediction) != rows or not all(fits):
            return {PREDICTION: prediction}, False
        named = [by_name(parts_of(sample) or {}, PREDICTION) for sample in prediction]
        names = dict.fromkeys(name for sample in named for name in sample)
        return {name: [sample.get(name) for sample in named] for name in names}, True
    parts = None if isinstance(prediction, Tensor) else parts_of(prediction)
    return ({PREDICTION: prediction} if parts is None else by_name(parts, PREDICTION)), False


def _refuse_ambiguous(prediction: Sequence[Any], rows: int) -> None:
    """A tuple of tensors for the batch, and as many as it has samples: `(scores, boxes)` for two of them."""
    if not isinstance(prediction, tuple) or len(prediction) != rows:
        return
    if all(isinstance(part, Tensor | np.ndarray) and part.ndim and part.shape[0] == rows for part in prediction):
        raise UnfitError(
            f"A tuple of {rows} tensors with {rows} rows each, for {rows} samples, could be one tensor per sample or"
            " several for the batch. Return a list for the former and a dict for the latter."
        )


def _conformed(array: pa.Array, field: pa.Field) -> pa.Array:
    try:
        return conform(array, field.type)
    except pa.ArrowException as error:
        raise UnfitError(
            f"Column {field.name!r} is no {field.type}, as it was in batches before it: {error}"
        ) from error


def _misfit(name: str, expected: pa.DataType, found: pa.DataType) -> str:
    text = f"Column {name!r} is of type {found}, and was {expected} in batches before it."
    if isinstance(expected, pa.FixedShapeTensorType) and isinstance(found, pa.FixedShapeTensorType):
        text += " Return a list with one tensor per sample if their shapes vary."
    return text
