"""The emulator's settings and its counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, kw_only=True)
class EmulatorConfig:
    """What the emulated device is like; a latency or bandwidth of 0 means "as fast as the CPU does it"."""

    lazy: bool = True
    """Accumulate ops until something flushes them (``PT_HPU_LAZY_MODE=1``), or launch each at once."""
    compile_ms: float = 0.0
    """Time that the first run of a new program (ops, shapes, dtypes) keeps the compute queue busy."""
    launch_us: float = 0.0
    """Time that each launched program costs the calling thread."""
    program_ms: float = 0.0
    """Least duration of a launched program (a replay or a flushed lazy graph) on the compute queue.

    It stands for the time of a network. Programs that only move or cast device memory, such as clones of a graph's
    outputs, take as long as on the CPU."""
    h2d_gbps: float = 0.0
    """Host-to-device bandwidth in 10^9 bytes per second."""
    d2h_gbps: float = 0.0
    """Device-to-host bandwidth in 10^9 bytes per second."""
    num_devices: int = 1
    """What ``torch.hpu.device_count()`` reports; a process still uses one device, as on the real bridge."""
    cpu_fallback_ops: frozenset[str] = frozenset()
    """Names such as ``"aten::cumsum"`` that have no device kernel: they run on the host, and not in a capture."""

    def __post_init__(self) -> None:
        for name in ("compile_ms", "launch_us", "program_ms", "h2d_gbps", "d2h_gbps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"EmulatorConfig.{name} must be a finite number >= 0, got {value!r}")
        if not isinstance(self.lazy, bool):
            raise ValueError(f"EmulatorConfig.lazy must be True or False, got {self.lazy!r}")
        if isinstance(self.num_devices, bool) or not isinstance(self.num_devices, int) or self.num_devices < 1:
            raise ValueError(f"EmulatorConfig.num_devices must be an integer >= 1, got {self.num_devices!r}")
        if isinstance(self.cpu_fallback_ops, str):
            raise ValueError(
                f"EmulatorConfig.cpu_fallback_ops must be a set of op names, got the string {self.cpu_fallback_ops!r};"
                " write {'aten::name'}"
            )
        ops = frozenset(self.cpu_fallback_ops)
        if bad := sorted(op for op in ops if "::" not in op):
            raise ValueError(f"EmulatorConfig.cpu_fallback_ops needs names such as 'aten::cumsum', got {bad}")
        object.__setattr__(self, "cpu_fallback_ops", ops)


@dataclass(frozen=True, kw_only=True)
class EmulatorStats:
    """Counters since installation or the last ``reset_stats()``; ``bytes_in_use`` is the state now."""

    captures: int = 0
    replays: int = 0
    captures_failed: int = 0
    """Captures that ended without ``capture_end``."""
    compiles: int = 0
    programs: int = 0
    """Programs launched on the device, replays included."""
    compiled_calls: int = 0
    """Calls of graphs that ``torch.compile`` made for ``hpu_backend``; each is one program unless it needs the host."""
    device_ops: int = 0
    """Ops executed by the compute queue."""
    mark_steps: int = 0
    flushes: Mapping[str, int] = field(default_factory=dict)
    """Cause -> how often it launched pending ops."""
    cpu_fallbacks: int = 0
    h2d_copies: int = 0
    h2d_bytes: int = 0
    h2d_pinned: int = 0
    h2d_non_blocking: int = 0
    d2h_copies: int = 0
    d2h_bytes: int = 0
    d2h_non_blocking: int = 0
    blocking_waits: int = 0
    """Blocking copies and synchronizations, whether or not the device was done already."""
    blocked_s: float = 0.0
    """Time that host threads waited for the device."""
    busy_s: float = 0.0
    """Time that compute queues ran programs (compilation and emulated latency included)."""
    idle_s: float = 0.0
    """Gaps between consecutive programs of the compute queue."""
    off_thread_calls: int = 0
    """Device calls from another thread than the one that first used the device."""
    bytes_in_use: int = 0
    peak_bytes: int = 0


class Counters:
    """The mutable twin of `EmulatorStats`."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {f.name: 0 for f in fields(EmulatorStats) if f.name != "flushes"}
        self.flushes: dict[str, int] = {}

    def add(self, name: str, amount: float = 1) -> None:
        """Add to the counter `name`."""
        self.values[name] += amount

    def flush(self, cause: str) -> None:
        """Count one flush with its cause."""
        self.flushes[cause] = self.flushes.get(cause, 0) + 1

    def snapshot(self) -> EmulatorStats:
        """Return the frozen copy."""
        return EmulatorStats(flushes=dict(self.flushes), **self.values)  # type: ignore[arg-type]
