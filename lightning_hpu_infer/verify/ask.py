"""What questions to the device share: tensors on it, work that takes it a while, and patience."""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hpu_infer import _habana
from lightning_hpu_infer.verify.check import Broken

DEVICE = torch.device(_habana.DEVICE_TYPE, 0)
_SECONDS = 0.03
# Each is a chain of eight products of this size squared. The largest takes a gigabyte.
_SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)


def host(*shape: int, seed: int = 0) -> Tensor:
    """Random float32 numbers on the host, the same in each call.

    Args:
        *shape: Of the tensor.
        seed: Of the numbers.
    """
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def launch_work() -> Tensor:
    """Call ops that keep the device busy for 30 ms or more, on any device. In lazy mode a step marker launches them.

    Returns:
        Their result, square, all elements equal: one divided by its number of rows.
    """
    return _chain(_size())


def seconds_of_work() -> float:
    """How long `launch_work` keeps the device busy, in seconds, measured now."""
    return _seconds(_size())


def _chain(size: int) -> Tensor:
    x = torch.full((size, size), 1 / size, device=DEVICE)
    for _ in range(8):
        x = x @ x  # each product is the matrix itself
    return x


def _seconds(size: int) -> float:
    _habana.synchronize()
    start = time.perf_counter()
    result = _chain(size)
    _habana.mark_step()
    _habana.synchronize()
    del result
    return time.perf_counter() - start


@functools.cache
def _size() -> int:
    """The smallest size that takes long enough here. The first run of each compiles."""
    for size in _SIZES:
        _seconds(size)
        if _seconds(size) >= _SECONDS:
            return size
    return _SIZES[-1]


def patiently(attempt: Callable[[], str]) -> str:
    """What an attempt saw that depends on time: the machine may be busy, so the best of three counts.

    Args:
        attempt: Returns what was seen, or raises `Broken`.

    Raises:
        Broken: If all three attempts did.
    """
    for _ in range(2):
        try:
            return attempt()
        except Broken:
            continue
    return attempt()


def expect(held: bool, seen: str) -> None:
    """Raise `Broken` unless something is so.

    Args:
        held: Whether it is.
        seen: What was seen instead.

    Raises:
        Broken: If not.
    """
    if not held:
        raise Broken(seen)


def expect_equal(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise `Broken` unless two tensors are equal, bit for bit.

    Args:
        found: On any device.
        expected: On the host.
        what: What they are, for the message.

    Raises:
        Broken: If they differ; says how.
    """
    found = found.cpu()
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise Broken(f"{what}: {found.dtype}{list(found.shape)} instead of {expected.dtype}{list(expected.shape)}")
    wrong = found != expected
    if bool(wrong.any()):
        first = int(wrong.flatten().nonzero()[0])
        raise Broken(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements differ, the first is"
            f" {found.flatten()[first].item()} instead of {expected.flatten()[first].item()}"
        )
