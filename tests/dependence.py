"""Parts of programs whose batches, steps and hooks may depend on each other."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_hpu_infer import HPUInferenceAccelerator
from tests.helpers import Net, assert_equal, predict, rows


class Holder(Dataset[Tensor]):
    def __init__(self, *held: Any, **more: Any) -> None:
        self.held = held[0] if len(held) == 1 else held
        vars(self).update(more)


class PartOfModule(Net):
    """A module with attributes."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        vars(self).update(held)

    def collate(self, samples: list[Tensor]) -> Tensor:
        return torch.stack(samples)


def of_rows() -> DataLoader[Any]:
    return rows(16, 2)


def of_dicts() -> DataLoader[Any]:
    return DataLoader([{"x": row} for row in torch.arange(52.0).reshape(13, 4) / 9], batch_size=2)  # type: ignore[arg-type]


def assert_hooks_are_stocks(make_module: Any, make_callback: Any, loader: Any, flags: dict[str, Any]) -> None:
    def run(accelerator: Any) -> Any:
        module, callbacks = make_module(), [make_callback()] if make_callback else []
        seen = [getattr(part, "seen", None) for part in (module, *callbacks)]
        return predict(accelerator, module, loader(), callbacks=callbacks), seen, dict(module.state_dict())

    ours, stock = run(HPUInferenceAccelerator(**flags)), run("cpu")
    for one, other in zip(ours, stock, strict=True):
        assert_equal(one, other)
