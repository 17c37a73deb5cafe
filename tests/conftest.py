"""Guards and devices for every test."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from lightning_hpu_infer import emulator
from lightning_hpu_infer.emulator import copies, engine, runtime, streams
from tests.helpers import Clock, installed

# The machine may be busy.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names of tests that are others in each process, which pytest-xdist needs to be the same."""
    if named := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"names with addresses: {named}")


# Not ours: a DataLoader's feeder thread lives until its iterator is collected, tqdm's monitor for ever.
_STAYING = {"QueueFeederThread", "tqdm_monitor"}


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """A test leaves threads, environment variables, the emulator and the log's levels as it found them."""
    before = _surroundings()
    yield
    for thread in threading.enumerate():
        if thread.name not in before[0] | _STAYING:
            thread.join(10)  # rich tells its thread to end, and does not wait for that
    assert _surroundings() == before


def _surroundings() -> tuple[set[str], dict[str, str], bool, tuple[int, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    threads = {thread.name for thread in threading.enumerate()} - _STAYING
    levels = logging.root.manager.disable, logging.getLogger("lightning.pytorch").level
    return threads, environment, emulator.is_installed(), levels


@pytest.fixture
def emulated() -> Iterator[None]:
    """The emulated HPU with its default settings, counters at zero."""
    with installed():
        yield


@pytest.fixture
def eager() -> Iterator[None]:
    """The emulated HPU in eager mode, as Habana's current releases are by default."""
    with installed(lazy=False):
        yield


@pytest.fixture(params=[True, False], ids=["lazy", "eager"])
def lazy_and_eager(request: pytest.FixtureRequest) -> Iterator[None]:
    """The test runs once in each mode of the emulated HPU."""
    with installed(lazy=request.param):
        yield


@pytest.fixture
def path_without_vision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other processes get as their `sys.path`: torchvision breaks `import lightning` (model_zoo/vision.py)."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if Path(folder).name != "vision"])


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """TorchDynamo without memory: it keeps code per function, and gives up on a function after eight versions of it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock of the test's own, for an emulator that is installed afterwards."""
    clock = Clock()
    for module in (copies, engine, runtime, streams):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(params=["cpu", "emulator"])
def device(request: pytest.FixtureRequest) -> str:
    """The test runs once on the CPU and once on the emulated HPU."""
    if request.param == "emulator":
        request.getfixturevalue("emulated")
    return str(request.param)
