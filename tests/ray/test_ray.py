"""Datasets of Ray, predicted by actors of a real Ray on this machine."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import Tensor

from lightning_hpu_infer.arrays import as_tensors
from lightning_hpu_infer.integrations.ray import Predictor, predict_dataset
from tests.helpers import Net, Rows
from tests.ray.models import Columns, Dying, Failing, Loading, Types, numbers, only_ids

# Ray warns of what it does itself.
pytestmark = pytest.mark.filterwarnings("default")

EMULATED = {"env_vars": {"LIGHTNING_HPU_INFER_EMULATOR": "1"}}
ROWS = 203
ROOT = Path(__file__).parents[2]


def expected() -> Tensor:
    with torch.inference_mode():
        return Net().net(Rows(ROWS).rows)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of many lengths, whose rows together are `Rows(ROWS)`, with an `id`."""
    folder = tmp_path_factory.mktemp("source")
    for number, ids in enumerate(np.split(np.arange(ROWS), [40, 41, 100, 150])):
        vectors = pyarrow.FixedShapeTensorArray.from_numpy_ndarray(Rows(ROWS).rows.numpy()[ids])
        pyarrow.parquet.write_table(pyarrow.table({"id": ids, "x": vectors}), folder / f"{number}.parquet")
    return folder


def check(dataset: Any, *, ordered: bool = False, hpu: bool) -> None:
    """Each row is there once, with its own prediction."""
    found = dataset.take_all()
    ids = [row["id"] for row in found]
    assert ids == list(range(ROWS)) if ordered else Counter(ids) == Counter(range(ROWS))
    assert {bool(row["hpu"]) for row in found} == {hpu}
    predictions = torch.from_numpy(np.stack([row["prediction"] for row in found]))
    torch.testing.assert_close(predictions, expected()[ids])


@pytest.mark.parametrize("batch_format", ["numpy", "pyarrow", "pandas"])
def test_each_format_on_emulated_hpus(cluster: Any, source: Path, tmp_path: Path, batch_format: Any) -> None:
    predicted = predict_dataset(
        cluster.data.read_parquet(str(source)),
        Loading(tmp_path),
        concurrency=1,
        batch_size=4,
        rows_per_task=16,
        columns=["id"],
        preprocess=numbers if batch_format == "pandas" else None,  # pandas has no type for vectors
        batch_format=batch_format,
        preserve_order=True,
        num_cpus=0.5,
        runtime_env=EMULATED,
    )
    check(predicted, ordered=True, hpu=True)
    assert len(list(tmp_path.iterdir())) == 1


def test_without_preprocess_the_types_of_the_dataset_decide(cluster: Any, tmp_path: Path) -> None:
    ids = np.arange(ROWS)
    vectors = pyarrow.array(list(Rows(ROWS).rows.numpy()), pyarrow.list_(pyarrow.float32(), 4))
    lists = [[int(number)] * (1 + number % 8 // 4) for number in ids]  # of equal lengths within each batch
    table = pyarrow.table({"id": ids, "x": vectors, "list": lists, "text": [str(number) for number in ids]})
    pyarrow.parquet.write_table(table, tmp_path / "full.parquet")
    # Without a value for one of them, NumPy would have these numbers rounded to float64.
    big = [None if number == 7 else 2**60 + int(number) for number in ids]
    pyarrow.parquet.write_table(table.append_column("big", [big]), tmp_path / "empty.parquet")
    arguments: dict[str, Any] = {
        "concurrency": 1,
        "batch_size": 4,
        "rows_per_task": 16,
        "num_cpus": 0.5,
        "resources": {},
    }

    full = cluster.data.read_parquet(str(tmp_path / "full.parquet"))
    found = predict_dataset(full, Types, columns=["id", "list"], **arguments).take_all()
    assert Counter(row["id"] for row in found) == Counter(range(ROWS))
    assert {row["kinds"] for row in found} == {"id Tensor, x Tensor, list list, text list"}
    for row in found:
        assert list(row["list"]) == lists[row["id"]]
        assert [type(value) is not int and bool(value) for value in row["even"]] == [row["id"] % 2 == 0] * 2
    empty = cluster.data.read_parquet(str(tmp_path / "empty.parquet"))
    with pytest.raises(Exception, match="The column 'big' has 1 empty places in 4 rows"):
        predict_dataset(empty, Types, **arguments).take_all()
    # What `preprocess` does not read need not be full, and is kept as it is.
    kept = predict_dataset(
        empty, Types, preprocess=only_ids, batch_format="pyarrow", columns=["id", "big"], **arguments
    ).take_all()
    assert {row["id"]: row["big"] for row in kept} == dict(enumerate(big))


def test_tensors_of_rays_own_type(cluster: Any) -> None:
    from ray.data.extensions import ArrowTensorArray

    numbers = np.arange(12.0).reshape(3, 2, 2)
    column = ArrowTensorArray.from_numpy(numbers)
    torch.testing.assert_close(as_tensors(column.slice(1)), torch.from_numpy(numbers[1:]))
    torch.testing.assert_close(as_tensors(pyarrow.chunked_array([], column.type)), torch.empty(0, 2, 2).double())
    empty = pyarrow.array([[1, None, 3, 4], None], column.type.storage_type)
    with pytest.raises(ValueError, match="has 2 empty places in 2 rows"):
        as_tensors(column.type.wrap_array(empty))
    ragged = ArrowTensorArray.from_numpy([np.ones(2), np.ones(3)])
    assert [value.tolist() for value in as_tensors(ragged)] == [[1, 1], [1, 1, 1]]


def test_map_batches_takes_the_class_itself_on_the_cpu(cluster: Any, source: Path) -> None:
    dataset = cluster.data.read_parquet(str(source)).map_batches(
        Predictor,
        batch_size=16,
        compute=cluster.data.ActorPoolStrategy(size=1),
        fn_constructor_args=(Columns,),
        fn_constructor_kwargs={"batch_size": 4, "columns": ["id"]},
    )
    check(dataset, hpu=False)


def test_an_actor_that_dies_is_replaced_and_each_row_is_there_once(cluster: Any, source: Path, tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    loads.mkdir()
    predicted = predict_dataset(
        cluster.data.read_parquet(str(source)),
        Loading(loads),
        concurrency=2,
        batch_size=4,
        rows_per_task=16,
        preprocess=Dying(101, tmp_path / "died"),
        columns=["id"],
        num_cpus=0.5,
        preserve_order=True,
        runtime_env=EMULATED,
    )
    check(predicted, ordered=True, hpu=True)
    assert (tmp_path / "died").exists()
    # Two and one more, or none if the second one had not started by then.
    assert 2 <= len(list(loads.iterdir())) <= 3


@pytest.mark.timeout(300)
def test_a_run_that_failed_goes_on_with_what_is_missing(cluster: Any, source: Path, tmp_path: Path) -> None:
    counts, mark = tmp_path / "counts", tmp_path / "mark"
    counts.mkdir()
    mark.touch()

    def run() -> int:
        for file in counts.iterdir():
            file.unlink()
        predict_dataset(
            cluster.data.read_parquet(str(source)),
            Columns,
            concurrency=1,
            batch_size=4,
            rows_per_task=16,
            preprocess=Failing(120, mark, counts),
            columns=["id"],
            id_column="id",
            checkpoint=tmp_path / "checkpoint",
            num_cpus=2,  # no more would be accepted, and with no more it has to end
            resources={},
        ).write_parquet(str(tmp_path / "out"))
        return sum(int(file.name.partition("-")[0]) for file in counts.iterdir())

    with pytest.raises(Exception, match="row 120 is bad"):
        run()
    written = len(pyarrow.parquet.read_table(tmp_path / "out"))
    assert 0 < written < ROWS
    mark.unlink()
    assert run() == ROWS - written
    check(cluster.data.read_parquet(str(tmp_path / "out")), hpu=False)
    assert run() == 0
    assert len(pyarrow.parquet.read_table(tmp_path / "out")) == ROWS


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_run_whose_driver_was_killed_goes_on_with_what_is_missing(cluster: Any, source: Path, tmp_path: Path) -> None:
    counts, mark, out = (tmp_path / name for name in ("counts", "mark", "out"))
    counts.mkdir()
    mark.touch()
    command = [sys.executable, "-m", "tests.ray.driver", str(source), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT) as driver:
        try:
            while len(list(out.glob("*.parquet"))) < 2:
                assert driver.poll() is None
                time.sleep(0.05)
        finally:
            driver.kill()
    mark.unlink()
    for file in counts.iterdir():
        file.unlink()
    subprocess.run(command, cwd=ROOT, check=True, timeout=200)
    check(cluster.data.read_parquet(str(out)), hpu=False)
    computed = sum(int(file.name.partition("-")[0]) for file in counts.iterdir())
    assert 0 < computed < ROWS


def test_an_error_says_what_was_wrong(cluster: Any, source: Path) -> None:
    dataset = cluster.data.read_parquet(str(source))
    arguments: dict[str, Any] = {"concurrency": 1, "batch_size": 4, "num_cpus": 0.5, "resources": {}}
    with pytest.raises(ValueError, match="`id_column` and `checkpoint` go together, got 'id' and None"):
        predict_dataset(dataset, Columns, id_column="id", **arguments)
    with pytest.raises(ValueError, match="`rows_per_task` must be a multiple of `batch_size`, 4, got 6"):
        predict_dataset(dataset, Columns, rows_per_task=6, **arguments)
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more, got 0"):
        predict_dataset(dataset, Columns, **(arguments | {"batch_size": 0}))
    for concurrency in ("2", 2.0, 0, (1,), (2, 1), (0, 2), (1, 2.5)):
        with pytest.raises(ValueError, match="`concurrency` must be a number of actors, 1 or more, or the least"):
            predict_dataset(dataset, Columns, **(arguments | {"concurrency": concurrency}))
    with pytest.raises(ValueError, match="`columns` must be a list of names, got 'id'"):
        predict_dataset(dataset, Columns, columns="id", id_column="i", checkpoint="/nowhere", **arguments)
    with pytest.raises(ValueError, match="`checkpoint` needs a dataset that Ray reads"):
        predict_dataset(
            cluster.data.from_items([{"id": 1}]), Columns, id_column="id", checkpoint="/nowhere", **arguments
        )
    with pytest.raises(ValueError, match=r"`columns` must have the `id_column`, 'id', got \['x'\]"):
        predict_dataset(dataset, Columns, columns=["x"], id_column="id", checkpoint="/nowhere", **arguments)
    with pytest.raises(Exception, match=r"\['nothing'\] are to be kept"):
        predict_dataset(dataset, Columns, columns=["nothing"], **arguments).take_all()


def test_what_ray_would_wait_for_without_an_end_is_refused(cluster: Any, source: Path, tmp_path: Path) -> None:
    def predict(actors: int, num_cpus: float, **arguments: Any) -> None:
        dataset = cluster.data.read_parquet(str(source))
        predict_dataset(
            dataset, Columns, concurrency=(actors, 8), batch_size=4, num_cpus=num_cpus, resources={}, **arguments
        )

    def predict_on(num_cpus: float, resources: dict[str, float]) -> None:
        dataset = cluster.data.read_parquet(str(source))
        arguments: dict[str, Any] = {"rows_per_task": None, "num_cpus": num_cpus, "resources": resources}
        predict_dataset(dataset, Columns, concurrency=2, batch_size=4, **arguments)

    predict_on(4, {"HPU": 2})
    refused: list[tuple[float, dict[str, float], str]] = [
        (5, {}, "5 of 'CPU', and Ray has 4"),
        (1, {"HPU": 3}, "3 of 'HPU', and Ray has 2"),
        (1, {"HPU": 1, "TPU": 0.5}, "0.5 of 'TPU', and Ray has 0"),
    ]
    for num_cpus, resources, said in refused:
        with pytest.raises(ValueError, match=rf"An actor needs {said} \(.*without an end"):
            predict_on(num_cpus, resources)

    kept = {"id_column": "id", "checkpoint": tmp_path}
    predict(3, 1)  # of four
    with pytest.raises(ValueError, match=r"needs 4\.3 CPUs, and Ray has 4: 3 x 1\.1 for the actors .* and 1 for Ray"):
        predict(3, 1.1)
    predict(2, 1, **kept)
    with pytest.raises(ValueError, match=r"needs 5 CPUs, and Ray has 4: 3 x 1 for the actors .* and 2 for Ray's own"):
        predict(3, 1, **kept)


@pytest.mark.timeout(300)
def test_the_example_gives_the_embeddings_of_stock_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    from examples.compare import trainer_of
    from examples.embed_sentences import SentenceEmbedder, embed, loader_of

    arguments = ["--limit", "40", "--batch-size", "8", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "examples.ray_data", *arguments]
    for _ in range(2):  # the second one has nothing to do, and ends
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
    table = pyarrow.parquet.read_table(tmp_path / "embeddings")
    assert sorted(table["id"].to_pylist()) == list(range(40))
    expected = embed(trainer_of("cpu"), SentenceEmbedder(), loader_of(table["text"].to_pylist(), 16, 48))
    found = torch.from_numpy(np.stack(table["embedding"].to_numpy(zero_copy_only=False)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
