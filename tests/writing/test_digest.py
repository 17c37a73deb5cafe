"""Digests are the same where the same runs, and others where something else does."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_hpu_infer.writing.digest import _canonical, code_of, digest_of


def loaded(source: str, path: Path | None = None) -> Any:
    """The function `f` of a script in a file; without one, as from standard input."""
    if path is not None:
        path.write_text(source)
    names: dict[str, Any] = {"__name__": "loaded"}
    exec(compile(source, "<stdin>" if path is None else str(path), "exec", dont_inherit=True), names)
    return names["f"]


CHANGES = {
    "constant": ("def f(x): return x * 2", "def f(x): return x * 3"),
    "type of a constant": ("def f(x): return x * 2", "def f(x): return x * 2.0"),
    "constant inside": ("def f(x): return [y * 2 for y in x]", "def f(x): return [y * 3 for y in x]"),
    "constant of a function inside": (
        "def f(x): return (lambda y: y * 2)(x)",
        "def f(x): return (lambda y: y * 3)(x)",
    ),
    "members of a set": ('def f(x): return x in {"a", "b"}', 'def f(x): return x in {"a", "c"}'),
    "lambda": ("f = lambda x: x * 2", "f = lambda x: x * 3"),
    "lambda in a call": ("f = dict(\n    a=lambda x: x * 2,\n)['a']", "f = dict(\n    a=lambda x: x * 3,\n)['a']"),
    "default": ("K = 2\ndef f(x, k=K): return x * k", "K = 3\ndef f(x, k=K): return x * k"),
    "keyword default": ("K = 2\ndef f(x, *, k=K): return x * k", "K = 3\ndef f(x, *, k=K): return x * k"),
    "variable of the function around": (
        "def g(k): return lambda x: x * k\nf = g(2)",
        "def g(k): return lambda x: x * k\nf = g(3)",
    ),
    "function in a variable": (
        "def g(h): return lambda x: h(x)\nf = g(lambda x: x * 2)",
        "def g(h): return lambda x: h(x)\n\n\nf = g(lambda x: x * 3)",
    ),
    "builtin in a variable": (
        "def g(h): return lambda x: h(x)\nf = g(min)",
        "def g(h): return lambda x: h(x)\nf = g(max)",
    ),
    "decorator": (
        "import torch\n@torch.autocast('cpu', torch.bfloat16)\ndef f(x): return x",
        "import torch\n@torch.no_grad()\ndef f(x): return x",
    ),
    "decorator of the user's": (
        "from functools import wraps\ndef g(h):\n    @wraps(h)\n    def call(x): return h(x) * 2\n    return call\n"
        "@g\ndef f(x): return x",
        "from functools import wraps\ndef g(h):\n    @wraps(h)\n    def call(x): return h(x) * 3\n    return call\n"
        "@g\ndef f(x): return x",
    ),
    "partial's argument": (
        "from functools import partial\ndef g(k, x): return x * k\nf = partial(g, 2)",
        "from functools import partial\ndef g(k, x): return x * k\nf = partial(g, 3)",
    ),
    "partial's keyword": (
        "from functools import partial\ndef g(x, k): return x * k\nf = partial(g, k=[2, {'a': 2}])",
        "from functools import partial\ndef g(x, k): return x * k\nf = partial(g, k=[2, {'a': 3}])",
    ),
    "partial's function": (
        "from functools import partial\ndef g(x, k): return x * k\nf = partial(g, k=2)",
        "from functools import partial\ndef g(x, k): return x + k\nf = partial(g, k=2)",
    ),
    "method": (
        "class C:\n    def f(self, x): return x * 2\nf = C().f",
        "class C:\n    def f(self, x): return x * 3\nf = C().f",
    ),
    "object that is called": (
        "class C:\n    def __call__(self, x): return x * 2\nf = C()",
        "class C:\n    def __call__(self, x): return x * 3\nf = C()",
    ),
    "constant of its class": (
        "class C:\n    k = 2\n    def __call__(self, x): return x * self.k\nf = C()",
        "class C:\n    k = 3\n    def __call__(self, x): return x * self.k\nf = C()",
    ),
    "class": (
        "class f:\n    def __init__(self, x): self.x = x * 2",
        "class f:\n    def __init__(self, x): self.x = x * 3",
    ),
    "cached function": (
        "from functools import lru_cache\n@lru_cache\ndef f(x): return x * 2",
        "from functools import lru_cache\n@lru_cache\ndef f(x): return x * 3",
    ),
    "what is caught": (
        "def f(x):\n    try:\n        x += 1\n        return x\n    except E: return 2",
        "def f(x):\n    x += 1\n    try:\n        return x\n    except E: return 2",
    ),
}


@pytest.mark.parametrize("where", ["file", "stdin"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_runs_is_seen(tmp_path: Path, change: str, where: str) -> None:
    before, after = (
        code_of(loaded(source, tmp_path / f"{number}.py" if where == "file" else None))
        for number, source in enumerate(CHANGES[change])
    )
    assert before != after
    assert ("bytecode of Python 3." in before) == (where == "stdin")


@pytest.mark.parametrize("where", ["file", "stdin"])
@pytest.mark.parametrize("name", CHANGES)
def test_the_same_code_elsewhere_is_the_same(tmp_path: Path, name: str, where: str) -> None:
    source = CHANGES[name][0]
    others = (source, f"# A comment.\n\nOTHER = 1\n{source}  # and another\n")
    paths = [tmp_path / f"{number}.py" if where == "file" else None for number in range(2)]
    first, second = (code_of(loaded(*pair)) for pair in zip(others, paths, strict=True))
    assert first == second


CALL = """
def call(**options): return options["post"]
f = call(post=lambda x: x * 2{rest})
"""


@pytest.mark.parametrize("rest", [", depth=2", ",\n    depth=2,\n", ", path='other')\nother = call(post=None"])
def test_what_stands_beside_a_lambda_does_not_matter(tmp_path: Path, rest: str) -> None:
    before = code_of(loaded(CALL.format(rest=""), tmp_path / "before.py"))
    assert code_of(loaded(CALL.format(rest=rest), tmp_path / "after.py")) == before


def test_layout_does_not_matter(tmp_path: Path) -> None:
    plain = "def f(x, y):\n    if x: return [x, y + 1]\n    return {'a': x}\n"
    laid_out = """
    def f(
        x,
        y,
    ):
        # Why it does so.
        if x:
            return [
                x,
                (y + 1),
            ]

        return {"a": x}
    """
    assert code_of(loaded(plain, tmp_path / "a.py")) == code_of(loaded(dedent(laid_out), tmp_path / "b.py"))


def test_a_file_that_was_edited_after_it_was_loaded_is_not_what_runs(tmp_path: Path) -> None:
    path = tmp_path / "edited.py"
    function = loaded("def f(x): return x * 2", path)
    assert "Python" not in code_of(function)
    path.write_text("def f(x): return x * 300")
    running = code_of(function)
    assert "bytecode of Python" in running
    assert running != code_of(loaded(path.read_text(), path))


def test_functions_that_hold_themselves_and_empty_variables_have_a_digest() -> None:
    def count(x: int) -> int:
        return 0 if x == 0 else count(x - 1) + later

    assert code_of(count) == code_of(count)
    later = 1
    own: list[Any] = []
    own.append(own)
    assert digest_of(own) == digest_of(own)


SCRIPT = """
import sys
from functools import partial
from lightning_hpu_infer.writing.digest import code_of, digest_of
names = {}
exec('def f(x, y=frozenset({"a", "b", "c"})): return x in {"d", "e", "f"}', names)
print(code_of(partial(names["f"], {"g", "h", "i"}, print, object(), key=object)), digest_of({"a": {"b", "c"}}))
"""


@pytest.mark.usefixtures("path_without_vision")
def test_it_is_the_same_in_every_process(capsys: pytest.CaptureFixture[str]) -> None:
    exec(SCRIPT, {})
    here = capsys.readouterr().out
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout == here


def test_the_source_has_the_same_digest_in_all_versions_of_python() -> None:
    source = "def f(x: int, *, k=None) -> str:\n    return f'{x!r:>{k}}' if x[1:, 2] else (lambda: ...)\n"
    expected = """
    Module(body=[FunctionDef(name='f', args=arguments(args=[arg(arg='x', annotation=Name(id='int', ctx=Load()))],
    kwonlyargs=[arg(arg='k')], kw_defaults=[Constant()]), body=[Return(value=IfExp(test=Subscript(value=Name(id='x',
    ctx=Load()), slice=Tuple(elts=[Slice(lower=Constant(value=1)), Constant(value=2)], ctx=Load()), ctx=Load()),
    body=JoinedStr(values=[FormattedValue(value=Name(id='x', ctx=Load()), conversion=114,
    format_spec=JoinedStr(values=[Constant(value='>'), FormattedValue(value=Name(id='k', ctx=Load()),
    conversion=-1)]))]), orelse=Lambda(args=arguments(), body=Constant(value=Ellipsis))))], returns=Name(id='str',
    ctx=Load()))])
    """
    assert _canonical(ast.parse(source)) == " ".join(expected.split())


@dataclass
class Pair:
    a: Any
    b: Any = 0


VALUES: list[Callable[[], Any]] = [
    lambda: 1,
    lambda: 1.0,
    lambda: True,
    lambda: "1",
    lambda: [1],
    lambda: (1,),
    lambda: {"a": 1},
    lambda: {"a": 2},
    lambda: {1, 2},
    lambda: Pair(1),
    lambda: Pair(2),
    lambda: np.zeros(3),
    lambda: np.ones(3),
    lambda: np.ones(3, np.float32),
    lambda: np.array(["a", None], object),
    lambda: torch.zeros(3),
    lambda: torch.ones(3),
    lambda: torch.ones(3, dtype=torch.bfloat16),
    lambda: torch.ones(3, 1),
    lambda: torch.ones(2, dtype=torch.complex64).conj() * 1j,
    lambda: torch.tensor(1.0),
    lambda: torch.tensor([0.0, 1.0]).to_sparse(),
    lambda: torch.tensor([0.0, 2.0]).to_sparse(),
    lambda: torch.tensor([1.0, 0.0]).to_sparse(),
    lambda: torch.eye(2).to_sparse_csr(),
    lambda: (torch.eye(2) * 2).to_sparse_csr(),
    lambda: torch.eye(2).to_sparse_csc(),
    lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    lambda: torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
    lambda: torch.ones(2, device="meta"),
    lambda: nn.UninitializedParameter(),
    lambda: nn.Softmax(-1),
    lambda: nn.BatchNorm1d(2),
    lambda: min,
    lambda: max,
    lambda: torch.relu,
    lambda: int,
    object,
    lambda: torch.float32,
    lambda: partial(min, 1),
    lambda: partial(min, 2),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse", "ignore:.*quantiz")
def test_values_have_digests_of_their_own() -> None:
    digests = [digest_of(make()) for make in VALUES]
    assert digests == [digest_of(make()) for make in VALUES]
    same = [(a, b) for a in range(len(digests)) for b in range(a) if digests[a] == digests[b]]
    assert same == []


def test_a_compiled_function_is_the_same_and_a_wrapped_one_is_not(tmp_path: Path) -> None:
    plain = loaded("def f(x): return x", tmp_path / "plain.py")
    assert code_of(torch.compile(plain, backend="eager")) == code_of(plain)
    assert code_of(torch.autocast("cpu")(plain)) != code_of(plain)

    @wraps(plain)
    def doubled(x: Any) -> Any:
        return plain(x) * 2

    assert code_of(doubled) != code_of(plain)
