import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prefetch": -1}, "`prefetch` must be from 0 to 1024, got -1"),
        ({"prefetch": 1025}, "`prefetch` must be from 0 to 1024, got 1025"),
        ({"in_flight": -2}, "`in_flight` must be from 0 to 1024, got -2"),
        ({"max_graphs": 0}, "`max_graphs` must be from 1 to 65536, got 0"),
        ({"postprocess_workers": 257}, "`postprocess_workers` must be from 0 to 256, got 257"),
    ],
)
def test_a_value_out_of_range_is_named_with_the_range(flags: dict[str, Any], message: str) -> None:
    for make in (InferenceConfig, HPUInferenceAccelerator):
        with pytest.raises(ValueError, match=message):
            make(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pipelining": 1}, "`pipelining` must be True, False or 'auto', got 1"),
        ({"hpu_graphs": "yes"}, "`hpu_graphs` must be True, False, 'hpu_graph', 'compile' or 'direct', got 'yes'"),
        ({"prefetch": True}, "`prefetch` must be of type int, got True"),
        ({"in_flight": 1.5}, "`in_flight` must be of type int, got 1.5"),
        ({"bucket_lengths": 32}, r"`bucket_lengths` must be a list of int, 'auto' or None, got 32. .*write \[32\]"),
        ({"bucket_lengths": "short"}, "`bucket_lengths` must be a list of int, 'auto' or None, got 'short'"),
        ({"postprocess": "decode"}, "`postprocess` must be a function or None, got 'decode'"),
        ({"postprocess_backend": "fork"}, "`postprocess_backend` must be 'thread' or 'process', got 'fork'"),
        ({"graph_modules": 5}, "`graph_modules` must be a list of module names or 'blocks', got 5"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(flags: dict[str, Any], message: str) -> None:
    for make in (InferenceConfig, HPUInferenceAccelerator):
        with pytest.raises(TypeError, match=message):
            make(**flags)


def test_an_empty_trace_folder_is_refused() -> None:
    for make in (InferenceConfig, HPUInferenceAccelerator):
        with pytest.raises(ValueError, match=r"`trace` is empty\. Name a folder"):
            make(trace="")


@pytest.mark.parametrize("make", [InferenceConfig, HPUInferenceAccelerator, HPUInferenceAccelerator.auto])
def test_an_unknown_option_is_answered_with_the_one_that_was_meant(make: Any) -> None:
    with pytest.raises(TypeError, match=r"has no option `hpu_graph`. Did you mean `hpu_graphs`\?"):
        make(hpu_graph=True)
    with pytest.raises(TypeError, match=r"has no option `buckets`. Did you mean `num_buckets`\?"):
        make(buckets=3)
    with pytest.raises(TypeError, match=r"has no option `zzz`. Its options are hpu_graphs, .*, trace\."):
        make(zzz=1)


def test_a_subclass_names_the_option_that_it_hands_on() -> None:
    class Mine(HPUInferenceAccelerator):
        def __init__(self, workers: int = 0, **flags: Any) -> None:
            super().__init__(**flags)

    assert Mine(workers=2, prefetch=3).config.prefetch == 3
    with pytest.raises(TypeError, match=r"HPUInferenceAccelerator has no option `prefech`\. Did you mean `prefetch`"):
        Mine(prefech=3)


@pytest.mark.parametrize(
    ("flags", "hpu", "cpu"),
    [
        ({}, (2, 1), (0, 0)),
        ({"pipelining": "auto"}, (2, 1), (2, 1)),
        ({"pipelining": False}, (0, 0), (0, 0)),
        ({"pipelining": False, "prefetch": 3, "in_flight": 3}, (0, 0), (0, 0)),
        ({"prefetch": 3, "in_flight": 4}, (3, 4), (3, 4)),
        ({"in_flight": 0}, (2, 0), (0, 0)),
    ],
)
def test_depths_that_are_not_chosen_depend_on_the_device(
    flags: dict[str, Any], hpu: tuple[int, int], cpu: tuple[int, int]
) -> None:
    config = InferenceConfig(**flags)
    for device, depths in (("hpu", hpu), ("cpu", cpu)):
        assert (config.prefetch_depth(device), config.in_flight_depth(device)) == depths


def test_the_accelerator_takes_exactly_the_fields_of_the_config_with_its_defaults() -> None:
    parameters = signature(HPUInferenceAccelerator).parameters
    assert [(name, parameter.default, parameter.annotation) for name, parameter in parameters.items()] == [
        (field.name, field.default, field.type) for field in fields(InferenceConfig)
    ]
    assert HPUInferenceAccelerator().config == InferenceConfig()


def test_docstring_and_page_have_the_texts_of_the_config() -> None:
    """`make options` writes them."""
    script = Path(__file__).parents[1] / "docs" / "make_options.py"
    assert subprocess.run([sys.executable, str(script), "--check"], timeout=60, check=False).returncode == 0
    page = (script.parent / "options.md").read_text()
    assert [name for name in signature(HPUInferenceAccelerator).parameters if f"| `{name}` |" not in page] == []
    readme = (script.parents[1] / "README.md").read_text()
    assert [name for name in signature(HPUInferenceAccelerator).parameters if f"`{name}`" not in readme] == []


def test_the_config_is_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        InferenceConfig().prefetch = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        InferenceConfig(True)  # type: ignore[call-arg]
