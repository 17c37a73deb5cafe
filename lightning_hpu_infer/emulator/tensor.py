"""The tensor that says it lives on an HPU, and what happens when an op is called on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch.utils._mode_utils import no_dispatch

from lightning_hpu_infer.emulator import autocast, runtime
from lightning_hpu_infer.emulator.plan import NeedsValues, Plan, Resized, Slot, make_plan
from lightning_hpu_infer.emulator.resizing import resize
from lightning_hpu_infer.emulator.runtime import Runtime
from lightning_hpu_infer.emulator.storage import Cell, Spec, Storage
from lightning_hpu_infer.emulator.task import Task

aten = torch.ops.aten
Handler = Callable[[Runtime, OpOverload, tuple[Any, ...], dict[str, Any]], Any]

HANDLERS: dict[OpOverload, Handler] = {}
"""Ops that are not simply queued; `copies` and `substitutes` add others."""

# Composite ops that the device runs whole; all others are taken apart when they arrive so (under inference mode).
_WHOLE = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.layer_norm.default,
        aten.scaled_dot_product_attention.default,
    }
)
_INDEXING = frozenset(
    {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
)


class HpuTensor(torch.Tensor):
    """A tensor of the emulated device: a cell and a layout in it. It has no storage of PyTorch's."""

    _cell: Cell
    _spec: Spec

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one op."""
        return dispatch(func, args, kwargs or {})

    @property
    def is_hpu(self) -> bool:
        """True, as on the real device."""
        return True

    @property
    def data(self) -> torch.Tensor:
        """The same memory without autograd; assigning points this tensor to the memory of another one."""
        # Looked up in each access: a program may replace torch's descriptor to watch assignments.
        data: Any = torch.Tensor.data
        return data.__get__(self)  # type: ignore[no-any-return]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if isinstance(value, torch.Tensor) and not isinstance(value, HpuTensor):
            # PyTorch compares the kinds of memory, and a wrapper has none.
            raise RuntimeError(
                "Attempted to call `variable.set_data(tensor)`, but `variable` and `tensor` have incompatible tensor"
                f" type: a tensor on {self.device} cannot take over memory on {value.device}"
            )
        data: Any = torch.Tensor.data
        data.__set__(self, value)  # refuses what is no tensor
        self._cell, self._spec = value._cell, value._spec

    def _set_layout(self, spec: Spec) -> None:
        """Show the same memory in another layout of the same dtype."""
        with torch.inference_mode(self.is_inference()):
            wrapper = wrap(self._cell, spec)
        data: Any = torch._C.TensorBase.data  # not torch.Tensor's, which may be watched
        data.__set__(self, wrapper)
        self._spec = spec

    def data_ptr(self) -> int:
        """Return the emulated device address; a replay changes it."""
        return self._cell.storage.data_ptr() + self._spec.offset * self._spec.dtype.itemsize

    def numpy(self, *, force: bool = False) -> Any:
        """Raise, as for any device tensor, unless `force`."""
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host"
            " memory first."
        )

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        """Copy to the host and convert."""
        return self.detach().cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        text = repr(self.detach().cpu())
        grad = ", requires_grad=True" if self.requires_grad else ""
        kind = "Parameter containing:\n" if isinstance(self, torch.nn.Parameter) else ""
        return f"{kind}{text[:-1]}, device='{self.device}'{grad})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) in memo:
            return cast(torch.Tensor, memo[id(self)])
        with torch.no_grad():
            copy: torch.Tensor = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, requires_grad=self.requires_grad)
        else:
            copy.requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The one rebuild function for foreign devices that torch.load(weights_only=True) allows.
        rebuild = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return rebuild, (self.detach().cpu(), self.dtype, str(self.device), self.requires_grad)


def wrap(cell: Cell, spec: Spec) -> HpuTensor:
    """Make a tensor that shows `cell` through `spec`."""
    tensor: HpuTensor = torch.Tensor._make_wrapper_subclass(
        HpuTensor, spec.size, strides=spec.stride, storage_offset=spec.offset, dtype=spec.dtype, device=_device()
    )
    tensor._cell, tensor._spec = cell, spec
    return tensor


def wrap_view(base: HpuTensor, spec: Spec) -> HpuTensor:
    """Make a view of `base`; as in PyTorch it is an inference tensor only if `base` is one."""
    if torch.is_inference_mode_enabled() and not base.is_inference():
        with torch.inference_mode(False):
            return wrap(base._cell, spec)
    return wrap(base._cell, spec)


@cache
def _device() -> torch.device:
    return torch.device("hpu", 0)


def allocate(spec: Spec) -> HpuTensor:
    """Make a tensor with new memory whose contents are not defined."""
    return wrap(Cell(Storage(runtime.current().memory, spec, virgin=True)), spec)


def constant(value: torch.Tensor) -> HpuTensor:
    """Make a tensor whose contents are `value`, which the caller must not change afterwards."""
    storage = Storage(runtime.current().memory, Spec.fresh(value))
    storage.value = value
    return wrap(Cell(storage), storage.spec)


class _Operands(list[HpuTensor]):
    """The tensors of a call, and whether some of them were copied from the host."""

    lifted = False


@cache
def _is_composite(func: OpOverload) -> bool:
    name: str = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
    return func not in _WHOLE and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


@cache
def _reads_values(func: OpOverload) -> bool:
    tags = func.tags
    return torch.Tag.data_dependent_output in tags or (torch.Tag.dynamic_output_shape in tags and func not in _INDEXING)


def dispatch(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Queue one op and return its outputs, without waiting for it where the layout alone is enough."""
    rt = runtime.current()
    rt.touch()
    if (handler := HANDLERS.get(func)) is not None:
        return handler(rt, func, args, kwargs)
    if _is_composite(func):
        with autocast.of_parts():
            return func.decompose(*args, **kwargs)
    return run(rt, func, args, kwargs)


def run(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Queue an op, or run it on the values if its output shapes depend on them."""
    tensors = _Operands()
    key: list[Any] = [func]
    template = tuple([_scan(arg, tensors, key, func) for arg in args])
    template_kwargs: dict[str, Any] = {}
    for name, value in kwargs.items():
        key.append(name)
        template_kwargs[name] = _scan(value, tensors, key, func)
    if tensors.lifted and func._schema.is_mutable:
        _refuse_to_write_to_the_host(func, args, kwargs)
    if func._schema.name in rt.config.cpu_fallback_ops:
        return _fall_back(rt, func, template, template_kwargs, tensors)
    if _reads_values(func):
        return _on_values(rt, func, template, template_kwargs, tensors)
    try:
        plan = rt.plans.get(tuple(key))
    except TypeError:  # an argument that has no hash: plan each call
        key, plan = [], None
    if plan is None:
        specs = [(tensor._cell.spec, tensor._spec) for tensor in tensors]
        try:
            plan = make_plan(func, template, template_kwargs, specs, rt.generator)
        except NeedsValues:
            return _on_values(rt, func, template, template_kwargs, tensors)
        except Resized as resized:
            for index, spec in resized.layouts.items():
                resize(rt, tensors[index], spec)
            return run(rt, func, args, kwargs)
        if key:
            rt.plans[tuple(key)] = plan
    made = rt.enqueue(plan, [tensor._cell for tensor in tensors]) if plan.runs else []
    return _present(plan, made, tensors)


def _present(plan: Plan, made: list[Cell], tensors: list[HpuTensor]) -> Any:
    results: list[Any] = []
    cells = iter(made)
    for output in plan.outputs:
        if type(output) is Spec:
            results.append(wrap(next(cells), output))
        elif type(output) is int:
            results.append(tensors[output])
        elif output[0] == "const":
            results.append(output[1])
        else:
            index, spec = output
            results.append(wrap_view(tensors[index], spec))
    if plan.multi is None:
        return results[0]
    return results if plan.multi is list else tuple(results)


def _scan(value: Any, tensors: _Operands, key: list[Any], func: OpOverload) -> Any:
    """Replace tensors by slots and add to the plan's key what the plan depends on."""
    kind = type(value)
    if kind is HpuTensor:
        tensors.append(value)
        key.append(value._spec)
        key.append(value._cell.spec)
        return Slot(len(tensors) - 1)
    if kind is list or kind is tuple:
        key.append(len(value))
        return kind([_scan(item, tensors, key, func) for item in value])
    if isinstance(value, HpuTensor):  # a subclass
        return _scan(wrap(value._cell, value._spec), tensors, key, func)
    if isinstance(value, torch.Tensor):
        tensors.lifted = True
        return _scan(_lift(value, func), tensors, key, func)
    if kind is torch.device and value.type == "hpu":
        value = torch.device("cpu")
    key.append(kind)
    # 0.0 and -0.0 are equal, and the plan contains the value.
    key.append(value if kind is not float or value else repr(value))
    return value


def _lift(tensor: torch.Tensor, func: OpOverload) -> torch.Tensor:
    """Bring an operand from the host to the device; a capture freezes it."""
    rt = runtime.current()
    rt.note_host_work()
    if tensor.dim() == 0 or func in _INDEXING:  # as on other devices: scalars and index tensors
        return constant(tensor.detach().clone())
    if rt.config.lazy:  # any other tensor too, by a copy that does not wait (bridge: lazy_kernels.h:1463-1495)
        return tensor.detach().to("hpu", non_blocking=True)
    # bridge: habana_eager/ops/eager_op.cpp:55-104
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, hpu:0 and"
        f" {tensor.device}! ({func}, shape {tuple(tensor.shape)}); move it with .to('hpu')"
    )


def _refuse_to_write_to_the_host(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name) if argument.kwarg_only or position >= len(args) else args[position]
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor) and not isinstance(item, HpuTensor):
                # bridge: habana_lazy/aten_lazy_bridge.cpp:288-298
                raise RuntimeError(
                    f"Got a non-HPU tensor, expecting an HPU tensor: {func} would write its result to {item.device}"
                    " while other operands are on hpu:0; write to a tensor on 'hpu', or move the operands"
                )


def _fall_back(
    rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[HpuTensor]
) -> Any:
    if rt.capture.capturing:
        # The text that users match on (bridge: cpu_fallback.cpp:103-105).
        raise RuntimeError(f"{func._schema.name}: cpu fallback is not supported during hpu graph capturing")
    rt.counters.add("cpu_fallbacks")
    rt.notify(f"cpu_fallback:{func._schema.name}")
    return _on_values(rt, func, args, kwargs, tensors)


def _on_values(
    rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[HpuTensor]
) -> Any:
    """Wait for the inputs, run the op, wait for its result."""
    rt.note_host_work()
    cells = [tensor._cell for tensor in tensors]
    specs = [(cell.spec, tensor._spec) for cell, tensor in zip(cells, tensors, strict=True)]
    if any(rt.is_pending(cell.storage) for cell in cells):
        rt.flush("host_read")
    writes = [cell.storage for cell in cells if func._schema.is_mutable]
    storages = [cell.storage for cell in cells]
    views = tuple(None if base is spec else spec for base, spec in specs)
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if any(argument.name == "generator" for argument in func._schema.arguments):
        kwargs.setdefault("generator", rt.generator)
    plan = Plan(func, args, kwargs, views, ())
    results: list[Any] = []
    is_resizable = any(argument.is_out for argument in func._schema.arguments)

    def work() -> None:
        inputs = [s.read() if view is None else view.view(s.read()) for s, view in zip(storages, views, strict=True)]
        results.append((plan.call(inputs), inputs))

    rt.wait(rt.engine("compute").submit(Task(work), storages, writes))
    result, inputs = results[0]
    if is_resizable:
        _adopt_sizes(rt, tensors, inputs)

    def present(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(present, value))
        if not isinstance(value, torch.Tensor):
            return value
        for tensor, base in zip(tensors, inputs, strict=True):
            if value is base:
                return tensor
        return constant(value.clone())

    return present(result)


def _adopt_sizes(rt: Runtime, tensors: list[HpuTensor], values: Sequence[torch.Tensor]) -> None:
    """Follow an op on values that resized its outputs."""
    for tensor, value in zip(tensors, values, strict=True):
        if tuple(value.shape) != tensor._spec.size:
            resize(rt, tensor, Spec.get(value.dtype, tuple(value.shape), value.stride(), tensor._spec.offset))
            run(rt, aten.copy_.default, (tensor, constant(value.clone())), {})


def _detach(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HpuTensor:
    tensor: HpuTensor = args[0]
    return wrap_view(tensor, tensor._spec)


def _view_in_place(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HpuTensor:
    tensor: HpuTensor = args[0]
    with no_dispatch():  # the generic kernel changes sizes and strides of the wrapper
        func(*args, **kwargs)
        tensor._spec = Spec.get(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
    return tensor


def _resize_(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HpuTensor:
    tensor: HpuTensor = args[0]
    size = tuple(args[1].shape) if isinstance(args[1], torch.Tensor) else tuple(args[1])
    if size != tensor._spec.size:
        twin = torch.empty(size, device="meta", memory_format=kwargs.get("memory_format") or torch.contiguous_format)
        resize(rt, tensor, Spec.get(tensor.dtype, size, twin.stride(), tensor._spec.offset))
    return tensor


def _nothing(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


for _name in ("squeeze_", "squeeze_.dim", "squeeze_.dims", "unsqueeze_", "t_", "transpose_", "as_strided_"):
    _base, _, _overload = _name.partition(".")
    HANDLERS[getattr(getattr(aten, _base), _overload or "default")] = _view_in_place
HANDLERS[aten.resize_.default] = HANDLERS[aten.resize_as_.default] = _resize_
HANDLERS[aten.detach.default] = _detach
HANDLERS[aten.alias.default] = _detach
HANDLERS[aten.lift_fresh.default] = lambda rt, func, args, kwargs: args[0]
HANDLERS[aten.record_stream.default] = _nothing
