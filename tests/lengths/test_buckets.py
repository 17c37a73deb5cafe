"""Batches of many lengths: padded to few, cut back, with a graph for each bucket."""

import copy
from collections import UserDict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, Pad, PadSpec, emulator
from lightning_hpu_infer.lengths.buckets import OBSERVED_BATCHES, Buckets
from lightning_hpu_infer.lengths.optimal import best_buckets
from tests.helpers import Net, Writer, assert_equal, predict, trainer

LENGTHS = [5, 9, 3, 16, 12, 8, 2, 7, 11, 15, 4, 6]


class Tokens(Net):
    """States of tokens `(batch, length, 4)` and their masked mean, as a sentence encoder has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 4)
        self.layer = nn.Linear(4, 4)
        self.lengths: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        mask = attention_mask.unsqueeze(-1).float()
        states = self.layer(self.embedding(input_ids))
        return {"states": states, "mean": (states * mask).sum(1) / mask.sum(1)}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.lengths.append(batch["input_ids"].shape[1])
        return batch

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch["input_ids"], batch["attention_mask"])


def batches(lengths: Sequence[int] = LENGTHS, kind: Any = dict) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    items = [
        kind(
            {
                "input_ids": torch.randint(1, 50, (2, length), generator=generator).int(),
                "attention_mask": torch.ones(2, length, dtype=torch.int32),
                "name": f"batch {length}",
            }
        )
        for length in lengths
    ]
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


SPEC = PadSpec.tokenizer(states=1)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.usefixtures("emulated")
def test_batches_are_padded_to_the_buckets_and_outputs_cut_back(pipelining: bool, kind: Any) -> None:
    module, loader = Tokens(), batches(kind=kind)
    expected = predict("cpu", copy.deepcopy(module), loader)
    accelerator = HPUInferenceAccelerator(bucket_lengths=[16, 4, 8], pad_spec=SPEC, pipelining=pipelining)
    assert_equal(predict(accelerator, module, loader), expected)
    assert module.lengths == [8, 16, 4, 16, 16, 8, 4, 8, 16, 16, 4, 8]
    # One graph per bucket instead of one per length.
    assert emulator.stats().captures == 3
    assert [batch["input_ids"].shape[1] for batch in loader] == LENGTHS  # the user's batches are as they were


def test_on_the_cpu_too() -> None:
    module, loader = Tokens(), batches()
    expected = predict("cpu", copy.deepcopy(module), loader)
    assert_equal(predict(HPUInferenceAccelerator(bucket_lengths=[16], pad_spec=SPEC), module, loader), expected)
    assert module.lengths == [16] * 12


@pytest.mark.parametrize("defer_hooks", [True, False])
@pytest.mark.usefixtures("emulated")
def test_hooks_and_writers_see_outputs_without_padding(defer_hooks: bool) -> None:
    ends: list[Any] = []

    class Log(Callback):
        def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            ends.append(outputs["states"].cpu())

    module, loader = Tokens(), batches()
    expected = predict("cpu", copy.deepcopy(module), loader)
    accelerator = HPUInferenceAccelerator(bucket_lengths=[16], pad_spec=SPEC, defer_hooks=defer_hooks)
    predict(accelerator, module, loader, callbacks=[Log()])
    assert_equal(ends, [each["states"] for each in expected])


def test_left_padding_is_cut_from_the_left() -> None:
    module, loader = Tokens(), batches([3, 5])
    expected = predict("cpu", copy.deepcopy(module), loader)
    spec = PadSpec.tokenizer(side="left", states=1)
    assert_equal(predict(HPUInferenceAccelerator(bucket_lengths=[8], pad_spec=spec), module, loader), expected)


def test_a_longer_batch_is_not_padded_and_said_once() -> None:
    module, loader = Tokens(), batches([3, 9, 10])
    expected = predict("cpu", copy.deepcopy(module), loader)
    with pytest.warns(UserWarning, match="A batch of length 9 is longer than the largest of") as log:
        accelerator = HPUInferenceAccelerator(bucket_lengths=[8], pad_spec=SPEC)
        assert_equal(predict(accelerator, module, loader), expected)
    assert module.lengths == [8, 9, 10]
    assert len([each for each in log if "bucket_lengths" in str(each.message)]) == 1


def test_a_batch_without_the_named_tensor_is_refused() -> None:
    loader: DataLoader[Any] = DataLoader([{"ids": torch.ones(2, 3)}], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no tensor `input_ids`, which `PadSpec` names"):
        predict(HPUInferenceAccelerator(bucket_lengths=[8], pad_spec="tokenizer"), Tokens(), loader)


def test_an_output_that_is_not_there_is_refused() -> None:
    accelerator = HPUInferenceAccelerator(bucket_lengths=[8], pad_spec=PadSpec.tokenizer(logits=1))
    with pytest.raises(ValueError, match="no tensor `logits`, which `PadSpec` names"):
        predict(accelerator, Tokens(), batches([3]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"bucket_lengths": [8]}, "`bucket_lengths` and `pad_spec` do nothing without each other"),
        ({"pad_spec": "tokenizer"}, "`bucket_lengths` and `pad_spec` do nothing without each other"),
        ({"bucket_lengths": [], "pad_spec": "tokenizer"}, "`bucket_lengths` must be positive, and at least one"),
        ({"bucket_lengths": [8, 0], "pad_spec": "tokenizer"}, "`bucket_lengths` must be positive"),
        ({"warm_up": True}, "`warm_up=True` warms up buckets"),
        (
            {"warm_up": True, "pipelining": False, "bucket_lengths": [8], "pad_spec": "tokenizer"},
            "`warm_up=True` needs `pipelining=True`",
        ),
    ],
)
def test_flags_that_do_nothing_alone_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InferenceConfig(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"bucket_lengths": "many", "pad_spec": "tokenizer"}, "must be a list of int, 'auto' or None, got 'many'"),
        ({"bucket_lengths": [8.0], "pad_spec": "tokenizer"}, "must be a list of int, 'auto' or None"),
        ({"bucket_lengths": [8], "pad_spec": {"input_ids": 1}}, "`pad_spec` must be a PadSpec, 'tokenizer' or None"),
    ],
)
def test_flags_of_the_wrong_type_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        InferenceConfig(**flags)


def auto(**flags: Any) -> Buckets:
    return Buckets(InferenceConfig(bucket_lengths="auto", pad_spec="tokenizer", num_buckets=3, **flags))


def lengths_after(buckets: Buckets, lengths: Sequence[int]) -> list[int]:
    batches = [{"input_ids": torch.ones(1, length, dtype=torch.int32)} for length in lengths]
    return [padded.padded for _, padded in map(buckets.pad, batches) if padded is not None]


def test_auto_observes_first_and_then_chooses_the_best() -> None:
    buckets = auto(bucket_multiple=4)
    buckets.start([])
    seen = [1 + (7 * i) % 50 for i in range(OBSERVED_BATCHES)]
    assert lengths_after(buckets, seen) == [-(-length // 4) * 4 for length in seen]
    assert buckets.chosen is None
    (after,) = lengths_after(buckets, [50])
    best = best_buckets([*seen, 50], 3, 4)
    assert after == best[-1]
    assert lengths_after(buckets, [1, 61]) == [best[0], 64]  # beyond the largest: to the multiple
    assert buckets.real == sum(seen) + 50 + 62
    assert buckets.padded == sum(-(-n // 4) * 4 for n in seen) + best[-1] + best[0] + 64


def test_auto_uses_lengths_that_are_known() -> None:
    buckets = auto(bucket_multiple=1)
    buckets.start([9, 9, 5, 2])
    assert lengths_after(buckets, [9, 9, 4, 2]) == [9, 9, 5, 2]
    assert buckets.chosen == [2, 5, 9]


def test_auto_does_not_judge_by_the_first_batches_if_they_are_the_longest() -> None:
    buckets = auto(bucket_multiple=1)
    lengths = list(range(200, 0, -1))
    buckets.start([4 * length for length in lengths])  # characters, say, where the batches have tokens
    assert lengths_after(buckets, lengths) == lengths
    assert buckets.chosen is None
    buckets.start([4 * length for length in lengths])
    assert buckets.chosen == best_buckets(lengths, 3, 1)


@pytest.mark.usefixtures("emulated")
def test_auto_gives_the_same_predictions() -> None:
    lengths = [1 + (7 * i) % 50 for i in range(OBSERVED_BATCHES + 30)]
    module, loader = Tokens(), batches(lengths)
    expected = predict("cpu", copy.deepcopy(module), loader)
    accelerator = HPUInferenceAccelerator(bucket_lengths="auto", num_buckets=3, pad_spec=SPEC, max_graphs=8)
    ours = trainer(accelerator)
    for _ in range(2):
        assert_equal(ours.predict(module, loader), expected)
        module.lengths.clear()


@pytest.mark.usefixtures("emulated")
def test_warm_up_captures_every_bucket_before_the_first_batch() -> None:
    captures: list[int] = []

    class First(Callback):
        def on_predict_batch_start(self, *_: Any) -> None:
            captures.append(emulator.stats().captures)

    module, loader = Tokens(), batches()
    expected = predict("cpu", copy.deepcopy(module), loader)
    emulator.reset_stats()
    accelerator = HPUInferenceAccelerator(bucket_lengths=[4, 8, 16], pad_spec=SPEC, warm_up=True)
    writer = Writer("batch")
    assert_equal(predict(accelerator, module, loader, callbacks=[First()]), expected)
    assert captures == [3] * len(LENGTHS)
    # Each bucket: plainly, captured, one replay verified.
    assert module.lengths[:9] == [16] * 3 + [8] * 3 + [4] * 3
    assert module.lengths[9:] == [8, 16, 4, 16, 16, 8, 4, 8, 16, 16, 4, 8]
    assert writer.batches == []


@pytest.mark.usefixtures("emulated")
def test_warm_up_leaves_random_numbers_as_they_were() -> None:
    class Noisy(Tokens):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"noise": torch.rand(2), **super().predict_step(batch, batch_idx)}

    module, loader = Noisy(), batches([3, 4])
    noises = []
    for warm_up in (False, True):
        torch.manual_seed(3)
        accelerator = HPUInferenceAccelerator(bucket_lengths=[4, 8], pad_spec=SPEC, warm_up=warm_up)
        noises.append([each["noise"] for each in predict(accelerator, module, loader)])
    assert_equal(noises[0], noises[1])


def test_a_spec_of_ones_own() -> None:
    """Waveforms `(batch, samples)` in a tuple, with a network that works frame by frame."""

    class Frames(Net):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return batch[0].float().square()

    loader: DataLoader[Any] = DataLoader([(torch.randn(2, n), n) for n in (3, 5, 9)], batch_size=None)  # type: ignore[arg-type]
    spec = PadSpec(inputs={"0": Pad(dim=-1)}, outputs={"": 1})
    expected = predict("cpu", Frames(), loader)
    assert_equal(predict(HPUInferenceAccelerator(bucket_lengths=[6, 9], pad_spec=spec), Frames(), loader), expected)
