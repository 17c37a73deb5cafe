"""Graphs on the emulated HPU: found, keyed, owned, given back."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, emulator
from lightning_hpu_infer.graphs import GraphedForward
from lightning_hpu_infer.networks import NetworkGraphs
from lightning_hpu_infer.signature import GraphKey, NotCapturable
from tests.helpers import Broken, BrokenStep, Net, Rows, assert_equal, assert_like_stock, predict, rows, trainer

pytestmark = pytest.mark.usefixtures("emulated")
HPU = torch.device("hpu", 0)


def key(*args: Any, **kwargs: Any) -> GraphKey:
    return GraphKey.of(nn.Identity(), args, kwargs, "hpu")[0]


def hpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype).to(HPU)


DIFFERENT: list[Callable[[], GraphKey]] = [
    lambda: key(hpu(2, 3)),
    lambda: key(hpu(3, 2)),
    lambda: key(hpu(2, 3, dtype=torch.int32)),
    lambda: key(hpu(2, 3, dtype=torch.bfloat16)),
    lambda: key(hpu(3, 2).t()),
    lambda: key(x=hpu(2, 3)),
    lambda: key([hpu(2, 3)]),
    lambda: key((hpu(2, 3),)),
    lambda: key({"a": hpu(2, 3)}),
    lambda: key({"b": hpu(2, 3)}),
    lambda: key(hpu(2, 3), 1),
    lambda: key(hpu(2, 3), True),
    lambda: key(hpu(2, 3), 1.0),
    lambda: key(hpu(2, 3), -1),
    lambda: key(hpu(2, 3), -2),
    lambda: key(hpu(2, 3), None),
    lambda: key(hpu(2, 3), "mean"),
    lambda: key(hpu(2, 3), "sum"),
]


def test_rule_4_keys_tell_apart_what_the_bridge_does_not() -> None:
    keys = [make() for make in DIFFERENT]
    again = [make() for make in DIFFERENT]
    assert [[one == other for other in again] for one in keys] == [
        [row == column for column in range(len(keys))] for row in range(len(keys))
    ]
    assert [hash(one) for one in keys] == [hash(one) for one in again]


def test_rule_4_modes_are_part_of_the_key() -> None:
    x, module = hpu(2), nn.Identity()
    keys = [GraphKey.of(module, (x,), {}, "hpu")[0]]
    with torch.inference_mode():
        keys.append(GraphKey.of(module, (x,), {}, "hpu")[0])
    with torch.autocast("hpu", dtype=torch.bfloat16):
        keys.append(GraphKey.of(module, (x,), {}, "hpu")[0])
    keys.append(GraphKey.of(module.eval(), (x,), {}, "hpu")[0])
    assert len(set(keys)) == 4


@pytest.mark.parametrize(
    ("argument", "reason"),
    [(torch.zeros(2), "a tensor on cpu"), (object(), "is given a object"), ({1, 2}, "is given a set")],
    ids=["tensor", "object", "set"],
)
def test_what_could_change_unseen_is_not_captured(argument: object, reason: str) -> None:
    with pytest.raises(NotCapturable, match=reason):
        key(hpu(2), argument)


class Calls(Net):
    """Calls networks in the ways that models do."""

    def __init__(self, step: Callable[["Calls", Tensor], Any]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, 2)
        self.plain = nn.Softmax(dim=1)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x))
        return out

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.step(self, batch)


@pytest.mark.parametrize(
    ("step", "captures"),
    [
        (lambda m, x: m(x), 1),
        (lambda m, x: m.head(m.encoder(x)), 2),
        (lambda m, x: m.plain(m.head(m.encoder(x))), 2),
        (lambda m, x: m.encoder(x) + m.encoder(x * 2), 1),
        (lambda m, x: (m(x), m.encoder(x)), 1),  # the encoder is a part of m, whose graph it is in
        (lambda m, x: m.net(x)[:, 0], 1),
    ],
)
def test_the_outermost_networks_are_captured(step: Callable[[Calls, Tensor], Any], captures: int) -> None:
    module = Calls(step)
    emulator.reset_stats()
    assert_like_stock(HPUInferenceAccelerator(), module, rows(12, 2))
    assert emulator.stats().captures == captures


def test_a_step_without_networks_says_that_graphs_do_nothing() -> None:
    with pytest.warns(UserWarning, match="`hpu_graphs=True` has no effect"):
        assert_like_stock(HPUInferenceAccelerator(), Calls(lambda m, x: x * 2), rows(8, 2))


def test_rule_5_the_step_itself_is_never_captured() -> None:
    class Numbered(Net):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.net(batch) + batch_idx

    emulator.reset_stats()
    assert_like_stock(HPUInferenceAccelerator(), Numbered(), rows(20, 2))
    assert emulator.stats().captures == 1


def test_rule_3_what_a_network_returned_is_not_overwritten_by_the_next_replay() -> None:
    class Keeps(Net):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[Tensor] = []

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            scores = self.net(batch)
            self.kept += [scores, scores.detach(), scores[:, 0]]
            return scores

    module = Keeps()
    expected = predict("cpu", module, rows(12, 2))
    module.kept.clear()
    predict(HPUInferenceAccelerator(), module, rows(12, 2))
    assert_equal([scores.cpu() for scores in module.kept[::3]], expected)
    assert_equal([scores.cpu() for scores in module.kept[1::3]], expected)
    assert_equal([scores.cpu() for scores in module.kept[2::3]], [scores[:, 0] for scores in expected])


def test_rule_3_changing_the_returned_container_does_not_reach_the_graph() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": self.linear(x), "hidden": [x + 1], "name": "linear"}

    class Pops(Net):
        def __init__(self) -> None:
            super().__init__()
            self.heads = Heads()

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            out = self.heads(batch)
            out["hidden"].clear()
            return out.pop("logits"), out

    assert_like_stock(HPUInferenceAccelerator(), Pops(), rows(12, 2))


def test_rule_7_no_batch_is_a_static_input() -> None:
    """The other cache mode of the bridge would overwrite the first captured batch with every later one."""

    class KeepsInputs(Net):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[Tensor] = []

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            self.kept.append(batch)
            return self.net(batch)

    module = KeepsInputs()
    predict(HPUInferenceAccelerator(), module, rows(12, 2))
    assert_equal([batch.cpu() for batch in module.kept], list(rows(12, 2)))


class Cumulative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x * self.weight, 1)


def test_rule_12_a_failed_capture_leaves_a_clean_state() -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Cumulative()

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.odd(self.net(batch))

    emulator.uninstall()
    emulator.install(emulator.EmulatorConfig(cpu_fallback_ops=frozenset({"aten::cumsum"})))
    module = Two()
    expected = predict("cpu", module, rows(12, 2))
    emulator.reset_stats()
    with pytest.warns(UserWarning, match="`odd` runs without an HPU graph: capturing it failed .*cpu fallback"):
        actual = predict(HPUInferenceAccelerator(), module, rows(12, 2))
    assert_equal(actual, expected)
    # `net` keeps its graph.
    assert emulator.stats().replays == 4


class FailsOnce(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.error = error
        self.calls = 0

    # Call 1 finds the network, call 2 is watched, call 3 is compared with call 4, which captures.
    CAPTURE = 4

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.CAPTURE:
            raise self.error("in the network")
        return x * self.weight


def test_rule_12_an_error_in_the_capturing_call_costs_the_graph_not_the_batch() -> None:
    module = Net()
    module.net = FailsOnce(Broken)  # type: ignore[assignment]
    with pytest.warns(
        UserWarning, match="`net` runs without an HPU graph: capturing it failed .Broken: in the network"
    ):
        actual = predict(HPUInferenceAccelerator(), module, rows(12, 2))
    assert_equal(actual, list(rows(12, 2)))
    assert_like_stock(HPUInferenceAccelerator(), Net(), rows(12, 2))


def test_rule_12_ctrl_c_in_a_capture() -> None:
    module = Net()
    module.net = FailsOnce(KeyboardInterrupt)  # type: ignore[assignment]
    graphs = NetworkGraphs(module, HPU, InferenceConfig(), "hpu_graph")
    x = Rows().rows[:2].to(HPU)
    module.to(HPU).eval()
    with torch.inference_mode():
        with pytest.raises(KeyboardInterrupt), graphs.attached():  # noqa: PT012
            with graphs.step():
                module.net(x)
            module.net(x)
            module.net(x)
        assert not GraphedForward._capturing
        # A dry run that was still on would answer with poison.
        assert_equal((x + 1).cpu(), Rows().rows[:2] + 1)


def test_rule_12_an_old_graph_that_becomes_garbage_does_not_end_a_capture() -> None:
    """On the bridge a graph that dies during a capture silently ends it; what is replayed then is nothing."""
    from habana_frameworks.torch.hpu import HPUGraph

    class Litters(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            cycle: list[Any] = [HPUGraph()]
            cycle.append(cycle)
            del cycle
            return super().forward(x)

    module = Net()
    module.net = Litters(4, 3)  # type: ignore[assignment]
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        assert_like_stock(HPUInferenceAccelerator(), module, rows(12, 2))
    finally:
        gc.set_threshold(*threshold)
    assert emulator.stats().replays == 4


def test_graphs_are_released_with_the_trainer() -> None:
    predict(HPUInferenceAccelerator(), Net(), rows(12, 2))
    gc.collect()
    assert emulator.stats().bytes_in_use == 0


def test_another_kind_of_run_releases_the_graphs_without_the_garbage_collector() -> None:
    class Tested(Net):
        def test_step(self, batch: Tensor, batch_idx: int) -> None: ...

    one, module = trainer(HPUInferenceAccelerator()), Tested()
    one.predict(module, rows(12, 2))
    gc.collect()
    gc.disable()
    try:
        assert emulator.stats().bytes_in_use > 0
        one.test(module, rows(2, 2), verbose=False)
        assert emulator.stats().bytes_in_use == 0
    finally:
        gc.enable()


def test_forward_is_given_back_even_if_it_was_the_instances_own() -> None:
    module = Net()
    own = module.net.forward
    module.net.__dict__["forward"] = own
    predict(HPUInferenceAccelerator(), module, rows())
    assert vars(module.net)["forward"] is own


def test_hooks_of_the_captured_module_run_for_every_batch() -> None:
    calls: list[int] = []
    module = Net()
    module.net.register_forward_hook(lambda *_: calls.append(1))
    predict(HPUInferenceAccelerator(), module, rows(12, 2))
    assert len(calls) == 6


def test_two_calls_with_different_constants_are_two_graphs() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, scale: float, flip: bool = False) -> Tensor:
            out: Tensor = self.linear(x) * scale
            return -out if flip else out

    class Module(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scaled = Scaled()

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.scaled(batch, 1), self.scaled(batch, 1, flip=True), self.scaled(batch, 1.5)

    emulator.reset_stats()
    assert_like_stock(HPUInferenceAccelerator(), Module(), rows(12, 2))
    assert emulator.stats().captures == 3


def test_changed_weights_are_used_by_the_next_run() -> None:
    module, ours = Net(), trainer(HPUInferenceAccelerator())
    ours.predict(module, rows())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-2)
    assert_equal(ours.predict(module, rows()), predict("cpu", module, rows()))


def test_bf16_autocast_is_captured_as_such() -> None:
    module = Net()
    full = predict("cpu", module, rows())
    mixed = predict(HPUInferenceAccelerator(), module, rows(), precision="bf16-mixed")
    assert {scores.dtype for scores in mixed} == {torch.bfloat16}
    torch.testing.assert_close([scores.float() for scores in mixed], full, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("fault", [False, True])
def test_rule_11_no_device_memory_is_left(fault: bool) -> None:
    for flags in ({}, {"in_flight": 3}, {"pipelining": False}, {"hpu_graphs": False}):
        if fault:
            with pytest.raises(Broken):
                predict(HPUInferenceAccelerator(**flags), BrokenStep(), rows(20, 2))
        else:
            predict(HPUInferenceAccelerator(**flags), Net(), rows(21, 2))
        gc.collect()
        assert emulator.stats().bytes_in_use == 0


def test_rule_10_device_memory_is_bounded_whatever_the_number_of_batches() -> None:
    peaks = []
    for batches in (20, 200):
        emulator.reset_stats()
        trainer(HPUInferenceAccelerator()).predict(Net(), rows(2 * batches, 2), return_predictions=False)
        peaks.append(emulator.stats().peak_bytes)
    # A queue without a bound would hold the 180 further batches; when the device frees a few of them is its affair.
    batch_bytes = 4 * (2 * 4 + 2 * 3)
    assert peaks[1] - peaks[0] < 12 * batch_bytes


def test_a_network_in_a_dataset_is_not_taken_for_one_of_the_step() -> None:
    class Featurised(Rows):
        def __init__(self) -> None:
            super().__init__(12)
            self.featurise = nn.Linear(4, 4)

        def __getitem__(self, index: int) -> Tensor:
            with torch.no_grad():
                return self.featurise(super().__getitem__(index))

    dataset = Featurised()
    assert_like_stock(HPUInferenceAccelerator(), Net(), DataLoader(dataset, 2))
    assert "forward" not in vars(dataset.featurise)
