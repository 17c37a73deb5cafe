"""What Python computes and keeps in a traced step is as in stock Lightning."""

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from lightning_hpu_infer import HPUInferenceAccelerator
from tests.graphs import python_containers, python_names, python_state
from tests.graphs.python_state import STEPS, Keeping
from tests.helpers import predict, rows


def plain(value: Any) -> Any:
    """A value as one that can be compared: its type too, and the attributes of objects."""
    if isinstance(value, Tensor):
        return (
            "tensor",
            [round(each, 3) for each in value.detach().cpu().double().flatten().tolist()],
            list(value.shape),
        )
    if isinstance(value, np.ndarray):
        return "array", value.dtype, plain(value.tolist())
    if isinstance(value, dict):
        return type(value).__name__, [(plain(key), plain(item)) for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(map(repr, value))
    if isinstance(value, list | tuple) or hasattr(value, "maxlen"):
        return type(value).__name__, getattr(value, "maxlen", None), [plain(item) for item in value]
    if callable(value):
        return "function", plain(getattr(value, "__defaults__", None)), plain(getattr(value, "__kwdefaults__", None))
    slots = {name: getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)}
    attributes = slots | getattr(value, "__dict__", {})
    return type(value).__name__, plain(attributes) if attributes else "" if " at 0x" in repr(value) else repr(value)


def outcome(accelerator: Any, name: str) -> Any:
    """The predictions of 6 batches, and the state that the step keeps after them."""
    module = Keeping(STEPS[name]).eval()
    return [plain(each) for each in predict(accelerator, module, rows(12, 2))], plain(module.s)


# What TorchDynamo traces wrongly by itself. The default run has these, `make full` has all.
REPAIRED = (
    *(
        "f-string 0",
        "f-string s",
        "f-string in",
        "f-string as",
        "f-string h",
        "f-string compared",
        "f-string method",
        "format 0",
        "format of",
    ),
    *(
        "tuple",
        "deque of",
        "generator b",
        "generator's ra",
        "lru_cache",
        "least",
        "array",
        "set of",
        "default reached",
        "class attr",
    ),
)


def test_all_files_of_steps_are_read() -> None:
    files = {step.compute.__module__ for step in STEPS.values()}
    assert files == {module.__name__ for module in (python_state, python_containers, python_names)}


@pytest.mark.filterwarnings("ignore:.*runs? without")
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.startswith(REPAIRED) else [pytest.mark.full]) for name in STEPS]
)
def test_rule_1_what_python_computes_in_a_traced_step_is_as_in_stock(name: str) -> None:
    expected = outcome("cpu", name)
    assert outcome(HPUInferenceAccelerator(), name) == expected
