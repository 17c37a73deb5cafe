"""Predictions come back in the order of the dataset, whoever wrote them, in whatever order."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import lightning_hpu_infer
from lightning_hpu_infer.writing import read, shards
from lightning_hpu_infer.writing.columns import Columns
from lightning_hpu_infer.writing.describe import describe
from lightning_hpu_infer.writing.manifest import Manifest
from lightning_hpu_infer.writing.read import iter_predictions, read_predictions
from lightning_hpu_infer.writing.shards import Shards
from lightning_hpu_infer.writing.storage import LocalStorage
from tests.writing.runs import batches_of, predictions, run, write_batches


def write(path: Path, rank: int, batches: list[tuple[int, list[int]]], **options: Any) -> None:
    """Write these samples of these dataloaders."""
    shards = Shards(LocalStorage(path), Manifest(rank=rank, world=rank + 1, fingerprint={}), **options)
    columns = Columns()
    for loader, indices in batches:
        write_batches(shards, columns, [indices], loader)
    shards.close(complete=True)


def test_ranks_are_put_together(tmp_path: Path) -> None:
    for rank in range(3):
        run(tmp_path, range(rank, 50, 3), rank, 3)
    table = read_predictions(tmp_path)
    assert table.column_names == ["index", "dataloader_idx", "value", "vector", "text"]
    assert table["index"].to_pylist() == list(range(50))
    expected = predictions(range(50))
    assert table["text"].to_pylist() == expected["text"]
    assert table["value"].to_pylist() == expected["value"].tolist()
    assert np.array_equal(table["vector"].combine_chunks().to_numpy_ndarray(), expected["vector"].numpy())


def test_columns_are_chosen(tmp_path: Path) -> None:
    run(tmp_path, range(4))
    assert read_predictions(tmp_path, ["value", "index"]).to_pylist()[2] == {"value": 1.0, "index": 2}
    assert read_predictions(str(tmp_path), ["text"])["text"].to_pylist() == predictions(range(4))["text"]
    with pytest.raises(ValueError, match=r"no column 'logits'. It has 'index', 'dataloader_idx', 'value'"):
        read_predictions(tmp_path, ["logits"])
    for read_all in (read_predictions, iter_predictions):
        with pytest.raises(TypeError, match=r"is the string 'value'. Pass a list of names: \['value'\]"):
            read_all(tmp_path, "value")
        with pytest.raises(ValueError, match="`columns` is empty"):
            read_all(tmp_path, [])


@pytest.mark.parametrize("rows", [1, 3, 16, 1000])
def test_some_at_a_time(tmp_path: Path, rows: int) -> None:
    """Shuffled, over ranks, dataloaders, files and row groups."""
    samples = [(loader, index) for loader in range(3) for index in range(40)]
    random.Random(0).shuffle(samples)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "ROW_GROUP_BYTES", 300)
        for rank in range(2):
            write(tmp_path, rank, [(loader, [index]) for loader, index in samples[rank::2]], rows_per_file=17)
    batches = list(iter_predictions(tmp_path, rows=rows))
    assert [batch.num_rows for batch in batches[:-1]] == [rows] * (len(batches) - 1)
    assert {batch.schema for batch in batches} == {read_predictions(tmp_path).schema}
    found = [row for batch in batches for row in batch.to_pylist()]
    assert [(row["dataloader_idx"], row["index"]) for row in found] == sorted(samples)
    assert [row["text"] for row in found] == [f"sample {index}" for _, index in sorted(samples)]
    assert found == read_predictions(tmp_path).to_pylist()


@pytest.mark.parametrize("most", [1, 400, 3000, 1 << 20])
def test_fewer_at_a_time_where_they_are_large(tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow's strings end at 2 GiB."""
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 300)
    monkeypatch.setattr(read, "_BATCH_BYTES", most)
    texts = ["x" * (1000 if 20 <= index < 30 else 20) for index in range(60)]
    for rank in range(2):
        mine = list(range(rank, 60, 2))
        random.Random(rank).shuffle(mine)
        run_of = Shards(LocalStorage(tmp_path), Manifest(rank=rank, world=2, fingerprint={}))
        columns = Columns()
        for batch in batches_of(mine):
            run_of.write(columns.batch({"text": [texts[index] for index in batch]}, len(batch), batch, 0))
        run_of.close(complete=True)
    batches = list(iter_predictions(tmp_path, rows=16))
    assert [text for batch in batches for text in batch["text"].to_pylist()] == texts
    assert all(batch.nbytes <= most or batch.num_rows == 1 for batch in batches)
    assert max(batch.num_rows for batch in batches) == {1: 1, 400: 8, 3000: 16, 1 << 20: 16}[most]
    assert read_predictions(tmp_path)["text"].to_pylist() == texts


def test_large_batches_do_not_share_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MOST_BYTES", 500)
    write(tmp_path, 0, [(0, each) for each in batches_of(range(40))])
    (file,) = tmp_path.glob("rank-00000/*.parquet")
    assert parquet.ParquetFile(file).num_row_groups == 10
    assert read_predictions(tmp_path)["index"].to_pylist() == list(range(40))


def test_row_groups_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, each is read once; what is kept at a time is bounded."""
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 300)
    monkeypatch.setattr(read, "_CACHED_BYTES", 1000)
    for rank in range(2):
        write(tmp_path, rank, [(0, each) for each in batches_of(range(rank, 200, 2))])
    source = read._Source(LocalStorage(tmp_path), None)
    opened: list[str] = []
    open_file = source._open

    def open_and_note(file: str) -> Any:
        opened.append(file)
        return open_file(file)

    monkeypatch.setattr(source, "_open", open_and_note)
    kept = [sum(batch.nbytes for batch in source._cache.values()) for _ in source.batches(4)]
    assert max(kept) <= 1000
    assert len(opened) == len(source._groups) + 2  # and each file once for the order
    assert source._cache == {}


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 30), min_size=1, max_size=5)), max_size=8))
def test_any_samples_in_any_order_come_back(
    tmp_path_factory: pytest.TempPathFactory, batches: list[tuple[int, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("predictions")
    write(path, 0, batches, rows_per_file=6)
    samples = sorted((loader, index) for loader, indices in batches for index in indices)
    in_parts = pa.Table.from_batches(iter_predictions(path, rows=7), read_predictions(path).schema)
    for found in (read_predictions(path).to_pylist(), in_parts.to_pylist()):
        assert [(row["dataloader_idx"], row["index"]) for row in found] == samples
        assert [row["value"] for row in found] == [index * 0.5 for _, index in samples]


def test_types_that_appeared_later(tmp_path: Path) -> None:
    shards = Shards(LocalStorage(tmp_path), Manifest(rank=0, world=1, fingerprint={}))
    columns = Columns()
    values: list[Any] = [None, {"a": None, "b": []}, {"a": [1.5], "b": ["x"]}, {"b": ["y", "z"], "a": None}]
    for index, value in enumerate(values):
        shards.write(columns.batch({"x": [value], "y": np.ones((1, 2)) if index else None}, 1, [index], 0))
    shards.close(complete=True)
    table = read_predictions(tmp_path)
    assert table["x"].to_pylist() == values
    assert table["y"].to_pylist() == [None, [1, 1], [1, 1], [1, 1]]


def test_ranks_whose_types_do_not_go_together(tmp_path: Path) -> None:
    for rank, value in enumerate([1, "x"]):
        shards = Shards(LocalStorage(tmp_path), Manifest(rank=rank, world=2, fingerprint={}))
        shards.write(Columns().batch([value], 1, [rank], 0))
        shards.close(complete=True)
    with pytest.raises(ValueError, match="'prediction' is of type int64 in some of the files, and string in others"):
        read_predictions(tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no predictions"):
        read_predictions(tmp_path)
    with pytest.raises(ValueError, match="`rows` is 0"):
        iter_predictions(tmp_path, rows=0)
    run(tmp_path, range(4))
    (tmp_path / "rank-00000" / "part-00000.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-00000\.parquet is listed and not there"):
        read_predictions(tmp_path)


@pytest.mark.parametrize("order", [list(range(16)), [*range(0, 16, 2), *range(1, 16, 2)] * 20], ids=["ranges", "any"])
@pytest.mark.parametrize("damage", ["all", "end", "values"])
def test_a_damaged_file_of_the_right_size_is_named(tmp_path: Path, damage: str, order: list[int]) -> None:
    run(tmp_path, order)
    file = tmp_path / "rank-00000" / "part-00001.parquet"
    bytes_before = file.read_bytes()
    places = {"all": slice(0, None), "end": slice(-30, None), "values": slice(4, 200)}[damage]
    broken = bytearray(bytes_before)
    broken[places] = bytes(len(broken[places]))
    file.write_bytes(broken)
    with pytest.raises(
        (OSError, ValueError), match=r"part-00001.parquet cannot be read: .* damaged, remove it: the next"
    ):
        read_predictions(tmp_path)
    assert describe(tmp_path, verify=True).problems == [
        "rank-00000/part-00001.parquet has other contents than were written"
    ]
    file.unlink()
    with pytest.warns(UserWarning, match=r"part-00001.parquet is missing. Its 8 samples are predicted again"):
        run(tmp_path, order)
    assert set(read_predictions(tmp_path)["index"].to_pylist()) == set(order)


def test_folders_of_other_names_are_no_ranks(tmp_path: Path) -> None:
    run(tmp_path, range(40))
    (tmp_path / "rank-00001").write_text("a file")
    shutil.copytree(tmp_path / "rank-00000", tmp_path / "rank-000000")
    shutil.copytree(tmp_path / "rank-00000", tmp_path / "rank-००००२")  # digits, for Python
    run(tmp_path, range(48))
    assert read_predictions(tmp_path)["index"].to_pylist() == list(range(48))
    assert describe(tmp_path).rows == 48


def test_a_copied_folder_of_a_rank_is_refused_wherever_it_is_looked_at(tmp_path: Path) -> None:
    run(tmp_path, range(40))
    shutil.copytree(tmp_path / "rank-00000", tmp_path / "rank-00003")
    for look in (read_predictions, describe, lambda path: run(path, range(40))):
        with pytest.raises(ValueError, match=r"rank-00003 is a copy of rank 0, whose .* Remove .*rank-00003\."):
            look(tmp_path)
    run(tmp_path, range(8), overwrite=True)
    assert read_predictions(tmp_path)["index"].to_pylist() == list(range(8))


def test_a_run_of_no_samples(tmp_path: Path) -> None:
    run(tmp_path, [])
    assert read_predictions(tmp_path).schema == pa.schema([("index", pa.int64()), ("dataloader_idx", pa.int32())])
    assert list(iter_predictions(tmp_path)) == []


def test_only_what_is_committed_is_read(tmp_path: Path) -> None:
    run(tmp_path, range(8))
    (tmp_path / "rank-00000" / "part-00001.parquet").write_bytes(b"not listed")
    (tmp_path / "rank-00000" / ".part-00002.parquet.tmp").write_bytes(b"half")
    assert read_predictions(tmp_path)["index"].to_pylist() == list(range(8))


def test_the_package_has_them() -> None:
    assert lightning_hpu_infer.read_predictions is read_predictions
    assert lightning_hpu_infer.iter_predictions is iter_predictions
    with pytest.raises(AttributeError, match="no attribute 'write_predictions'"):
        _ = lightning_hpu_infer.write_predictions  # type: ignore[attr-defined]


OPTIONAL: list[list[Any]] = [
    [[{"a": 0}, {"a": 1}], [{"a": 2}, {"a": 3}]],
    [[{"a": 4, "b": "x"}, {"a": 5}], [None, None]],
    [None, [{"a": 8, "s": {"x": 1}}, {"a": 9, "s": {"x": 2}}]],
    [[{"a": 10, "s": {"y": 0.5, "x": 3}}, {"a": 11}], [{"a": None}, {}]],
    [None, None],
]


@pytest.mark.parametrize("order", [range(5), reversed(range(5)), [2, 0, 4, 1, 3]], ids=["up", "down", "mixed"])
def test_ranks_may_lack_columns_that_others_have(tmp_path: Path, order: Any) -> None:
    """Those of a detector, for one, whose images have not all of the classes."""
    for rank, number in enumerate(order):
        shards = Shards(LocalStorage(tmp_path), Manifest(rank=rank, world=5, fingerprint={}), rows_per_file=2)
        columns = Columns()
        for place, batch in enumerate(OPTIONAL[number]):
            first = 4 * number + 2 * place
            shards.write(columns.batch(batch, 2, [first, first + 1], 0))
        shards.close(complete=True)
    table = read_predictions(tmp_path)
    assert set(table.column_names) == {"index", "dataloader_idx", "a", "b", "s"}
    samples = [sample or {} for batches in OPTIONAL for batch in batches for sample in batch or [None, None]]
    assert table["index"].to_pylist() == list(range(20))
    for name in ("a", "b"):
        assert table[name].to_pylist() == [sample.get(name) for sample in samples]
    structs = [sample.get("s") for sample in samples]
    assert table["s"].to_pylist() == [None if s is None else {"x": s["x"], "y": s.get("y")} for s in structs]
    assert read_predictions(tmp_path, ["b"])["b"].to_pylist() == table["b"].to_pylist()
    assert describe(tmp_path).problems == []
