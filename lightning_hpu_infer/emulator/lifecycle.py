"""Installing and removing the emulator."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lightning_hpu_infer.emulator import c_api, c_core, events, runtime
from lightning_hpu_infer.emulator.config import Counters, EmulatorConfig, EmulatorStats
from lightning_hpu_infer.emulator.registration import Registration
from lightning_hpu_infer.emulator.timeline import DeviceSpan

_BRIDGE = str(Path(__file__).parent / "bridge")
_PACKAGE = "habana_frameworks"
_C_MODULES = {"_hpu_C": c_api, "_core_C": c_core, "utils._event_dispatcher_C": events}
_LAZY_ENV = "PT_HPU_LAZY_MODE"
_SWITCH_INTERVAL_S = 2e-4
"""How long one Python thread may keep another waiting. With CPython's 5 ms a device thread that comes back from a
kernel of 50 us would wait a hundred times as long for the GIL as the kernel took."""


class _Installation:
    def __init__(self, config: EmulatorConfig) -> None:
        self.config = config
        self._undo = contextlib.ExitStack()
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(min(interval, _SWITCH_INTERVAL_S))
        self._undo.callback(sys.setswitchinterval, interval)
        if _environment_is_lazy() != self.config.lazy:
            _set_env(self._undo, _LAZY_ENV, str(int(self.config.lazy)))
        sys.path.insert(0, _BRIDGE)
        self._undo.callback(lambda: sys.path.remove(_BRIDGE) if _BRIDGE in sys.path else None)
        importlib.invalidate_caches()
        rt = runtime.Runtime(self.config)
        runtime.set_current(rt)
        self._undo.callback(runtime.set_current, None)
        self._undo.callback(rt.stop)
        self._undo.callback(_forget_modules)
        self._undo.callback(events.EventDispatcher.instance().unsubscribe_all)
        sys.modules.update({f"{_PACKAGE}.torch.{name}": module for name, module in _C_MODULES.items()})
        device = importlib.import_module(f"{_PACKAGE}.torch.hpu")
        self._undo.callback(Registration(device).undo)
        importlib.import_module(f"{_PACKAGE}.torch.core")
        if not self.config.lazy:
            backends = importlib.import_module(f"{_PACKAGE}.torch.dynamo.compile_backend.backends")
            self._undo.callback(backends._unregister)
        distributed = importlib.import_module(f"{_PACKAGE}.torch.distributed.hccl")
        self._undo.callback(distributed._unregister)

    def remove(self) -> None:
        self._undo.close()


_installation: _Installation | None = None


def _environment_is_lazy() -> bool:
    return os.environ.get(_LAZY_ENV, "1") != "0"  # as the bridge's Python reads it (utils/internal.py:25-31)


def _set_env(undo: contextlib.ExitStack, name: str, value: str) -> None:
    before = os.environ.get(name)
    os.environ[name] = value
    undo.callback(lambda: os.environ.pop(name, None) if before is None else os.environ.update({name: before}))


def _forget_modules() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in (_PACKAGE, "habana_dataloader")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def install(config: EmulatorConfig | None = None) -> None:
    """Make this process one with an emulated HPU: ``habana_frameworks``, ``torch.hpu`` and the device "hpu".

    Installing again with an equal configuration does nothing.

    Args:
        config: By default one with all defaults, in the mode that ``PT_HPU_LAZY_MODE`` chooses as on a real bridge.
            A configuration that is given beats the variable, and changes it until `uninstall` where they disagree.

    Raises:
        RuntimeError: A real ``habana_frameworks`` is installed, the emulator runs with another configuration, or
            PyTorch is too old.
    """
    global _installation
    config = config or EmulatorConfig(lazy=_environment_is_lazy())
    if _installation is not None:
        if _installation.config == config:
            return
        raise RuntimeError(
            f"the HPU emulator is already installed with {_installation.config}, not {config};"
            " call emulator.uninstall() first"
        )
    # A spawned process inherits its parent's sys.path, but not the emulator.
    sys.path[:] = [folder for folder in sys.path if folder != _BRIDGE]
    found = importlib.util.find_spec(_PACKAGE)
    if found is not None:
        where = found.origin or next(iter(found.submodule_search_locations or ["an unknown location"]))
        raise RuntimeError(
            f"a real {_PACKAGE} is installed ({where}) and the emulator will not shadow it; use the device,"
            " or install the emulator in an environment without the Gaudi software"
        )
    _installation = _Installation(config)
    atexit.register(uninstall)


def uninstall() -> None:
    """Run what was launched, end the device threads and restore torch; does nothing if not installed."""
    global _installation
    if _installation is None:
        return
    installation, _installation = _installation, None
    atexit.unregister(uninstall)
    if runtime.is_forked():
        return
    installation.remove()


def is_installed() -> bool:
    """Tell whether this process has the emulated HPU."""
    return _installation is not None


def stats() -> EmulatorStats:
    """Return the counters since `install` or `reset_stats`."""
    rt = runtime.current()
    values = rt.counters.values
    values["bytes_in_use"], values["peak_bytes"] = rt.memory.in_use, rt.memory.peak
    compute = [rt.compute, *rt.engines.values()]
    values["busy_s"] = sum(engine.busy_s for engine in compute)
    values["idle_s"] = rt.compute.idle_s
    return rt.counters.snapshot()


def reset_stats() -> None:
    """Set all counters to zero, and the peak of memory to what is in use."""
    rt = runtime.current()
    rt.counters = Counters()
    rt.memory.peak = rt.memory.in_use
    for engine in rt.all_engines():
        engine.reset_times()


def start_timeline() -> None:
    """Record from now on when the device works; what was recorded before is dropped."""
    runtime.current().timeline.start()


def stop_timeline() -> list[DeviceSpan]:
    """Record no more and return the work done since `start_timeline`, in the order in which it began.

    It contains all work that the caller has waited for. It lacks work that has not ended, and ops that run on values
    (CPU fallbacks, shapes that depend on data). Empty if nothing was started.
    """
    return runtime.current().timeline.stop()


@contextlib.contextmanager
def paused(engine: Literal["compute", "h2d", "d2h", "d2h_host"]) -> Iterator[None]:
    """Start no task of that queue of stream 0 while inside; a wait for one of its tasks would never end.

    ``"d2h_host"`` is the host thread that fills pageable destinations of asynchronous device-to-host copies.
    """
    names = ("compute", "h2d", "d2h", "d2h_host")
    if engine not in names:
        raise ValueError(f"engine must be one of {names}, got {engine!r}")
    queue = getattr(runtime.current(), engine)
    queue.pause()
    try:
        yield
    finally:
        queue.resume()
