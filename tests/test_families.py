"""Models as users bring them, through `trainer.predict` with everything on: equal to stock, with so many captures."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, PadSpec, emulator
from tests.contract.models import MODELS
from tests.helpers import predict

embed = pytest.importorskip("examples.embed_sentences", exc_type=ImportError)  # sets environment variables
demo = pytest.importorskip("examples.demo", exc_type=ImportError)
pytestmark = pytest.mark.usefixtures("emulated")

FULL, SHORT = 6, 2


class Classifier(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        output = self.net(**batch)
        return output if isinstance(output, torch.Tensor) else output.logits


def family(name: str) -> tuple[Classifier, DataLoader[Any]]:
    """A model with random weights, and batches of four rows or more, of which the last ones have one row less."""
    torch.manual_seed(0)
    net, inputs = MODELS[name]()
    inputs = {key: torch.cat([value, value]) for key, value in inputs.items()}
    batches = [{key: value.roll(i, 0) for key, value in inputs.items()} for i in range(FULL)]
    batches += [{key: value[:-1] for key, value in batches[i].items()} for i in range(SHORT)]
    return Classifier(net), DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("pad_batch", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_like_stock_with_one_capture_per_shape(name: str, pad_batch: bool) -> None:
    module, loader = family(name)
    expected = predict("cpu", copy.deepcopy(module), loader)
    emulator.reset_stats()
    # By name: True would leave out models that so few batches do not pay for.
    predictions = predict(HPUInferenceAccelerator(hpu_graphs="hpu_graph", pad_batch=pad_batch), module, loader)
    torch.testing.assert_close(predictions, expected, atol=1e-5, rtol=1e-4)
    # The shorter batches: the first runs plainly, the second is captured; or both use the larger graph.
    assert emulator.stats().captures == (1 if pad_batch else 2)


def test_minilm_on_real_sentences_with_a_graph_per_bucket() -> None:
    """Sentences of Python's documentation. In their own order each batch has a long one, in order of length not."""
    sentences = embed.sentences_of("\n\n".join(topics.values()))[:96]
    tokenizer = embed.AutoTokenizer.from_pretrained(embed.get_model_path())

    def collate(batch: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(batch, padding=True, truncation=True, max_length=64, return_tensors="pt"))

    module = embed.SentenceEmbedder()
    loader: DataLoader[Any] = DataLoader(sentences, batch_size=8, collate_fn=collate)
    expected = predict("cpu", module, loader)
    cases: tuple[tuple[dict[str, Any], int], ...] = (({}, 1), ({"group_by_length": len}, 2))
    for flags, captures in cases:
        emulator.reset_stats()
        ours = HPUInferenceAccelerator(
            hpu_graphs="hpu_graph", bucket_lengths=[32, 64], pad_spec=PadSpec.tokenizer(), **flags
        )
        predictions = predict(ours, module, loader)
        torch.testing.assert_close(predictions, expected, atol=1e-4, rtol=1e-3)
        assert emulator.stats().captures == captures


@pytest.mark.full
def test_the_sentence_example_runs() -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "examples.embed_sentences", "--limit", "48", "--batch-size", "8", "--length", "16"]
    environment = os.environ | {"LIGHTNING_HPU_INFER_EMULATOR": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110, env=environment, cwd=root)
    assert run.returncode == 0, run.stderr
    assert "all results agree with stock Lightning's" in run.stdout
    # Technique, first, then, per second, captures, replays.
    rows = [line.split("│")[1:7] for line in run.stdout.splitlines() if line.startswith("│")]
    counted = {name.strip(): (captures.strip(), replays.strip()) for name, _, _, _, captures, replays in rows}
    assert counted == {
        "stock Lightning": ("", ""),
        "stock order": ("0", "0"),
        "graphs": ("1", "11"),
        "async copies": ("0", "0"),
        "pipelining": ("0", "0"),
        "all together": ("1", "11"),
    }


def test_the_demo_runs(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    options = ["--sentences", "16", "--rounds", "1", "--pictures", str(tmp_path)]
    command = [sys.executable, "-m", "examples.demo", *options]
    environment = os.environ | {"COLUMNS": "160"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110, env=environment, cwd=root)
    assert run.returncode == 0, run.stderr
    assert "All embeddings are equal, in the dataset's order." in run.stdout
    assert "All predictions are equal." in run.stdout
    assert all((tmp_path / name / "timeline.png").exists() for name in ("stock-order", "all-together"))
    arms = [line.split("│")[1].strip() for line in run.stdout.splitlines() if line.startswith("│")]
    assert arms[-5:] == ["stock order", "HPU graphs", "async copies", "pipelining", "all together"]


@pytest.mark.parametrize("arguments", [["--sentences", "0"], ["--rounds", "0"], ["--rounds", "x"]])
def test_wrong_numbers_are_an_error_of_the_demos_command_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit):
        demo.main()
    assert f"argument {arguments[0]}: " in capsys.readouterr().err
