from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.contract.models import MODELS, TOLERANCE

pytestmark = pytest.mark.parametrize("name", MODELS)
BOTH_GRAD_MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


def _logits(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return tensor


def _case(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    net, inputs = MODELS[name]()
    return net.eval(), inputs


def _shuffled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.flip(0) for name, value in inputs.items()}


def _to_hpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to("hpu") for name, value in inputs.items()}


@pytest.mark.usefixtures("hpu")
@BOTH_GRAD_MODES
def test_logits_equal_the_cpus(name: str, mode: Any) -> None:
    net, inputs = _case(name)
    with mode():
        expected = _logits(net(**inputs))
    net = net.to("hpu")
    with mode():
        torch.testing.assert_close(_logits(net(**_to_hpu(inputs))).cpu(), expected, **TOLERANCE)


@pytest.mark.usefixtures("lazy_hpu")
@BOTH_GRAD_MODES
@pytest.mark.parametrize("mode_b", [False, True], ids=["mode-a", "mode-b"])
def test_replayed_logits_equal_the_cpus(name: str, mode: Any, mode_b: bool) -> None:
    import habana_frameworks.torch as htorch

    net, inputs = _case(name)
    batches = [inputs, _shuffled(inputs), inputs]
    with mode():
        expected = [_logits(net(**batch)) for batch in batches]
    net = htorch.hpu.wrap_in_hpu_graph(net.to("hpu"), disable_tensor_cache=mode_b)
    with mode():
        for batch, logits in zip(batches, expected, strict=True):
            result = _logits(net(**_to_hpu(batch))).cpu()
            torch.testing.assert_close(result, logits, **TOLERANCE)


@pytest.mark.usefixtures("lazy_hpu")
def test_bfloat16_autocast(name: str) -> None:
    import habana_frameworks.torch as htorch

    net, inputs = _case(name)
    with torch.no_grad():
        expected = _logits(net(**inputs))
    net = htorch.hpu.wrap_in_hpu_graph(net.to("hpu"), disable_tensor_cache=True)
    with torch.no_grad(), torch.autocast("hpu", dtype=torch.bfloat16):
        for _ in range(2):
            result = _logits(net(**_to_hpu(inputs))).float().cpu()
            # bfloat16 has three digits, and kernels of the CPU differ from machine to machine.
            torch.testing.assert_close(result, expected, atol=0.2, rtol=0.1)
