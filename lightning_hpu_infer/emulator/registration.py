"""Making PyTorch know the device "hpu", reversibly and without a compiler."""

from __future__ import annotations

import ctypes
import importlib
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_hpu_infer.emulator import autocast, compiled, hpu_ops, naming, pinned, runtime
from lightning_hpu_infer.emulator import copies as copies  # registers its ops
from lightning_hpu_infer.emulator import substitutes as substitutes  # likewise
from lightning_hpu_infer.emulator.patches import (
    fork_rng_on_hpu,
    load_to_hpu,
    record_on_hpu,
    seed_both,
    seed_both_randomly,
)
from lightning_hpu_infer.emulator.storage import Spec
from lightning_hpu_infer.emulator.tensor import HpuTensor, allocate, dispatch, run

aten = torch.ops.aten
# Factories whose generic kernels resize an output, which a wrapper tensor cannot do.
_COMPUTED_FACTORIES = (
    *("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "logspace", "randperm"),
    *("range", "range.step", "tril_indices", "triu_indices"),
)
_SDPA: Any = aten.scaled_dot_product_attention.default
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

        guard_type = type(
            "Guard", (accelerators.DeviceGuard,), {"type_": lambda self: torch._C._autograd.DeviceType.HPU}
        )
        slots = _registry()
        private = _slot("PrivateUse1")
        before = slots[private]
        _guards["guard"] = guard_type()
        accelerators.register_python_privateuseone_device_guard(_guards["guard"])
        _guards["address"] = slots[private]
        # The guard is ours, not PrivateUse1's: torch.accelerator would take the process for one with such a device.
        slots[private] = before
    return int(_guards["address"])


def _slot(device_type: str) -> int:
    return int(getattr(torch._C._autograd.DeviceType, device_type))


def _registry() -> Any:
    """Return c10's table of device guards, one pointer per device type.

    ``.to("hpu")`` without an index asks the entry of HPU for the current device, and there is no API to fill it.
    """
    library = ctypes.CDLL(str(next(pathlib.Path(torch.__file__).parent.glob("lib/libc10.*"))))
    table = ctypes.c_void_p.in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    length = _slot("PrivateUse1") + 1
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
        """Restore torch."""
        while self._undo:
            self._undo.pop()()

    def _register(self, module: types.ModuleType) -> None:
        guard = _device_guard()
        slots, hpu = _registry(), _slot("HPU")
        slots[hpu] = guard
        self._undo.append(lambda: slots.__setitem__(hpu, None))
        self._register_module(module)
        self._register_kernels()
        # module.to("hpu") can only replace parameters, not swap the data of a CPU tensor for a wrapper's.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._undo.append(lambda: torch.__future__.set_overwrite_module_params_on_conversion(before))
        self._make_traceable()
        if runtime.current().config.lazy:
            self._name_modules()
        self._patch(torch.Tensor, "is_hpu", property(lambda tensor: tensor.device.type == "hpu"))
        self._patch(torch, "load", load_to_hpu(torch.load))
        seed = seed_both(torch.manual_seed)
        self._patch(torch, "manual_seed", seed)
        self._patch(torch.random, "manual_seed", seed)
        self._patch(torch, "seed", seed_both_randomly(torch.seed))
        self._patch(torch.random, "seed", torch.seed)
        self._patch(torch.random, "fork_rng", fork_rng_on_hpu(torch.random.fork_rng))
        self._patch(torch.Tensor, "record_stream", record_on_hpu(torch.Tensor.record_stream))

    def _register_module(self, module: types.ModuleType) -> None:
        register: Any = torch._register_device_module
        register("hpu", module)

        def remove() -> None:
            delattr(torch, "hpu")
            sys.modules.pop("torch.hpu", None)
            torch.get_device_module.cache_clear()

        self._undo.append(remove)
        torch.get_device_module.cache_clear()

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
        self._library("_", "AutocastHPU").fallback(torch.library.fallthrough_kernel)
        casting = self._library("aten", "AutocastHPU")
        for name, kernel in autocast.kernels():
            casting.impl(name, kernel)
        self._library("aten", "AutogradHPU").impl(_SDPA.name(), _attention)
        hpu_ops.define(self._library("hpu"))
        cpu = self._library("aten", "CPU")
        cpu.impl("is_pinned", _is_pinned)
        cpu.impl("_pin_memory", _pin_memory)
        # The generic kernel warns that a device argument is deprecated; on this device it is mandatory.
        cpu.impl(
            "pin_memory",
            lambda tensor, device=None: tensor if _is_pinned(tensor, device) else _pin_memory(tensor, device),
        )

    def _make_traceable(self) -> None:
        """Let dynamo trace through tensors of the device, and not into the emulator."""
        from torch._dynamo import trace_rules

        self._patch(HpuTensor, "__tensor_flatten__", compiled.tensor_flatten)
        self._patch(HpuTensor, "__tensor_unflatten__", staticmethod(compiled.tensor_unflatten))
        self._patch(HpuTensor, "_is_view", compiled.is_view)
        # A module would swap its parameters' contents with such tensors, which PyTorch refuses where dynamo has guards.
        # A parametrization would do the same.
        for modules in (torch.nn.modules.module, torch.nn.utils.parametrize):
            self._patch(modules, is_traceable_wrapper_subclass.__name__, _is_traceable)
        before = list(trace_rules.SKIP_DIRS)

        def trace_again() -> None:
            trace_rules.SKIP_DIRS[:] = before
            trace_rules._recompile_re()

        trace_rules.add("lightning_hpu_infer.emulator")
        self._undo.append(trace_again)
        # Without it torch.tensor(..., device="hpu") makes a real tensor while a fake one is asked for.
        self._patch(FakeTensorMode, "avoid_device_init", property(lambda mode: True))

    def _name_modules(self) -> None:
        """Register the bridge's hooks on every module that becomes a child of another one."""
        from torch._dynamo import trace_rules

        hooks = importlib.import_module("habana_frameworks.torch.core.torch_overwrites")
        naming.start(hooks._pre_fwd_hook, hooks._post_fwd_hook)
        self._undo.append(naming.stop)
        module: Any = torch.nn.Module
        self._patch(module, "__setattr__", naming.name_on_setattr(module.__setattr__))
        self._patch(module, "add_module", naming.name_on_add_module(module.add_module))
        # To dynamo these are functions like any other, as the bridge's are: assignments in a forward are traced through
        # the wrapper, and a hook breaks the graph at its lock.
        traced = {str(part.__file__) for part in (naming, hooks)}
        inlined = trace_rules.get_legacy_mod_inlinelist()
        inlined.update(traced)
        self._undo.append(lambda: inlined.difference_update(traced))

    def _library(self, namespace: str, key: str = "") -> Any:
        make: Any = torch.library.Library
        library = make(namespace, "IMPL", key) if key else make(namespace, "FRAGMENT")
        self._undo.append(library._destroy)
        return library

    def _patch(self, owner: Any, name: str, value: object) -> None:
        missing = object()
        before = owner.__dict__.get(name, missing)
        setattr(owner, name, value)
        self._undo.append(lambda: delattr(owner, name) if before is missing else setattr(owner, name, before))


def _is_traceable(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, HpuTensor) and is_traceable_wrapper_subclass(tensor)


def _empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
           memory_format: Any = None) -> HpuTensor:  # fmt: skip
    twin = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format or torch.contiguous_format)
    return allocate(Spec.of(twin))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None,
                   pin_memory: Any = None) -> HpuTensor:  # fmt: skip
    return allocate(Spec.get(dtype or torch.get_default_dtype(), tuple(size), tuple(stride)))


def _overload(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(aten, base), overload or "default")


def _attention(*args: Any, **kwargs: Any) -> Any:
    # Whole where no gradient is wanted (the device has a fused kernel for it), in parts where one is.
    if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
        return aten._scaled_dot_product_attention_math.default(*args, **kwargs)[0]
    with torch._C._AutoDispatchBelowAutograd():
        return _SDPA(*args, **kwargs)


def _copy_from(src: torch.Tensor, dst: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return dispatch(aten.copy_.default, (dst, src, non_blocking), {})  # type: ignore[no-any-return]


def _computed(name: str) -> Callable[..., Any]:
    func = _overload(name)

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
