"""The hooks by which the bridge names modules in lazy mode."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_hpu_infer import emulator
from lightning_hpu_infer.emulator import EmulatorConfig, naming
from tests.helpers import Net, installed

BRIDGE = "habana_frameworks.torch.core.torch_overwrites"


class Outer(nn.Module):
    """At module level, so that it can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.first(x))


def _hooks(module: nn.Module) -> list[tuple[str, str]]:
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [(hook.__module__, hook.__name__) for hook in hooks]


BOTH = [(BRIDGE, "_pre_fwd_hook"), (BRIDGE, "_post_fwd_hook")]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the hooks tell the debug function."""
    with installed():
        from habana_frameworks.torch.utils import debug

        names: list[str] = []
        monkeypatch.setattr(debug, "_set_module_name", names.append)
        yield names


def test_every_child_is_named_once(emulated: None) -> None:
    net = Outer()
    names = {path: getattr(module, "custom_name", None) for path, module in net.named_modules()}
    assert names == {"": None, "first": "first", "rest": "rest", "rest.0": "0", "rest.1": "1"}
    for module in net.modules():
        assert _hooks(module) == ([] if module is net else BOTH)
    other = nn.Module()
    other.again = net.first
    other.add_module("more", net.first)
    other.register_module("most", module=net.first)
    assert net.first.custom_name == "first"
    assert _hooks(net.first) == BOTH
    assert list(net.first._forward_hooks_always_called) == list(net.first._forward_hooks)


def test_children_of_lightning_modules_and_containers(emulated: None) -> None:
    assert issubclass(Net, LightningModule)
    module: Any = Net()
    assert (module.net.custom_name, module.net[0].custom_name, _hooks(module.net)) == ("net", "0", BOTH)
    modules = nn.ModuleList([nn.ReLU()])
    modules.append(nn.ReLU())
    named = nn.ModuleDict({"a": nn.ReLU()})
    assert [child.custom_name for child in (*modules, named["a"])] == ["0", "1", "a"]


def test_names_are_paths_while_a_module_runs(names: list[str]) -> None:
    parent = nn.Module()
    parent.net = Outer()
    assert parent.net(torch.ones(1, 2)).shape == (1, 1)
    inside = ["net", "net/first", "net", "net/rest", "net/rest/0", "net/rest", "net/rest/1", "net/rest", "net", ""]
    assert names == inside


def test_an_error_leaves_no_name_behind(names: list[str]) -> None:
    net = Outer()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        net(torch.ones(1, 3))
    assert names == ["first", ""]


def test_no_hooks_in_eager_mode() -> None:
    setattr_, add_module = nn.Module.__setattr__, nn.Module.add_module
    with installed(lazy=False):
        assert (nn.Module.__setattr__, nn.Module.add_module) == (setattr_, add_module)
        net = Outer()
        assert not hasattr(net.first, "custom_name")
        assert _hooks(net.first) == []


def test_uninstall_takes_the_hooks_off() -> None:
    before = (nn.Module.__setattr__, nn.Module.add_module)
    called: list[str] = []
    with installed():
        net = Outer()
        net.first.register_forward_hook(lambda module, args, output: called.append("called"))
        plain = set(vars(nn.ReLU()))
        twin = copy.deepcopy(net)
        wrapped: Any = nn.Module.__setattr__
    assert (nn.Module.__setattr__, nn.Module.add_module) == before
    for module in net.modules():
        assert not {"custom_name", "names_hook"} & set(vars(module))
        assert len(_hooks(module)) == (module is net.first)
        assert not module._forward_hooks_always_called
    assert set(vars(net.rest[0])) == plain
    x = torch.ones(1, 2)
    assert torch.equal(net(x), twin(x))  # the copy still has them
    assert called == ["called"] * 2
    wrapped(net, "late", nn.ReLU())  # through a wrapper that was kept
    assert _hooks(net.late) == []  # type: ignore[arg-type]


def test_a_named_module_is_collected_like_any_other(emulated: None) -> None:
    module = nn.Sequential(nn.ReLU())
    refs: list[Any] = [weakref.ref(module), weakref.ref(module[0])]
    before = len(naming._named)
    del module
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert len(naming._named) < before


def test_copies_pickles_and_state(emulated: None) -> None:
    net = Outer()
    x = torch.ones(1, 2)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
        assert _hooks(twin.first) == BOTH
        assert twin.first.custom_name == "first"
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    assert list(torch.load(file)) == ["first.weight", "first.bias", "rest.1.weight", "rest.1.bias"]


def test_scripted_and_unfinished_modules(emulated: None) -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            self.value = 1
            super().__init__()

    net: Any = nn.Module()
    net.early = Early()
    with pytest.raises(AttributeError, match=r"cannot assign module before Module.__init__\(\) call"):
        nn.Module.__setattr__(nn.Module.__new__(nn.Module), "child", nn.ReLU())
    with pytest.raises(TypeError):
        net.early = 3  # a child stays a module
    assert _hooks(net.early) == BOTH


def test_a_second_installation_names_anew() -> None:
    net = nn.ReLU()
    parent = nn.Module()
    for name in ("one", "two"):
        emulator.install(EmulatorConfig())
        try:
            setattr(parent, name, net)
            assert net.custom_name == name
            assert pickle.loads(pickle.dumps(parent)) is not None
        finally:
            emulator.uninstall()
