"""The networks that programs are made of: what a call depends on, and what it leaves behind."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.fuzz.listeners import Fault

WIDTH = 3
"""What each network gives per row."""


class Body(nn.Module):
    """Parts that networks share; each gives (rows, 3) for (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, WIDTH)
        self.build()

    def build(self) -> None: ...

    def forward(self, x: Tensor) -> Any:
        return self.last(self.middle(self.first(x).relu()))

    def middle(self, h: Tensor) -> Tensor:
        return h


class Conv(Body):
    def build(self) -> None:
        self.conv = nn.Conv1d(1, 2, 3, padding=1)

    def middle(self, h: Tensor) -> Tensor:
        return self.conv(h[:, None]).sum(1)


class Lstm(Body):
    def build(self) -> None:
        self.lstm = nn.LSTM(1, 2, batch_first=True)

    def middle(self, h: Tensor) -> Tensor:
        return h * self.lstm(h[..., None])[0].sum(-1)


class Norm(Body):
    def build(self) -> None:
        self.norm = nn.BatchNorm1d(8)

    def middle(self, h: Tensor) -> Tensor:
        # More than one value per channel, whatever the batch.
        return self.norm(torch.stack([h, h * 2, h - 1], -1)).sum(-1)


class Drop(Body):
    """The mean of many draws, which differs little from run to run."""

    def build(self) -> None:
        self.drop = nn.Dropout(0.5)

    def middle(self, h: Tensor) -> Tensor:
        return h * self.drop(h.new_ones(1 << 16)).mean()


class Embedding(Body):
    def build(self) -> None:
        self.table = nn.Embedding(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table((x * 3).long() % 10).mean(1))


class Attention(Body):
    def build(self) -> None:
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def middle(self, h: Tensor) -> Tensor:
        h = h[:, None] * torch.arange(1, 4, device=h.device)[:, None]
        return self.attention(h, h, h, need_weights=False)[0].sum(1)


class Heads(Body):
    def build(self) -> None:
        self.other = nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Any:
        h = self.first(x).tanh()
        return {"y": self.last(h), "other": self.other(h)}


class Counter(Body):
    """A number that each call changes."""

    calls = 0

    def middle(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * (self.calls % 3)


class History(Body):
    """A tensor that each call replaces."""

    state: Tensor | None = None

    def middle(self, h: Tensor) -> Tensor:
        mean = h.mean(0)
        self.state = mean if self.state is None else (self.state + mean) / 2
        return h + self.state


class Memories(Body):
    """A list that each call appends to."""

    def build(self) -> None:
        self.kept: list[Tensor] = []

    def middle(self, h: Tensor) -> Tensor:
        self.kept.append(h.mean(0))
        del self.kept[:-2]
        return h + self.kept[0]


class Running(Body):
    """A buffer that each call changes in place."""

    total: Tensor

    def build(self) -> None:
        self.register_buffer("total", torch.zeros(8))

    def middle(self, h: Tensor) -> Tensor:
        self.total.mul_(0.5).add_(h.mean(0))
        return h + self.total


class Replaced(Running):
    """A buffer that each call replaces."""

    def middle(self, h: Tensor) -> Tensor:
        self.total = self.total * 0.5 + h.mean(0)
        return h + self.total


class Features(Body):
    """What a call puts aside, for the step to read."""

    def build(self) -> None:
        self.saved: dict[str, Tensor] = {}

    def middle(self, h: Tensor) -> Tensor:
        self.saved["h"] = h[:, :WIDTH]
        return h


class Branch(Body):
    """Asks the device what to do."""

    def middle(self, h: Tensor) -> Tensor:
        return h * 2 if h.sum() > h.numel() * 0.3 else h - 1


class Catches(Body):
    """Fails inside at every third call, and goes on."""

    calls = 0

    def middle(self, h: Tensor) -> Tensor:
        try:
            return self.uncertain(h)
        except ArithmeticError:
            return h * 0

    def uncertain(self, h: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 3 == 2:
            raise ArithmeticError("every third")
        return h


class Random(Body):
    """Draws numbers on the host, as augmentation at test time does."""

    def middle(self, h: Tensor) -> Tensor:
        return h * float(torch.rand(1)) + torch.rand(8).to(h.device) + random.random() * float(np.random.rand())


class Compiled(Body):
    def build(self) -> None:
        self.compiled = torch.compile(nn.Linear(8, 8), backend="eager")

    def middle(self, h: Tensor) -> Tensor:
        return self.compiled(h)


class Blocks(Body):
    """Parts that are alike, of which some are left out."""

    def build(self) -> None:
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.depth = 3

    def middle(self, h: Tensor) -> Tensor:
        for block in self.blocks[: self.depth]:
            h = h + block(h).tanh()
        self.depth = 5 - self.depth
        return h


class Cached(Body):
    """A table that is made when it is first needed, and whenever it is too short."""

    table: Tensor | None = None

    def middle(self, h: Tensor) -> Tensor:
        if self.table is None or len(self.table) < len(h):
            self.table = torch.arange(len(h), device=h.device, dtype=h.dtype)[:, None]
        return h + self.table[: len(h)]


class HostScalar(Body):
    """A host scalar that the network reads."""

    def build(self) -> None:
        self.scale = torch.tensor(1.5)

    def middle(self, h: Tensor) -> Tensor:
        self.scale += 0.5
        return h * self.scale


class Identity(Body):
    def forward(self, x: Tensor) -> Tensor:
        return x


NETWORKS: dict[str, type[Body]] = {
    "linear": Body,
    "conv": Conv,
    "lstm": Lstm,
    "norm": Norm,
    "dropout": Drop,
    "embedding": Embedding,
    "attention": Attention,
    "heads": Heads,
    "counter": Counter,
    "history": History,
    "memories": Memories,
    "running": Running,
    "replaced": Replaced,
    "features": Features,
    "branch": Branch,
    "catches": Catches,
    "random": Random,
    "compiled": Compiled,
    "blocks": Blocks,
    "cached": Cached,
    "host_scalar": HostScalar,
    "identity": Identity,
}


class Network(nn.Module):
    """A body, and what changes change: a number, a buffer, a second body."""

    offset: Tensor

    def __init__(self, body: str, fault: Fault | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.spare = NETWORKS[body](), nn.Linear(4, WIDTH)
        self.factor, self.use_spare, self.fault = 1.0, False, fault
        self.register_buffer("offset", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        if self.fault is not None:
            self.fault.pass_by("network")
        if self.use_spare:
            return self.spare(x)
        y = self.body(x)
        if isinstance(y, dict):
            return {name: each * self.factor + self.offset for name, each in y.items()}
        return y if isinstance(self.body, Identity) else y * self.factor + self.offset
