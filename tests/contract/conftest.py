"""The device under test: a real Gaudi if there is one, the emulator otherwise."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

from lightning_hpu_infer import emulator

REAL_DEVICE = importlib.util.find_spec("habana_frameworks") is not None and not emulator.is_installed()
VERIFYING = "LIGHTNING_HPU_INFER_VERIFY_JOB" in os.environ
"""`verify` starts a process for each mode, as a real bridge needs it."""


def _device(*, lazy: bool) -> Iterator[None]:
    if not REAL_DEVICE and VERIFYING and lazy is not (os.environ["PT_HPU_LAZY_MODE"] != "0"):
        pytest.skip(f"the process runs with PT_HPU_LAZY_MODE={os.environ['PT_HPU_LAZY_MODE']}")
    if REAL_DEVICE:
        from habana_frameworks.torch.utils.internal import is_lazy

        if is_lazy() is not lazy:
            pytest.skip(f"the process runs with PT_HPU_LAZY_MODE={int(is_lazy())}")
        yield
        return
    emulator.install(emulator.EmulatorConfig(lazy=lazy))
    try:
        yield
    finally:
        emulator.uninstall()


@pytest.fixture
def lazy_hpu() -> Iterator[None]:
    """A device in lazy mode."""
    yield from _device(lazy=True)


@pytest.fixture
def eager_hpu() -> Iterator[None]:
    """A device in eager mode."""
    yield from _device(lazy=False)


@pytest.fixture(params=["lazy", "eager"])
def hpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """A device in each mode."""
    yield from _device(lazy=request.param == "lazy")


@pytest.fixture
def emulated(lazy_hpu: None) -> None:
    """The emulator in lazy mode, for laws that hardware obeys without showing it."""
    if REAL_DEVICE:
        pytest.skip("needs queues that can be paused, which only the emulator has")
