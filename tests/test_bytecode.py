"""What functions are seen to change: of objects that both sides hold, of variables, and through the Trainer."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_hpu_infer.ahead import reason_against
from tests.dependence import Holder, PartOfModule
from tests.helpers import Rows


class Stored:
    """State with parts."""

    total = 0.0

    def __init__(self) -> None:
        self.rows, self.table, self.settings = [0.0], {"last": 0.0}, SimpleNamespace(last=0.0)


def put(store: Any, value: Any) -> None:
    store.table["last"] = value


def put_deeper(store: Any, value: Any) -> None:
    put(store, value)


def by_function(self: Any, value: Any) -> None:
    put(self.store, value)


def by_functions(self: Any, value: Any) -> None:
    put_deeper(self.store, value)


def appended(self: Any, value: Any) -> None:
    self.store.rows.append(value)


def an_item(self: Any, value: Any) -> None:
    self.store.rows[0] = value


def an_alias(self: Any, value: Any) -> None:
    rows = self.store.rows
    rows[-1] = value


def added_to_an_item(self: Any, value: Any) -> None:
    self.store.table["last"] += value


def merged(self: Any, value: Any) -> None:
    self.store.table |= {"last": value}


def added_to_an_attribute(self: Any, value: Any) -> None:
    self.store.total += value


def added_to_a_class_attribute(self: Any, value: Any) -> None:
    self.store.__class__.total += value


def set_by_name(self: Any, value: Any) -> None:
    setattr(self.store, "last", value)  # noqa: B010


def set_in_the_dictionary(self: Any, value: Any) -> None:
    vars(self.store)["last"] = value


def set_in_its_own_dictionary(self: Any, value: Any) -> None:
    self.store.__dict__["last"] = value


def a_part_of_a_part(self: Any, value: Any) -> None:
    self.store.settings.last = value


def removed(self: Any, value: Any) -> None:
    del self.store.rows[0]


WAYS = [
    *(by_function, by_functions, appended, an_item, an_alias, added_to_an_item, merged, added_to_an_attribute),
    *(added_to_a_class_attribute, set_by_name, set_in_the_dictionary, set_in_its_own_dictionary),
    *(a_part_of_a_part, removed),
]


@pytest.mark.parametrize("held", [Stored(), SimpleNamespace(**vars(Stored()))], ids=["own class", "namespace"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_change_an_object_that_both_hold(way: Any, held: Any) -> None:
    writes = type("Writes", (PartOfModule,), {"predict_step": way})
    assert "hold the same" in reason_against([DataLoader(Holder(held))], [writes(store=held)])
    assert "hold the same" in reason_against(
        [DataLoader(type("Data", (Holder,), {"__getitem__": way})(store=held, held=0))], [PartOfModule(s=held)]
    )


# Variables outside of functions, and what is found in the Trainer

SCALES = [0.5, 0.4]
OFFSET = torch.ones(())
LAST = 0


class Scaling(Dataset[Tensor]):
    """Says a class attribute."""

    scale = 1.0

    def __getitem__(self, index: int) -> Any:
        return scaled(index) * self.scale, LAST


def scaled(index: int) -> Any:
    return SCALES[index] * OFFSET


def with_variable() -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    last = 0.0

    def read(samples: Any) -> Any:
        return samples, last

    def write(*args: Any) -> None:
        nonlocal last
        last = 1.0

    return read, write


def write_attribute(*args: Any) -> None:
    Scaling.scale = 2.0


def write_attribute_of_function(*args: Any) -> None:
    scaled.calls = 1  # type: ignore[attr-defined]


def write_item(*args: Any) -> None:
    scales = SCALES
    scales[0] = 1.0


def write_item_of_items(*args: Any) -> None:
    SCALES[0][0] = 1.0  # type: ignore[index]


def write_tensor(*args: Any) -> None:
    OFFSET.add_(1)


def write_variable(*args: Any) -> None:
    global LAST
    LAST += 1


def write_in_a_function(*args: Any) -> None:
    def inner() -> None:
        write_variable()

    inner()


def read_all(*args: Any) -> Any:
    return SCALES, OFFSET, LAST, Scaling, scaled


def write_through_the_trainer(trainer: Any, *args: Any) -> None:
    trainer.predict_dataloaders.dataset.held = 1


def write_into_what_the_trainer_has(trainer: Any, *args: Any) -> None:
    trainer.datamodule.rows.held.append(1)


def read_through_the_trainer(trainer: Any, *args: Any) -> Any:
    return trainer.predict_dataloaders.dataset.held, trainer.datamodule.tokenizer.decode(args)


class CountsItself(Holder):
    def __getitem__(self, index: int) -> Any:
        self.held = index
        return index


WRITERS = [
    write_attribute,
    write_attribute_of_function,
    write_item,
    write_item_of_items,
    write_tensor,
    write_variable,
    write_in_a_function,
]


def at_ends(function: Callable[..., Any]) -> Callback:
    return LambdaCallback(on_predict_batch_end=function)


@pytest.mark.parametrize("write", WRITERS)
def test_global_variables_that_one_side_is_seen_to_change(write: Any) -> None:
    assert "a batch may depend on the steps before it" in reason_against([DataLoader(Scaling())], [at_ends(write)])
    assert reason_against([DataLoader(Rows(4), collate_fn=write)], [at_ends(read_all)])


def test_global_variables_that_nobody_is_seen_to_change() -> None:
    assert not reason_against([DataLoader(Scaling())], [at_ends(read_all)])


def test_a_variable_of_the_function_around_both() -> None:
    read, write = with_variable()
    assert "assign to the variable `last`" in reason_against([DataLoader(Rows(4), collate_fn=read)], [at_ends(write)])
    assert "assign to the variable `last`" in reason_against([DataLoader(Rows(4), collate_fn=write)], [at_ends(read)])
    other, _ = with_variable()
    assert not reason_against([DataLoader(Rows(4), collate_fn=other)], [at_ends(write)])


def test_a_dataset_found_in_the_trainer() -> None:
    for write in (write_through_the_trainer, write_into_what_the_trainer_has):
        reason = reason_against([DataLoader(Holder([1.0]))], [at_ends(write)])
        assert reason.startswith(f"`{write.__name__}` finds ")
    reading = at_ends(read_through_the_trainer)
    assert "finds CountsItself in the Trainer" in reason_against([DataLoader(CountsItself(1.0))], [reading])
    assert not reason_against([DataLoader(Holder(1.0))], [reading])
