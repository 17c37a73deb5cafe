from __future__ import annotations

import collections
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.contract.models import hpu

pytestmark = pytest.mark.usefixtures("lazy_hpu")


def _wrap(func: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    import habana_frameworks.torch as htorch

    wrapped: Callable[..., Any] = htorch.hpu.wrap_in_hpu_graph_func(func, **options)
    return wrapped


def _hpu(*values: float) -> torch.Tensor:
    return torch.tensor(values).to("hpu")


BOTH_MODES = pytest.mark.parametrize("mode_b", [False, True], ids=["mode-a", "mode-b"])


@BOTH_MODES
def test_python_runs_once_and_results_follow_the_inputs(mode_b: bool) -> None:
    calls = []

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x * 2

    wrapped = _wrap(double, disable_tensor_cache=mode_b)
    assert [wrapped(_hpu(v, -v)).tolist() for v in (1.0, 2.0, 3.0)] == [[2.0, -2.0], [4.0, -4.0], [6.0, -6.0]]
    assert len(calls) == 1


@BOTH_MODES
def test_a_result_is_overwritten_by_the_next_call(mode_b: bool) -> None:
    wrapped = _wrap(lambda x: {"y": x + 1}, disable_tensor_cache=mode_b)
    first = wrapped(_hpu(1.0, 2.0))
    detached, part, owned = first["y"].detach(), first["y"][1:], first["y"].clone()
    second = wrapped(_hpu(10.0, 20.0))
    assert second is first
    assert first["y"].tolist() == detached.tolist() == [11.0, 21.0]
    assert part.tolist() == [21.0]
    assert owned.tolist() == [2.0, 3.0]


def test_an_asynchronous_copy_that_was_issued_keeps_the_old_result() -> None:
    wrapped = _wrap(lambda x: x + 1, disable_tensor_cache=True)
    kept = torch.empty(1).pin_memory("hpu")
    kept.copy_(wrapped(_hpu(1.0)), non_blocking=True)
    wrapped(_hpu(10.0))
    hpu().synchronize()
    assert kept.item() == 2.0


def test_the_first_batch_becomes_a_static_input_in_mode_a_only() -> None:
    for mode_b, expected in ((False, 7.0), (True, 1.0)):
        wrapped = _wrap(lambda x: x + 1, disable_tensor_cache=mode_b)
        first = _hpu(1.0)
        wrapped(first)
        wrapped(_hpu(7.0))
        assert first.item() == expected


@BOTH_MODES
def test_parameters_are_read_at_each_replay(mode_b: bool) -> None:
    import habana_frameworks.torch as htorch

    net = nn.Linear(1, 1, bias=False).to("hpu")
    htorch.hpu.wrap_in_hpu_graph(net, disable_tensor_cache=mode_b)
    with torch.no_grad():
        net.weight.fill_(2.0)
        assert net(_hpu(3.0)).item() == 6.0
        net.weight.fill_(5.0)
        assert net(_hpu(3.0)).item() == 15.0


@BOTH_MODES
def test_in_place_state_advances_once_per_call(mode_b: bool) -> None:
    state = _hpu(0.0)
    wrapped = _wrap(lambda x: state.add_(x) * 1, disable_tensor_cache=mode_b)
    assert [wrapped(_hpu(1.0)).item() for _ in range(3)] == [1.0, 2.0, 3.0]


@BOTH_MODES
def test_inputs_that_are_views(mode_b: bool) -> None:
    wrapped = _wrap(lambda x: x * 2, disable_tensor_cache=mode_b)
    for value in (1.0, 3.0):
        base = torch.full((4, 2), value)
        base[1] += 1
        assert wrapped(base.to("hpu")[1]).tolist() == [2 * value + 2] * 2


def test_host_data_inside_is_frozen() -> None:
    values = iter([1.0, 100.0])
    wrapped = _wrap(lambda x: x + torch.tensor([next(values)]).to("hpu"))
    assert wrapped(_hpu(1.0)).item() == 2.0
    assert wrapped(_hpu(2.0)).item() == 3.0


def test_random_ops_draw_anew_at_each_replay() -> None:
    wrapped = _wrap(lambda x: x + torch.rand_like(x), disable_tensor_cache=True)
    first = wrapped(_hpu(0.0, 0.0)).cpu()
    assert not torch.equal(wrapped(_hpu(0.0, 0.0)).cpu(), first)


def test_mark_step_inside_splits_but_does_not_break() -> None:
    import habana_frameworks.torch.core as htcore

    def func(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        htcore.mark_step()
        return y * 2

    for mode_b in (False, True):
        wrapped = _wrap(func, disable_tensor_cache=mode_b)
        assert [wrapped(_hpu(v)).item() for v in (1.0, 2.0, 3.0)] == [4.0, 6.0, 8.0]


def test_keys_ignore_dtype_and_collide_as_python_hashes_do() -> None:
    from habana_frameworks.torch.hpu.graphs import get_user_input_tensor_list, input_hash

    x = torch.ones(2, device="hpu")
    assert input_hash((x,)) == input_hash((x.to(torch.int32).clone(),))
    assert input_hash((1,)) == input_hash((True,)) == input_hash((1.0,))
    assert input_hash((-1,)) == input_hash((-2,))
    assert input_hash((x,)) != input_hash((torch.ones(3, device="hpu"),))
    assert input_hash({"a": x}) != input_hash({"b": x})
    assert input_hash((x,)) != input_hash((torch.ones(3, device="hpu")[1:],))
    # A UserDict is hashed by its rows' identities, and its tensors are not seen as inputs.
    assert get_user_input_tensor_list(collections.UserDict({"x": x}), ()) == ()
    assert [id(tensor) for tensor in get_user_input_tensor_list({"a": [x, 1]}, ())] == [id(x)]
    with torch.autocast("hpu", dtype=torch.bfloat16):
        inside = input_hash((x,))
    assert inside != input_hash((x,))
    with pytest.raises(TypeError, match="unhashable"):
        input_hash(({1, 2},))


def test_copy_to_wants_the_same_structure() -> None:
    from habana_frameworks.torch.hpu.graphs import copy_to

    dst: dict[str, Any] = {"a": _hpu(1.0), "n": 1}
    copy_to(dst, {"a": _hpu(2.0), "n": 5})
    assert dst["a"].item() == 2.0
    assert dst["n"] == 1
    with pytest.raises(AssertionError):
        copy_to((_hpu(1.0),), [_hpu(1.0)])


def test_max_graphs_never_evicts() -> None:
    calls: list[int] = []

    def func(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x + 1

    wrapped = _wrap(func, max_graphs=1)
    for length in (1, 2, 2, 1):
        assert wrapped(torch.zeros(length).to("hpu")).tolist() == [1.0] * length
    assert calls == [1, 2, 2]


def test_bypass_and_warm_up() -> None:
    calls: list[float] = []

    def func(x: torch.Tensor) -> torch.Tensor:
        calls.append(1.0)
        return x + 1

    wrapped = _wrap(func)
    assert wrapped(_hpu(1.0)).item() == 2.0
    assert wrapped(_hpu(2.0), bypass_hpu_graphs=True).item() == 3.0
    assert len(calls) == 2
    assert wrapped(_hpu(5.0), warmup_mode=True).item() == 2.0  # stale: not replayed
    assert wrapped(_hpu(5.0)).item() == 6.0


def test_the_environment_overrides_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_HPUGRAPH_DISABLE_TENSOR_CACHE", "1")
    wrapped = _wrap(lambda x: x + 1, disable_tensor_cache=False)
    first = _hpu(1.0)
    wrapped(first)
    wrapped(_hpu(7.0))
    assert first.item() == 1.0


def test_module_attributes_and_unwrapping() -> None:
    import habana_frameworks.torch as htorch

    net = nn.Linear(2, 2).to("hpu")
    assert htorch.hpu.wrap_in_hpu_graph(net) is net
    assert "forward" in vars(net)
    with torch.no_grad():
        first = net(_hpu(1.0, 2.0))
        net.clear_cache()
        assert net(_hpu(1.0, 2.0)) is not first
        net.clear_inputs()
    del net.forward
    assert net(_hpu(1.0, 2.0)).requires_grad


def test_a_dry_run_is_replayed_at_once() -> None:
    calls = []

    def func(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x + 1

    wrapped = _wrap(func, dry_run=True)
    assert [wrapped(_hpu(value)).item() for value in (1.0, 5.0)] == [2.0, 6.0]
    assert len(calls) == 1


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    parts: tuple[torch.Tensor, ...]


@BOTH_MODES
def test_tensors_in_the_attributes_of_a_result_are_found(mode_b: bool) -> None:
    wrapped = _wrap(lambda x: Output(x + 1, (x * 2, x * 3)), disable_tensor_cache=mode_b)
    for value in (1.0, 5.0):
        result = wrapped(_hpu(value))
        assert [tensor.item() for tensor in (result.logits, *result.parts)] == [value + 1, value * 2, value * 3]


@pytest.mark.usefixtures("emulated")
def test_a_failed_capture_leaves_the_process_dry_until_the_next_one_ends() -> None:
    import habana_frameworks.torch as htorch

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        _wrap(fail, disable_tensor_cache=True)(_hpu(1.0))
    gc.collect()
    assert (_hpu(1.0) + 1).isnan().all().cpu().item() is False  # nothing ran: reads see undefined memory
    assert torch.isnan((_hpu(1.0) + 1).cpu()).all()
    recovery = htorch.hpu.HPUGraph()
    recovery.capture_begin(False)
    recovery.capture_end()
    assert (_hpu(1.0) + 1).item() == 2.0


@pytest.mark.usefixtures("emulated")
def test_host_reads_in_a_dry_run_see_undefined_memory() -> None:
    seen: list[float] = []

    def func(x: torch.Tensor) -> torch.Tensor:
        seen.append((x + 1).item())
        return x * 2

    assert _wrap(func, disable_tensor_cache=True)(_hpu(1.0)).item() == 2.0
    assert seen[0] != seen[0]
    assert _wrap(func, disable_tensor_cache=False)(_hpu(1.0)).item() == 2.0
    assert seen[1] == 2.0


def test_mixed_dtypes_under_one_key_are_cast_in_mode_a() -> None:
    wrapped = _wrap(lambda x: x / 2, disable_tensor_cache=False)
    assert wrapped(torch.tensor([3], dtype=torch.int32).to("hpu")).item() == 1.5
    assert wrapped(_hpu(3.2)).item() == 1.5  # into the static input, an integer
