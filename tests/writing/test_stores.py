"""Predictions on an object store: files are seen when they are whole, and runs go on there too."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer

from lightning_hpu_infer import cli
from lightning_hpu_infer.writing.columns import Columns
from lightning_hpu_infer.writing.describe import describe
from lightning_hpu_infer.writing.manifest import MANIFEST
from lightning_hpu_infer.writing.read import iter_predictions, read_predictions
from lightning_hpu_infer.writing.storage import LocalStorage, storage_at
from tests.writing.runs import batches_of, opened, run, write_batches

SECRETS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def s3() -> Iterator[str]:
    """A server of this test's own, and the URI of a bucket in it."""
    before = dict(os.environ)
    os.environ.update(SECRETS, AWS_EC2_METADATA_DISABLED="true")
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # Its buckets are those of the process.
    for method, name in (("POST", "moto-api/reset"), ("PUT", "bucket")):
        urlopen(Request(f"http://{host}:{port}/{name}", method=method)).close()
    yield f"s3://bucket/run 1?endpoint_override=http://{host}:{port}".replace(" ", "%20")
    server.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(params=["s3", "memory"])
def uri(request: pytest.FixtureRequest) -> str:
    """A store that Arrow knows, and one that only fsspec does."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return "memory://bucket/run"


def test_a_run_that_was_killed_goes_on(uri: str) -> None:
    killed = opened(uri)
    shards = killed.shards(rows_per_file=8)
    write_batches(shards, Columns(), [*batches_of(range(16)), [16, 17]])
    found = describe(uri)
    assert (found.complete, found.rows) == (False, 16)
    assert read_predictions(uri)["index"].to_pylist() == list(range(16))

    run(uri, range(40))
    found = describe(uri, verify=True)
    assert found.sound
    assert found.rows == 40
    assert [index for batch in iter_predictions(uri, rows=7) for index in batch["index"].to_pylist()] == list(range(40))
    assert cli.main(["predictions", uri]) == 0
    names = storage_at(uri).names("rank-00000")
    assert sorted(names) == [MANIFEST, *sorted(name for name in names if name.endswith(".parquet"))]
    shards.abort()  # Not before: a killed run does not clean up.


def test_ranks_overwriting_and_refusals(uri: str) -> None:
    for rank in range(2):
        run(uri, range(rank, 20, 2), rank, 2)
    assert opened(uri).done[0].tolist() == list(range(20))
    with pytest.raises(ValueError, match="model was"):
        opened(uri, fingerprint={"model": "b"})
    with pytest.raises(FileExistsError, match="20 samples"):
        opened(uri, resume=False)
    run(uri, range(3), overwrite=True)
    assert read_predictions(uri)["index"].to_pylist() == [0, 1, 2]
    assert [rank.rank for rank in describe(uri).ranks] == [0]


def test_other_peoples_files_are_left(uri: str) -> None:
    storage = storage_at(uri)
    storage.put("thesis.txt", b"years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        opened(uri, overwrite=True)
    assert storage.get("thesis.txt") == b"years of work"


def test_a_file_is_not_kept_after_an_error(uri: str) -> None:
    run(uri, range(8), complete=False)
    each = opened(uri)
    shards = each.shards()
    write_batches(shards, Columns(schema=each.schema), batches_of(range(8, 16)))
    shards.abort()
    assert sorted(each.storage.names("rank-00000")) == [MANIFEST, "part-00000.parquet"]
    assert read_predictions(uri)["index"].to_pylist() == list(range(8))


@pytest.mark.parametrize("path", ["folder", Path("folder"), "file:///tmp/folder", "~/folder"])
def test_local_paths(path: Any) -> None:
    storage = storage_at(path)
    assert isinstance(storage, LocalStorage)
    assert storage.local.is_absolute()
    assert storage.local.name == "folder"
    assert "~" not in str(storage)


def test_a_uri_is_no_path() -> None:
    with pytest.raises(ValueError, match=r"has lost a slash\. Pass it as a string"):
        storage_at(Path("s3://bucket/run"))
    with pytest.raises(ValueError, match="nosuch"):
        storage_at("nosuch://bucket/run")
