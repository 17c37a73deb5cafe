"""Copies of batches and outputs whose memory may be written again while they are under way."""

import copy
import sys
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from operator import is_
from types import MemberDescriptorType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_hpu_infer import kinds
from lightning_hpu_infer.kinds import FLAT, UNSET, Kind, attributes_of, dict_of, is_constant, is_users, kind_of
from lightning_hpu_infer.nested import parts_of, with_parts


def may_reuse_memory(loader: object) -> bool:
    """Whether a loader may yield memory that it writes again.

    `default_collate` has just made what it returns, and worker processes send copies. A collate function of the user's
    may return the dataset's own memory.
    """
    if isinstance(loader, list | tuple):
        return False  # of batches: it has no code that could write to them
    if type(loader) is not DataLoader:
        return True  # whatever its class overrides
    return loader.num_workers == 0 and loader.collate_fn is not default_collate


def copy_of(tensor: Tensor) -> Tensor:
    """A copy of a host tensor that differs in nothing but its memory; any other tensor itself.

    Work of a device belongs to the main thread, and this may be another one.
    """
    if tensor.device.type != "cpu":
        return tensor
    # One that is made in inference mode would be refused by autograd in the step.
    with torch.inference_mode(tensor.is_inference()):
        copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    if attributes := getattr(tensor, "__dict__", None):
        vars(copied).update(attributes)
    return copied


def owned(data: Any, copied: Callable[[Tensor], Tensor] = copy_of, inside: Callable[[Tensor], Tensor] = copy_of) -> Any:
    """A batch or an output that stays as it is, whatever its loader or the step does next. Any thread.

    Tensors, NumPy arrays and collections are copied, and objects with what is in their attributes, however deep: those
    of the user's classes, namespaces, data classes, and objects of libraries that hold tensors or arrays. One that can
    copy itself does so (`clone` of those that can be moved, `__deepcopy__`, `__copy__`). What nobody can change, what
    is shared on purpose (modules, datasets, locks, tokenizers) and what cannot be copied stay the objects that they
    are.

    Args:
        data: Any object.
        copied: Copies a tensor, or gives tensors back that nobody writes to.
        inside: The same for tensors in objects, and in collections that move themselves to the device.
    """
    try:
        return _Copies(copied, inside).filled(data)
    except RecursionError:  # mappings in each other, which Lightning does not end with either
        return data


def moves_itself(data: object) -> bool:
    """Whether Lightning lets an object move what it holds to the device by itself (2.6 `apply_func.py`).

    Not a `BatchEncoding` and the like, of which it is known that they move the tensors that are their parts.
    """
    return kinds.moves_itself(type(data))


def _is_flat(data: Any) -> bool:
    """Whether nothing in a collection can be written. Of very many numbers or strings, without a call for each."""
    if isinstance(data, dict):
        return FLAT.issuperset(map(type, data.values())) and FLAT.issuperset(map(type, data))
    return FLAT.issuperset(map(type, data)) and not dict_of(data)


def _or_itself(data: Any, copied: Callable[[], Any]) -> Any:
    """A copy; the object itself if its class allows none. Stock Lightning makes none, so this must not end a run."""
    try:
        return copied()
    except Exception:
        return data


_Way = Callable[["_Copies", Any, bool], Any]


class _Copies:
    """The copies made of one batch. What occurs in it twice is copied once, as it is one object for the step.

    A collection or an object is copied with its old parts first, and gets copies of these when its turn comes. So what
    refers to itself, and chains of any length, need no recursion.
    """

    def __init__(self, copied: Callable[[Tensor], Tensor], inside: Callable[[Tensor], Tensor]) -> None:
        self._copied = copied, inside
        made: dict[int, Any] = {}
        # By whether it is in an object, and by the ids of the originals, which would otherwise be free for others.
        self._made = made, made if copied is inside else {}
        self._originals: list[Any] = []
        self._unfilled: deque[Callable[[], None]] = deque()
        # Last of all, since the hash of a part may be one of its parts.
        self._unhashed: deque[Callable[[], None]] = deque()
        self._ways: dict[type, _Way] = {}
        self._slots: dict[type, list[MemberDescriptorType]] = {}

    def filled(self, data: Any) -> Any:
        """The copy of a batch, complete."""
        copied = self._of(data, inside=False)
        while todo := self._unfilled or self._unhashed:
            todo.popleft()()
        return copied

    def _of(self, data: Any, inside: bool) -> Any:
        """The copy of a part, or itself.

        Args:
            data: Any object.
            inside: Whether it is in an object, where Lightning does not look for tensors.
        """
        kind, made = type(data), self._made[inside]
        if kind in FLAT:
            return data
        if id(data) not in made:
            if kind not in self._ways:
                self._ways[kind], self._slots[kind] = _WAYS[kind_of(kind)], kinds.slots_of(kind)
            copied = self._ways[kind](self, data, inside)
            self._originals.append(data)
            made.setdefault(id(data), copied)  # a tuple may have been met again among its parts
        return made[id(data)]

    # How objects of each `Kind` are copied

    def _itself(self, data: Any, inside: bool) -> Any:
        return data

    def _tensor(self, data: Any, inside: bool) -> Any:
        copied = self._copied[inside](data)
        attributes = getattr(data, "__dict__", None)
        if attributes and copied is not data and (type(data) is Tensor or is_users(type(data))):
            vars(copied).update({name: value for name, value in attributes.items() if name not in vars(copied)})
            self._fill(copied, inside)
        return copied

    def _list(self, data: Any, inside: bool) -> Any:
        return self._collection(data, inside, self._fill_list)

    def _deque(self, data: Any, inside: bool) -> Any:
        return self._collection(data, inside, self._fill_deque)

    def _dict(self, data: Any, inside: bool) -> Any:
        return self._collection(data, inside, self._fill_dict)

    def _set(self, data: Any, inside: bool) -> Any:
        return self._collection(data, inside, self._fill_set)

    def _collection(self, data: Any, inside: bool, fill: Callable[[Any, bool], None]) -> Any:
        copied = _or_itself(data, lambda: copy.copy(data))
        if copied is data or type(copied) is not type(data):
            return data
        inside = inside or moves_itself(data)
        if not _is_flat(data):
            self._unfilled.append(partial(fill, copied, inside))
        attributes = dict_of(data)
        if attributes is data:  # its items are its attributes
            copied.__dict__ = copied
        elif attributes:
            vars(copied).update({name: part for name, part in attributes.items() if name not in vars(copied)})
            self._fill(copied, inside)
        return copied

    def _tuple(self, data: Any, inside: bool) -> Any:
        if _is_flat(data):
            return data
        inside = inside or moves_itself(data)
        parts = [self._of(part, inside) for part in data]
        if all(map(is_, parts, data)) and not dict_of(data):
            return data
        copied = _or_itself(data, lambda: with_parts(data, dict(enumerate(parts))))
        return self._fill(copied, inside) if copied is not data and dict_of(data) else copied

    def _frozenset(self, data: Any, inside: bool) -> Any:
        parts = [self._of(part, inside) for part in data]
        return data if all(map(is_, parts, data)) else _or_itself(data, lambda: frozenset.__new__(type(data), parts))

    def _mapping(self, data: Any, inside: bool) -> Any:
        if inside and (is_users(type(data)) or isinstance(data, kinds.WRAPPERS)):
            return self._dataclass(data, inside)  # nobody asks it for tensors, to move them
        inside = inside or moves_itself(data)
        try:
            parts = parts_of(data) or {}
        except Exception:  # it may compute them
            return data
        parts = {name: self._of(part, inside) for name, part in parts.items()}
        copied = _or_itself(data, lambda: with_parts(data, parts))
        return copied if copied is data else self._fill(copied, inside, like=data)

    def _array(self, data: Any, inside: bool) -> Any:
        copied = _or_itself(data, lambda: copy.copy(data))
        if copied is not data and data.dtype.hasobject:
            self._unfilled.append(partial(self._fill_array, copied))
        return copied

    def _buffer(self, data: Any, inside: bool) -> Any:
        return _or_itself(data, lambda: copy.copy(data))

    def _view(self, data: Any, inside: bool) -> Any:
        def copied() -> memoryview:
            made = memoryview(bytearray(data.tobytes())).cast(data.format, data.shape)
            return made.toreadonly() if data.readonly else made

        return _or_itself(data, copied)

    def _method(self, data: Any, inside: bool) -> Any:
        """A method of an object that is copied becomes one of the copy."""
        owner = self._made[True].get(id(data.__self__), data.__self__)
        return data if owner is data.__self__ else MethodType(data.__func__, owner)

    def _reference(self, data: Any, inside: bool) -> Any:
        """A weak reference to an object that is copied becomes one to the copy."""
        target = data()
        copied = self._made[True].get(id(target), target)
        return data if copied is target else weakref.ref(copied)

    def _clone(self, data: Any, inside: bool) -> Any:
        copied = _or_itself(data, data.clone)
        if not is_users(type(data)):
            return self._object(data, copied)
        if copied is data:
            return self._instance(data, inside)
        return self._object(data, self._fill(copied, True, like=data))  # it may have cloned the tensors only

    def _deepcopy(self, data: Any, inside: bool) -> Any:
        """Such as a table of pandas, whose memory is out of sight."""
        made, copied = self._made[True], None
        before = len(made)
        try:
            copied = copy.deepcopy(data, made)
        except Exception:  # a lock in it, say
            for part in list(made)[before:]:
                del made[part]  # it may be half a copy
        finally:
            self._originals.extend(made.pop(id(made), ()))  # where `deepcopy` keeps them
        if copied is None:
            return self._instance(data, inside) if is_users(type(data)) else data
        pandas = sys.modules.get("pandas")
        if copied is not data and pandas is not None and isinstance(data, pandas.DataFrame | pandas.Series):
            self._unfilled.append(partial(self._fill_table, copied))
        return self._object(data, copied)

    def _dataclass(self, data: Any, inside: bool) -> Any:
        if is_constant(data):
            return data
        copied = self._with_same_attributes(data)
        return copied if copied is data else self._fill(copied, inside or moves_itself(data))

    def _instance(self, data: Any, inside: bool) -> Any:
        if is_constant(data):
            return data
        copies = hasattr(type(data), "__copy__")
        copied = _or_itself(data, lambda: copy.copy(data)) if copies else self._with_same_attributes(data)
        return self._object(data, copied if copied is data else self._fill(copied, inside=True))

    def _of_library(self, data: Any, inside: bool) -> Any:
        copied = _or_itself(data, lambda: copy.copy(data)) if kinds.holds_memory(data) else data
        return self._object(data, copied if copied is data else self._fill(copied, inside=True))

    def _object(self, data: Any, copied: Any) -> Any:
        """One object is one, wherever it is met."""
        for made in self._made:
            made[id(data)] = copied
        return copied

    def _with_same_attributes(self, data: Any) -> Any:
        """Another object of a class, without what its `__getstate__` leaves out."""
        try:
            copied = object.__new__(type(data))
        except TypeError:  # made in another language
            return _or_itself(data, lambda: copy.copy(data))
        if (attributes := dict_of(copied)) is not None:
            attributes.update(dict_of(data) or {})
        for slot in self._slots[type(data)]:
            if (value := kinds.in_slot(slot, data)) is not UNSET:
                slot.__set__(copied, value)
        return copied

    # New parts in place of old ones. By methods of Python's own classes: those of others may refuse, or do more.

    def _fill(self, copied: Any, inside: bool, like: Any = None) -> Any:
        """Copy later what attributes hold; of a copy like another object, only what both have."""
        self._unfilled.append(partial(self._fill_attributes, copied, inside, like))
        return copied

    def _fill_attributes(self, copied: Any, inside: bool, like: Any) -> None:
        old = None if like is None else {name: id(value) for name, value in attributes_of(like)}
        attributes = dict_of(copied) or {}
        for name, value in list(attributes.items()):
            if old is None or old.get(name) == id(value):
                attributes[name] = self._of(value, inside)
        for slot in kinds.slots_of(type(copied)):
            value = kinds.in_slot(slot, copied)
            if value is not UNSET and (old is None or old.get(slot.__name__) == id(value)):
                slot.__set__(copied, self._of(value, inside))

    def _fill_list(self, copied: Any, inside: bool) -> None:
        list.__setitem__(copied, slice(None), [self._of(part, inside) for part in list.__iter__(copied)])

    def _fill_deque(self, copied: Any, inside: bool) -> None:
        parts = [self._of(part, inside) for part in deque.__iter__(copied)]
        deque.clear(copied)
        deque.extend(copied, parts)

    def _fill_dict(self, copied: Any, inside: bool) -> None:
        for name, part in list(dict.items(copied)):
            if (new := self._of(part, inside)) is not part:
                dict.__setitem__(copied, name, new)
        if not FLAT.issuperset(map(type, dict.keys(copied))):
            names = [self._of(name, inside) for name in dict.keys(copied)]
            if not all(map(is_, names, dict.keys(copied))):
                self._unhashed.append(partial(self._rename, copied, inside))

    def _rename(self, copied: Any, inside: bool) -> None:
        kind: Any = OrderedDict if isinstance(copied, OrderedDict) else dict
        parts = [(self._of(name, inside), part) for name, part in kind.items(copied)]
        kind.clear(copied)
        for name, part in parts:
            kind.__setitem__(copied, name, part)

    def _fill_set(self, copied: Any, inside: bool) -> None:
        parts = [self._of(part, inside) for part in set.__iter__(copied)]
        if not all(map(is_, parts, set.__iter__(copied))):
            self._unhashed.append(partial(self._refill, copied, parts))

    def _refill(self, copied: Any, parts: list[Any]) -> None:
        set.clear(copied)
        set.update(copied, parts)

    def _fill_array(self, copied: Any) -> None:
        if copied.dtype == object:
            for place, part in enumerate(copied.flat):
                copied.flat[place] = self._of(part, inside=True)
        for name in copied.dtype.names or ():
            if copied.dtype[name].hasobject:
                self._fill_array(copied[name])

    def _fill_table(self, copied: Any) -> None:
        """The cells of a table or a column of pandas, which copies none of them."""
        columns = [copied] if copied.ndim == 1 else [copied.iloc[:, place] for place in range(copied.shape[1])]
        for cells in (column.to_numpy() for column in columns if column.dtype == object):
            cells.flags.writeable = True  # pandas 3 shows its own memory, which here is ours
            self._fill_array(cells)


_WAYS: dict[Kind, _Way] = {
    Kind.ITSELF: _Copies._itself,
    Kind.TENSOR: _Copies._tensor,
    Kind.ARRAY: _Copies._array,
    Kind.BUFFER: _Copies._buffer,
    Kind.VIEW: _Copies._view,
    Kind.LIST: _Copies._list,
    Kind.DEQUE: _Copies._deque,
    Kind.DICT: _Copies._dict,
    Kind.SET: _Copies._set,
    Kind.TUPLE: _Copies._tuple,
    Kind.FROZENSET: _Copies._frozenset,
    Kind.MAPPING: _Copies._mapping,
    Kind.METHOD: _Copies._method,
    Kind.REFERENCE: _Copies._reference,
    Kind.CLONE: _Copies._clone,
    Kind.DEEPCOPY: _Copies._deepcopy,
    Kind.DATACLASS: _Copies._dataclass,
    Kind.OBJECT: _Copies._instance,
    Kind.LIBRARY: _Copies._of_library,
}
