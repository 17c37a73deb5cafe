"""What of a model is traced, what stays from one run to the next, and what graphs hold."""

import copy
import gc
import logging
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.profilers import PyTorchProfiler
from torch import Tensor, nn

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, InferencePipeline, emulator
from lightning_hpu_infer._lightning import is_profilers_hook
from lightning_hpu_infer.graphs.counts import GraphCounts
from tests.graphs.models import HPU, Model, graphs_of, one_warning, run, sizes
from tests.helpers import Broken, BrokenStep, Net, Rows, assert_equal, predict, rows, trainer

pytestmark = pytest.mark.usefixtures("emulated")


class Two(Net):
    """An encoder and a decoder that the step calls one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.decoder = nn.Linear(8, 4)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x) * self.scale)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch)


def runs(module: Two, *changes: Callable[[Any], object], **flags: Any) -> list[GraphCounts]:
    """What graphs did in runs on one Trainer, each after a change of the module; predictions equal stock's."""
    ours, found = trainer(HPUInferenceAccelerator(**flags)), []
    loop: Any = ours.predict_loop
    for change in changes:
        change(module)
        expected = predict("cpu", copy.deepcopy(module), rows(12, 2))
        assert_equal(ours.predict(module, rows(12, 2)), expected)
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
        found.append(loop._graphs.counts)
    return found


def nothing(module: Two) -> None: ...


# What is traced


@pytest.mark.parametrize(
    ("names", "captures"), [(["encoder"], 1), (["encoder", "decoder"], 2), (["encoder.0"], 1), (("net",), 0)]
)
def test_named_modules_are_captured_and_no_others(names: list[str], captures: int) -> None:
    (counts,) = runs(Two(), nothing, graph_modules=names)
    assert counts.captures == counts.traces == captures


def test_the_name_of_the_whole_model_is_its_forward() -> None:
    (counts,) = runs(Two(), nothing, graph_modules=[""])
    assert counts.captures <= 1


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


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.tanh(self.linear(x)))


class Other(Block): ...


class Encoder(nn.Module):
    """Repeats a block."""

    def __init__(self, blocks: int = 6, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.others = nn.ModuleList([Other(width), Other(width)])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, *self.others):
            x = block(x)
        return x.softmax(-1)


class Encodes(Model):
    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.encoder = Encoder(blocks)

    def forward(self, x: Tensor, i: int) -> Any:
        return self.encoder(x)


def test_blocks_are_traced_once_per_kind() -> None:
    counts = run(Encodes(), sizes(*[2] * 6), graph_modules="blocks")
    # Each of the eight has a graph, since the weights differ.
    assert (counts.traces, counts.captures) == (2, 8)
    assert counts.replays >= 8 * 3


def test_blocks_of_one_kind_with_other_shapes_are_right() -> None:
    run(Encodes(), sizes(2, 2, 3, 3, 2, 3), graph_modules="blocks")


def test_a_model_without_blocks_is_told() -> None:
    with one_warning("`graph_modules='blocks'` has no effect: Model has no `nn.ModuleList` of modules of one class"):
        assert run(Model(), graph_modules="blocks").captures == 0


def test_a_network_that_is_called_in_a_loop_is_traced_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    def loop(network: Any, x: Tensor, i: int) -> Tensor:
        for _ in range(20):
            x = network(x)
        return x

    caplog.set_level(logging.INFO)
    counts = run(Model(step=loop), sizes(*[2] * 5))
    assert (counts.traces, counts.captures) == (1, 1)
    assert counts.replays >= 2 * 20
    assert "calls `network` in a loop" in caplog.text


@pytest.mark.parametrize(
    ("batches", "flags", "traces", "message"),
    [
        (50, {}, 0, "nothing is traced, since a run of 50 batches cannot win back the time"),
        (200, {}, 2, "so repeated blocks are traced instead"),
        (1000, {}, 1, ""),
        (float("inf"), {}, 1, ""),
        (50, {"hpu_graphs": "hpu_graph"}, 1, ""),
        (50, {"graph_modules": "blocks"}, 2, ""),
    ],
)
def test_what_is_traced_follows_from_the_length_of_the_run(
    batches: float, flags: dict[str, Any], traces: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = Encodes(24)
    graphs = graphs_of(model, **flags)
    with torch.inference_mode(), graphs.attached(model.forward) as step:
        graphs.expect(batches)
        x = sizes(2)[0].to(HPU)
        results = [step(x, i).cpu() for i in range(3)]
        assert_equal(results, [model(x, 0).cpu()] * 3)
    assert graphs.counts.traces == traces
    assert (message in caplog.text) if message else ("traced" not in caplog.text)


def test_a_short_run_of_a_large_model_in_a_trainer_is_not_traced(caplog: pytest.LogCaptureFixture) -> None:
    class Large(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = Encoder(30)  # type: ignore[assignment]

    caplog.set_level(logging.INFO)
    expected = predict("cpu", Large(), rows(8, 2))
    assert_equal(predict(HPUInferenceAccelerator(), Large(), rows(8, 2)), expected)
    assert "nothing is traced, since a run of 4 batches" in caplog.text
    assert emulator.stats().captures == 0


def test_many_short_runs_of_a_trainer_are_traced_in_the_end() -> None:
    model = Encodes(24)
    graphs = graphs_of(model)
    traces = []
    for _ in range(3):
        with torch.inference_mode(), graphs.attached(model.forward) as step:
            graphs.expect(150)
            x = sizes(2)[0].to(HPU)
            for i in range(150):
                step(x, i)
        traces.append(graphs.counts.traces)
    # Blocks of two kinds at first, the whole step when 400 batches are in sight.
    assert traces == [2, 0, 1]


# From run to run


@pytest.mark.smoke
@pytest.mark.parametrize("flags", [{}, {"graph_modules": ["encoder", "decoder"]}, {"hpu_graphs": "hpu_graph"}], ids=str)
def test_graphs_survive_from_one_run_to_the_next(flags: dict[str, Any]) -> None:
    first, second, third = runs(Two(), nothing, nothing, nothing, **flags)
    assert first.captures > 0
    assert [(counts.traces, counts.captures, counts.plain_calls) for counts in (second, third)] == [(0, 0, 0)] * 2
    assert second.replays == 6 * first.captures


def load_others(module: Two) -> None:
    module.load_state_dict({name: tensor + 0.5 for name, tensor in module.state_dict().items()})


def change_data(module: Two) -> None:
    module.decoder.weight.data[0, 0] += 1.0  # past the version counter


def replace_layer(module: Two) -> None:
    module.decoder = nn.Linear(8, 4)


def replace_forward(module: Two) -> None:
    module.forward = lambda x: x.abs()  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "captures"),
    [
        (load_others, 0),
        (change_data, 0),
        (replace_layer, 1),
        (replace_forward, 1),
        (lambda m: setattr(m, "scale", 3), 1),
    ],
)
def test_what_changed_between_runs_is_used_by_the_next(change: Any, captures: int) -> None:
    first, second, third = runs(Two(), nothing, change, nothing)
    assert (first.captures, second.captures, third.captures) == (1, captures, 0)


def test_another_model_gets_its_own_graphs() -> None:
    ours = trainer(HPUInferenceAccelerator())
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = Two()
        expected = predict("cpu", copy.deepcopy(module), rows(12, 2))
        assert_equal(ours.predict(module, rows(12, 2)), expected)
    assert emulator.stats().captures == 2


def test_rule_10_graphs_of_a_run_that_failed_are_right_or_gone() -> None:
    class Fails(Two):
        fault_at = 5

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if batch_idx == self.fault_at:
                raise Broken
            return self(batch)

    module = Fails()
    ours = trainer(HPUInferenceAccelerator())
    with pytest.raises(Broken):
        ours.predict(module, rows(12, 2))
    # On a device the model's parameters are the same objects in the next run, in other memory.
    loop: Any = ours.predict_loop
    assert not any(graph.holds_graphs for graph in loop._graphs._context.graphs())
    module.fault_at = -1
    load_others(module)
    assert_equal(ours.predict(module, rows(12, 2)), predict("cpu", copy.deepcopy(module), rows(12, 2)))


def test_tied_weights_are_kept_from_run_to_run() -> None:
    class Tied(Two):
        def __init__(self) -> None:
            super().__init__()
            self.back = nn.Linear(8, 8, bias=False)
            self.again = nn.Linear(8, 8, bias=False)
            self.again.weight = self.back.weight
            self.register_buffer("shift", torch.arange(4.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.again(self.back(self.encoder(x)))) + self.shift

    module = Tied()
    first, second, third = runs(module, nothing, nothing, load_others)
    assert (first.captures, second.captures, third.captures) == (1, 0, 0)


# Without a Trainer


def test_a_pipeline_can_name_its_networks() -> None:
    batches = [Rows(12).rows[i : i + 2] for i in range(0, 12, 2)]
    module = Two()
    expected = [module(batch).detach() for batch in batches]
    with InferencePipeline(module, config=InferenceConfig(graph_modules=["encoder"])) as pipeline:
        assert_equal(list(pipeline.predict(batches)), expected)
    assert emulator.stats().captures == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("names", [None, ["encoder"]])
def test_rule_11_two_pipelines_on_one_model_close_in_any_order(order: tuple[int, int], names: Any) -> None:
    batches = list(Rows(12).rows.split(2))
    module: Any = Two()
    plain = copy.deepcopy(module)
    expected = [plain(batch).detach() for batch in batches]
    data, swap = torch.Tensor.__dict__.get("data"), torch.utils.swap_tensors
    pipelines = [InferencePipeline(module, config=InferenceConfig(graph_modules=names)) for _ in range(2)]
    for each in pipelines:
        assert_equal(list(each.predict(batches)), expected)
    pipelines[order[0]].close()
    assert_equal(list(pipelines[order[1]].predict(batches)), expected)
    pipelines[order[1]].close()
    assert (torch.Tensor.__dict__.get("data"), torch.utils.swap_tensors) == (data, swap)
    assert all(part._compiled_call_impl is None for part in module.modules())
    assert_equal([module.cpu()(batch).detach() for batch in batches], expected)


# Memory


def bytes_left() -> int:
    gc.collect()
    return emulator.stats().bytes_in_use


@pytest.mark.parametrize("flags", [{}, {"in_flight": 3}, {"pipelining": False}, {"graph_modules": ["net"]}], ids=str)
def test_rule_11_no_device_memory_is_left(flags: dict[str, Any]) -> None:
    predict(HPUInferenceAccelerator(**flags), Net(), rows(21, 2))
    assert bytes_left() == 0
    with pytest.raises(Broken):
        predict(HPUInferenceAccelerator(**flags), BrokenStep(), rows(20, 2))
    assert bytes_left() == 0


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


def test_rule_9_device_memory_is_bounded_whatever_the_number_of_batches() -> None:
    peaks = []
    for batches in (20, 200):
        emulator.reset_stats()
        # Given depths: those that rise by themselves rise in the longer run.
        accelerator = HPUInferenceAccelerator(prefetch=2, in_flight=1)
        trainer(accelerator).predict(Net(), rows(2 * batches, 2), return_predictions=False)
        peaks.append(emulator.stats().peak_bytes)
    # A queue without a bound would hold the 180 further batches; when the device frees a few of them is its affair.
    batch_bytes = 4 * (2 * 4 + 2 * 3)
    assert peaks[1] - peaks[0] < 12 * batch_bytes


# What labels modules


def test_a_profiler_that_labels_modules_does_not_split_the_step(tmp_path: Path) -> None:
    """`PyTorchProfiler` puts hooks on every module. They are off during the run, and gone after it as in stock."""
    module = Two()
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="profile", export_to_chrome=False)
    ours = trainer(HPUInferenceAccelerator(), profiler=profiler)
    expected = predict("cpu", copy.deepcopy(module), rows(12, 2))
    assert_equal(ours.predict(module, rows(12, 2)), expected)
    loop: Any = ours.predict_loop
    assert (loop.graph_counts.captures, loop.graph_counts.replays) == (1, 4)
    hooks = [(*part._forward_hooks.values(), *part._forward_pre_hooks.values()) for part in module.modules()]
    assert not any(map(is_profilers_hook, chain.from_iterable(hooks)))
