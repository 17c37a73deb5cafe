"""`pad_batch`: batches with fewer rows use a larger graph, with equal predictions."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from lightning_hpu_infer.graphs.padding import pad_rows
from tests.helpers import Net, assert_equal, predict, trainer

pytestmark = pytest.mark.usefixtures("emulated")


class Network(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self.linear, *args)


class Module(Net):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network = Network(function)
        self.seen: list[int] = []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(len(batch))
        return batch

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.network(batch)


def batches(*sizes: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader([torch.randn(n, 4, generator=generator) for n in sizes], batch_size=None)  # type: ignore[arg-type]


def run(function: Callable[..., Any], *sizes: int, **flags: Any) -> tuple[emulator.EmulatorStats, Any]:
    """Counters of the device and of the graphs, over a run whose predictions equal stock's."""
    module, loader = Module(function), batches(*sizes)
    expected = predict("cpu", copy.deepcopy(module), loader)
    emulator.reset_stats()
    ours = trainer(HPUInferenceAccelerator(pad_batch=True, **flags))
    assert_equal(ours.predict(module, loader), expected)
    assert module.seen == list(sizes)  # The step itself sees no padding.
    loop: Any = ours.predict_loop
    return emulator.stats(), loop._graphs.counts


def test_short_batches_use_the_graph_of_the_full_ones() -> None:
    stats, counts = run(lambda linear, x: {"rows": linear(x), "sums": linear(x).sum(1)}, 4, 4, 4, 4, 4, 3, 2, 3, 2, 4)
    assert (stats.captures, counts.padded) == (1, 4)


def test_without_it_short_batches_run_plainly_at_first() -> None:
    stats, counts = run(lambda linear, x: linear(x), 4, 4, 4, 4, 4, 3)
    assert (stats.captures, counts.padded) == (1, 1)
    module, loader = Module(lambda linear, x: linear(x)), batches(4, 4, 4, 4, 4, 3)
    ours = trainer(HPUInferenceAccelerator())
    ours.predict(module, loader)
    loop: Any = ours.predict_loop
    assert (loop._graphs.counts.captures, loop._graphs.counts.padded) == (1, 0)


def test_the_smallest_graph_that_is_large_enough_is_used() -> None:
    stats, counts = run(lambda linear, x: linear(x), 8, 8, 8, 8, 4, 4, 4, 4, 3, verify_graphs=0)
    # Four rows fit the graph of eight, so there is no other.
    assert (stats.captures, counts.padded) == (1, 5)


@pytest.mark.parametrize(
    "function",
    [lambda linear, x: linear(x).softmax(0), lambda linear, x: linear(x) - linear(x).mean()],
    ids=["softmax over rows", "mean over all"],
)
def test_networks_that_mix_rows_are_found_and_get_their_own_graph(function: Any) -> None:
    with pytest.warns(UserWarning, match="rows added to a short batch change the others"):
        stats, _ = run(function, 4, 4, 4, 4, 4, 3, 3, 3)
    assert stats.captures == 2


@pytest.mark.parametrize(
    "function",
    [lambda linear, x: linear(x).mean(), lambda linear, x: (linear(x), linear.weight * 1)[::-1]],
    ids=["scalar", "an output that has four rows by chance"],
)
def test_outputs_without_the_batch_dimension_are_known_by_their_sizes_and_get_their_own_graph(function: Any) -> None:
    with pytest.warns(UserWarning, match=r"`pad_batch` is not used for `predict_step`: a result of shape .* of rows"):
        stats, counts = run(function, 4, 4, 4, 4, 4, 3, 3, 3)
    assert (stats.captures, counts.padded) == (2, 0)


def test_a_batch_of_one_row_is_traced_apart() -> None:
    """TorchDynamo takes a size of one for a constant, so there is no graph that one row could be padded for."""
    stats, counts = run(lambda linear, x: linear(x), 4, 4, 4, 4, 4, 1, 1, 1)
    assert (stats.captures, counts.padded) == (2, 0)


def test_an_empty_batch_is_not_padded() -> None:
    _, counts = run(lambda linear, x: linear(x), 4, 4, 4, 4, 4, 0, 0)
    assert counts.padded == 0


def test_inputs_without_the_batch_dimension_stay_as_they_are() -> None:
    table = torch.ones(7, 4)
    module = Module(lambda linear, x, weights: linear(x) @ weights.T)

    class WithTable(Module):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.network(batch, table.to(batch.device))

    module = WithTable(lambda linear, x, weights: linear(x) @ weights.T)
    loader = batches(4, 4, 4, 4, 4, 2, 2)
    expected = predict("cpu", copy.deepcopy(module), loader)
    ours = trainer(HPUInferenceAccelerator(pad_batch=True))
    assert_equal(ours.predict(module, loader), expected)
    loop: Any = ours.predict_loop
    assert (loop._graphs.counts.captures, loop._graphs.counts.padded) == (1, 2)


def test_padding_goes_with_its_graph() -> None:
    """When the larger graph is dropped, short batches find another."""
    with_eviction, _ = run(lambda linear, x: linear(x), 4, 4, 4, 4, 3, 8, 8, 8, 8, 3, 4, max_graphs=1, verify_graphs=0)
    assert with_eviction.captures == 2


@pytest.mark.parametrize(
    "sizes",
    [(4, 4, 4, 3, 8, 8, 3, 16, 16, 16, 4), (4, 4, 4, 8, 8, 3, 2, 16, 16, 16, 4)],
    ids=["by a size that was padded before", "by new sizes"],
)
def test_a_graph_that_short_batches_use_is_in_use(sizes: tuple[int, ...]) -> None:
    """The third graph drops the second one, and the first is still there for a batch of its size."""
    _, counts = run(lambda linear, x: linear(x), *sizes, max_graphs=2, verify_graphs=0)
    assert (counts.captures, counts.evictions, counts.padded) == (3, 1, 2)


def test_the_first_output_may_be_kept() -> None:
    kept: list[Tensor] = []

    class Keeps(Callback):
        def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            assert outputs.device.type == "hpu"
            kept.append(outputs)

    module, loader = Module(lambda linear, x: linear(x)), batches(4, 4, 4, 4, 4, 3, 2, 3)
    expected = predict("cpu", copy.deepcopy(module), loader)
    predict(HPUInferenceAccelerator(pad_batch=True, defer_hooks=False), module, loader, callbacks=[Keeps()])
    assert_equal([tensor.cpu() for tensor in kept], expected)


def test_padding_is_compared_even_if_graphs_are_believed() -> None:
    with pytest.warns(UserWarning, match="rows added to a short batch change the others"):
        run(lambda linear, x: linear(x).softmax(0), 4, 4, 4, 4, 4, 3, 3, 3, verify_graphs=0)


def test_rows_are_filled_up_with_the_last_one() -> None:
    tensor = torch.tensor([[1, 2], [3, 4]])
    assert pad_rows(tensor, 4).tolist() == [[1, 2], [3, 4], [3, 4], [3, 4]]
    assert pad_rows(tensor, 2) is tensor
    assert pad_rows(torch.tensor([True]), 2).tolist() == [True, True]
    for wrong in (torch.ones(3), torch.ones(0), torch.ones(())):
        with pytest.raises(ValueError, match="cannot be filled up to 2 rows"):
            pad_rows(wrong, 2)
