"""Ops that a device can do, and that PyTorch's meta or CPU kernels refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

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
    with pytest.raises(RuntimeError, match="which the emulator cannot do"):
        torch.add(x, x, out=torch.empty(0).to("hpu"))


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
