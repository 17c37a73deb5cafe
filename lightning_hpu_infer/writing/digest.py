"""Digests of values and of code that are the same in every process, and others if the values or the code are."""

import ast
import hashlib
import inspect
import linecache
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from enum import Enum
from functools import lru_cache, partial
from types import CodeType, EllipsisType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_hpu_infer.nested import parts_of

_PLAIN = (bool, int, float, complex, str, bytes, type(None), EllipsisType, Enum, torch.dtype, torch.device)
"""Types whose `repr` tells all, in every process."""
_PASSED_OVER = ("torch._dynamo.", "lightning.", "lightning_hpu_infer.")
"""Where functions are wrapped that give the same as before."""
_SPARSE = {
    torch.sparse_coo: ("indices", "values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def digest_of(value: Any) -> str:
    """A digest of numbers, text, tensors, arrays and functions in nested collections.

    Of a module, it is of its weights. Of any other object, it is of its type, since attributes may change from run to
    run without a meaning.
    """
    digest = _Digest()
    digest.add(value)
    return digest.text()


def code_of(function: Callable[..., Any]) -> str:
    """The name of a function, and a digest of its code and of the values that are bound in it.

    Bound are its defaults, the arguments of a `functools.partial`, and the variables of functions around it. The code
    is the source without comments and layout. Where that is not there, or not what runs, since it was edited after it
    was loaded, it is the bytecode, and the name has the version of Python.

    Without its module's name, which is `__main__` in a script that another one may import.
    """
    digest = _Digest()
    digest.add_callable(function)
    inner: Any = function
    while isinstance(inner, partial):
        inner = inner.func
    inner = inspect.unwrap(getattr(inner, "__func__", inner))
    version = f" (bytecode of Python {_python()})" if digest.has_bytecode else ""
    return f"{_name_of(inner)}{version} {digest.text()[:16]}"


class _Digest:
    """A digest of the values that are added."""

    def __init__(self) -> None:
        self.has_bytecode = False
        """Whether it depends on the version of Python."""
        self._hash = hashlib.sha256()
        self._open: set[int] = set()
        """Functions and collections that are being added, which may hold themselves."""

    def text(self) -> str:
        return self._hash.hexdigest()

    def add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, np.ndarray | np.generic):
            plain = value.dtype.hasobject
            self._say("array", value.dtype, value.shape)
            self.add(value.tolist()) if plain else self._hash.update(value.tobytes())
        elif isinstance(value, _PLAIN):
            self._say(type(value).__qualname__, repr(value))
        elif isinstance(value, set | frozenset):
            self._say("set", *sorted(map(digest_of, value)))
        elif isinstance(value, list | tuple | dict) or (is_dataclass(value) and not isinstance(value, type)):
            self._once(self._add_parts, value)
        elif isinstance(value, FunctionType | MethodType | partial | nn.Module):
            self.add_callable(value)
        else:
            self._say(_name_of(value))

    def add_callable(self, function: Any) -> None:
        if isinstance(function, partial):
            self._say("partial")
            self.add_callable(function.func)
            self.add((function.args, function.keywords))
        elif isinstance(function, MethodType):
            self.add_callable(function.__func__)
            self.add(function.__self__)
        elif isinstance(function, FunctionType):
            self._once(self._add_function, function)
        elif isinstance(function, LightningModule):
            self._say("module")  # Its weights are compared by themselves.
        elif hasattr(function, "__wrapped__"):  # as `functools.lru_cache` makes them
            self.add_callable(function.__wrapped__)
        else:
            self._say(_name_of(function))
            self._add_class(function if isinstance(function, type) else type(function))
            if isinstance(function, nn.Module):
                self.add([*function.state_dict().items(), *function.named_buffers()])

    def _say(self, *words: object) -> None:
        self._hash.update(f"{words}\n".encode())

    def _once(self, add: Callable[[Any], None], value: Any) -> None:
        if id(value) in self._open:
            self._say("itself")
            return
        self._open.add(id(value))
        add(value)
        self._open.remove(id(value))

    def _add_parts(self, value: Any) -> None:
        parts = parts_of(value) or {}
        self._say(type(value).__qualname__, len(parts))
        for name, part in parts.items():
            self.add(name)
            self.add(part)

    def _add_function(self, function: FunctionType) -> None:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is None or not function.__globals__.get("__name__", "").startswith(_PASSED_OVER):
            if (source := _source_of(function)) is not None:
                self._say(source)
            else:
                self._add_bytecode(function.__code__)
            self.add((function.__defaults__, function.__kwdefaults__))
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                self._say(name)
                for held in _held(cell):
                    self.add(held)
        if wrapped is not None:
            self.add_callable(wrapped)

    def _add_bytecode(self, code: CodeType) -> None:
        self.has_bytecode = True
        self._say(_python(), code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        self._say(code.co_argcount, code.co_kwonlyargcount, getattr(code, "co_exceptiontable", b""))
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._add_bytecode(constant)
            else:
                self.add(constant)

    def _add_class(self, cls: type) -> None:
        for name, member in sorted(vars(cls).items()):
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(function, FunctionType):
                self._say(name)
                self._once(self._add_function, function)
            elif isinstance(member, _PLAIN) and not name.startswith("__"):
                self._say(name, repr(member))

    def _add_tensor(self, tensor: Tensor) -> None:
        if is_lazy(tensor):
            self._say("uninitialized")
            return
        if tensor.is_nested:
            self.add(tensor.unbind())
            return
        self._say(tensor.dtype, tuple(tensor.shape), tensor.layout)
        if tensor.is_meta or not tensor.numel():
            self._say(tensor.is_meta)
            return
        host = tensor.detach().cpu()
        if (parts := _made_of(host)) is not None:
            for part in parts:
                self._add_tensor(part)
            return
        memory = host.resolve_conj().resolve_neg().contiguous()
        self._hash.update(memory.reshape(-1).view(torch.uint8).numpy().data)


def _made_of(tensor: Tensor) -> list[Tensor] | None:
    """The tensors that one without memory of its own is made of; None of any other."""
    if tensor.is_quantized:
        return [tensor.dequantize()]
    if (names := _SPARSE.get(tensor.layout)) is not None:
        held = tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor
        return [getattr(held, name)() for name in names]
    if tensor.layout is not torch.strided:
        return [tensor.to_dense()]
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return None


def _name_of(value: Any) -> str:
    """The name of a function or class; of another object, that of its class."""
    name = getattr(value, "__qualname__", getattr(value, "__name__", None))
    return name if isinstance(name, str) else type(value).__qualname__


def _held(cell: Any) -> tuple[Any, ...]:
    """What a cell of a closure holds, if its variable has a value."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _source_of(function: FunctionType) -> str | None:
    """The source of a function without comments and layout; None if it is not there, or not what runs."""
    code = function.__code__
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    codes, nodes = _parsed(code.co_filename, text)
    if code not in codes:
        return None
    # Lambdas of one line cannot be told apart, and count together.
    return "\n".join(map(_canonical, nodes.get((code.co_firstlineno, code.co_name), ()))) or None


Nodes = dict[tuple[int, str], list[ast.AST]]


@lru_cache(maxsize=2)
def _parsed(filename: str, text: str) -> tuple[set[CodeType], Nodes]:
    """The code objects that a file compiles to, and its functions, by their first lines and names."""
    nodes: Nodes = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
            compiled = compile(tree, filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError):
        return set(), nodes
    for node in ast.walk(tree):
        if isinstance(node, ast.Lambda):
            nodes.setdefault((node.lineno, "<lambda>"), []).append(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            nodes.setdefault((first, node.name), []).append(node)
    return set(_codes_in(compiled)), nodes


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes_in(constant)


def _canonical(node: Any) -> str:
    """A syntax tree as text that is the same in all versions of Python, which add fields (3.12, 3.13)."""
    if isinstance(node, list):
        return f"[{', '.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.JoinedStr):  # Python 3.12 adds empty parts.
        node = ast.JoinedStr([part for part in node.values if getattr(part, "value", None) != ""])
    fields = ((name, getattr(node, name, None)) for name in node._fields)
    shown = (f"{name}={_canonical(value)}" for name, value in fields if value is not None and value != [])
    return f"{type(node).__name__}({', '.join(shown)})"
