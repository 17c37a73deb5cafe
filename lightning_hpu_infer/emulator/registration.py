"""Making PyTorch know the device "hpu", reversibly and without a compiler."""

from __future__ import annotations

import ctypes
import pathlib
import types
from collections.abc import Callable
from typing import Any

import torch

from lightning_hpu_infer.emulator import copies, pinned, runtime
from lightning_hpu_infer.emulator.storage import Spec
from lightning_hpu_infer.emulator.tensor import HpuTensor, allocate, dispatch, run

aten = torch.ops.aten
# Factories whose generic kernels resize an output, which a wrapper tensor cannot do.
_COMPUTED_FACTORIES = (
    "arange arange.start arange.start_step eye eye.m linspace logspace randperm range range.step tril_indices triu_indices"
).split()
_guards: dict[str, Any] = {}


def _device_guard() -> int:
    """Return the address of a device guard that is written in Python, made once per process."""
    if not _guards:
        accelerators = getattr(torch._C, "_acc", None)
        if accelerators is None or not hasattr(accelerators, "register_python_privateuseone_device_guard"):
            raise RuntimeError(
                f"the HPU emulator needs device guards written in Python, which PyTorch {torch.__version__} has not;"
                " install torch>=2.10 (tested with 2.13)"
            )

        class Guard(accelerators.DeviceGuard):  # type: ignore[misc]
            def type_(self) -> Any:
                return torch._C._autograd.DeviceType.HPU

        slots = _registry()
        private = int(torch._C._autograd.DeviceType.PrivateUse1)
        before = slots[private]
        _guards["guard"] = Guard()
        accelerators.register_python_privateuseone_device_guard(_guards["guard"])
        _guards["address"] = slots[private]
        # The guard is ours, not PrivateUse1's: torch.accelerator would take the process for one with such a device.
        slots[private] = before
    return int(_guards["address"])


def _registry() -> Any:
    """Return c10's table of device guards, one pointer per device type.

    ``.to("hpu")`` without an index asks the entry of HPU for the current device, and there is no API to fill it.
    """
    library = ctypes.CDLL(str(next(pathlib.Path(torch.__file__).parent.glob("lib/libc10.*"))))
    table = ctypes.c_void_p.in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    length = int(torch._C._autograd.DeviceType.PrivateUse1) + 1
    return (ctypes.c_void_p * length).from_address(ctypes.addressof(table))


class Registration:
    """Everything that was changed in torch, and `undo`."""

    def __init__(self, device_module: types.ModuleType) -> None:
        self._undo: list[Callable[[], object]] = []
        try:
            self._register(device_module)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put torch back as it was."""
        while self._undo:
            self._undo.pop()()

    def _register(self, module: types.ModuleType) -> None:
        guard = _device_guard()
        slots, hpu = _registry(), int(torch._C._autograd.DeviceType.HPU)
        slots[hpu] = guard
        self._undo.append(lambda: slots.__setitem__(hpu, None))
        self._register_module(module)
        self._register_kernels()
        # module.to("hpu") can only replace parameters, not swap the data of a CPU tensor for a wrapper's.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._undo.append(lambda: torch.__future__.set_overwrite_module_params_on_conversion(before))
        self._patch(torch.Tensor, "is_hpu", property(lambda tensor: tensor.device.type == "hpu"))
        self._patch(torch, "load", _load_to_hpu(torch.load))
        seed = _seed_both(torch.manual_seed)
        self._patch(torch, "manual_seed", seed)
        self._patch(torch.random, "manual_seed", seed)

    def _register_module(self, module: types.ModuleType) -> None:
        import sys

        torch._register_device_module("hpu", module)

        def remove() -> None:
            delattr(torch, "hpu")
            sys.modules.pop("torch.hpu", None)
            torch.get_device_module.cache_clear()  # type: ignore[attr-defined]

        self._undo.append(remove)
        torch.get_device_module.cache_clear()  # type: ignore[attr-defined]

    def _register_kernels(self) -> None:
        hpu = self._library("aten", "HPU")
        hpu.impl("empty.memory_format", _empty)
        hpu.impl("empty_strided", _empty_strided)
        # 0 is the math implementation: every other one is a kernel of some real device.
        hpu.impl("_fused_sdp_choice", lambda *args, **kwargs: 0)
        # torch.tensor() hides the Python key, so its copy arrives here and not at the tensor.
        hpu.impl("_copy_from", _copy_from)
        for name in _COMPUTED_FACTORIES:
            hpu.impl(name, _computed(name))
        # Casting is done when the op arrives at the tensor; see `tensor._autocast`.
        self._library("_", "AutocastHPU").fallback(torch.library.fallthrough_kernel)
        cpu = self._library("aten", "CPU")
        cpu.impl("is_pinned", _is_pinned)
        cpu.impl("_pin_memory", _pin_memory)
        # The generic kernel warns that a device argument is deprecated; on this device it is mandatory.
        cpu.impl("pin_memory", lambda tensor, device=None: tensor if _is_pinned(tensor, device) else _pin_memory(tensor, device))

    def _library(self, namespace: str, key: str) -> torch.library.Library:
        library = torch.library.Library(namespace, "IMPL", key)  # noqa: TOR901 - undone by _destroy
        self._undo.append(library._destroy)
        return library

    def _patch(self, owner: Any, name: str, value: object) -> None:
        missing = object()
        before = owner.__dict__.get(name, missing)
        setattr(owner, name, value)
        self._undo.append(lambda: delattr(owner, name) if before is missing else setattr(owner, name, before))


def _empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
           memory_format: Any = None) -> HpuTensor:  # fmt: skip
    twin = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format or torch.contiguous_format)
    return allocate(Spec.of(twin))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None,
                   pin_memory: Any = None) -> HpuTensor:  # fmt: skip
    return allocate(Spec.get(dtype or torch.get_default_dtype(), tuple(size), tuple(stride)))


def _copy_from(src: torch.Tensor, dst: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return dispatch(aten.copy_.default, (dst, src, non_blocking), {})  # type: ignore[no-any-return]


def _computed(name: str) -> Callable[..., Any]:
    base, _, overload = name.partition(".")
    func = getattr(getattr(aten, base), overload or "default")

    def factory(*args: Any, **kwargs: Any) -> Any:
        rt = runtime.current()
        rt.touch()
        return run(rt, func, args, {**kwargs, "device": torch.device("cpu"), "pin_memory": False})

    return factory


def _is_pinned(tensor: torch.Tensor, device: torch.device | None = None) -> bool:
    # Without a device the answer of the bridge is no (bridge: kernels_register.cpp:69-100).
    return device is not None and torch.device(device).type == "hpu" and pinned.is_pinned(tensor)


def _pin_memory(tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    if device is None:
        raise RuntimeError("Unable to pin memory to an null device; write tensor.pin_memory('hpu')")
    if torch.device(device).type != "hpu":
        raise RuntimeError(f"while the HPU emulator is installed memory can be pinned for 'hpu' only, not for {device}")
    runtime.current()
    return pinned.pin(tensor)


def _load_to_hpu(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch.load: a storage cannot be on the emulated device, so load to the host and move the tensors."""
    from functools import wraps

    @wraps(load)
    def load_to_hpu(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(map_location, (str, torch.device)) and torch.device(map_location).type == "hpu":
            return _to_hpu(load(f, "cpu", *args, **kwargs))
        return load(f, map_location, *args, **kwargs)

    return load_to_hpu


def _to_hpu(value: Any) -> Any:
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(value.detach().to("hpu"), requires_grad=value.requires_grad)
    if isinstance(value, torch.Tensor):
        return value.detach().to("hpu").requires_grad_(value.requires_grad)
    if isinstance(value, torch.nn.Module):
        return value.to("hpu")
    if isinstance(value, dict):
        for key in value:
            value[key] = _to_hpu(value[key])
        return value
    if isinstance(value, list):
        return [_to_hpu(item) for item in value]
    if type(value) is tuple:
        return tuple(_to_hpu(item) for item in value)
    return value


def _seed_both(manual_seed: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch.manual_seed: the bridge seeds its device too (bridge: torch_overwrites.py:131-257)."""
    from functools import wraps

    @wraps(manual_seed)
    def seed_both(seed: Any) -> Any:
        if (rt := runtime.installed()) is not None:
            rt.seed(int(seed))
        return manual_seed(seed)

    return seed_both


__all__ = ["Registration", "copies"]
