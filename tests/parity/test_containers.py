"""A law: whatever a batch is, the step and the hooks get what they get in stock Lightning, with every flag."""

from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType, SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from lightning_hpu_infer import HPUInferenceAccelerator
from tests.helpers import trainer


class Meta:
    """What a batch carries along, and nobody touches."""


META = Meta()
Named = namedtuple("Named", "x meta")


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    meta: Any
    derived: str = field(init=False, default="derived")


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor
    meta: Any


@dataclass
class Cached:
    x: Tensor
    meta: Any
    later: Any = field(init=False)

    def __post_init__(self) -> None:
        self.later = "post"
        self.extra = "an attribute that is no field"

    @cached_property
    def total(self) -> float:
        return self.x.sum().item()


class Tagged(dict[str, Any]):
    """A dictionary with an attribute, whose constructor takes something else."""

    def __init__(self, tag: str, x: Tensor) -> None:
        super().__init__(x=x, meta=META)
        self.tag = tag


class Plain(dict[str, Any]):
    """A dictionary with a class attribute."""

    tag = "tag"


class Attributes(dict[str, Any]):
    """A dictionary whose keys are its attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Sealed(dict[str, Any]):
    """A dictionary that cannot be assigned to."""

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError("sealed")


class View(Mapping[str, Any]):
    """A mapping that is made of something else."""

    def __init__(self, x: Tensor, meta: Any) -> None:
        self.x, self.meta = x, meta

    def __getitem__(self, name: str) -> Any:
        return {"x": self.x, "meta": self.meta}[name]

    def __iter__(self) -> Iterator[str]:
        return iter(("x", "meta"))

    def __len__(self) -> int:
        return 2


class Listed(list[Any]):
    def __init__(self, tag: str, x: Tensor) -> None:
        super().__init__([x, META])
        self.tag = tag


class Pair(tuple[Any, ...]):
    """A tuple with an attribute, whose constructor takes something else."""

    def __new__(cls, x: Tensor, meta: Any) -> "Pair":
        made = super().__new__(cls, (x, meta))
        made.tag = "tag"
        return made

    tag: str


class Graph:
    """A batch object of a graph library: it moves itself."""

    def __init__(self, x: Tensor, meta: Any) -> None:
        self.x, self.meta = x, meta

    def to(self, device: Any, non_blocking: bool = False) -> "Graph":
        return type(self)(self.x.to(device), self.meta)


class ClonedGraph(Graph):
    def clone(self) -> "ClonedGraph":
        return type(self)(self.x.clone(), self.meta)

    def pin_memory(self) -> "ClonedGraph":
        raise AssertionError("DataLoader calls this, if it is asked to")


class MovedInPlace(Graph):
    def to(self, device: Any, non_blocking: bool = False) -> None:  # type: ignore[override]
        self.x = self.x.to(device)


class Anything:
    """An object that has every attribute, as a mock."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.meta = x, META

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return "anything"


class Uncopied:
    """An object that refuses to be copied."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.meta = x, META

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("not copied")


class Slots:
    __slots__ = ("meta", "x")

    def __init__(self, x: Tensor) -> None:
        self.x, self.meta = x, META


@attrs.frozen
class Attrs:
    x: Tensor
    meta: Any


class Text(Tensor):
    """A tensor of a class of the user's own."""


def encoding(x: Tensor) -> BatchEncoding:
    encodings: Any = [SimpleNamespace(tokens=["a"])]
    return BatchEncoding({"x": x, "meta": META}, encoding=encodings, n_sequences=1)


def own(x: Tensor) -> Tensor:
    made = x.as_subclass(Text)
    made.note = "an attribute of a tensor"  # type: ignore[attr-defined]
    return made


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "list": lambda x: [x, META, None, "text", 1.5],
    "tuple": lambda x: (x, META, b"bytes"),
    "nested": lambda x: {"a": [{"b": (x, META)}], "x": x, "none": None},
    "named tuple": lambda x: Named(x, META),
    "own tuple": lambda x: Pair(x, META),
    "OrderedDict": lambda x: OrderedDict(x=x, meta=META),
    "defaultdict": lambda x: defaultdict(int, x=x, meta=META),
    "UserDict": lambda x: UserDict(x=x, meta=META),
    "UserList": lambda x: UserList([x, META]),
    "ChainMap": lambda x: ChainMap({"x": x}, {"meta": META}),
    "deque": lambda x: deque([x, META], maxlen=5),
    "MappingProxyType": lambda x: MappingProxyType({"x": x, "meta": META}),
    "frozen": lambda x: Frozen(x, META),
    "slotted": lambda x: Slotted(x, META),
    "dataclass": lambda x: Cached(x, META),
    "tagged dict": lambda x: Tagged("tag", x),
    "dict with class attribute": lambda x: Plain(x=x, meta=META),
    "dict of attributes": lambda x: Attributes(x=x, meta=META),
    "sealed dict": lambda x: Sealed(x=x, meta=META),
    "view": lambda x: View(x, META),
    "tagged list": lambda x: Listed("tag", x),
    "BatchEncoding": encoding,
    "ModelOutput": lambda x: BaseModelOutput(last_hidden_state=x),
    "packed": lambda x: pack_sequence(list(x)),
    "graph": lambda x: Graph(x, META),
    "graph with clone": lambda x: ClonedGraph(x, META),
    "moved in place": lambda x: MovedInPlace(x, META),
    "namespace": lambda x: SimpleNamespace(x=x, meta=META, many=[x, x]),
    "anything": Anything,
    "uncopied": Uncopied,
    "slots": Slots,
    "attrs": lambda x: Attrs(x, META),
    "arrays": lambda x: {"x": x, "raw": x.numpy() * 2, "masked": np.ma.masked_array([1, 2], [False, True])},
    "tensor subclass": lambda x: {"x": own(x)},
    "sparse": lambda x: [x, x.to_sparse(), x.to_sparse_csr()],
    "quantized": lambda x: [x, torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)],
    "jagged": lambda x: [x, torch.nested.nested_tensor(list(x), layout=torch.jagged)],
    "mkldnn": lambda x: [x, x.to_mkldnn()],
    "odd tensors": lambda x: [
        x,
        x.to(torch.complex64).conj(),
        x[:, :0],
        x[0, 0],
        x.expand(3, *x.shape),
        x.double(),
        x > 1,
    ],
    "type": lambda x: {"x": x, "class": Graph, "function": own, "dtype": x.dtype, "shape": x.shape},
    "structseq": lambda x: x.max(0),
}


# What the emulator's device does not have; the bridge's own limits are others.
NOT_EMULATED = {"sparse", "quantized", "jagged", "mkldnn", "tensor subclass"}


def described(data: Any) -> Any:
    """Types, values and attributes, all the way down; the objects themselves where nobody should have touched them."""
    if isinstance(data, Tensor):
        on_host = data.device.type == "cpu"
        values = data.detach().cpu()
        values = values.values() if data.is_nested else values.dequantize() if data.is_quantized else values.to_dense()
        attributes = getattr(data, "__dict__", {}) if on_host else {}
        kind = type(data) if on_host else Tensor
        return kind, data.dtype, data.layout, data.requires_grad, values.shape, values.tolist(), described(attributes)
    if isinstance(data, np.ndarray):
        return type(data), data.tolist()
    if data is META or isinstance(data, type) or callable(data):
        return data
    parts: Any = []
    if isinstance(data, Mapping):
        parts = [(name, described(part)) for name, part in data.items()]
    elif isinstance(data, list | tuple | deque | UserList):
        parts = [described(part) for part in data]
    names = [*getattr(data, "__dict__", {}), *getattr(type(data), "__slots__", ())]
    held = {name: described(getattr(data, name)) for name in names if data is not getattr(data, "__dict__", None)}
    extra = getattr(data, "default_factory", None), getattr(data, "maxlen", None)
    return type(data), parts, held, extra, data if isinstance(data, str | bytes | int | float) else None


class Seen(LightningModule):
    """Notes what the step and the hooks get. It has no network."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(("before", described(batch)))
        return batch

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.batch = batch
        self.seen.append(("step", described(batch)))
        if isinstance(batch, BatchEncoding):
            assert batch.encodings is not None
        return batch_idx


class LeftOnHost(Seen):
    """With a hook of the user's for what Lightning cannot move."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.seen.append(("transfer", described(batch)))
        return batch


class Hooks(Callback):
    def on_predict_batch_start(self, t: Any, module: Any, batch: Any, *_: Any) -> None:
        module.seen.append(("start", described(batch)))

    def on_predict_batch_end(self, t: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        module.seen.append(("end", described(batch)))


FLAGS: list[dict[str, Any]] = [
    {},
    {"async_copy": False},
    {"prefetch": 3, "in_flight": 2},
    {"prefetch": 0, "in_flight": 2, "async_copy": False},
    {"prefetch": 2, "in_flight": 0, "defer_hooks": False},
    {"pipelining": False},
]


def outcome(accelerator: Any, kind: type[Seen], make: Callable[[Tensor], Any]) -> Any:
    """What a run shows, by place: predictions, and what each hook saw in its order; or the type of its error."""
    generator = torch.Generator().manual_seed(1)
    batches = [make(torch.rand(2, 3, generator=generator)) for _ in range(3)]
    module = kind()
    ours = trainer(accelerator, callbacks=[Hooks()], limit_predict_batches=3)
    try:
        predictions = ours.predict(module, DataLoader(batches, 1, collate_fn=lambda samples: samples[0]))  # type: ignore[arg-type]
    except Exception as error:
        return type(error), str(error)
    places = ("before", "transfer", "start", "step", "end")
    return predictions, {place: [what for at, what in module.seen if at == place] for place in places}


@pytest.mark.filterwarnings("ignore:.*(quantize_per_tensor|Sparse CSR|NJT)")
@pytest.mark.parametrize("kind", [Seen, LeftOnHost])
@pytest.mark.parametrize("container", CONTAINERS)
def test_steps_and_hooks_get_what_they_get_in_stock(container: str, kind: type[Seen], device: str) -> None:
    if container in NOT_EMULATED and device == "emulator" and kind is Seen:
        pytest.skip("the emulated device has no such tensors")
    make = CONTAINERS[container]
    expected = outcome("cpu", kind, make)
    for flags in FLAGS:
        actual = outcome(HPUInferenceAccelerator(**flags, hpu_graphs=False), kind, make)
        assert repr(actual) == repr(expected), flags
