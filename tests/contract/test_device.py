from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.contract.conftest import REAL_DEVICE
from tests.contract.models import TOLERANCE, hpu

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
    torch.testing.assert_close(net(x.to("hpu")).cpu(), expected, **TOLERANCE)
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


def test_a_scalar_may_stay_on_the_host() -> None:
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


@pytest.mark.skipif(REAL_DEVICE, reason="a Gaudi does not check indices")
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


def test_settings_that_programs_switch() -> None:
    for first, then in (("disable", "enable"), ("enable", "disable")):
        getattr(hpu(), f"{first}_optim_output_sif")()
        for name in ("inference_mode", "quantization", "matmul3d_2d_reshape", "dynamic_shape"):
            getattr(hpu(), f"{then}_{name}")()
        assert hpu().get_dynamic_shape_status() is (then == "enable")
    with hpu().sdp_kernel(enable_recompute=False):
        assert not hpu().recompute_sdp_enabled()
    assert hpu().recompute_sdp_enabled()
    with pytest.warns(UserWarning, match="deprecated"):
        hpu().setDeterministic(True)
    with pytest.warns(UserWarning, match="deprecated"):
        assert hpu().getDeterministic() is True
    with pytest.warns(UserWarning, match="deprecated"):
        hpu().setDeterministic(False)


def test_device_arguments() -> None:
    assert hpu()._get_device_index("hpu:0") == hpu()._get_device_index(None, optional=True) == 0
    assert hpu()._get_device_index("cpu", allow_cpu=True) == -1
    with pytest.raises(ValueError, match="Expected a hpu device"):
        hpu()._get_device_index("cpu")
    with pytest.raises(ValueError, match="specified index"):
        hpu()._get_device_index("hpu")
    with pytest.raises(AssertionError, match="Invalid device id"):
        hpu().memory_stats(99)
    assert isinstance(hpu().get_device_name(), str)
    assert "dramSize=" in hpu().get_device_properties()


def test_states_of_the_random_generator() -> None:
    state = hpu().get_rng_state()
    first = torch.rand(4, device="hpu").cpu()
    hpu().set_rng_state(state)
    assert torch.equal(torch.rand(4, device="hpu").cpu(), first)
    assert hpu().manual_seed(3) is not None
    assert hpu().initial_seed() == 3
    assert hpu().seed() == hpu().initial_seed()
    assert len(hpu().get_rng_state_all()) == 1
    with pytest.raises(RuntimeError):
        hpu().get_rng_state("hpu:1")


def test_metrics_by_name() -> None:
    metric = hpu().metric_global("graph_compilation")
    assert metric.name() == "graph_compilation"
    assert {"TotalNumber", "TotalTime", "AvgTime"} <= set(dict(metric.stats()))
    assert hpu().metric_global("nothing") is None
    with hpu().metric_localcontext("cpu_fallback") as inside:
        pass
    assert dict(inside.stats()) == {"TotalNumber": 0, "FallbackOps": {}}


def test_weights_are_marked_as_constant() -> None:
    import habana_frameworks.torch.core as htcore
    from habana_frameworks.torch.core.quantization import _check_params_as_const

    net = nn.Linear(2, 2).to("hpu")
    for _ in range(2):
        htcore.hpu_inference_initialize(net)
    if htcore.is_lazy():  # in eager mode nothing is marked
        _check_params_as_const(net)
    htcore.hpu_teardown_inference_env()
