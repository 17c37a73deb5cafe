"""``torch.compile(..., backend="hpu_backend")`` on the emulator: dynamo's tracing, the emulator's programs."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, InvalidBackend

from lightning_hpu_infer import emulator
from lightning_hpu_infer.emulator import EmulatorConfig
from tests.contract.models import MODELS
from tests.helpers import Clock, installed

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
BOTH_GRAD_MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


def _compiled(target: Any, **options: Any) -> Any:
    return torch.compile(target, backend="hpu_backend", dynamic=False, **options)


def _stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def _synchronize() -> None:
    torch.get_device_module("hpu").synchronize()


@BOTH_GRAD_MODES
def test_each_shape_is_compiled_once_and_each_call_is_one_program(eager: None, mode: Any) -> None:
    net = _stack()
    batches = [torch.randn(size, 4) for size in (3, 3, 5, 3, 5)]
    with mode():
        expected = [net(batch) for batch in batches]
        compiled = _compiled(net.to("hpu"))
        emulator.reset_stats()
        results = [compiled(batch.to("hpu")) for batch in batches]
        for result, logits in zip(results, expected, strict=True):
            torch.testing.assert_close(result.cpu(), logits)
    stats = emulator.stats()
    assert (stats.compiled_calls, stats.programs, stats.compiles) == (5, 5, 2)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # transformers' Wav2Vec2
@pytest.mark.parametrize(
    ("name", "mode", "autocast"),
    [
        *((name, mode, False) for name in MODELS for mode in (torch.no_grad, torch.inference_mode)),
        ("bert", torch.inference_mode, True),
        ("wav2vec2", torch.no_grad, True),
    ],
)
def test_models(eager: None, name: str, mode: Any, autocast: bool) -> None:
    torch.manual_seed(0)
    net, inputs = MODELS[name]()
    net.eval()
    batches = [inputs, {key: value.flip(0) for key, value in inputs.items()}, inputs]
    with mode():
        expected = [net(**batch) for batch in batches]
        compiled = _compiled(net.to("hpu"))
        emulator.reset_stats()
        with torch.autocast("hpu", dtype=torch.bfloat16, enabled=autocast):
            results = [compiled(**{key: value.to("hpu") for key, value in batch.items()}) for batch in batches]
    # bfloat16 has three digits, and kernels of the CPU differ from machine to machine.
    atol, rtol = (0.2, 0.1) if autocast else (1e-5, 1e-4)
    for result, plain in zip(results, expected, strict=True):
        assert isinstance(result, torch.Tensor) or type(result) is type(plain)
        logits, right = (x if isinstance(x, torch.Tensor) else x.logits for x in (result, plain))
        torch.testing.assert_close(logits.cpu().float(), right, atol=atol, rtol=rtol)
    stats = emulator.stats()
    assert (stats.compiled_calls, stats.programs, stats.compiles) == (3, 3, 1)


def test_results_are_not_overwritten_by_later_calls(eager: None) -> None:
    compiled = _compiled(lambda x: {"twice": x * 2, "rows": [(x * 2)[0], x + 1]})
    outputs = [compiled(torch.full((2, 2), float(value)).to("hpu")) for value in range(4)]
    for value, output in enumerate(outputs):
        assert output["twice"].tolist() == [[2.0 * value] * 2] * 2
        assert output["rows"][0].tolist() == [2.0 * value] * 2
        assert output["rows"][1].tolist() == [[value + 1.0] * 2] * 2
    first, second = (output["twice"] for output in outputs[:2])
    first.zero_()
    assert second.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert first.data_ptr() != second.data_ptr()


def test_a_call_returns_before_the_device_has_run(eager: None) -> None:
    compiled = _compiled(_stack().to("hpu"))
    x = torch.ones(3, 4).to("hpu")
    with torch.no_grad():
        for _ in range(2):  # the first call compiles, the second one does not
            emulator.reset_stats()
            with emulator.paused("compute"):
                compiled(x)
                assert emulator.stats().programs == 0
            _synchronize()
            assert emulator.stats().programs == 1


def test_a_program_takes_a_networks_time_and_its_compilation_once(clock: Clock) -> None:
    with installed(lazy=False, compile_ms=20, program_ms=10):
        compiled = _compiled(lambda x: (x + 1) * 2)
        x = torch.ones(2).to("hpu")
        emulator.start_timeline()
        for _ in range(2):
            assert compiled(x).tolist() == [4.0, 4.0]
        spans = [span for span in emulator.stop_timeline() if span.queue == "compute"]
        assert [span.kind for span in spans] == ["compile", "compute", "compute"]
        assert [span.end - span.start for span in spans] == pytest.approx([0.02, 0.01, 0.01])


def test_a_graph_break_is_two_programs(eager: None) -> None:
    def branch(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return y + 1 if y.sum().item() > 0 else y - 1

    compiled = _compiled(branch)
    for sign, expected in ((1.0, [3.0, 3.0]), (-1.0, [-3.0, -3.0]), (1.0, [3.0, 3.0])):
        assert compiled(torch.full((2,), sign).to("hpu")).tolist() == expected
    # Dynamo does not trace functions of the emulator, which run between the graphs.
    assert (emulator.stats().compiled_calls, emulator.stats().programs) == (6, 6)


def test_work_on_the_host_inside_a_graph(eager: None) -> None:
    """No recording repeats it, so such a graph is run op by op, as several programs if need be."""

    def through_the_host(x: torch.Tensor) -> torch.Tensor:
        y = (x * 2).cpu() + 1
        return y.to("hpu") * 3

    compiled = _compiled(through_the_host, fullgraph=True)
    for value in (1.0, 2.0):
        assert compiled(torch.full((2,), value).to("hpu")).tolist() == [3 * (2 * value + 1)] * 2
    assert emulator.stats().compiled_calls == 2
    assert emulator.stats().programs == 4


def test_scalars_on_the_host_are_read_at_each_call(eager: None) -> None:
    compiled = _compiled(lambda x, scale: x * scale, fullgraph=True)
    x = torch.ones(2).to("hpu")
    assert [compiled(x, torch.tensor(scale)).tolist()[0] for scale in (2.0, 3.0)] == [2.0, 3.0]


def test_results_on_the_host(eager: None) -> None:
    compiled = _compiled(lambda x: (x + 1, torch.ones(2), 5), fullgraph=True)
    for value in (1.0, 2.0):
        device, host, number = compiled(torch.full((2,), value).to("hpu"))
        assert device.tolist() == [value + 1] * 2
        assert host.tolist() == [1.0, 1.0]
        assert number == 5


def test_an_op_without_a_device_kernel() -> None:
    emulator.install(EmulatorConfig(lazy=False, cpu_fallback_ops=frozenset({"aten::cumsum"})))
    try:
        compiled = _compiled(lambda x: (x + 1).cumsum(0) * 2, fullgraph=True)
        for _ in range(2):
            assert compiled(torch.ones(3).to("hpu")).tolist() == [4.0, 8.0, 12.0]
        assert emulator.stats().cpu_fallbacks == 2
    finally:
        emulator.uninstall()


def test_arguments_and_views_of_them_as_results(eager: None) -> None:
    compiled = _compiled(lambda x: (x, x[0], x.t()), fullgraph=True)
    for _ in range(2):
        x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to("hpu")
        same, row, turned = compiled(x)
        assert same is x
        x.mul_(10)
        assert row.tolist() == [10.0, 20.0]
        assert turned.tolist() == [[10.0, 30.0], [20.0, 40.0]]


@BOTH_GRAD_MODES
def test_views_as_arguments(eager: None, mode: Any) -> None:
    with mode():
        compiled = _compiled(lambda x, y: x + y, fullgraph=True)
        base = torch.arange(8.0).to("hpu").view(2, 4)
        assert compiled(base[0], base[1]).tolist() == [4.0, 6.0, 8.0, 10.0]
        assert compiled(base[1], base[1]).tolist() == [8.0, 10.0, 12.0, 14.0]
        assert compiled(base[0, :2], base.t()[2:, 0]).tolist() == [2.0, 4.0]


def test_a_graph_that_writes_to_its_arguments(eager: None) -> None:
    def update(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * y

    compiled = _compiled(update, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            x, y = torch.ones(2).to("hpu"), torch.full((2,), 3.0).to("hpu")
            assert compiled(x, y).tolist() == [6.0, 6.0]
            assert (x.tolist(), y.tolist()) == ([2.0, 2.0], [3.0, 3.0])
            # The same memory twice is another program than different memory.
            assert compiled(x, x).tolist() == [9.0, 9.0]


def test_a_layout_of_the_argument_that_was_changed_in_place(eager: None) -> None:
    def flatten(x: torch.Tensor) -> torch.Tensor:
        x.squeeze_(0)
        return x + 1

    compiled = _compiled(flatten)
    for _ in range(2):
        x = torch.zeros(1, 3).to("hpu")
        assert compiled(x).tolist() == [1.0, 1.0, 1.0]
        assert x.shape == (3,)


def test_buffers_and_weights_are_read_at_each_call(eager: None) -> None:
    net = nn.BatchNorm1d(2).to("hpu")
    compiled = _compiled(net)
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]]).to("hpu")
    with torch.no_grad():
        for steps in (1, 2):
            compiled(x)
            assert net.num_batches_tracked is not None
            assert net.num_batches_tracked.item() == steps
        net.eval()
        compiled(x)
        before = compiled(x).cpu()
        net.load_state_dict({**net.state_dict(), "bias": torch.ones(2)})
        emulator.reset_stats()  # the copy of the weights is a program too
        assert torch.equal(compiled(x).cpu(), before + 1)
        assert emulator.stats().compiles == 0


def test_random_numbers_are_drawn_anew(eager: None) -> None:
    compiled = _compiled(lambda x: nn.functional.dropout(x, 0.5) + torch.rand_like(x))
    x = torch.ones(50).to("hpu")
    first, second = compiled(x).cpu(), compiled(x).cpu()
    assert not torch.equal(first, second)


def test_autocast_is_a_matter_of_each_call(eager: None) -> None:
    compiled = _compiled(nn.Linear(4, 4).to("hpu"))
    x = torch.ones(2, 4).to("hpu")
    dtypes = []
    with torch.inference_mode():
        for enabled in (False, True, False):
            with torch.autocast("hpu", dtype=torch.bfloat16, enabled=enabled):
                dtypes.append(compiled(x).dtype)
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]


def test_a_module_that_moves_after_it_was_compiled(eager: None) -> None:
    net = _stack().to("hpu")
    compiled = _compiled(net)
    x = torch.ones(3, 4)
    with torch.no_grad():
        expected = compiled(x.to("hpu")).cpu()
        for device in ("hpu", "cpu", "hpu"):
            net.to(device)
            torch.testing.assert_close(compiled(x.to(device)).cpu(), expected)


def test_both_grad_modes_on_one_compiled_module(eager: None) -> None:
    compiled = _compiled(_stack().to("hpu"))
    x = torch.ones(3, 4).to("hpu")
    with torch.inference_mode():
        first = compiled(x)
        assert first.is_inference()
    with torch.no_grad():
        second = compiled(x)
        assert not second.is_inference()
    assert first.tolist() == second.tolist()


def test_exceptions_reach_the_caller(eager: None) -> None:
    class Refuses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] == 2:
                raise ValueError("two is too few")
            return x + 1

    compiled = _compiled(Refuses())
    assert compiled(torch.ones(3).to("hpu")).tolist() == [2.0] * 3
    with pytest.raises(ValueError, match="two is too few"):
        compiled(torch.ones(2).to("hpu"))
    assert compiled(torch.ones(3).to("hpu")).tolist() == [2.0] * 3


def test_a_shape_error_names_itself(eager: None) -> None:
    compiled = _compiled(_stack().to("hpu"))
    with torch.no_grad():
        with pytest.raises(Exception, match=r"must have same reduction dim|shapes cannot be multiplied"):
            compiled(torch.ones(3, 5).to("hpu"))
        assert compiled(torch.ones(3, 4).to("hpu")).shape == (3, 2)


def test_an_error_on_the_device_arrives_where_the_result_is_read(eager: None) -> None:
    compiled = _compiled(nn.functional.embedding)
    weight = torch.ones(2, 2).to("hpu")
    result = compiled(torch.tensor([5]).to("hpu"), weight)
    with pytest.raises(IndexError):
        result.cpu()
    assert compiled(torch.tensor([1]).to("hpu"), weight).tolist() == [[1.0, 1.0]]


def test_memory_is_freed(eager: None) -> None:
    def work() -> None:
        compiled = _compiled(_stack().to("hpu"))
        with torch.no_grad():
            for _ in range(3):
                compiled(torch.ones(3, 4).to("hpu")).cpu()

    work()
    torch._dynamo.reset()
    _synchronize()
    gc.collect()
    assert emulator.stats().bytes_in_use == 0


def test_options(eager: None) -> None:
    known = _compiled(lambda x: x + 1, options={"force_static_compile": True, "keep_input_mutations": True})
    assert known(torch.ones(1).to("hpu")).item() == 2.0
    assert _compiled(lambda x: x + 2, mode="reduce-overhead")(torch.ones(1).to("hpu")).item() == 3.0
    unknown = _compiled(lambda x: x + 3, options={"use_graphs": True})
    # The backend raises an AttributeError, which dynamo wraps.
    with pytest.raises(BackendCompilerFailed, match=r"AttributeError: .*config\.use_graphs does not exist") as caught:
        unknown(torch.ones(1).to("hpu"))
    assert isinstance(caught.value.inner_exception, AttributeError)


def test_the_backend_exists_in_eager_mode_while_installed() -> None:
    from torch._dynamo import trace_rules

    before = list(trace_rules.SKIP_DIRS)
    for lazy in (True, False, True):
        emulator.install(EmulatorConfig(lazy=lazy))
        try:
            assert ("hpu_backend" in torch._dynamo.list_backends()) is not lazy
            if lazy:
                with pytest.raises(InvalidBackend, match="hpu_backend"):
                    _compiled(lambda x: x)
        finally:
            emulator.uninstall()
        assert "hpu_backend" not in torch._dynamo.list_backends()
        assert list(trace_rules.SKIP_DIRS) == before
        with pytest.raises(InvalidBackend, match="hpu_backend"):
            _compiled(lambda x: x)


def test_a_compiled_function_outlives_an_installation() -> None:
    compiled: Any = None
    for value in (1.0, 2.0):
        emulator.install(EmulatorConfig(lazy=False))
        try:
            compiled = compiled or _compiled(lambda x: x * 2)
            assert compiled(torch.full((2,), value).to("hpu")).tolist() == [2 * value] * 2
            assert (emulator.stats().compiles, emulator.stats().programs) == (1, 1)
        finally:
            emulator.uninstall()
