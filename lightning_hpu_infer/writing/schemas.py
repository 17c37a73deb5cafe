"""Arrow types that differ only by what had no values yet, brought together."""

from collections.abc import Iterable, Sequence

import pyarrow as pa

INDEX, LOADER, ID = "index", "dataloader_idx", "id"
"""The columns that are the writer's own."""
PREDICTION = "prediction"
"""The column of a prediction that has no names of its own."""


def without_placeholder(schema: pa.Schema) -> pa.Schema:
    """A schema without the column that stands for predictions of which all were None, if it is that of such."""
    others = [field for field in schema if field.name not in (INDEX, LOADER, ID)]
    if [(field.name, field.type) for field in others] != [(PREDICTION, pa.null())]:
        return schema
    return pa.schema([field for field in schema if field.name != PREDICTION])


def widened(known: pa.DataType, found: pa.DataType, *, both: bool = False) -> pa.DataType | None:
    """The type that holds values of both, if one has no values where the other has some; None if there is none.

    Structs are of the same fields, in any order, or `found` lacks some; the order of `known` is kept.

    Args:
        known: The type of what was there before.
        found: Of what comes to it.
        both: Whether `found` was there before as well, so that it may be `known` that has to fit.
    """
    if known == found or pa.types.is_null(found):
        return known
    if pa.types.is_null(known):
        return found
    if pa.types.is_list(known) and pa.types.is_list(found):
        inner = widened(known.value_type, found.value_type, both=both)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(known) and pa.types.is_struct(found):
        ours, others = ({field.name: field.type for field in kind} for kind in (known, found))
        if not both and not set(others) <= set(ours):
            return None
        names = dict.fromkeys([*ours, *others])
        fields = [(n, widened(ours.get(n, pa.null()), others.get(n, pa.null()), both=both)) for n in names]
        return None if any(kind is None for _, kind in fields) else pa.struct(fields)
    # Numbers without fractions in a list of numbers. The conversion is exact, or an error.
    if both and pa.types.is_int64(known):
        known, found = found, known
    return known if pa.types.is_float64(known) and pa.types.is_int64(found) else None


def conform(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The array as one of the type, which is what `widened` said, or what `stored` was made of.

    Raises:
        pyarrow.ArrowInvalid: If an integer is not exact as a float.
    """
    if array.type == kind:
        return array
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), kind)
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, conform(array, kind.storage_type))
    if pa.types.is_struct(kind):
        places = [array.type.get_field_index(field.name) for field in kind]
        given = [pa.nulls(len(array)) if place < 0 else array.field(place) for place in places]
        children = [conform(child, field.type) for child, field in zip(given, kind, strict=True)]
        mask = array.is_null() if array.null_count else None
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=mask)
    if pa.types.is_list(kind):
        mask = array.is_null() if array.null_count else None
        lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets = pa.array([0, *lengths.cumsum().tolist()], pa.int32())
        return pa.ListArray.from_arrays(offsets, conform(array.flatten(), kind.value_type), mask=mask)
    return array.cast(kind)


def stored(kind: pa.DataType) -> pa.DataType:
    """The type as it is in files: lists in place of Arrow's tensors, which some readers refuse (datasets 4 does)."""
    if isinstance(kind, pa.BaseExtensionType):
        return kind.storage_type
    return pa.struct([(field.name, stored(field.type)) for field in kind]) if pa.types.is_struct(kind) else kind


def as_stored(array: pa.Array) -> pa.Array:
    """The array as one of the type that `stored` says. Nothing is copied."""
    if isinstance(array, pa.ExtensionArray):
        return array.storage
    if array.type == (kind := stored(array.type)):
        return array
    children = [as_stored(array.field(number)) for number in range(array.type.num_fields)]
    mask = array.is_null() if array.null_count else None
    return pa.StructArray.from_arrays(children, fields=list(kind), mask=mask)


def united(schemas: Iterable[pa.Schema | None]) -> pa.Schema | None:
    """One schema for the files of several runs and ranks; None if there is none at all.

    It has the columns of all, those without values too. Files may lack some: the samples of a rank have not all the
    parts that those of another have.

    Raises:
        ValueError: If they do not go together: which column, and the two types.
    """
    result: pa.Schema | None = None
    for schema in schemas:
        if schema is not None and result is not None:
            result = _both(result, schema)
        else:
            result = schema if result is None else result
    return result


def _both(known: pa.Schema, found: pa.Schema) -> pa.Schema:
    if PREDICTION not in known.names or PREDICTION not in found.names:
        known, found = without_placeholder(known), without_placeholder(found)
    fields = []
    for name in dict.fromkeys([*known.names, *found.names]):
        types = [schema.field(name).type for schema in (known, found) if name in schema.names]
        kind = types[0] if len(types) == 1 else widened(*types, both=True)
        if kind is None:
            raise ValueError(f"Column {name!r} is of type {types[0]} in some of the files, and {types[1]} in others.")
        fields.append(pa.field(name, kind))
    return pa.schema(fields)


def conformed(arrays: Sequence[pa.Array], schema: pa.Schema) -> pa.RecordBatch:
    """A batch of these columns, of the schema's types and in its order."""
    return pa.RecordBatch.from_arrays(
        [conform(array, field.type) for array, field in zip(arrays, schema, strict=True)], schema=schema
    )
