"""An earlier run's predictions are gone on with only if they are of the same weights, step and dataset."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, PredictionWriter
from tests.helpers import assert_equal, trainer
from tests.writing.predicting import COUNT, Numbers, Scores, expected, predict, stop, written


class OtherStep(Scores):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"scores": self.net(batch["row"]) * 2, "row": batch["row"][:, 0]}


class SameStep(Scores):
    """Laid out in another way, and of another name."""

    predict_step = Scores.predict_step


class Scaled(Scores):
    """With a buffer and a weight that are not in the state dictionary."""

    def __init__(self, fails_at: int | None = None, *, buffer: float = 2.0, weight: float = 2.0) -> None:
        super().__init__(fails_at)
        self.register_buffer("scale", torch.tensor(buffer), persistent=False)
        self.weight = nn.Parameter(torch.tensor(weight))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = super().state_dict(*args, **kwargs)
        found.pop("weight", None)
        return found

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"scores": self.net(batch["row"]) * self.scale * self.weight, "row": batch["row"][:, 0]}


def rename(output: Any, name: str) -> Any:
    return {"scores": output["scores"], name: output["row"]}


@pytest.mark.parametrize("other", [partial(Scaled, buffer=3.0), partial(Scaled, weight=3.0)])
def test_what_is_not_in_the_state_dictionary_counts(tmp_path: Path, other: Any) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        predict(tmp_path, Scaled(2), DataLoader(Numbers(), 4))
    with pytest.raises(ValueError, match=r"weights and buffers outside of the state dictionary was .* and is"):
        predict(tmp_path, other(), DataLoader(Numbers(), 4))
    predict(tmp_path, Scaled(), DataLoader(Numbers(), 4))
    assert len(written(tmp_path)) == COUNT


def test_what_is_bound_in_postprocess_counts(tmp_path: Path) -> None:
    stop(tmp_path, DataLoader(Numbers(), 4), 2, postprocess=partial(rename, name="row"))
    with pytest.raises(ValueError, match=r'postprocess was "rename .* and is "rename'):
        predict(tmp_path, Scores(), DataLoader(Numbers(), 4), postprocess=partial(rename, name="other"))
    predict(tmp_path, Scores(), DataLoader(Numbers(), 4), postprocess=partial(rename, name="row"))
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))


def test_an_option_beside_a_lambda_does_not_count(tmp_path: Path) -> None:
    stop(tmp_path, DataLoader(Numbers(), 4), 2, postprocess=lambda output: dict(output))
    predict(tmp_path, Scores(), DataLoader(Numbers(), 4), postprocess=lambda output: dict(output), in_flight=2)
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))


class Lazy(LightningModule):
    """Has weights that the first batch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LazyLinear(3)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch["row"])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_predicts_with_a_writer(tmp_path: Path) -> None:
    def run(*callbacks: Any) -> Any:
        torch.manual_seed(0)
        return trainer("cpu", list(callbacks)).predict(Lazy(), DataLoader(Numbers(), 4))

    assert_equal(run(PredictionWriter(tmp_path)), run())


@pytest.mark.parametrize(
    ("module", "count", "flags", "name"),
    [
        (partial(Scores, seed=1), COUNT, {}, "weights"),
        (OtherStep, COUNT, {}, "predict_step"),
        (Scores, COUNT + 1, {}, "dataset lengths"),
        (Scores, COUNT, {"postprocess": dict}, "postprocess"),
    ],
)
def test_predictions_of_another_run_are_not_gone_on_with(
    tmp_path: Path, module: Any, count: int, flags: dict[str, Any], name: str
) -> None:
    stop(tmp_path, DataLoader(Numbers(), 4), 2)
    before = written(tmp_path)
    with pytest.raises(ValueError, match=rf"of another run: {name} was .* and is .*`overwrite=True`"):
        predict(tmp_path, module(), DataLoader(Numbers(count), 4), **flags)
    assert written(tmp_path) == before
    writer = PredictionWriter(tmp_path, overwrite=True)
    predict(tmp_path, module(), DataLoader(Numbers(count), 4), writer=writer, **flags)
    assert len(written(tmp_path)) == count


def test_the_same_step_of_another_class_is_gone_on_with(tmp_path: Path) -> None:
    stop(tmp_path, DataLoader(Numbers(), 4), 2)
    predict(tmp_path, SameStep(), DataLoader(Numbers(), 4))
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))


def test_the_step_of_a_script_is_that_of_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(tmp_path, DataLoader(Numbers(), 4), 2)
    monkeypatch.setattr(Scores.predict_step, "__module__", "__main__")
    predict(tmp_path, Scores(), DataLoader(Numbers(), 4))
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))


def test_without_resume_predictions_are_left_alone(tmp_path: Path) -> None:
    stop(tmp_path, DataLoader(Numbers(), 4), 2)
    with pytest.raises(FileExistsError, match="holds predictions of 8 samples"):
        predict(tmp_path, Scores(), DataLoader(Numbers(), 4), writer=PredictionWriter(tmp_path, resume=False))


def test_other_types_are_refused_in_words(tmp_path: Path) -> None:
    class Widens(Callback):
        """Comes before the writer."""

        def on_predict_batch_end(self, t: Any, m: Any, outputs: Any, *_: Any) -> None:
            outputs["row"] = outputs["row"].long()

    stop(tmp_path, DataLoader(Numbers(), 4), 2)
    ours = trainer(HPUInferenceAccelerator(), [Widens(), PredictionWriter(tmp_path)])
    with pytest.raises(ValueError, match=r"(?s)batch 2 of dataloader 0.*'row'|'row'.*batch 2 of dataloader 0"):
        ours.predict(Scores(), DataLoader(Numbers(), 4))
