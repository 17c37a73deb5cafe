"""What steps and batches tell each other, in whatever way, they tell as in stock Lightning."""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lightning_hpu_infer import HPUInferenceAccelerator
from tests import variables
from tests.helpers import Net, Rows, assert_equal, predict


class OfNames(Rows):
    """Samples with a name."""

    def __getitem__(self, index: int) -> Any:
        return {"x": self.rows[index], "name": f"row {index}"}


class Named(Net):
    """Returns names that somebody has kept when the batch was made."""

    keeper: Any

    def __init__(self, keeper: Any = None) -> None:
        super().__init__()
        self.keeper = keeper

    def collate(self, samples: list[Any]) -> Tensor:
        return keep(self, samples)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        keeper: Any = self.keeper or self
        return {"y": self.net(batch), "names": list(keeper.names)}


def keep(keeper: Any, samples: list[Any]) -> Tensor:
    keeper.names = [sample["name"] for sample in samples]
    return torch.stack([sample["x"] for sample in samples])


class Keeper:
    names: list[str]

    def __call__(self, samples: list[Any]) -> Tensor:
        return keep(self, samples)


class Feedback(Net):
    """Its outputs are what later batches begin with."""

    def __init__(self, told: Callable[[Any, float], object] = lambda module, last: None) -> None:
        super().__init__()
        self.last = 0.0
        self.told = told

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        scores = self.net(batch)
        self.last = scores.mean().item()
        self.told(self, self.last)
        return scores


class Shifted(Rows):
    def __init__(self, shift: Callable[[], float]) -> None:
        super().__init__(12)
        self.shift = shift

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index] + self.shift()


class Moved(LightningDataModule):
    """Takes names out of batches before they are copied, and puts them back."""

    def predict_dataloader(self) -> Any:
        return DataLoader(OfNames(12), batch_size=2)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.names = batch.pop("name")
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch | {"name": self.names}


class Whole(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"y": self.net(batch["x"]), "names": batch["name"]}


class MovesBack(LightningDataModule):
    def predict_dataloader(self) -> Any:
        return DataLoader(Rows(12), batch_size=2)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        trainer: Any = self.trainer
        return batch + trainer.lightning_module.last


class Chosen(Sampler[int]):
    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[int]:
        return (self.next for _ in range(12))


def collate_of_the_module() -> Any:
    module = Named()
    return module, DataLoader(OfNames(12), 2, collate_fn=module.collate)


def collate_of_an_object() -> Any:
    keeper = Keeper()
    return Named(keeper), DataLoader(OfNames(12), 2, collate_fn=keeper)


def collate_of_a_function() -> Any:
    keeper = SimpleNamespace(names=[])
    return Named(keeper), DataLoader(OfNames(12), 2, collate_fn=partial(keep, keeper))


def dataset_of_the_module() -> Any:
    module = Feedback()
    return module, DataLoader(Shifted(lambda: module.last), 2)


def one_list() -> Any:
    history = [0.0]
    return Feedback(lambda module, last: history.append(last)), DataLoader(Shifted(lambda: history[-1]), 2)


def sampler_of_the_module() -> Any:
    sampler = Chosen()
    module = Feedback(lambda module, last: setattr(sampler, "next", int(abs(last) * 100) % 12))
    return module, DataLoader(Rows(12), sampler=sampler)


# Global variables, and what is found through the Trainer

SHIFT = 0.0
HISTORY: list[float] = []
TABLE = {"shift": 0.0}
BIAS = torch.zeros(())
MODULE: Any = None


class Scale:
    value = 0.0


class Told(Feedback):
    """Tells later batches in a way of its own what it has predicted."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        scores = super().predict_step(batch, batch_idx, dataloader_idx)
        self.tell(float(self.last))
        return scores

    def tell(self, last: float) -> None: ...


class Assigns(Told):
    def tell(self, last: float) -> None:
        global SHIFT
        SHIFT = last


class Appends(Told):
    def tell(self, last: float) -> None:
        HISTORY.append(last)


class Fills(Told):
    def tell(self, last: float) -> None:
        table = TABLE
        table["shift"] = last


class FillsInPlace(Told):
    def tell(self, last: float) -> None:
        BIAS.fill_(last)


class SetsOfClass(Told):
    def tell(self, last: float) -> None:
        Scale.value = last


class SetsOfModule(Told):
    def tell(self, last: float) -> None:
        variables.VALUE = last


def note(last: float) -> None:
    HISTORY.append(last)


class Calls(Told):
    def tell(self, last: float) -> None:
        note(last)


class ThroughTheTrainer(Told):
    def tell(self, last: float) -> None:
        trainer: Any = self.trainer
        trainer.predict_dataloaders.dataset.offset = last


class ThroughTheDatamodule(Told):
    def tell(self, last: float) -> None:
        trainer: Any = self.trainer
        trainer.datamodule.rows.offset = last


class Offset(Rows):
    """Rows that somebody moves."""

    offset = 0.0

    def __init__(self) -> None:
        super().__init__(12)
        self.offset = 0.0

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index] + self.offset


class OfOffset(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.rows = Offset()

    def predict_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=2)


class Counts(Rows):
    """Says in a global variable which sample was read last."""

    def __getitem__(self, index: int) -> Tensor:
        global SHIFT
        SHIFT = float(index)
        return self.rows[index]


class Reads(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch) + SHIFT


def of_global(module: type[Told], shift: Callable[[], float]) -> Callable[[], Any]:
    def make() -> Any:
        global SHIFT
        SHIFT = Scale.value = variables.VALUE = TABLE["shift"] = 0.0
        HISTORY.clear()
        BIAS.zero_()
        return module(), DataLoader(Shifted(shift), 2)

    make.__name__ = module.__name__
    return make


def of_a_global_module() -> Any:
    global MODULE
    MODULE = Feedback()
    return MODULE, DataLoader(Shifted(lambda: MODULE.last), 2)


DEPENDING = [
    of_global(Assigns, lambda: SHIFT),
    of_global(Appends, lambda: sum(HISTORY)),
    of_global(Calls, lambda: sum(HISTORY)),
    of_global(Fills, lambda: TABLE["shift"]),
    of_global(FillsInPlace, BIAS.item),
    of_global(FillsInPlace, lambda: float(BIAS)),
    of_global(SetsOfClass, lambda: Scale.value),
    of_global(SetsOfModule, lambda: variables.VALUE),
    of_a_global_module,
    lambda: (Reads(), DataLoader(Counts(12), 2)),
    lambda: (ThroughTheTrainer(), DataLoader(Offset(), 2)),
    lambda: (ThroughTheDatamodule(), OfOffset()),
    collate_of_the_module,
    collate_of_an_object,
    collate_of_a_function,
    dataset_of_the_module,
    one_list,
    sampler_of_the_module,
    lambda: (Whole(), Moved()),
    lambda: (Feedback(), MovesBack()),
]


@pytest.mark.parametrize("flags", [{}, {"in_flight": 3, "pipelining": "auto"}], ids=str)
@pytest.mark.parametrize("make", DEPENDING)
def test_what_steps_and_batches_tell_each_other_is_stocks(make: Any, flags: dict[str, Any], device: str) -> None:
    expected = predict("cpu", *make())
    assert_equal(predict(HPUInferenceAccelerator(**flags, hpu_graphs=False), *make()), expected)
