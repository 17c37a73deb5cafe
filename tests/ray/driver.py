"""Predicts files of Ray's with a checkpoint, on a cluster of its own: `python -m tests.ray.driver SOURCE FOLDER`."""

import sys
from pathlib import Path

import ray

from lightning_hpu_infer.integrations.ray import predict_dataset
from tests.ray.models import Columns, Waiting


def main(source: str, folder: Path) -> None:
    # "local", or Ray would take the cluster of the tests.
    ray.init("local", num_cpus=4, object_store_memory=150 * 2**20, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    predict_dataset(
        ray.data.read_parquet(source),
        Columns,
        concurrency=1,
        batch_size=4,
        rows_per_task=16,
        preprocess=Waiting(120, folder / "mark", folder / "counts"),
        columns=["id"],
        id_column="id",
        checkpoint=folder / "checkpoint",
        resources={},
    ).write_parquet(str(folder / "out"))
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
