from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.contract.models import hpu

pytestmark = pytest.mark.usefixtures("hpu")


@pytest.mark.parametrize("inference", [False, True])
def test_matmuls_run_in_bfloat16(inference: bool) -> None:
    net = nn.Linear(4, 4).to("hpu")
    x = torch.randn(2, 4).to("hpu")
    with torch.inference_mode(inference), torch.no_grad():
        with torch.autocast("hpu", dtype=torch.bfloat16):
            assert hpu().is_autocast_hpu_enabled()
            assert net(x).dtype is torch.bfloat16
            assert (x @ x.t()).dtype is torch.bfloat16
            assert (x + 1).dtype is torch.float32
            with torch.autocast("hpu", enabled=False):
                assert net(x).dtype is torch.float32
        assert not hpu().is_autocast_hpu_enabled()
        assert net(x).dtype is torch.float32


def test_results_are_close_to_float32() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = net(x)
        with torch.autocast("hpu", dtype=torch.bfloat16):
            result = net.to("hpu")(x.to("hpu"))
    torch.testing.assert_close(result.float().cpu(), expected, atol=0.05, rtol=0.05)
