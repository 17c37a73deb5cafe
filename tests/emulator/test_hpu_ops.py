"""``torch.ops.hpu``: the bridge's own ops, against their definitions in its tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("lazy_and_eager")
hpu: Any = torch.ops.hpu


def _hpu(x: torch.Tensor) -> torch.Tensor:
    return x.to("hpu")


def test_fast_math_and_indexing() -> None:
    x = torch.rand(5, 5, 5) + 0.5
    for name in ("exp", "sqrt", "rsqrt"):
        torch.testing.assert_close(getattr(hpu, f"{name}_fast_math")(_hpu(x)).cpu(), getattr(torch, name)(x))
    rows, columns = torch.tensor([1, 2, 3]), torch.tensor([1, 3, 1])
    assert torch.equal(hpu.plain_index(_hpu(x), [_hpu(rows), _hpu(columns)]).cpu(), x[rows, columns])


def test_masked_softmax() -> None:
    x, mask = torch.randn(3, 4), torch.randn(3, 4)
    result = hpu.scaled_masked_softmax(_hpu(x), _hpu(mask), 0.5)
    torch.testing.assert_close(result.cpu(), torch.softmax(x * 0.5 + mask, -1))


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 1, 4), (2, 3, 4)])
def test_triangular_softmax(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    later = torch.ones(shape[-2:], dtype=torch.bool).triu(shape[-1] - shape[-2] + 1)
    expected = torch.softmax((x * 1.5).masked_fill(later, float("-inf")), -1)
    torch.testing.assert_close(hpu.scaled_triangular_softmax(_hpu(x), 1.5).cpu(), expected)
    result, factor, largest = hpu.scaled_triangular_softmax_retain(_hpu(x), 1.5)
    torch.testing.assert_close(result.cpu(), expected)
    assert torch.equal(hpu.scaled_triangular_softmax(_hpu(x), 1.5, factor, largest).cpu(), result.cpu())


def test_triangular_softmax_of_groups_with_bounds() -> None:
    x, bounds = torch.randn(4, 3, 3), torch.tensor([[0, 2], [1, 3]])
    result = hpu.scaled_masked_triangular_softmax(_hpu(x), _hpu(bounds), 2.0, 2, True, 0, torch.bfloat16)
    allowed = torch.ones(3, 3, dtype=torch.bool).tril().repeat(4, 1, 1)
    allowed[:2, :, 2:] = False
    allowed[2:, :, :1] = False
    expected = torch.softmax((x * 2).masked_fill(~allowed, float("-inf")), -1).nan_to_num(0.0)
    assert result.dtype is torch.bfloat16
    torch.testing.assert_close(result.cpu(), expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.float8_e4m3fn])
def test_a_cache_of_beams_is_reordered_in_place(dtype: torch.dtype) -> None:
    cache = torch.randint(0, 16, (2, 4, 3, 6, 2)).to(dtype)
    start, length = torch.tensor([2, 1], dtype=torch.int32), torch.tensor([2, 4], dtype=torch.int32)
    beams = torch.tensor([[0, 2, 3, 2], [1, 0, 1, 3]])
    packed = (beams * torch.tensor([64, 16, 4, 1])).sum(-1).to(torch.uint8)
    device = _hpu(cache)
    result = hpu.kv_reorder_(device, _hpu(start), _hpu(start + length), _hpu(packed))
    for row in range(2):
        part = cache[row].narrow(-2, int(start[row]), int(length[row]))
        part.copy_(part.float()[beams[row]].to(dtype))
    assert torch.equal(device.cpu().float(), cache.float())
    assert result is device


def test_interleaving_in_place() -> None:
    x = torch.arange(16.0).reshape(8, 2)
    device = _hpu(x)
    hpu.in_place_interleave_(device)
    assert torch.equal(device.cpu(), x[torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])])


def test_compiled() -> None:
    x = torch.randn(2, 4, 4)

    @torch.compile(backend="eager")
    def attend(scores: torch.Tensor) -> torch.Tensor:
        return hpu.scaled_triangular_softmax(scores, 1.0) + 1

    torch.testing.assert_close(attend(_hpu(x)).cpu(), hpu.scaled_triangular_softmax(x, 1.0) + 1)
