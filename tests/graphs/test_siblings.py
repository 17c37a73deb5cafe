"""What an independent review found wrong: each kind of case equals stock."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from tests.helpers import Net, assert_equal, installed, predict, rows, trainer

quiet = pytest.mark.filterwarnings("ignore:.*runs? without")


class Steps(Net):
    """Its step is a function; it has state on the host and on the device."""

    total: Tensor

    def __init__(self, step: Callable[["Steps", Tensor, int], Any]) -> None:
        super().__init__()
        self.step = step
        self.host, self.sign = torch.zeros(3), torch.ones(3)
        self.register_buffer("total", torch.zeros(3))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.step(self, batch, batch_idx)


STEPS: dict[str, Callable[[Steps, Tensor, int], Any]] = {}


def case(step: Callable[[Steps, Tensor, int], Any]) -> Callable[[Steps, Tensor, int], Any]:
    STEPS[step.__name__] = step
    return step


@case
def a_host_tensor_that_is_made_and_changed(m: Steps, x: Tensor, i: int) -> Any:
    mask = torch.ones(3, 3)
    mask.triu_(1)
    return m.net(x) @ (1 - mask).to(x.device)


@case
def host_state_that_is_changed(m: Steps, x: Tensor, i: int) -> Any:
    m.sign.neg_()
    return m.net(x) * (m.sign * 2.0).to(x.device)


@case
def a_counter_on_the_host(m: Steps, x: Tensor, i: int) -> Any:
    out = m.net(x)
    m.host.add_(1)
    return out, m.host.clone()


@case
def a_buffer_that_is_fed_from_the_host(m: Steps, x: Tensor, i: int) -> Any:
    out = m.net(x)
    m.total.add_(out.cpu().sum().to(x.device))
    m.total.mul_(0.5)
    return out, m.total.clone()


@case
def an_input_and_a_view_of_it(m: Steps, x: Tensor, i: int) -> Any:
    head = x[:, :2] if i > 3 else x[:, :2].clone()
    return shared(m, x, head)


def shared(m: Steps, x: Tensor, head: Tensor) -> Any:
    torch._dynamo.graph_break()
    x.clamp_(max=5.0)
    return m.net(x), head * 2


@case
def an_assertion_that_is_caught(m: Steps, x: Tensor, i: int) -> Any:
    y = m.net(x)
    try:
        assert x.max() < 6.0, "too large"
    except AssertionError:
        return y * 0
    return y


@case
def types_of_numpy(m: Steps, x: Tensor, i: int) -> Any:
    scores = m.net(x).cpu().numpy()
    return type(scores.max()).__name__, isinstance(scores.max(), np.generic), np.argsort(-scores).tolist()


@case
def memory_of_a_weight_that_is_replaced(m: Steps, x: Tensor, i: int) -> Any:
    weight: Any = m.net[0].weight
    weight.data = weight.data * 1.1
    return m.net(x)


@case
def windows_that_overlap(m: Steps, x: Tensor, i: int) -> Any:
    windows = m.net(x).unfold(1, 2, 1)
    torch._dynamo.graph_break()
    windows[:, 0].add_(1)
    return windows.clone()


@quiet
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("name", STEPS)
def test_rule_1_a_step_equals_stock(name: str, lazy: bool) -> None:
    flags: dict[str, Any] = {"prefetch": 0, "in_flight": 0}
    expected = predict("cpu", Steps(STEPS[name]), rows(24, 2))
    with installed(lazy=lazy):
        assert_equal(predict(HPUInferenceAccelerator(**flags), Steps(STEPS[name]), rows(24, 2)), expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def untied_between_runs(accelerator: Any) -> list[Any]:
    class Ties(Net):
        first = True

        def __init__(self) -> None:
            super().__init__()
            self.net: Any = Tied()

        def on_predict_start(self) -> None:
            if self.first:
                self.net.b.weight = self.net.a.weight

    ours, module = trainer(accelerator), Ties()
    found = [ours.predict(module, rows(12, 2))]
    module.first = False
    module.net.b.weight = nn.Parameter(module.net.b.weight.detach() * -2)
    return [*found, ours.predict(module, rows(12, 2)), module.net.b.weight.detach().clone()]


def test_rule_5_weights_that_were_tied_and_are_no_longer() -> None:
    expected = untied_between_runs("cpu")
    with installed():
        assert_equal(untied_between_runs(HPUInferenceAccelerator()), expected)


@quiet
def test_rule_3_a_network_that_other_threads_call_runs_plainly_there() -> None:
    def step(m: Steps, x: Tensor, i: int) -> Any:
        def call(part: Tensor) -> Tensor:
            with torch.no_grad():
                return m.net(part)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(call, [x, x + 1, x + 2]))

    expected = predict("cpu", Steps(step), rows(24, 2), inference_mode=False)
    with installed():
        accelerator = HPUInferenceAccelerator(graph_modules=["net"])
        assert_equal(predict(accelerator, Steps(step), rows(24, 2), inference_mode=False), expected)


@quiet
def test_memory_that_is_replaced_in_every_batch_is_not_captured_without_end() -> None:
    step = memory_of_a_weight_that_is_replaced
    with installed():
        predict(HPUInferenceAccelerator(), Steps(step), rows(60, 2))
        assert emulator.stats().captures < 10
