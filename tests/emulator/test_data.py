"""Assigning to ``tensor.data``, swapping tensors, and tensors that are resized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_hpu_infer import emulator

pytestmark = pytest.mark.usefixtures("lazy_and_eager")
GRAD_MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])


def _on_device(*values: float) -> torch.Tensor:
    return torch.tensor(values).to("hpu")


@GRAD_MODES
def test_a_parameter_takes_over_what_its_data_is_set_to(mode: Any) -> None:
    net = nn.Linear(2, 1, bias=False).to("hpu")
    weight = net.weight
    with mode():
        new = _on_device(3.0, 4.0).reshape(1, 2)
        weight.data = new
        assert net(_on_device(1.0, 1.0)).item() == 7.0
        assert net.weight is weight
        assert isinstance(weight, nn.Parameter)
        assert weight.requires_grad
        assert weight.data_ptr() == new.data_ptr()
        new += 1
        assert weight.tolist() == [[4.0, 5.0]]  # one memory, as on any device
    with pytest.raises(TypeError):
        weight.data = [1.0]  # type: ignore[assignment]


@GRAD_MODES
def test_data_is_an_alias_without_autograd(mode: Any) -> None:
    with mode():
        parameter = nn.Parameter(_on_device(1.0, 2.0))
        data = parameter.data
        assert not data.requires_grad
        assert type(data) is not nn.Parameter
        assert data.data_ptr() == parameter.data_ptr()
        data.mul_(2)
        parameter.data[0] = 9.0
        assert parameter.tolist() == [9.0, 4.0]


@GRAD_MODES
def test_the_new_data_may_have_another_shape_and_type(mode: Any) -> None:
    with mode():
        x = _on_device(1.0, 2.0)
        view = x[1:]
        x.data = torch.arange(6).to("hpu").reshape(2, 3)[:, 1:]
        assert (x.shape, x.dtype, x.stride(), x.is_contiguous()) == ((2, 2), torch.int64, (3, 1), False)
        assert x.tolist() == [[1, 2], [4, 5]]
        assert (x + 1).tolist() == [[2, 3], [5, 6]]
        assert view.tolist() == [2.0]  # shows the memory that it was made of
        half = nn.Parameter(_on_device(1.5))
        half.data = half.data.half()
        assert half.dtype is torch.float16


def test_idioms_that_assign_data() -> None:
    net = nn.Linear(2, 2).to("hpu")
    for parameter in net.parameters():
        parameter.data = parameter.data.clone().fill_(2.0)
    assert nn.utils.parameters_to_vector(net.parameters()).tolist() == [2.0] * 6
    nn.utils.vector_to_parameters(torch.arange(6.0).to("hpu"), net.parameters())
    assert net.weight.tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert net.bias.tolist() == [4.0, 5.0]


def test_host_memory_is_refused_and_changes_nothing() -> None:
    x = _on_device(1.0)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        x.data = torch.ones(2)
    assert x.tolist() == [1.0]


def test_whoever_replaces_the_attribute_of_torch_sees_each_access(monkeypatch: pytest.MonkeyPatch) -> None:
    accesses: list[str] = []
    plain: Any = torch.Tensor.data

    class Watch:
        def __get__(self, tensor: Any, owner: Any = None) -> Any:
            if tensor is None:
                return self
            accesses.append("get")
            return plain.__get__(tensor)

        def __set__(self, tensor: Any, value: Any) -> None:
            accesses.append("set")
            plain.__set__(tensor, value)

    monkeypatch.setattr(torch.Tensor, "data", Watch(), raising=False)
    x = _on_device(1.0)
    x.data = x.data + 1
    assert x.tolist() == [2.0]
    assert accesses == ["get", "set"]


@GRAD_MODES
def test_swapped_tensors_show_each_others_values(mode: Any) -> None:
    with mode():
        x, y = _on_device(1.0, 2.0), _on_device(3.0)
        torch.utils.swap_tensors(x, y)
        assert (x.tolist(), y.tolist()) == ([3.0], [1.0, 2.0])
        assert ((x + 1).tolist(), (y + 1).tolist()) == ([4.0], [2.0, 3.0])


@GRAD_MODES
def test_resizing_keeps_elements_and_views(mode: Any) -> None:
    with mode():
        x = _on_device(1.0, 2.0, 3.0, 4.0)
        view = x[1:3]
        address = x.data_ptr()
        assert x.resize_(2, 1) is x
        assert (x.shape, x.stride(), x.tolist()) == ((2, 1), (1, 1), [[1.0], [2.0]])
        assert x.data_ptr() == address
        assert x.is_inference() is torch.is_inference_mode_enabled()
        x.resize_(2, 3)
        x[1] = 9.0
        assert x[:, :].flatten().tolist()[:3] == [1.0, 2.0, 3.0]
        assert (x + 1)[1].tolist() == [10.0, 10.0, 10.0]
        view.fill_(7.0)
        assert x[0].tolist() == [1.0, 7.0, 7.0]  # one memory still
        assert x.cpu().shape == (2, 3)
        assert x.resize_as_(_on_device(1.0)).tolist() == [1.0]


def test_a_view_that_grows_beyond_its_base() -> None:
    base = _on_device(1.0, 2.0)
    view = base[1:]
    view.resize_(3)
    view[1:] = 5.0
    assert view.tolist() == [2.0, 5.0, 5.0]
    view.mul_(2)
    assert base.tolist() == [1.0, 4.0]


def test_resized_memory_is_counted() -> None:
    before = emulator.stats().bytes_in_use
    x = torch.zeros(4, device="hpu")
    assert emulator.stats().bytes_in_use == before + 16
    x.resize_(100)
    x.cpu()
    assert emulator.stats().bytes_in_use == before + 400


@GRAD_MODES
def test_outputs_are_resized(mode: Any) -> None:
    with mode():
        x = _on_device(1.0, 2.0, 3.0)
        empty = torch.empty(0, device="hpu")
        assert torch.add(x, x, out=empty) is empty
        assert empty.tolist() == [2.0, 4.0, 6.0]
        values, places = torch.empty(0, device="hpu"), torch.empty(0, dtype=torch.int64, device="hpu")
        torch.topk(x, 2, out=(values, places))
        assert (values.tolist(), places.tolist()) == ([3.0, 2.0], [2, 1])
        torch.nonzero(x > 1, out=places.resize_(0))
        assert places.tolist() == [[1], [2]]
        full = _on_device(1.0)
        with pytest.warns(UserWarning, match="output with one or more elements was resized"):
            torch.neg(x, out=full)
        assert full.tolist() == [-1.0, -2.0, -3.0]


def test_resizing_inside_a_graph() -> None:
    hpu: Any = torch.hpu  # type: ignore[attr-defined]
    if not hasattr(hpu, "wrap_in_hpu_graph_func"):
        pytest.skip("graphs exist in lazy mode only")

    def step(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(0, device="hpu")
        torch.add(x, x, out=out)
        return out.resize_(2) + 1

    graphed = hpu.wrap_in_hpu_graph_func(step)
    assert [graphed(_on_device(*values)).tolist() for values in [(1.0, 2.0, 3.0), (4.0, 5.0, 6.0)]] == [[3, 5], [9, 11]]


def test_a_view_of_another_type() -> None:
    # bridge: habana_kernels/lazy_kernels.cpp:1660-1685
    flags = torch.tensor([False, True, True, False] * 2).to("hpu")
    assert flags.view(torch.float).view(torch.int32).tolist() == [0x00010100] * 2
    assert torch.tensor([0, 3], dtype=torch.uint8).to("hpu").view(torch.bool).tolist() == [False, True]
