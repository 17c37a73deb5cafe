"""The step of one run on the device, with its graphs and step markers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import Strategy

from lightning_hpu_infer import _habana
from lightning_hpu_infer.graphs import StepGraphs
from lightning_hpu_infer.observer import Observer

Step = Callable[..., Any]


class DeviceStep:
    """Calls a step so that all that it enqueued is launched.

    Args:
        step: What to call per batch.
        device: Where the step runs.
    """

    def __init__(self, step: Callable[..., Any], device: torch.device) -> None:
        self._step = step
        self._on_hpu = device.type == _habana.DEVICE_TYPE

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Enqueue the step and launch it; does not wait for the device."""
        output = self._step(*args, **kwargs)
        if self._on_hpu:
            _habana.mark_step()
        return output


def sets_default_dtype(strategy: Strategy) -> bool:
    """Whether the step changes torch's default dtype, which is process-wide, so that other threads notice.

    Lightning does so for true half and double precision (2.6 `plugins/precision/half.py`).
    """
    before = torch.get_default_dtype()
    with strategy.precision_plugin.predict_step_context():
        return torch.get_default_dtype() != before


@contextmanager
def step_on_device(strategy: Strategy, graphs: Callable[[], StepGraphs | None], observer: Observer) -> Iterator[None]:
    """Put graphs and step markers into a strategy's `predict_step`.

    It is shadowed on the object, so that this works with whichever strategy there is.

    Args:
        strategy: Of a Trainer whose run has started.
        graphs: Gives the graphs of the run; not called inside of another run.
        observer: Observes captures and replays.
    """
    if "predict_step" in vars(strategy):
        # A run inside a run, as of `BatchSizeFinder`.
        yield
        return
    step, context = step_of(strategy)
    found = graphs()
    with found.attached(step, observer) if found is not None else nullcontext(step) as graphed:
        vars(strategy)["predict_step"] = DeviceStep(inside(context, graphed), strategy.root_device)
        try:
            yield
        finally:
            del strategy.predict_step


def step_of(strategy: Strategy) -> tuple[Step, Callable[[], AbstractContextManager[Any]] | None]:
    """What `strategy.predict_step` calls, and the precision plugin's context around it, where they can be told apart.

    The context is None where the plugin has none, or where a strategy's own `predict_step` enters it.
    """
    module, precision = strategy.lightning_module, strategy.precision_plugin
    if (
        module is None
        or strategy.model is not module
        or getattr(strategy.predict_step, "__func__", None) is not Strategy.predict_step
    ):
        return strategy.predict_step, None
    plain = (
        type(precision).predict_step_context is Precision.predict_step_context
        and type(precision).forward_context is Precision.forward_context
    )

    def step(*args: Any, **kwargs: Any) -> Any:
        # Looked up at each call: a hook may replace it.
        return module.predict_step(*args, **kwargs)

    return step, None if plain else precision.predict_step_context


def inside(context: Callable[[], AbstractContextManager[Any]] | None, step: Step) -> Step:
    """A step that runs inside of a context of its precision, which is never traced; None is no context."""
    if context is None:
        return step

    def call(*args: Any, **kwargs: Any) -> Any:
        with context():
            return step(*args, **kwargs)

    return call
