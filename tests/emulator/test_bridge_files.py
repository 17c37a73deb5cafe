"""Seven Python files of Habana's bridge, unmodified, on the emulator in place of ours.

They are not part of this repository. Set the variable below to a checkout of https://github.com/HabanaAI/gaudi-pytorch-bridge
(tried with 1.19.0), or to its folder `habana_frameworks`, and run this file. Nothing of it is copied: the folder that
takes the place of the emulator's consists of links.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_hpu_infer.emulator import lifecycle

VARIABLE = "LIGHTNING_HPU_INFER_BRIDGE_SOURCE"
FILES = [f"hpu/{name}.py" for name in ("graphs", "streams", "events", "memory", "random")]
FILES += [
    "core/step_closure.py",
    *(f"hpu/metrics/{name}.py" for name in ("__init__", "exceptions", "metrics", "saver")),
]
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(
        VARIABLE not in os.environ, reason=f"set {VARIABLE} to a checkout of gaudi-pytorch-bridge to run it"
    ),
    pytest.mark.timeout(900),
]

PREDICT = """
import json, sys
from pathlib import Path
from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from lightning_hpu_infer.emulator import lifecycle
if sys.argv[2]:
    lifecycle._BRIDGE = sys.argv[2]
from tests.helpers import Net, installed, predict, rows
runs = []
with installed(lazy=sys.argv[1] == "lazy"):
    for flags in json.loads(sys.argv[3]):
        emulator.reset_stats()
        batches = predict(HPUInferenceAccelerator(**flags), Net(), rows(30, 4))
        stats = emulator.stats()
        counts = [stats.captures, stats.captures_failed, stats.replays, stats.compiled_calls, stats.mark_steps]
        runs.append([[batch.tolist() for batch in batches], counts])
    names = [name for name in sys.modules if name.startswith("habana_frameworks")]
    files = sorted(str(Path(sys.modules[name].__file__).resolve()) for name in names)
print(json.dumps([runs, files]))
"""
PYTEST = """
import sys, pytest
from lightning_hpu_infer.emulator import lifecycle
lifecycle._BRIDGE = sys.argv[1]
raise SystemExit(pytest.main(sys.argv[2:]))
"""


def _package() -> Path:
    root = Path(os.environ[VARIABLE]).resolve()
    places = (root / "python_packages/habana_frameworks", root / "habana_frameworks", root)
    found = next((place for place in places if (place / "torch/hpu/graphs.py").is_file()), None)
    assert found is not None, f"{VARIABLE}={root} has no habana_frameworks/torch/hpu/graphs.py"
    return found


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """A folder like the emulator's `bridge`, with links to our files, and to the bridge's where it is about them."""
    ours, theirs, folder = Path(lifecycle._BRIDGE), _package() / "torch", tmp_path / "bridge"
    links = {path.relative_to(ours): path for path in ours.rglob("*.py")}
    del links[Path("habana_frameworks/torch/hpu/metrics.py")]  # a package on the bridge
    links |= {Path("habana_frameworks/torch", name): theirs / name for name in FILES}
    for name, path in links.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path)
    return str(folder)


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PT_HPU_LAZY_MODE"}
    # PyTorch has deprecated a base class of the bridge's streams.
    command = [sys.executable, "-W", "ignore::FutureWarning", "-c", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)


def _predict(mode: str, folder: str, flags: list[dict[str, Any]]) -> tuple[Any, set[str]]:
    done = _python(PREDICT, mode, folder, json.dumps(flags))
    assert done.returncode == 0, done.stderr[-4000:]
    runs, files = json.loads(done.stdout.splitlines()[-1])
    return runs, set(files)


@pytest.mark.parametrize("mode", ["lazy", "eager"])
def test_predictions_and_counts_are_those_on_our_files(mode: str, mixed: str) -> None:
    flags: list[dict[str, Any]] = [{}, {"pipelining": False}, {"hpu_graphs": False}]
    flags += [{"hpu_graphs": "direct", "graph_modules": ["net"]}] if mode == "lazy" else []
    runs, files = _predict(mode, mixed, flags)
    expected, our_files = _predict(mode, "", flags)
    theirs = {str(_package() / "torch" / name) for name in FILES}
    if mode == "eager":  # nothing imports them there
        theirs -= {str(_package() / "torch/hpu/graphs.py")}
    assert theirs <= files
    assert not theirs & our_files
    assert runs == expected
    if mode == "lazy":
        assert [counts[2] > 0 for _, counts in runs] == [True, True, False, True]


def test_the_contract_holds(mixed: str) -> None:
    # Importing the emulator has imported a plugin of pytest's before pytest could.
    ignored = [
        word for name in ("FutureWarning", "pytest.PytestAssertRewriteWarning") for word in ("-W", f"ignore::{name}")
    ]
    done = _python(PYTEST, mixed, "-q", "-p", "no:cacheprovider", *ignored, str(ROOT / "tests/contract"))
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout
