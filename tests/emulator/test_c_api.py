"""The C level: names and arguments of Habana's extension modules, and the events that it publishes."""

from __future__ import annotations

import gc
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hpu_infer import emulator
from lightning_hpu_infer.emulator import c_api, c_core, events
from tests.helpers import installed

# What the bridge's Python imports from its extension modules (1.19: hpu/csrc/*.cpp, core/bindings.cpp).
HPU_C = """
    HPUGraph capture_begin capture_end clear_inputs destroy get_user_input_match_indices get_view_hash mark_user_inputs
    mark_user_outputs replay replayV2 replayV3
    _HpuEventBase _HpuStreamBase _hpu_getCurrentRawStream _hpu_getCurrentStream _hpu_getDefaultStream _hpu_getStreamInfo
    _hpu_setStream record_stream
    clear_memory_stats get_extended_memory_summary get_hlml_shared_object_name get_mem_stats get_memory_summary
    reset_peak_memory_stats
    cleanup current_device device_count get_device_capability get_device_name get_device_properties init
    synchronize_device
    disable_dynamic_shape disable_inference_mode disable_matmul3d_2d_reshape disable_optim_output_sif
    disable_quantization enable_const_section_serialization enable_dynamic_shape enable_inference_mode
    enable_matmul3d_2d_reshape enable_optim_output_sif enable_quantization enable_recompute_FSDPA getDeterministic
    get_autocast_hpu_dtype get_dynamic_shape_status is_autocast_hpu_enabled is_recompute_FSDPA_enabled
    setDeterministic set_autocast_hpu_dtype set_autocast_hpu_enabled
"""
CORE_C = """
    TensorExtraMeta _get_default_generator _hb_get_default_device _iter_mark_step _mark_step get_new_tensor_extra_meta
    get_tensor_extra_meta
"""


@pytest.mark.parametrize(
    ("module", "names", "helpers"), [(c_api, HPU_C, {"view_hash", "_switch"}), (c_core, CORE_C, {"_key"})]
)
def test_a_module_has_the_bridges_names_and_no_functions_of_its_own(module: Any, names: str, helpers: set[str]) -> None:
    assert [name for name in names.split() if not hasattr(module, name)] == []
    functions = {name for name, value in vars(module).items() if inspect.isfunction(value)}
    assert functions - helpers <= set(names.split())


def test_they_are_two_modules(emulated: None) -> None:
    from habana_frameworks.torch import _core_C, _hpu_C
    from habana_frameworks.torch.utils import _event_dispatcher_C

    assert (_hpu_C, _core_C, _event_dispatcher_C) == (c_api, c_core, events)


def test_a_second_capture_into_a_graph_is_refused(emulated: None) -> None:
    graph, x = c_api.HPUGraph(), torch.ones(1).to("hpu")
    c_api.capture_begin(graph)
    y = x + 1
    c_api.capture_end(graph)
    with pytest.raises(NotImplementedError, match="holds a capture already"):
        c_api.capture_begin(graph)
    c_api.destroy(graph)
    c_api.capture_begin(graph, False)
    y = x + 2
    c_api.capture_end(graph)
    x.fill_(5.0)
    c_api.replay(graph, False)
    assert y.item() == 7.0


def test_replay_v2_reads_the_new_tensors(emulated: None) -> None:
    graph, static = c_api.HPUGraph(), torch.ones(1).to("hpu")
    c_api.capture_begin(graph)
    y = static + 1
    c_api.capture_end(graph)
    c_api.replayV2(graph, [static], [torch.full((1,), 5.0).to("hpu")], True)
    assert y.item() == 6.0


def test_a_side_stream_waits_for_stream_0_in_eager_mode_only() -> None:
    for lazy in (True, False):
        with installed(lazy=lazy):
            hpu = torch.get_device_module("hpu")
            side, done = hpu.Stream(), hpu.Event()
            with emulator.paused("compute"):
                _ = torch.ones(1, device="hpu") + 1
                with hpu.stream(side):
                    other = torch.zeros(1, device="hpu") + 1
                    done.record()
                if not lazy:
                    assert not done.query()
                else:
                    done.synchronize()  # would never end
            assert other.item() == 1.0


def test_events_reach_their_subscribers_and_nobody_after_uninstall() -> None:
    seen: list[tuple[str, dict[str, str]]] = []
    dispatcher = events.EventDispatcher.instance()
    with installed():
        handles = [
            dispatcher.subscribe(topic, lambda when, params, topic=topic: seen.append((topic.name, dict(params))))  # type: ignore[misc]
            for topic in events.EventId
        ]
        hpu = torch.get_device_module("hpu")
        hpu.init()
        for _ in range(2):
            (torch.ones(1, device="hpu") + 1).cpu()
        c_core._mark_step()
        assert [name for name, _ in seen] == [
            *("DEVICE_ACQUIRED", "CACHE_MISS", "GRAPH_COMPILATION", "CACHE_HIT", "MARK_STEP"),
        ]
        params = dict(seen)
        assert params["CACHE_HIT"] == params["CACHE_MISS"] == {"recipe_id": params["GRAPH_COMPILATION"]["recipe"]}
        assert int(params["GRAPH_COMPILATION"]["duration"]) >= 0
        dispatcher.unsubscribe(handles[-1])
        dispatcher.unsubscribe(handles[-1])
        dispatcher.publish(events.EventId.CUSTOM_EVENT, [("a", "b")])
        assert seen.pop() == ("CUSTOM_EVENT", {"a": "b"})
    assert not any(dispatcher.has_subscribers(topic) for topic in events.EventId)


def test_recipe_cache_and_dump_of_metrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PT_HPU_ENABLE_CACHE_METRICS", "1")
    with installed():
        from habana_frameworks.torch.hpu.metrics import MetricNotFound, metric_global, metric_localcontext, metrics_dump

        for _ in range(3):
            (torch.ones(1, device="hpu") + 1).cpu()
        counts = dict(metric_global("recipe_cache").stats())
        assert (counts["TotalHit"], counts["TotalMiss"]) == (2, 1)
        assert (list(counts["RecipeHit"].values()), list(counts["RecipeMiss"].values())) == ([2], [1])
        with pytest.raises(MetricNotFound), metric_localcontext("nothing"):
            pass
        metric_global("recipe_cache").stop()
        (torch.ones(1, device="hpu") + 1).cpu()
        assert dict(metric_global("recipe_cache").stats()) == counts
        metrics_dump(str(tmp_path / "metrics.json"))
    dump = {entry["metric_name"]: entry["statistics"] for entry in json.loads((tmp_path / "metrics.json").read_text())}
    assert dump["graph_compilation"]["TotalNumber"] == 1
    assert set(dump) == {"graph_compilation", "cpu_fallback", "memory_defragmentation", "recipe_cache"}


def test_marks_belong_to_the_tensor_and_end_with_it(emulated: None) -> None:
    x, host = torch.ones(2).to("hpu"), torch.ones(2)
    for tensor in (x, host):
        assert c_core.get_tensor_extra_meta(tensor) is None
        c_core.get_new_tensor_extra_meta(tensor).const_id = 7
        with pytest.raises(RuntimeError, match="already exists"):
            c_core.get_new_tensor_extra_meta(tensor)
    meta = c_core.get_tensor_extra_meta(x.detach())  # the same memory, as the entry of a state_dict
    assert meta is not None
    assert (meta.const_id, meta.is_const_tensor) == (7, False)
    marked = len(c_core._metas)
    del x, tensor
    gc.collect()
    assert len(c_core._metas) == marked - 1


def test_memory_in_words_and_counted_anew(emulated: None) -> None:
    hpu = torch.get_device_module("hpu")
    x = torch.ones(1024).to("hpu")
    assert f"{x.numel() * 4}" in hpu.memory_summary()
    assert c_api.get_extended_memory_summary()["in_use"] == hpu.memory_usage() == hpu.memory_allocated() == 4096
    assert hpu.memory_reserved() == hpu.max_memory_reserved() == hpu.memory_stats()["Limit"]
    hpu.reset_accumulated_memory_stats()
    stats = hpu.memory_stats()
    assert (stats["NumAllocs"], stats["MaxAllocSize"], stats["MaxInUse"]) == (0, 0, 4096)
