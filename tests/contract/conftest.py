"""The device under test: a real Gaudi if there is one, the emulator otherwise."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

REAL_DEVICE = importlib.util.find_spec("habana_frameworks") is not None

if importlib.util.find_spec("torchvision") is not None:
    # torchvision's wheel from PyPI lacks its C++ operators next to a CPU-only torch, and then fails to import, which
    # timm does (and torchmetrics, so Lightning too). It only registers shapes for these two.
    _TORCHVISION_OPS = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _TORCHVISION_OPS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


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
