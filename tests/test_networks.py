"""Which networks are captured, and what stays of them between runs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, InferencePipeline, emulator
from lightning_hpu_infer.networks import NetworkGraphs
from tests.helpers import Broken, Net, Rows, assert_equal, predict, rows, trainer

pytestmark = pytest.mark.usefixtures("emulated")


class Two(Net):
    """An encoder and a decoder that the step calls one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.decoder = nn.Linear(8, 4)
        self.scale = 1.0
        self.fault_at = -1

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x) * self.scale)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == self.fault_at:
            raise Broken
        return self(batch)


def runs(module: Two, *changes: Any, **flags: Any) -> list[emulator.EmulatorStats]:
    """Counters of runs on one Trainer, each after a change of the module; predictions equal stock's on the CPU."""
    ours, found = trainer(HPUInferenceAccelerator(**flags)), []
    for change in changes:
        change(module)
        expected = predict("cpu", copy.deepcopy(module), rows(12, 2))
        emulator.reset_stats()
        assert_equal(ours.predict(module, rows(12, 2)), expected)
        found.append(emulator.stats())
    return found


def nothing(module: Two) -> None: ...


@pytest.mark.parametrize(
    ("names", "captures"), [(["encoder"], 1), (["encoder", "decoder"], 2), (["encoder.0"], 1), ([""], 1), (("net",), 0)]
)
def test_named_networks_are_captured_and_no_others(names: list[str], captures: int) -> None:
    (stats,) = runs(Two(), nothing, graph_modules=names)
    # Of six batches the first is watched, the second captures: no step is spent on finding the networks.
    assert (stats.captures, stats.replays) == (captures, captures * 5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["encodr"], r"names 'encodr', which Two does not have\. It has net, encoder, decoder\."),
        (["encoder", "encoder.0"], "names 'encoder' and 'encoder.0', of which one is a part of the other"),
        (["decoder", ""], "names 'decoder' and '', of which one is a part of the other"),
    ],
)
def test_names_that_cannot_be_captured_are_refused(names: list[str], message: str) -> None:
    module = Two()
    with pytest.raises(ValueError, match=message):
        predict(HPUInferenceAccelerator(graph_modules=names), module, rows(4, 2))
    assert "forward" not in vars(module)


def test_a_name_is_no_list_of_names() -> None:
    with pytest.raises(TypeError, match="`graph_modules` must be a list of module names, got 'encoder'"):
        InferenceConfig(graph_modules="encoder")


@pytest.mark.smoke
def test_graphs_survive_from_one_run_to_the_next() -> None:
    first, second, third = runs(Two(), nothing, nothing, nothing)
    assert (first.captures, first.replays) == (1, 4)
    # All six batches are replays; the first is compared with the plain forward once more.
    assert [(stats.captures, stats.replays) for stats in (second, third)] == [(0, 6), (0, 6)]


def test_the_model_is_on_the_cpu_between_runs_as_with_stock() -> None:
    module = Two()
    ours = trainer(HPUInferenceAccelerator())
    for _ in range(2):
        ours.predict(module, rows(12, 2))
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
        assert "forward" not in vars(module)


def load_others(module: Two) -> None:
    module.load_state_dict({name: tensor + 0.5 for name, tensor in module.state_dict().items()})


def change_data(module: Two) -> None:
    module.decoder.weight.data[0, 0] += 1.0  # past the version counter


def replace_layer(module: Two) -> None:
    module.decoder = nn.Linear(8, 4)


def replace_forward(module: Two) -> None:
    module.forward = lambda x: x.abs()  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [load_others, change_data, replace_layer, replace_forward])
def test_changed_weights_are_noticed_by_the_next_run(change: Any) -> None:
    first, second = runs(Two(), nothing, change)
    assert (first.captures, second.captures) == (1, 1)


def test_a_changed_python_value_is_noticed_by_the_next_run() -> None:
    """It is no weight, so the graph is used again; the first replay of a run is compared with the plain forward."""
    module = Two()
    first, second, third = runs(module, nothing, lambda module: setattr(module, "scale", 3.0), nothing)
    # The stale graph is found out by the first batch; the second is watched, the third captured.
    assert (first.captures, second.captures, third.captures) == (1, 1, 0)


def test_another_model_gets_its_own_graphs() -> None:
    ours = trainer(HPUInferenceAccelerator())
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = Two()
        expected = predict("cpu", copy.deepcopy(module), rows(12, 2))
        assert_equal(ours.predict(module, rows(12, 2)), expected)
    assert emulator.stats().captures == 2


def test_rule_11_graphs_of_a_run_that_failed_are_not_used_again() -> None:
    module = Two()
    ours = trainer(HPUInferenceAccelerator())
    module.fault_at = 5
    with pytest.raises(Broken):
        ours.predict(module, rows(12, 2))
    module.fault_at = -1
    assert_equal(ours.predict(module, rows(12, 2)), predict("cpu", copy.deepcopy(module), rows(12, 2)))
    assert emulator.stats().captures == 2


def test_tied_weights_survive() -> None:
    class Tied(Two):
        def __init__(self) -> None:
            super().__init__()
            self.back = nn.Linear(8, 8, bias=False)
            self.again = nn.Linear(8, 8, bias=False)
            self.again.weight = self.back.weight
            self.register_buffer("shift", torch.arange(4.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.again(self.back(self.encoder(x)))) + self.shift

    first, second, third = runs(Tied(), nothing, nothing, load_others)
    assert (first.captures, second.captures, third.captures) == (1, 0, 1)


@pytest.mark.parametrize(("budget", "captures", "evictions"), [(None, 4, 0), (200, 4, 3), (10**6, 4, 0)])
def test_a_memory_budget_drops_the_graphs_that_were_used_least_recently(
    budget: int | None, captures: int, evictions: int
) -> None:
    loader: DataLoader[Any] = DataLoader([torch.randn(n, 4) for n in (1, 1, 2, 3, 4, 1, 2, 3, 4)], batch_size=None)  # type: ignore[arg-type]
    torch.manual_seed(0)
    module = Two()
    expected = predict("cpu", copy.deepcopy(module), loader)
    ours = trainer(HPUInferenceAccelerator(graph_memory=budget, graph_modules=["decoder"]))
    assert_equal(ours.predict(module, loader), expected)
    loop: Any = ours.predict_loop
    # Rows of 16 bytes, in the graph's outputs and in the one that was handed out: 32, 64, 96 and 128 bytes.
    assert (loop._graphs.counts.captures, loop._graphs.counts.evictions) == (captures, evictions)


def test_a_graph_that_exceeds_the_memory_budget_alone_is_given_up() -> None:
    with pytest.warns(UserWarning, match="`decoder` runs without an HPU graph: it alone takes 64 bytes"):
        (stats,) = runs(Two(), nothing, graph_memory=63, graph_modules=["decoder"])
    assert (stats.captures, stats.bytes_in_use) == (1, 0)


def test_what_graphs_did_is_summed_up_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    runs(Two(), nothing)
    assert "Graphs: 1 captured, 3 replays, 3 calls without a graph." in caplog.messages


def test_a_pipeline_can_name_its_networks() -> None:
    batches = [Rows(12).rows[i : i + 2] for i in range(0, 12, 2)]
    module = Two()
    expected = [module(batch).detach() for batch in batches]
    with InferencePipeline(module, config=InferenceConfig(graph_modules=["encoder"])) as pipeline:
        assert_equal(list(pipeline.predict(batches)), expected)
    assert (emulator.stats().captures, emulator.stats().replays) == (1, 5)


def test_a_value_that_a_hook_sets_for_each_run_is_noticed_by_the_next() -> None:
    """The graphs' first replay may look right by chance, so the attributes are compared, after the hooks have run."""

    class Threshold(Two):
        threshold = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.decoder = Above()

        def on_predict_start(self) -> None:
            vars(self.decoder)["above"] = self.threshold

    class Above(nn.Linear):
        above = 0.0

        def __init__(self) -> None:
            super().__init__(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) > self.above) & (x[:, :4].abs() > 0.9)

    (first, second, third) = runs(
        Threshold(),
        nothing,
        lambda module: setattr(module, "threshold", 0.3),
        nothing,
        graph_modules=["decoder"],
    )
    assert (first.captures, second.captures, third.captures) == (1, 1, 0)


def test_a_tensor_that_a_hook_replaces_is_noticed_by_the_next_run() -> None:
    class Shifted(Two):
        shift = 0.0

        def on_predict_start(self) -> None:
            self.table = torch.full((4,), self.shift).to(self.device)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.table

    flags: dict[str, Any] = {"verify_graphs": 0, "graph_modules": [""]}
    first, second = runs(Shifted(), nothing, lambda module: setattr(module, "shift", 1e-4), **flags)
    assert (first.captures, second.captures) == (1, 1)


def test_a_network_that_was_replaced_is_found_anew() -> None:
    class Calls(Two):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.decoder(self.encoder(batch))

    first, second = runs(Calls(), nothing, replace_layer)
    assert (first.captures, second.captures) == (2, 2)


def test_weights_that_other_modules_share_stay_shared_in_a_run() -> None:
    shared: list[bool] = []

    class Head(Two):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 4)

        def on_predict_start(self) -> None:
            self.head.weight = self.decoder.weight  # what a move took apart

        def on_predict_batch_start(self, *_: Any) -> None:
            shared.append(self.head.weight is self.decoder.weight)

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.decoder(self.encoder(batch))

    runs(Head(), nothing, nothing)
    assert set(shared) == {True}


def test_on_the_cpu_parameters_stay_the_same_objects() -> None:
    emulator.uninstall()
    torch._dynamo.reset()
    module = Two()
    before = dict(module.named_parameters())
    ours = trainer(HPUInferenceAccelerator(hpu_graphs="compile"))
    graphs = NetworkGraphs(module, torch.device("cpu"), ours.accelerator.config, "eager")  # type: ignore[attr-defined]
    with torch.inference_mode():
        for _ in range(2):
            with graphs.attached():
                for _ in range(4):
                    with graphs.step():
                        module(torch.ones(2, 4))
    assert graphs.counts.captures == 0
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    torch._dynamo.reset()
