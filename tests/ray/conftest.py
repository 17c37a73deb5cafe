"""A Ray of the tests' own: small, on this machine, and gone afterwards."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Ray with four CPUs, as it counts them, and two emulated HPUs for actors that ask for one."""
    import ray
    from ray.data import DataContext

    ray.init(
        num_cpus=4,
        resources={"HPU": 2},
        object_store_memory=150 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    logging.getLogger("ray").setLevel(logging.WARNING)
    DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()
