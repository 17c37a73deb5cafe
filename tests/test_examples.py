"""Each example, on the CPU and on the emulated HPU: it compares itself with stock Lightning, and says what it found."""

import importlib
import logging
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
HERE = {"classify_images", "generate", "read_text", "speaker_embeddings", "transcribe"}
RUNS = 2
"""Of each Trainer, once nothing is captured anymore."""
AGREE = "all results agree with stock Lightning's"

Run = Callable[..., str]


def imported(name: str) -> Any:
    """An example, or None if the extra `[examples]` is not installed."""
    try:
        return importlib.import_module(f"examples.{name}")
    except ImportError:
        return None


# Here and not in a test, since examples set environment variables.
MODULES = {name: imported(name) for name in sorted(HERE)}


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, device: str
) -> Iterator[Run]:
    """Runs an example in this process and returns what it prints."""
    logger = logging.getLogger("lightning.pytorch")
    caplog.set_level(logger.level, logger.name)  # examples change it, and the fixture restores what it was
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are small, and threads that wait for each other spin

    def call(name: str, *arguments: str) -> str:
        if (module := MODULES[name]) is None:
            pytest.skip("needs the extra `[examples]`")
        monkeypatch.setattr(sys, "argv", [module.__file__, *arguments])
        monkeypatch.setenv("COLUMNS", "160")  # as wide as the table
        module.main()
        return capsys.readouterr().out

    yield call
    torch.set_num_threads(threads)


def counted(printed: str) -> dict[str, tuple[int, int]]:
    """Captures and replays of each technique in the table; none where the device is the CPU."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    return {row[0]: (int(row[4]), int(row[5])) for row in rows if len(row) == 7 and row[4].isdigit()}


def number(pattern: str, printed: str) -> float:
    found = re.search(pattern, printed)
    assert found is not None, printed
    return float(found[1])


def few_lengths_come_again(counts: dict[str, tuple[int, int]]) -> None:
    """A graph is captured for a shape that comes twice: among batches of any length there is none."""
    assert counts["all together"] == (0, 0)
    captures, replays = counts["and buckets"]
    assert 0 < captures <= 4
    assert replays > 0


def test_transcribe(run: Run, device: str) -> None:
    printed = run("transcribe")
    assert AGREE in printed
    assert number(r"word error rate (\S+)", printed) < 0.2
    if device == "emulator":
        few_lengths_come_again(counted(printed))


# What the emulator needs ten seconds for, most of them to trace.
seldom = pytest.mark.parametrize("device", ["cpu", pytest.param("emulator", marks=pytest.mark.full)], indirect=True)


@seldom
def test_read_text(run: Run, device: str) -> None:
    printed = run("read_text", "--lines", "12", "--batch-size", "2")
    assert AGREE in printed
    assert number(r"character error rate (\S+)", printed) < 0.05
    if device == "emulator":
        few_lengths_come_again(counted(printed))


@seldom
def test_classify_images(run: Run, device: str) -> None:
    examples = MODULES["classify_images"]
    photos = [str(photo) for photo in examples.samples() if photo.stem == "grace_hopper"] if examples else []
    printed = run("classify_images", *photos, "--batch-size", "4")
    assert AGREE in printed
    assert "grace_hopper.jpg: military uniform" in printed
    if device == "emulator":
        counts = counted(printed)
        captures, replays = counts["all together"]
        assert captures == 1
        assert counts["and pad_batch"] == (1, replays + RUNS)  # with the short batch of each run


def test_generate(run: Run, device: str) -> None:
    """The second run of a Trainer replays the graphs of the first: also that of a cache which begins anew."""
    printed = run("generate", "--prompts", "8", "--tokens", "6")
    assert AGREE in printed
    assert "nothing was captured" not in printed
    if device == "emulator":
        captures, replays = counted(printed)["all together"]
        assert captures == 2  # for the prompt and for each token after it
        assert replays > 20


def test_an_example_that_is_too_short_for_graphs_says_so(run: Run, device: str) -> None:
    printed = " ".join(run("generate", "--prompts", "2", "--tokens", "3").split())
    said = "nothing was captured in graphs and all together: no shape came again often enough" in printed
    assert said == (device == "emulator")


@seldom
def test_speaker_embeddings(run: Run, device: str) -> None:
    printed = run("speaker_embeddings", "--clips", "8", "--batch-size", "4")
    assert AGREE in printed


WRONG = [
    "classify_images setup.cfg",
    "classify_images photo.lost",
    "generate --prompts 0",
    "generate --tokens -1",
    "read_text --lines 0",
    "speaker_embeddings --clips 0",
    "speaker_embeddings --weights lost",
    "transcribe clip.lost",
    "transcribe setup.cfg",
    "transcribe --weights lost",
    "transcribe --weights docs",
]


@pytest.mark.parametrize("command", WRONG)
def test_wrong_input_is_an_error_of_the_command_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *arguments = command.split()
    if (module := MODULES[name]) is None:
        pytest.skip("needs the extra `[examples]`")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        module.main()
    assert exit_.value.code == 2
    assert f"{name}.py: error: " in capsys.readouterr().err


EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "compare")


@pytest.mark.parametrize("name", EXAMPLES)
def test_usage_names_the_one_form_in_which_each_example_is_started(name: str) -> None:
    usage = (ROOT / "examples" / f"{name}.py").read_text().partition('"""')[2].partition('"""')[0]
    commands = [line for line in usage.splitlines() if line.startswith("    python")]
    assert commands
    assert [line for line in commands if f"python -m examples.{name}" not in line] == []


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"write_and_resume"}))
def test_without_its_extra_an_example_says_in_one_line_how_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = (ROOT / "examples" / f"{name}.py").read_text()
    block = re.search(r'^with needs\("(.+)", __name__\):\n((?:    .*\n)+)', source, re.MULTILINE)
    assert block is not None
    optional = re.findall(r"^    (?:from|import) (\w+)", block[2], re.MULTILINE)
    for variable in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(variable, "1")
    for lost in optional:
        monkeypatch.setitem(sys.modules, lost, None)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf".*{optional[0]}.*: pip install '\.\[{block[1]}\]'\n", said)


@pytest.mark.full
@pytest.mark.parametrize("name", ["ray_data", "spark_predict"])
def test_without_its_extra_an_example_has_help_and_names_the_extra(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for lost in ("ray", "pyspark"):
        (tmp_path / f"{lost}.py").write_text(f"raise ModuleNotFoundError('No module named {lost}')")
    for arguments, code, said in ((["--help"], 0, "usage:"), ([], 2, "pip install '.[demo,")):
        command = [sys.executable, "-m", f"examples.{name}", *arguments]
        paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, cwd=ROOT, env=paths, capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == code, done.stderr
        assert said in done.stdout + done.stderr


def test_a_command_of_the_page() -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "examples.generate", "--prompts", "4", "--tokens", "2"]
    environment = os.environ | {"LIGHTNING_HPU_INFER_EMULATOR": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "emulated HPU" in done.stdout
    assert AGREE in done.stdout


def test_every_example_is_on_the_page_and_tested() -> None:
    examples = set(EXAMPLES)
    page = (ROOT / "examples" / "README.md").read_text()
    assert set(re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\) \|", page, re.MULTILINE)) == examples
    assert {f"test_{name}" for name in HERE} <= set(globals())
    others = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != Path(__file__).name)
    assert [name for name in examples - HERE if not re.search(rf"\b{name}\b", others)] == []
