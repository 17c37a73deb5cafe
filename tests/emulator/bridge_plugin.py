"""A pytest plugin: the bridge's own tests on the emulator. `test_bridge_tests.py` starts the process that loads it."""

from __future__ import annotations

import contextlib
import enum
import gc
import importlib
import json
import os
import resource
import sys
import types
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from lightning_hpu_infer import emulator
from lightning_hpu_infer.emulator import runtime

RESULTS = "LIGHTNING_HPU_INFER_BRIDGE_RESULTS"
"""Path of the file that gets the outcome of each test, and the error if it failed."""
MAX_BYTES = 6 << 30

_outcomes: dict[str, tuple[str, str]] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Install the emulator before the bridge's conftest files import its package."""
    # One test that asks for too much memory must not end the others.
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    emulator.install()
    _stand_in(
        "habana_frameworks.torch.internal.bridge_config", get_pt_hpu_gpu_migration=_no, get_pt_enable_int64_support=_no
    )
    _stand_in("habana_frameworks.torch.utils.debug.dynamo_utils", FxGraphAnalyzer=None)
    _stand_in("habana_frameworks.torch.dynamo.compile_backend.shared_layer", hpu_fallback_op_list=[])
    from habana_frameworks.torch.dynamo.compile_backend import config as compile_config
    from habana_frameworks.torch.hpex.experimental.transformer_engine import recipe
    from habana_frameworks.torch.utils import debug

    names: list[tuple[Any, str, object]] = [
        (compile_config, "configuration_flags", {"use_eager_fallback": False}),
        (recipe, "Format", enum.Enum("Format", ["E5M2", "HYBRID"])),
        (debug, "_bridge_cleanup", lambda: None),
    ]
    for module, name, value in names:
        vars(module).setdefault(name, value)


def _no() -> bool:
    return False


def _stand_in(name: str, **names: object) -> None:
    """Make a module that the files import, and of which no chosen test of lazy mode uses more than `names`."""
    module = sys.modules.setdefault(name, types.ModuleType(name))
    vars(module).update(names)
    parent, _, last = name.rpartition(".")
    try:
        owner = importlib.import_module(parent)
    except ModuleNotFoundError:
        owner = sys.modules[parent] = types.ModuleType(parent)
    setattr(owner, last, module)
    # ``import a.b.c as d`` goes by attributes, and `internal` of the package is another module than of its name.
    top, _, path = parent.partition(".")
    setattr(attrgetter(path)(sys.modules[top]), last, module)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a file that could not be imported."""
    if report.failed:
        _outcomes[report.nodeid] = ("failed", str(report.longrepr)[-600:])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the outcome of a test; a failure of its teardown is one of the test."""
    if _outcomes.get(report.nodeid, ("",))[0] == "failed" or (report.when != "call" and report.passed):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash is not None else report.longrepr)[:600] if report.failed else ""
    _outcomes[report.nodeid] = ("xfailed" if hasattr(report, "wasxfail") else report.outcome, text)


def pytest_runtest_teardown() -> None:
    """Leave nothing of a test to the next: no error that nobody waited for, no graph whose end would end a capture."""
    with contextlib.suppress(Exception):
        runtime.current().synchronize()
    if emulator.stats().captures:
        gc.collect()
        emulator.reset_stats()


def pytest_sessionfinish() -> None:
    """Write the outcomes."""
    Path(os.environ[RESULTS]).write_text(json.dumps(_outcomes))
