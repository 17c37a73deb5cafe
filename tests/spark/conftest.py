"""A Spark of the tests' own, in one process of Java on this machine."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def session() -> Iterator[Any]:
    """Two tasks at once, which may fail twice, in workers that have the emulated HPU."""
    from pyspark.sql import SparkSession

    patch = pytest.MonkeyPatch()
    patch.setenv("PYSPARK_PYTHON", sys.executable)
    patch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    spark = (
        SparkSession.builder.master("local[2,3]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.memory", "1g")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "12")
        .config("spark.executorEnv.LIGHTNING_HPU_INFER_EMULATOR", "1")
        .getOrCreate()
    )
    yield spark
    spark.stop()
    patch.undo()
