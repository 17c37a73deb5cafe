"""Rule 2: end hooks run late only where that makes no difference; else they see what they see in stock Lightning."""

import io
import logging
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BasePredictionWriter, LambdaCallback, ProgressBar, TQDMProgressBar

from lightning_hpu_infer import HPUInferenceAccelerator
from lightning_hpu_infer._lightning import PredictionLoop
from tests.dependence import assert_hooks_are_stocks, of_dicts, of_rows
from tests.helpers import Net, assert_equal, rows, trainer

FLAGS: list[dict[str, Any]] = [
    {},
    {"in_flight": 4, "prefetch": 3},
    {"pipelining": "auto"},
    {"hpu_graphs": False},
    {"async_output": True},
    {"defer_hooks": False},
]
LATE = "end hooks run right after each step"


class Notes:
    """What happened, in order. Nobody sees that it is changed."""

    def __init__(self) -> None:
        self.text = io.StringIO()

    def put(self, note: str) -> None:
        self.text.write(f" {note}")

    def all(self) -> list[str]:
        return self.text.getvalue().split()


class Steps(Net):
    """Notes its steps where others note their end hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.notes = Notes()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.notes.put(f"s{batch_idx}")
        return self.net(batch)


class NotingWriter(BasePredictionWriter):
    """Uses what it is given, and notes, which the module's steps write to as well."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.notes = Notes()

    def write_on_batch_end(self, t: Any, module: Any, prediction: Any, i: Any, batch: Any, idx: int, dl: int) -> None:
        assert prediction.device.type in ("cpu", module.device.type)
        self.notes.put(f"e{idx}")


class NotingInModule(NotingWriter):
    def write_on_batch_end(self, t: Any, module: Any, prediction: Any, i: Any, batch: Any, idx: int, dl: int) -> None:
        module.newest = idx
        module.notes.put(f"e{idx}")


class OwnEnd(NotingWriter):
    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_predict_batch_end(*args, **kwargs)


class NotingStart(NotingWriter):
    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None: ...


class NotingCallback(Callback):
    def on_predict_batch_end(self, t: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        module.notes.put(f"e{batch_idx}")


class NotingBar(TQDMProgressBar):
    def on_predict_batch_end(self, t: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        super().on_predict_batch_end(t, module, outputs, batch, batch_idx, *_)
        module.notes.put(f"e{batch_idx}")


class StepsAndEnds(Steps):
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.notes.put(f"e{batch_idx}")


def noting_lambda() -> Callback:
    def note(t: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        module.notes.put(f"e{batch_idx}")

    return LambdaCallback(on_predict_batch_end=note)


IN_ORDER = "s0 e0 s1 e1 s2 e2 s3 e3 s4 e4"
BEHIND = "s0 s1 e0 s2 e1 s3 e2 s4 e3 e4"


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("defer_hooks", ["auto", True, False])
@pytest.mark.parametrize(
    ("module", "callbacks", "is_safe"),
    [
        (Steps, [NotingWriter], True),
        (Steps, [NotingWriter, TQDMProgressBar], True),
        (Steps, [NotingCallback], False),
        (Steps, [OwnEnd], False),
        (Steps, [NotingStart], False),
        (Steps, [NotingInModule], False),
        (Steps, [NotingBar], False),
        (Steps, [noting_lambda], False),
        (StepsAndEnds, [], False),
        (Steps, [NotingWriter, lambda: LambdaCallback(on_predict_batch_end=lambda *_: None)], False),
    ],
)
def test_rule_2_end_hooks_are_late_where_all_of_them_may_be(
    module: type[Steps], callbacks: list[Any], is_safe: bool, defer_hooks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    net = module()
    made = [callback() for callback in callbacks]
    for writer in made:
        vars(writer)["notes"] = net.notes
    bar = any(isinstance(callback, ProgressBar) for callback in made)
    accelerator = HPUInferenceAccelerator(hpu_graphs=False, defer_hooks=defer_hooks)
    ours = trainer(accelerator, made, enable_progress_bar=bar)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        ours.predict(net, rows(10, 2))
    late = defer_hooks is True or (defer_hooks == "auto" and is_safe)
    assert " ".join(net.notes.all()) == (BEHIND if late else IN_ORDER)
    told = [record.message for record in caplog.records if LATE in record.message]
    assert len(told) == (defer_hooks == "auto" and not is_safe)


@pytest.mark.usefixtures("emulated")
def test_rule_2_a_profiler_makes_no_hook_unsafe(caplog: pytest.LogCaptureFixture) -> None:
    """With one, hooks that do nothing are called too, for their spans."""
    net, writer = Steps(), NotingWriter()
    writer.notes = net.notes
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer(HPUInferenceAccelerator(hpu_graphs=False), [writer], profiler="simple").predict(net, rows(10, 2))
    assert " ".join(net.notes.all()) == BEHIND
    assert [record.message for record in caplog.records if LATE in record.message] == []


# What end hooks do to what others see: each gives the module, callbacks and what to compare besides predictions.


class ChangesWeights(Net):
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        with torch.no_grad():
            next(self.net.parameters()).add_(1.0)


class ReadsState(Net):
    sums: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.register_buffer("sums", torch.zeros(3))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.last = batch_idx
        scores = self.net(batch)
        self.sums += scores.sum(0)
        return scores

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        progress: Any = self.trainer.predict_loop.batch_progress.current
        self.seen.append((self.last, self.sums.cpu().clone(), batch.cpu().clone(), outputs.cpu().clone()))
        self.seen.append((progress.ready, progress.started, progress.processed, progress.completed))
        if batch_idx == 2:
            self.sums.zero_()


class ClearsPredictions(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_predict_batch_end(self, t: Any, m: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.seen.append([len(predictions) for predictions in t.predict_loop._predictions])
        if batch_idx == 3:
            t.predict_loop._predictions = [[] for _ in range(t.predict_loop.num_dataloaders)]


class ChangesOutputs(Callback):
    def on_predict_batch_start(self, t: Any, m: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        batch["extra"] = batch["x"] + batch_idx

    def on_predict_batch_end(self, t: Any, m: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        outputs["y"] = outputs["y"].cpu().softmax(-1)
        outputs.pop("tmp")
        outputs["n"].add_(batch_idx)
        batch.pop("extra")


class OfDicts(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"y": self.net(batch["extra"]), "tmp": 1, "n": torch.zeros(1, device=self.device)}


class Late(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_predict_batch_start(self, t: Any, m: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.seen.append(("start", batch_idx))

    def on_predict_batch_end(self, t: Any, m: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.seen.append(("end", batch_idx, outputs.sum().cpu()))


class Adds(Callback):
    """Adds a callback before batch 2."""

    def __init__(self) -> None:
        self.late = Late()
        self.seen = self.late.seen

    def on_predict_batch_start(self, t: Any, m: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == 2:
            t.callbacks.append(self.late)


class ReplacesEndHook(Net):
    """Gets an end hook in batch 2, and a forward hook in batch 3."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 2:
            self.on_predict_batch_end = lambda outputs, *args: self.seen.append((args[1], outputs.sum().cpu()))  # type: ignore[method-assign]
        if batch_idx == 3:
            self.net.register_forward_hook(lambda module, args, output: output * 7)


CHANGES: dict[str, Any] = {
    "changes weights": (ChangesWeights, None, of_rows),
    "reads the module's state": (ReadsState, None, of_rows),
    "clears predictions": (Net, ClearsPredictions, of_rows),
    "changes outputs and batch": (OfDicts, ChangesOutputs, of_dicts),
    "adds a callback": (Net, Adds, of_rows),
    "replaces an end hook": (ReplacesEndHook, None, of_rows),
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*runs without")
def test_rule_2_what_a_hook_does_and_sees_is_stock(change: str, flags: dict[str, Any]) -> None:
    make_module, make_callback, loader = CHANGES[change]
    assert_hooks_are_stocks(make_module, make_callback, loader, flags)


class Joined(PredictionLoop):
    """A loop of the user's own."""

    def on_run_end(self) -> Any:
        return torch.cat(super().on_run_end())  # type: ignore[arg-type]


@pytest.mark.usefixtures("device")
def test_a_prediction_loop_of_ones_own_is_the_one_that_runs() -> None:
    def run(accelerator: Any) -> Any:
        ours = trainer(accelerator)
        ours.predict_loop = Joined(ours)
        return ours.predict(Net(), rows(11, 2)), type(ours.predict_loop)

    expected = run("cpu")
    with pytest.warns(UserWarning, match="`trainer.predict_loop` is a Joined, which runs as it is"):
        assert_equal(run(HPUInferenceAccelerator()), expected)
