from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.contract.models import hpu

pytestmark = pytest.mark.usefixtures("hpu")


def test_device_module() -> None:
    import habana_frameworks.torch as htorch
    import habana_frameworks.torch.core as htcore

    assert hpu().is_available()
    assert hpu().device_count() >= 1
    assert hpu().current_device() == 0
    assert torch.get_device_module("hpu") is htorch.hpu
    assert htcore.hpu is htorch.hpu
    assert htorch.hpu.hpu.memory_stats()["InUse"] >= 0


def test_torch_accelerator_names_no_foreign_device() -> None:
    current = torch.accelerator.current_accelerator()
    assert current is None or current.type == "hpu"


@pytest.mark.parametrize("device", ["hpu", "hpu:0", torch.device("hpu"), torch.device("hpu", 0)])
def test_round_trip(device: torch.device | str) -> None:
    x = torch.randn(3, 4)
    on_device = x.to(device)
    assert on_device.device == torch.device("hpu", 0)
    assert getattr(on_device, "is_hpu")  # noqa: B009 - type checkers do not know it
    assert not getattr(x, "is_hpu")  # noqa: B009
    assert torch.equal(on_device.cpu(), x)


def test_factories() -> None:
    assert torch.zeros(2, 3, device="hpu").cpu().tolist() == [[0.0] * 3] * 2
    assert torch.full((2,), 7, device="hpu").tolist() == [7, 7]
    assert torch.arange(1, 7, 2, device="hpu").tolist() == [1, 3, 5]
    assert torch.tensor([[1, 2]], device="hpu").tolist() == [[1, 2]]
    assert torch.eye(2, device="hpu").tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert torch.ones_like(torch.empty(2, device="hpu")).tolist() == [1.0, 1.0]
    assert torch.randn(3, device="hpu").device.type == "hpu"


def test_module_parameters_move_and_come_back() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(2, 3)
    expected = net(x)
    net = net.to("hpu")
    assert {p.device.type for p in (*net.parameters(), *net.buffers())} == {"hpu"}
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in net.parameters())
    torch.testing.assert_close(net(x.to("hpu")).cpu(), expected)
    torch.testing.assert_close(net.cpu()(x), expected)


def test_views_share_memory() -> None:
    x = torch.arange(12.0).reshape(3, 4).to("hpu")
    x.t()[1:, 1] = -1.0
    x[0].add_(100)
    assert x.tolist() == [[100.0, 101.0, 102.0, 103.0], [4.0, -1.0, -1.0, -1.0], [8.0, 9.0, 10.0, 11.0]]
    assert [part.tolist() for part in x[0].split(2)] == [[100.0, 101.0], [102.0, 103.0]]


def test_views_in_place() -> None:
    x = torch.arange(6.0).reshape(1, 2, 3).to("hpu")
    y = x.squeeze_(0).t_()
    assert y is x
    assert x.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert x.unsqueeze_(0).shape == (1, 3, 2)
    assert (x + 1).sum().item() == 21.0
    with pytest.raises(RuntimeError, match="in place"):
        x.resize_(100)


def test_views_of_another_dtype() -> None:
    x = torch.tensor([1.0, 2.0]).to("hpu")
    assert x.view(torch.int32).tolist() == torch.tensor([1.0, 2.0]).view(torch.int32).tolist()


def test_shapes_that_depend_on_values() -> None:
    x = torch.tensor([1.0, -2.0, 3.0]).to("hpu")
    assert x[x > 0].tolist() == [1.0, 3.0]
    assert x.nonzero().tolist() == [[0], [1], [2]]
    assert torch.unique(torch.tensor([2, 1, 2]).to("hpu")).tolist() == [1, 2]
    assert bool((x > 0).any())
    assert torch.equal(x, x.clone())


def test_indexing_with_host_and_device_indices() -> None:
    x = torch.arange(6.0).reshape(3, 2).to("hpu")
    assert x[torch.tensor([2, 0])].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert x[torch.tensor([2, 0]).to("hpu")].tolist() == [[4.0, 5.0], [0.0, 1.0]]


def test_mixing_devices_raises() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="hpu") + torch.ones(3)
    assert (torch.ones(3, device="hpu") + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0]


def test_numpy_needs_the_host() -> None:
    with pytest.raises(TypeError, match=r"Tensor\.cpu"):
        torch.ones(2, device="hpu").numpy()


def test_repr_names_the_device() -> None:
    assert repr(torch.ones(2, device="hpu")) == "tensor([1., 1.], device='hpu:0')"


def test_deepcopy_and_pickle() -> None:
    net = nn.Linear(2, 2).to("hpu")
    twin = copy.deepcopy(net)
    with torch.no_grad():
        net.weight.zero_()
    assert twin.weight.abs().sum().item() > 0
    assert twin.weight.requires_grad
    assert torch.equal(pickle.loads(pickle.dumps(twin.weight)).cpu(), twin.weight.cpu())


def test_save_and_load() -> None:
    state = nn.Linear(2, 3).state_dict()
    host, device = io.BytesIO(), io.BytesIO()
    torch.save(state, host)
    torch.save({name: value.to("hpu") for name, value in state.items()}, device)
    for file, location in ((host, "hpu"), (device, None), (device, "cpu")):
        file.seek(0)
        loaded = torch.load(file, map_location=location, weights_only=True)
        assert {value.device.type for value in loaded.values()} == {location or "hpu"}
        assert torch.equal(loaded["weight"].cpu(), state["weight"])


def test_device_randomness_has_its_own_state() -> None:
    torch.manual_seed(0)
    host = torch.randn(3)
    torch.manual_seed(0)
    on_device = torch.randn(3, device="hpu")
    torch.rand(5, device="hpu").bernoulli_()
    assert torch.equal(torch.randn(3), host)
    hpu().manual_seed(0)
    again = torch.randn(3, device="hpu")
    assert torch.equal(on_device.cpu(), again.cpu())


def test_errors_of_the_device_reach_the_host_and_the_device_survives() -> None:
    table = torch.ones(2, 2, device="hpu")
    hpu().synchronize()  # an error spoils everything that was launched together with it
    bad = torch.nn.functional.embedding(torch.tensor([5]).to("hpu"), table)
    with pytest.raises((IndexError, RuntimeError), match="index out of range"):
        bad.cpu()
    assert table.sum().item() == 4.0


def test_scalars_of_a_repeated_op_are_told_apart() -> None:
    x = torch.ones(2).to("hpu")
    for scalar in (0.0, 1.0, -0.0, -1.0, 0, 1, True, False):
        torch.testing.assert_close((x * scalar).cpu(), torch.ones(2) * scalar)
