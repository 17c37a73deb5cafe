from __future__ import annotations

import gc

import pytest
import torch

from tests.contract.models import hpu

pytestmark = pytest.mark.usefixtures("lazy_hpu")


def test_memory_follows_tensors() -> None:
    start = hpu().memory_allocated()
    x = torch.ones(1024).to("hpu")
    assert hpu().memory_allocated() == start + 4096
    view = x[10:]
    del x
    assert hpu().memory_allocated() == start + 4096
    del view
    hpu().synchronize()
    assert hpu().memory_allocated() == start
    assert hpu().max_memory_allocated() >= start + 4096
    hpu().reset_peak_memory_stats()
    assert hpu().max_memory_allocated() == start


def test_64_bit_types_take_32_bits_in_lazy_mode() -> None:
    start = hpu().memory_allocated()
    ids = torch.ones(1024, dtype=torch.int64).to("hpu")
    assert hpu().memory_allocated() == start + 4096
    del ids


def test_memory_stats_names() -> None:
    assert set(hpu().memory_stats()) == {
        *("Limit", "InUse", "MaxInUse", "NumAllocs", "NumFrees", "ActiveAllocs", "MaxAllocSize"),
        *("TotalSystemAllocs", "TotalSystemFrees", "TotalActiveAllocs"),
    }
    free, total = hpu().mem_get_info()
    assert 0 < free <= total


@pytest.mark.parametrize("disable_tensor_cache", [False, True])
def test_a_loop_of_replays_does_not_grow(disable_tensor_cache: bool) -> None:
    import habana_frameworks.torch as htorch

    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)).to("hpu")
    htorch.hpu.wrap_in_hpu_graph(net, disable_tensor_cache=disable_tensor_cache)
    sizes = []
    with torch.no_grad():
        for _ in range(20):
            out = net(torch.randn(4, 8).to("hpu")).clone().cpu()
            hpu().synchronize()
            sizes.append(hpu().memory_allocated())
    del out
    assert len(set(sizes[3:])) == 1


def test_the_cache_keeps_intermediates_only_with_the_tensor_cache() -> None:
    import habana_frameworks.torch as htorch

    def in_use(*, disable_tensor_cache: bool) -> int:
        def func(x: torch.Tensor) -> torch.Tensor:
            for _ in range(5):
                x = x + 1
            return x

        wrapped = htorch.hpu.wrap_in_hpu_graph_func(func, disable_tensor_cache=disable_tensor_cache)
        gc.collect()
        before = hpu().memory_allocated()
        for _ in range(3):
            wrapped(torch.zeros(1024).to("hpu")).cpu()
        hpu().synchronize()
        return int(hpu().memory_allocated() - before)

    assert in_use(disable_tensor_cache=True) == 4096
    assert in_use(disable_tensor_cache=False) == 6 * 4096
