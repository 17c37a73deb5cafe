"""What one op does to layouts, found once per kind of call by running it on `meta` twins of its inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from lightning_hpu_infer.emulator.storage import Spec, poison

aten = torch.ops.aten

# The fused CPU kernel lays out its result unlike the meta kernel says: ask the CPU once instead of copying always.
_PREDICT_ON_CPU = frozenset({aten.scaled_dot_product_attention.default})
# Ops that only move or cast device memory.
_MOVES = frozenset({aten.clone.default, aten.copy_.default, aten._to_copy.default})
_NARROW = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16})


class NeedsValues(Exception):
    """Raised when the layout of the outputs depends on the values of the inputs."""


class Resized(Exception):
    """Raised when an op resizes outputs that it was given: `layouts` has what they must be before it is called."""

    def __init__(self, layouts: dict[int, Spec]) -> None:
        self.layouts = layouts


class Slot:
    """Stands for the tensor `index` of a call in the plan's argument template."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Plan:
    """How to run one kind of call, and what its outputs are.

    `outputs` has one entry per returned value: a `Spec` (new memory), ``(index, spec)`` (a view of input `index`),
    an `int` (input `index` itself) or ``("const", value)``.
    """

    __slots__ = ("args", "computes", "func", "kwargs", "lists", "multi", "new", "outputs", "singles", "views", "writes")

    def __init__(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        views: tuple[Spec | None, ...],
        writes: tuple[int, ...],
    ) -> None:
        self.func = func
        self.computes = func not in _MOVES
        self.kwargs = {name: value for name, value in kwargs.items() if type(value) is not Slot}
        self.args = tuple(None if type(arg) is Slot else arg for arg in args)
        self.singles: list[tuple[int | str, int]] = []
        """Position or name of an argument, and the index of its tensor."""
        self.lists: list[tuple[int | str, list[Any]]] = []
        arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for position, arg in arguments:
            if type(arg) is Slot:
                self.singles.append((position, arg.index))
            elif type(arg) in (list, tuple) and any(type(item) is Slot for item in arg):
                self.lists.append((position, list(arg)))
        self.views = views
        self.writes = writes
        self.outputs: list[Any] = []
        self.new: tuple[tuple[int, Spec], ...] = ()
        self.multi: type | None = None

    @property
    def runs(self) -> bool:
        """Whether the device has anything to do; a pure view has not."""
        return bool(self.new or self.writes)

    def call(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Run the op on these tensors instead of the planned call's."""
        args: list[Any] = list(self.args)
        kwargs = self.kwargs.copy() if self.kwargs else {}
        for position, index in self.singles:
            if type(position) is int:
                args[position] = tensors[index]
            else:
                kwargs[position] = tensors[index]  # type: ignore[index]
        for position, items in self.lists:
            filled = [tensors[item.index] if type(item) is Slot else item for item in items]
            if type(position) is int:
                args[position] = filled
            else:
                kwargs[position] = filled  # type: ignore[index]
        return self.func(*args, **kwargs)

    def _call_wider(self, tensors: Sequence[torch.Tensor], error: NotImplementedError) -> Any:
        """Run an op that the CPU's kernels lack for a narrow type; the results are float32, and rounded later."""
        wider = [tensor.float() if tensor.dtype in _NARROW else tensor for tensor in tensors]
        if "not implemented for" not in str(error) or all(map(operator.is_, wider, tensors)):
            raise error
        result = self.call(wider)
        for index in self.writes:
            if wider[index] is not tensors[index]:
                tensors[index].copy_(wider[index])
        return result

    def _call_twins(self, specs: Sequence[tuple[Spec, Spec]], device: str) -> tuple[list[torch.Tensor], Any]:
        """Run the op on tensors of these layouts; the host's random state stays as it is."""
        bases = [base.empty(device) for base, _ in specs]
        if device == "cpu":
            bases = [base.fill_(0) for base in bases]
        twins = [spec.view(base) for base, (_, spec) in zip(bases, specs, strict=True)]
        kwargs = self.kwargs
        if "device" in kwargs:
            self.kwargs = {**kwargs, "device": torch.device(device)}
        if "generator" in kwargs:
            self.kwargs = {**self.kwargs, "generator": torch.Generator() if device == "cpu" else None}
        with torch.inference_mode():
            try:
                return twins, self.call(twins)
            finally:
                self.kwargs = kwargs

    def execute(self, values: list[Any], ins: tuple[int, ...], outs: tuple[int, ...]) -> None:
        """Run on a program's registers; for device threads."""
        tensors = []
        for register, view in zip(ins, self.views, strict=True):
            value = values[register]
            tensors.append(value if view is None else view.view(value))
        try:
            result = self.call(tensors)
        except NotImplementedError as error:
            result = self._call_wider(tensors, error)
        if self.multi is None:
            for register, (_, spec) in zip(outs, self.new, strict=True):
                values[register] = _settle(result, spec)
        else:
            for register, (position, spec) in zip(outs, self.new, strict=True):
                values[register] = _settle(result[position], spec)

    def _check_sizes(self, twins: Sequence[torch.Tensor], specs: Sequence[tuple[Spec, Spec]]) -> None:
        changed = {i: Spec.of(twins[i]) for i in self.writes if Spec.of(twins[i]) is not specs[i][1]}
        if changed and any(argument.is_out for argument in self.func._schema.arguments):  # type: ignore[attr-defined]
            raise Resized(changed)
        for index, after in changed.items():
            raise RuntimeError(
                f"{self.func} would change the shape or strides of an HPU tensor in place (from"
                f" {specs[index][1].size} to {after.size}), which the emulator cannot do; use the out-of-place op"
            )

    def predict(self, specs: Sequence[tuple[Spec, Spec]]) -> None:
        """Fill in the outputs. `specs` has the layouts of each tensor's storage and of the tensor."""
        if self.func in _PREDICT_ON_CPU:
            twins, result = self._call_twins(specs, "cpu")
        else:
            try:
                twins, result = self._call_twins(specs, "meta")
            except NotImplementedError:
                raise
            except (RuntimeError, ValueError) as error:
                # Some meta kernels refuse what only the CPU's can do, such as a grouped_mm of float32.
                try:
                    twins, result = self._call_twins(specs, "cpu")
                except Exception:
                    raise error from None
        self._check_sizes(twins, specs)
        owners = {twin.untyped_storage()._cdata: index for index, twin in enumerate(twins)}
        self.multi = type(result) if isinstance(result, (tuple, list)) else None
        for value in result if self.multi else (result,):
            self.outputs.append(_describe(value, twins, owners))
        self.new = tuple((position, out) for position, out in enumerate(self.outputs) if type(out) is Spec)


def _describe(value: object, twins: Sequence[torch.Tensor], owners: dict[int, int]) -> object:
    if not isinstance(value, torch.Tensor):
        if isinstance(value, (list, tuple)):
            raise NeedsValues
        return ("const", value)
    for index, twin in enumerate(twins):
        if value is twin:
            return index
    owner = owners.get(value.untyped_storage()._cdata)
    return Spec.fresh(value) if owner is None else (owner, Spec.of(value))


def _settle(result: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Give a result the predicted type and strides, on which the views of it rely."""
    if result.dtype is spec.dtype and result.stride() == spec.stride and not result.storage_offset():
        return result
    settled = spec.empty()
    return settled.copy_(result) if result.shape == spec.size else result


def make_plan(
    func: OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    specs: Sequence[tuple[Spec, Spec]],
    generator: torch.Generator,
) -> Plan:
    """Plan a call whose tensors were replaced by `Slot`.

    Raises:
        NeedsValues: The op has no meta kernel, or its output shapes depend on data.
    """
    schema = func._schema
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    if torch.Tag.nondeterministic_seeded in func.tags and any(arg.name == "generator" for arg in schema.arguments):
        # Device threads must not change the host's random state.
        kwargs = {**kwargs, "generator": kwargs.get("generator") or generator}
    writes: list[int] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.kwarg_only or position >= len(args) else args[position]
            items = value if isinstance(value, (list, tuple)) else (value,)
            writes += [item.index for item in items if type(item) is Slot]
    views = tuple(None if base is spec else spec for base, spec in specs)
    plan = Plan(func, args, kwargs, views, tuple(writes))
    try:
        plan.predict(specs)
    except NotImplementedError as error:  # also what dynamic shapes raise on meta
        raise NeedsValues from error
    return plan


def empty_plan(spec: Spec) -> Plan:
    """Plan the allocation of memory inside a program: contents undefined."""
    plan = Plan(lambda: poison(spec.empty(), loud=False), (), {}, (), ())
    plan.outputs, plan.new, plan.computes = [spec], ((0, spec),), False
    return plan
