"""Ops that a device can do, and that PyTorch's meta or CPU kernels refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_hpu_infer import emulator
from lightning_hpu_infer.emulator import runtime

pytestmark = pytest.mark.usefixtures("lazy_and_eager")
GRAD_MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])


def test_grouped_mm_of_float32() -> None:
    grouped_mm: Any = nn.functional.grouped_mm
    rows, weights = torch.randn(6, 8), torch.randn(2, 8, 16)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    expected = torch.cat([rows[:2] @ weights[0], rows[2:] @ weights[1]])
    result = grouped_mm(rows.to("hpu"), weights.to("hpu"), offs=ends.to("hpu"))
    torch.testing.assert_close(result.cpu(), expected)


def test_what_both_kernels_refuse_is_refused_when_it_is_called() -> None:
    x = torch.ones(2, 3).to("hpu")
    with pytest.raises(RuntimeError, match=r"must have same reduction dim|shapes cannot be multiplied"):
        torch.mm(x, x)


def test_planning_leaves_the_hosts_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError):
        torch.ones(2).to("hpu").normal_(0.0, -1.0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_histogram_of_integers() -> None:
    counts = torch.histc(torch.tensor([0, 2, 2], dtype=torch.int32).to("hpu"), bins=3, min=0, max=2)
    assert counts.dtype is torch.int32
    assert counts.tolist() == [1, 0, 2]


@GRAD_MODES
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("lengths", [[6, 4, 2], [2, 6, 4]])
def test_packed_sequences(mode: Any, kind: Any, batch_first: bool, lengths: list[int]) -> None:
    torch.manual_seed(0)
    net = kind(4, 5, num_layers=2, batch_first=batch_first, bidirectional=True).eval()
    x = torch.randn(3, 6, 4) if batch_first else torch.randn(6, 3, 4)
    is_sorted = lengths == sorted(lengths, reverse=True)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=is_sorted)
        assert packed.data.device == x.device
        assert packed.batch_sizes.device.type == "cpu"
        result, state = net(packed)
        padded, counts = pad_packed_sequence(result, batch_first=batch_first, padding_value=-1.0, total_length=7)
        return padded, counts, state[0] if kind is nn.LSTM else state

    with mode():
        expected = run(x)
        net.to("hpu")
        result = run(x.to("hpu"))
        for value, other in zip(result, expected, strict=True):
            torch.testing.assert_close(value.detach().cpu(), other.detach())


def test_lengths_of_a_packed_sequence() -> None:
    x = torch.ones(2, 3, 1).to("hpu")
    for lengths, message in [
        (torch.tensor([3, 2]).to("hpu"), "1D CPU int64 tensor, but got 1D hpu:0"),
        (torch.tensor([2, 3]), "sorted"),
        (torch.tensor([3, 0]), "greater than 0"),
        (torch.tensor([3]), "batch_size"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            pack_padded_sequence(x, lengths, batch_first=True)


def test_a_tensor_of_the_host_is_copied_to_the_device_in_lazy_mode_only() -> None:
    host, device = torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0]).to("hpu")
    if not runtime.current().config.lazy:
        # bridge: habana_eager/ops/eager_op.cpp:55-104
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            torch.eq(host, device)
        return
    # bridge: habana_kernels/lazy_kernels.h:1463-1495
    emulator.reset_stats()
    result = torch.eq(host, device)
    assert result.device.type == "hpu"
    assert result.tolist() == [True, False]
    stats = emulator.stats()
    assert (stats.h2d_copies, stats.h2d_non_blocking) == (1, 1)
    device.index_copy_(0, torch.tensor([1]), device[0:1])
    assert device.tolist() == [1.0, 1.0]


def test_an_operand_of_the_host_is_a_constant_of_a_capture() -> None:
    if not runtime.current().config.lazy:
        pytest.skip("graphs exist in lazy mode only")
    from habana_frameworks.torch.hpu import wrap_in_hpu_graph_func

    host = torch.tensor([10.0, 20.0])
    add = wrap_in_hpu_graph_func(lambda x: x + host)
    assert add(torch.ones(2).to("hpu")).tolist() == [11.0, 21.0]
    host.zero_()
    assert add(torch.zeros(2).to("hpu")).tolist() == [10.0, 20.0]


@pytest.mark.parametrize("shape", [(), (2,)])
def test_results_are_never_written_to_the_host(shape: tuple[int, ...]) -> None:
    host, device = torch.ones(shape), torch.ones(shape).to("hpu")
    for write in (
        lambda: host.add_(device),
        lambda: torch.add(device, device, out=host),
        lambda: torch.ones(2).index_put_((torch.tensor([0]).to("hpu"),), torch.tensor(3.0)),
    ):
        # bridge: habana_lazy/aten_lazy_bridge.cpp:288-298
        with pytest.raises(RuntimeError, match=r"expecting an HPU tensor|on the same device"):
            write()
    assert host.tolist() == torch.ones(shape).tolist()


def test_a_complex_tensor_is_made_on_the_host() -> None:
    # bridge: habana_kernels/lazy_kernels.cpp:2040-2042 and habana_eager/ops/complex.cpp
    z = torch.complex(torch.tensor([1.0]).to("hpu"), torch.tensor([2.0]).to("hpu"))
    assert z.device.type == "cpu"
    assert z.tolist() == [1 + 2j]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_ops_that_the_cpu_lacks_for_a_type_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, y = torch.tensor([1.0, -2.0, 3.0]).to("hpu").to(dtype), torch.tensor([2.0, 2.0, 2.0]).to("hpu").to(dtype)
    for result, expected in [
        (x + y, [3.0, 0.0, 5.0]),
        (torch.maximum(x, y), [2.0, 2.0, 3.0]),
        (x.amax(), 3.0),
        (x.clone().clamp_(min=0.0), [1.0, 0.0, 3.0]),
    ]:
        assert result.dtype is dtype
        assert result.float().tolist() == expected
    assert [part.item() for part in torch.aminmax(x)] == [-2.0, 3.0]


def test_streams_are_recorded_and_seeds_are_common() -> None:
    x = torch.ones(2).to("hpu")
    x.record_stream(torch.hpu.current_stream())  # type: ignore[attr-defined]
    torch.Tensor.record_stream(x[1:], torch.hpu.Stream())  # type: ignore[attr-defined]
    torch.seed()
    assert torch.initial_seed() == torch.hpu.initial_seed()  # type: ignore[attr-defined]
    first = torch.rand(4, device="hpu").tolist()
    torch.manual_seed(1)
    second = torch.rand(4, device="hpu").tolist()
    assert first != second
    torch.manual_seed(1)
    with torch.random.fork_rng():
        torch.rand(7, device="hpu")
        torch.manual_seed(99)
    assert torch.rand(4, device="hpu").tolist() == second
