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
    ],
)
def test_a_value_of_the_wrong_type_is_named(flags: dict[str, Any], message: str) -> None:
    for make in (InferenceConfig, HPUInferenceAccelerator):
        with pytest.raises(TypeError, match=message):
            make(**flags)


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
