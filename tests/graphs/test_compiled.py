"""`hpu_graphs` where there are no HPU graphs: eager mode on the device, and inductor on the CPU."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, _inductor, nn
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, InferencePipeline, emulator
from lightning_hpu_infer.graphs import StepGraphs
from tests.graphs.models import IN_PLACE, Model, sizes
from tests.helpers import Broken, Net, Rows, assert_equal, assert_like_stock, predict, rows, trainer


@pytest.mark.parametrize("hpu_graphs", [True, "compile"])
@pytest.mark.usefixtures("eager")
def test_rule_6_in_eager_mode_the_step_is_compiled(hpu_graphs: Any) -> None:
    expected = predict("cpu", Net(), rows(16, 2))
    emulator.reset_stats()
    ours = trainer(HPUInferenceAccelerator(hpu_graphs=hpu_graphs))
    assert_equal(ours.predict(Net(), rows(16, 2)), expected)
    stats = emulator.stats()
    # Of eight batches the first runs plainly, and the second is the first compiled one.
    assert (stats.captures, stats.compiled_calls) == (0, 7)
    loop: Any = ours.predict_loop
    assert (loop._graphs.counts.captures, loop._graphs.counts.replays) == (1, 7)


@pytest.mark.usefixtures("eager")
def test_in_eager_mode_every_shape_is_compiled_once_however_many() -> None:
    """Sizes that vary are traced as such, so Dynamo's limit of eight traces per function is never met."""
    batches = [torch.randn(n, 4) for _ in range(4) for n in range(1, 12)]
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    ours = assert_like_stock(HPUInferenceAccelerator(), Net(), loader)
    loop: Any = ours.predict_loop
    assert loop._graphs.counts.traces <= 3
    assert loop._graphs.counts.captures == 11


@pytest.mark.usefixtures("eager")
def test_in_eager_mode_short_batches_are_padded_too() -> None:
    batches = [torch.randn(n, 4) for n in (4, 4, 4, 4, 4, 3, 2, 3)]
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    ours = assert_like_stock(HPUInferenceAccelerator(pad_batch=True), Net(), loader)
    loop: Any = ours.predict_loop
    assert (loop._graphs.counts.captures, loop._graphs.counts.padded) == (1, 3)


class Reads(nn.Linear):
    """Reads a value of the device: torch.compile breaks its graph there and gets it right."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if y.sum() > 0 else -y


class ReadsNumber(nn.Linear):
    """Reads a number, which TorchDynamo takes for a constant of what follows."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if y.sum().item() > 0 else -y


@pytest.mark.usefixtures("eager")
def test_in_eager_mode_a_network_that_reads_the_device_is_compiled_around_it() -> None:
    module = Net()
    module.net = Reads(4, 3)  # type: ignore[assignment]
    ours = assert_like_stock(HPUInferenceAccelerator(), module, rows(24, 2))
    loop: Any = ours.predict_loop
    assert loop._graphs.counts.replays >= 11  # one batch of twelve runs plainly


@pytest.mark.filterwarnings(
    "ignore:`predict_step` as a whole runs without a graph", "ignore:The network .* runs without graphs"
)
@pytest.mark.usefixtures("eager")
def test_in_eager_mode_a_number_that_is_read_is_right_in_every_batch() -> None:
    module = Net()
    module.net = ReadsNumber(4, 3)  # type: ignore[assignment]
    assert_like_stock(HPUInferenceAccelerator(), module, rows(24, 2))


class Counts(nn.Linear):
    """Counts its calls in Python."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


@pytest.mark.usefixtures("eager")
def test_in_eager_mode_a_counter_never_gives_a_wrong_number() -> None:
    """It is one more in every call: traced anew each time, until the step and then the network run plainly."""
    module = Net()
    module.net = Counts(4, 3)  # type: ignore[assignment]
    x = Rows().rows[:2]
    loader: DataLoader[Any] = DataLoader([x] * 16, batch_size=None)  # type: ignore[arg-type]
    with (
        pytest.warns(
            UserWarning, match="`predict_step` as a whole runs without a graph from now on: it is traced anew"
        ),
        pytest.warns(UserWarning, match="The network `net` runs without graphs from now on: it is traced anew"),
    ):
        predictions = predict(HPUInferenceAccelerator(), module, loader)
    plain = nn.functional.linear(x, module.net.weight, module.net.bias).detach()  # type: ignore[arg-type]
    factors = [float((each / plain).mean()) for each in predictions]
    assert factors == pytest.approx([*range(1, 17)])
    assert module.net.calls == 16


def test_a_failed_compilation_costs_the_graph_not_the_batch() -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise Broken("no recipe")

    torch._dynamo.register_backend(fails, name="fails_in_a_test")
    module, x = Net(), Rows().rows[:2]
    kind: Any = "fails_in_a_test"
    graphs = StepGraphs(module, torch.device("cpu"), InferenceConfig(), kind)
    with (
        torch.inference_mode(),
        graphs.attached(module.predict_step) as step,
        pytest.warns(UserWarning, match="`predict_step` .*runs without .*no recipe"),
    ):
        for i in range(6):
            assert_equal(step(x, i), nn.Sequential(*module.net)(x))


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (lambda results: results[99], "compiling failed .IndexError: tuple index out of range"),
        (lambda results: tuple(result + 0.5 for result in results), "its program differs from the plain ops .*0.5"),
    ],
    ids=["raises", "wrong results"],
)
def test_a_program_that_is_faulty_costs_the_graph_only(faulty: Any, message: str) -> None:
    """Many backends compile, and fail, in the first call."""
    name: Any = f"faulty_in_a_test_{message[:9]}"
    torch._dynamo.register_backend(lambda graph, inputs: lambda *args: faulty(graph.forward(*args)), name=name)
    model = Model(IN_PLACE[0]).eval()
    expected, graphs = copy.deepcopy(model), StepGraphs(model, torch.device("cpu"), InferenceConfig(), name)
    with (
        torch.inference_mode(),
        graphs.attached(model.forward) as step,
        pytest.warns(UserWarning, match=f"`predict_step` runs without torch.compile: {message}"),
    ):
        for i, x in enumerate(sizes(2, 2, 2, 2)):
            assert_equal(step(x, i), expected(x, i))
        assert_equal(model.network.total, expected.network.total)


@pytest.mark.usefixtures("eager")
def test_in_eager_mode_compiled_steps_survive_to_the_next_run_and_notice_new_weights() -> None:
    module, ours = Net(), trainer(HPUInferenceAccelerator())
    for change in (0.0, 0.0, 1.0):
        module.load_state_dict({name: tensor + change for name, tensor in module.state_dict().items()})
        assert_equal(ours.predict(module, rows(12, 2)), predict("cpu", copy.deepcopy(module), rows(12, 2)))


@pytest.mark.parametrize(
    ("lazy", "hpu_graphs", "message"),
    [
        (True, "compile", "`hpu_graphs='compile'` is not possible in lazy mode. Set PT_HPU_LAZY_MODE=0"),
        (False, "hpu_graph", "`hpu_graphs='hpu_graph'` is not possible in eager mode. Set PT_HPU_LAZY_MODE=1"),
    ],
)
def test_rule_6_what_the_mode_cannot_do_is_refused(lazy: bool, hpu_graphs: Any, message: str) -> None:
    emulator.install(emulator.EmulatorConfig(lazy=lazy))
    try:
        with pytest.raises(MisconfigurationException, match=message):
            predict(HPUInferenceAccelerator(hpu_graphs=hpu_graphs), Net(), rows(4, 2))
        with pytest.raises(MisconfigurationException, match=message):
            InferencePipeline(nn.Linear(4, 4), config=InferenceConfig(hpu_graphs=hpu_graphs))
    finally:
        emulator.uninstall()


@pytest.mark.usefixtures("emulated")
def test_in_lazy_mode_the_name_of_hpu_graphs_means_the_same_as_true() -> None:
    assert_like_stock(HPUInferenceAccelerator(hpu_graphs="hpu_graph"), Net(), rows(12, 2))
    assert emulator.stats().captures == 1


def test_on_the_cpu_nothing_is_compiled_unless_asked_for() -> None:
    for hpu_graphs in (True, "hpu_graph"):
        ours = assert_like_stock(HPUInferenceAccelerator(hpu_graphs=hpu_graphs), Net(), rows(12, 2))
        assert vars(ours.predict_loop)["_graphs"] is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.full
def test_on_the_cpu_inductor_can_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler the step is compiled; without one it runs plainly. Either way the numbers are right."""
    # Inductor would set them permanently.
    for name in ("TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"):
        monkeypatch.setenv(name, str(tmp_path))
    with _inductor.config.patch(compile_threads=1):
        ours = assert_like_stock(HPUInferenceAccelerator(hpu_graphs="compile"), Net(), rows(12, 2))
    loop: Any = ours.predict_loop
    assert (loop._graphs.counts.captures, loop._graphs.counts.replays) == (1, 5)
