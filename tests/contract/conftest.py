"""The device under test: a real Gaudi if there is one, the emulator otherwise."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

REAL_DEVICE = importlib.util.find_spec("habana_frameworks") is not None


def _device(*, lazy: bool) -> Iterator[None]:
    if REAL_DEVICE:
        from habana_frameworks.torch.utils.internal import is_lazy

        if is_lazy() is not lazy:
            pytest.skip(f"the process runs with PT_HPU_LAZY_MODE={int(is_lazy())}")
        yield
        return
    from lightning_hpu_infer import emulator

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
