from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hpu_infer import emulator
from lightning_hpu_infer.emulator import EmulatorConfig


def _state() -> dict[str, Any]:
    return {
        "module": hasattr(torch, "hpu"),
        "habana": sorted(name for name in sys.modules if name.startswith("habana")),
        "path": list(sys.path),
        "env": os.environ.get("PT_HPU_LAZY_MODE"),
        "load": torch.load,
        "seed": torch.manual_seed,
        "overwrite": torch.__future__.get_overwrite_module_params_on_conversion(),
        "is_hpu": hasattr(torch.Tensor, "is_hpu"),
        "switch": sys.getswitchinterval(),
        "spec": importlib.util.find_spec("habana_frameworks"),
        "threads": {thread.name for thread in threading.enumerate()},
        "pinned": torch.ones(1).is_pinned(),
    }


@pytest.mark.parametrize("lazy", [True, False])
def test_uninstall_puts_everything_back(lazy: bool) -> None:
    before = _state()
    for _ in range(3):
        emulator.install(EmulatorConfig(lazy=lazy))
        assert emulator.is_installed()
        assert os.environ.get("PT_HPU_LAZY_MODE") == (None if lazy else "0")
        x = torch.ones(2).to("hpu") + 1
        assert x.tolist() == [2.0, 2.0]
        emulator.uninstall()
        assert not emulator.is_installed()
        assert _state() == before
        with pytest.raises(RuntimeError, match="not installed"):
            x + 1
        with pytest.raises((RuntimeError, ModuleNotFoundError)):
            torch.ones(2).to("hpu")
    emulator.uninstall()


@pytest.mark.parametrize(
    ("value", "lazy", "inside"),
    [
        ("0", None, "0"),
        ("1", None, "1"),
        ("banana", None, "banana"),  # all but 0 is lazy to the bridge's Python
        ("0", True, "1"),
        ("1", False, "0"),
        ("0", False, "0"),
        ("banana", True, "banana"),
    ],
)
def test_the_mode_is_the_environments_unless_it_is_given(
    monkeypatch: pytest.MonkeyPatch, value: str, lazy: bool | None, inside: str
) -> None:
    monkeypatch.setenv("PT_HPU_LAZY_MODE", value)
    emulator.install(None if lazy is None else EmulatorConfig(lazy=lazy))
    try:
        from habana_frameworks.torch.utils.internal import is_lazy

        assert is_lazy() == (value != "0" if lazy is None else lazy)
        assert hasattr(torch.get_device_module("hpu"), "HPUGraph") == is_lazy()
        assert os.environ["PT_HPU_LAZY_MODE"] == inside
        if lazy is None:
            emulator.install()
    finally:
        emulator.uninstall()
    assert os.environ["PT_HPU_LAZY_MODE"] == value


def test_installing_twice() -> None:
    emulator.install(EmulatorConfig(compile_ms=1))
    try:
        emulator.install(EmulatorConfig(compile_ms=1))
        with pytest.raises(RuntimeError, match=r"already installed with .*call emulator\.uninstall"):
            emulator.install(EmulatorConfig(compile_ms=2))
    finally:
        emulator.uninstall()


def test_a_real_package_is_not_shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "habana_frameworks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="a real habana_frameworks is installed"):
        emulator.install()
    assert not emulator.is_installed()


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_hpu_infer.emulator import registration

    before = _state()
    monkeypatch.setattr(registration, "_guards", {})
    monkeypatch.delattr(torch._C, "_acc")
    with pytest.raises(RuntimeError, match=r"install torch>=2\.10"):
        emulator.install()
    assert _state() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("compile_ms", -1),
        ("program_ms", float("nan")),
        ("launch_us", "3"),
        ("h2d_gbps", True),
        ("num_devices", 0),
        ("lazy", 1),
        ("cpu_fallback_ops", "aten::cumsum"),
        ("cpu_fallback_ops", {"cumsum"}),
    ],
)
def test_wrong_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        EmulatorConfig(**{field: value})


def test_importing_has_no_side_effects() -> None:
    code = (
        "import sys, threading, torch\n"
        "load, switch = torch.load, sys.getswitchinterval()\n"
        "import lightning_hpu_infer.emulator\n"
        "assert torch.load is load and sys.getswitchinterval() == switch\n"
        "assert threading.active_count() == 1 and not hasattr(torch, 'hpu')\n"
        "assert not any(name.startswith('habana') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_process_ends_with_work_in_flight() -> None:
    code = (
        "from lightning_hpu_infer import emulator\n"
        "import torch\n"
        "emulator.install(emulator.EmulatorConfig(program_ms=50))\n"
        "import habana_frameworks.torch.core as htcore\n"
        "x = torch.ones(10, device='hpu') + 1\n"
        "htcore.mark_step()\n"
        "y = x + 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert done.stderr == b""


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_forking_is_fine_and_device_calls_in_the_child_are_not(emulated: None) -> None:
    x = torch.ones(2).to("hpu")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - runs in the child
        try:
            torch.ones(2).add(1)
            x + 1
            os.write(write, b"no error")
        except RuntimeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"spawn" in os.read(read, 1000)
    os.close(read)
    os.close(write)
    assert (x + 1).tolist() == [2.0, 2.0]


def test_paused_names_its_engines(emulated: None) -> None:
    with pytest.raises(ValueError, match="engine must be one of"), emulator.paused("gpu"):  # type: ignore[arg-type]
        pass


@pytest.mark.full
def test_a_spawned_process_may_install_though_it_inherits_the_path(emulated: None) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from lightning_hpu_infer import emulator\n"
        "emulator.install(); print(emulator.is_installed())"
    )
    bridge = next(folder for folder in sys.path if folder.endswith("bridge"))
    run = subprocess.run([sys.executable, "-c", code, bridge], capture_output=True, text=True, timeout=100)
    assert run.stdout.strip() == "True", run.stderr


def test_a_module_that_a_program_has_kept_has_no_device_after_uninstall() -> None:
    """lightning-habana 1.6.0 keeps it, and every later Trainer asks it."""
    emulator.install()
    kept = torch.get_device_module("hpu")
    assert kept.is_available()
    emulator.uninstall()
    assert (kept.is_available(), kept.device_count()) == (False, 0)
