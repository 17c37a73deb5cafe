"""The one object that users pass to the Trainer."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from os import PathLike
from reprlib import Repr
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_hpu_infer import _habana, _lightning
from lightning_hpu_infer.config import InferenceConfig, knows_its_options
from lightning_hpu_infer.devices import check_count, check_training, log_device, select_device, warn_of_cpu
from lightning_hpu_infer.graphs import graph_kind
from lightning_hpu_infer.lengths.pad import PadSpec
from lightning_hpu_infer.loop import PipelinedPredictionLoop
from lightning_hpu_infer.observe.report import Report

_BRIEF = Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80  # characters; of lists, the first six


@knows_its_options
class HPUInferenceAccelerator(Accelerator):
    """Makes `trainer.predict` keep an Intel Gaudi busy: `Trainer(accelerator=HPUInferenceAccelerator())`.

    Each technique of Intel's guide "Optimize Inference on PyTorch" is one flag. With all of them off, prediction is
    stock Lightning's. Without an HPU the same code runs on the CPU.

    Args:
        hpu_graphs: Trace `predict_step` with TorchDynamo and replay what it does: as HPU graphs in lazy mode, by
            `hpu_backend` in eager mode. True leaves out runs too short to win back what tracing costs. "hpu_graph" and
            "compile" insist on one of the two; "compile" also compiles on the CPU, with torch's inductor. "direct"
            captures the modules that `graph_modules` names without TorchDynamo, unguarded and not verified.
        graph_modules: Modules to trace by themselves instead of the whole step, by their names in the LightningModule.
            "blocks" means the children of each `nn.ModuleList` that are alike, which are traced once per kind. Used
            when `hpu_graphs`.
        max_graphs: Captured graphs, that is, shapes, per traced graph and set of weights, 1 to 65536. Used when
            `hpu_graphs`.
        graph_memory: Bytes of device memory that these may take; None sets no bound. Used when `hpu_graphs`.
        verify_graphs: Replays of each new graph that are compared with the plain ops, besides the capturing call, 0 to
            65536. 0 compares none. Used when `hpu_graphs`.
        pad_batch: Let a batch with fewer rows than a captured graph use it: rows are added to the graph's inputs and
            cut from its outputs. Used when `hpu_graphs`.
        async_copy: Copy inputs to pinned host memory first, so that their copy to the device does not hold up the host.
        async_output: Copy outputs to pinned host memory as soon as they are computed, without waiting, where the bridge
            can, instead of late and waiting. The first copies are compared with ones that are waited for. Used when
            `pipelining`.
        pipelining: Prepare later batches in a thread, and fetch a batch's output only after later batches were
            launched. On an HPU the depths of both rise during a run where that proves faster, unless `prefetch` or
            `in_flight` is given. "auto" lets them rise from what is given, and on the CPU too.
        prefetch: Batches that the host prepares ahead, in a thread, 0 to 1024. 0 prepares each batch when it is needed.
            None means 2 or more on an HPU, and 0 on the CPU, where no device waits and a thread takes time from the
            network. Used when `pipelining`.
        in_flight: Batches whose output may wait on the device while a later one is launched, 0 to 1024. Each takes the
            device memory of a batch and its output. None means 1 or more on an HPU, and 0 on the CPU, where an output
            is there at once. Used when `pipelining`.
        depth_memory: Bytes that the batches ahead, and the batches and outputs behind, may take where depths rise
            during a run.
        defer_hooks: Run the end hooks of a batch when its output has arrived, with host tensors, beside later batches.
            "auto" does so where all that there are may be late: those of prediction writers without other batch hooks,
            of Lightning's callbacks and ours. False, and "auto" otherwise, run them right after the step with device
            tensors, as stock Lightning does, and delay only the stored predictions. Used when `pipelining`.
        postprocess: A function that is called with the output of each batch, with host tensors, such as one that
            decodes. What it returns takes the place of the prediction for end hooks, writers and the list of
            predictions. It runs beside the main thread, for several batches at once; in place without `pipelining`, and
            where end hooks run right after the step (`defer_hooks`).
        postprocess_workers: Calls of `postprocess` at once, 0 to 256; twice as many outputs may be there for them. 0
            calls it in place. Used with `postprocess`.
        postprocess_backend: What these workers are. Threads suit work outside of Python, as of torch, NumPy and
            tokenizers. Processes suit Python code; they take seconds to start, and what they call, take and return is
            pickled. Used with `postprocess`.
        lengths: One flag for batches of a Hugging Face tokenizer, made of samples with `input_ids`: "auto" is short for
            `group_by_length="input_ids"`, `bucket_lengths="auto"` and `pad_spec="tokenizer"`, each unless it is given.
        bucket_lengths: Lengths to which batches are padded on the host, as `pad_spec` says. "auto" chooses them.
        num_buckets: Lengths that "auto" chooses at most, 1 to 1024.
        bucket_multiple: Lengths that "auto" chooses are multiples of this, 1 to 65536.
        pad_spec: Which tensors of a batch are padded, in which dimension and with what, and which outputs are cut back.
            "tokenizer" is for batches of a Hugging Face tokenizer. Used with `bucket_lengths`.
        warm_up: Run every bucket before the first batch, so that none is captured later. Used with `bucket_lengths`.
        group_by_length: Predict samples of like lengths together: a key or a function that gives a sample's length, or
            one length per sample. Predictions come back in the dataset's order.
        trace: A folder to which every run writes where its time went: `trace.json`, `report.json` and `timeline.png`.

    Raises:
        TypeError: If a value is of the wrong type.
        ValueError: If a value is out of its range, or does nothing without another.

    Example::

        trainer = Trainer(accelerator=HPUInferenceAccelerator())
        predictions = trainer.predict(model, dataloader)
    """

    def __init__(
        self,
        *,
        hpu_graphs: bool | Literal["hpu_graph", "compile", "direct"] = True,
        graph_modules: Sequence[str] | Literal["blocks"] | None = None,
        max_graphs: int = 16,
        graph_memory: int | None = None,
        verify_graphs: int = 1,
        pad_batch: bool = False,
        async_copy: bool = True,
        async_output: bool = True,
        pipelining: bool | Literal["auto"] = True,
        prefetch: int | None = None,
        in_flight: int | None = None,
        depth_memory: int = 2**30,
        defer_hooks: bool | Literal["auto"] = "auto",
        postprocess: Callable[[Any], Any] | None = None,
        postprocess_workers: int = 2,
        postprocess_backend: Literal["thread", "process"] = "thread",
        lengths: Literal["auto"] | None = None,
        bucket_lengths: Sequence[int] | Literal["auto"] | None = None,
        num_buckets: int = 8,
        bucket_multiple: int = 8,
        pad_spec: PadSpec | Literal["tokenizer"] | None = None,
        warm_up: bool = False,
        group_by_length: str | Sequence[int] | Callable[[Any], int] | None = None,
        trace: str | PathLike[str] | None = None,
    ) -> None:
        # Spelled out, not **kwargs: LightningCLI reads this signature.
        self.config: InferenceConfig = InferenceConfig(
            hpu_graphs=hpu_graphs,
            graph_modules=graph_modules,
            max_graphs=max_graphs,
            graph_memory=graph_memory,
            verify_graphs=verify_graphs,
            pad_batch=pad_batch,
            async_copy=async_copy,
            async_output=async_output,
            pipelining=pipelining,
            prefetch=prefetch,
            in_flight=in_flight,
            depth_memory=depth_memory,
            defer_hooks=defer_hooks,
            postprocess=postprocess,
            postprocess_workers=postprocess_workers,
            postprocess_backend=postprocess_backend,
            lengths=lengths,
            bucket_lengths=bucket_lengths,
            num_buckets=num_buckets,
            bucket_multiple=bucket_multiple,
            pad_spec=pad_spec,
            warm_up=warm_up,
            group_by_length=group_by_length,
            trace=trace,
        )
        self.report: Report | None = None
        """What the newest run with `trace` was limited by."""

    @classmethod
    def auto(cls, **flags: Any) -> "HPUInferenceAccelerator":
        """An accelerator that chooses the depths of its pipeline itself; other flags as usual."""
        return cls(**({"pipelining": "auto"} | flags))

    def __repr__(self) -> str:
        """The options that differ from the defaults."""
        values = [(each.name, getattr(self.config, each.name), each.default) for each in fields(self.config)]
        chosen = [f"{name}={_BRIEF.repr(value)}" for name, value, default in values if value != default]
        return f"{type(self).__name__}({', '.join(chosen)})"

    def setup_device(self, device: torch.device) -> None:
        """Check the device that the strategy was built with.

        Raises:
            MisconfigurationException: If it is neither an HPU nor the CPU.
        """
        if device.type not in (_habana.DEVICE_TYPE, "cpu"):
            raise MisconfigurationException(f"HPUInferenceAccelerator runs on hpu or cpu, the strategy has {device}.")

    def setup(self, trainer: Trainer) -> None:
        """Put precision and the prediction loop in place. Called before the model moves to the device.

        Raises:
            MisconfigurationException: If the Trainer was asked to fit on an emulated HPU.
        """
        device = trainer.strategy.root_device
        if trainer.state.fn == TrainerFn.FITTING and device.type == _habana.DEVICE_TYPE:
            check_training()
        if trainer.state.fn == TrainerFn.PREDICTING:
            log_device(device)
        if select_device().type == "cpu":
            warn_of_cpu()
        elif device.type == "cpu":
            rank_zero_warn(
                f"There is an HPU, but {type(trainer.strategy).__name__} was made for the CPU and predicts there. Use"
                " `strategy='auto'`, and install the emulator, if that is the HPU, before you make the Trainer."
            )
        _repair_precision(trainer.precision_plugin, device.type)
        PipelinedPredictionLoop.install_on(trainer.predict_loop, self.config)
        kind = graph_kind(device, self.config)  # raises early where it cannot be
        if kind is not None and trainer.state.fn == TrainerFn.PREDICTING:
            _trace_instead_of_compiling(trainer.lightning_module)
        if trainer.state.fn != TrainerFn.PREDICTING and isinstance(trainer.predict_loop, PipelinedPredictionLoop):
            # Other runs need the device's memory and change the weights.
            trainer.predict_loop.release_graphs()

    def teardown(self) -> None:
        """Nothing of the device is ours; graphs stay with the Trainer for its next prediction."""

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Device memory in bytes by the bridge's names; empty on the CPU."""
        device = torch.device(device)
        return _habana.memory_stats(device) if device.type == _habana.DEVICE_TYPE else {}

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> int:
        """The number of devices asked for.

        Raises:
            MisconfigurationException: If that is not a positive number, or more than this machine has.
        """
        try:
            count = 0 if isinstance(devices, list | bool) else int(devices)
        except ValueError:
            count = 0
        if count < 1:
            raise MisconfigurationException(
                f"`devices` must be a positive number or 'auto' (one device), got {devices!r}. Each process sees one"
                " device only; choose cards with HABANA_VISIBLE_MODULES."
            )
        check_count(count)
        return count

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        """The device of each process: always its first, the bridge ignores the index (bridge `csrc/bindings.cpp`)."""
        return [select_device()] * devices

    @staticmethod
    def auto_device_count() -> int:
        """What `devices="auto"` means: one, so that `predict` returns all predictions unless told otherwise."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Always true: without an HPU the CPU stands in, with a warning."""
        return True

    @staticmethod
    def name() -> str:
        """The name in Lightning's registry."""
        return "hpu_infer"

    @classmethod
    def register_accelerators(cls, accelerator_registry: _lightning.AcceleratorRegistry) -> None:
        """Make `accelerator="hpu_infer"` work. Does nothing the second time."""
        if cls.name() not in accelerator_registry:
            accelerator_registry.register(cls.name(), cls, description="Fast prediction on Intel Gaudi")


def register() -> None:
    """Make the accelerator known to Lightning by name, and to who asks for another one. Idempotent."""
    HPUInferenceAccelerator.register_accelerators(AcceleratorRegistry)
    _lightning.check_flags(_hint_at_ours)


def _hint_at_ours(connector: Any, stock: Callable[..., Any], **flags: Any) -> Any:
    """Lightning knows "hpu" up to 2.5.5 and beside lightning-habana. Who asks for it elsewhere is told of ours."""
    try:
        return stock(connector, **flags)
    except ValueError as error:
        if str(flags["accelerator"]).lower() != _habana.DEVICE_TYPE:
            raise
        ours = "`accelerator=HPUInferenceAccelerator()`, of `lightning_hpu_infer`, or `accelerator='hpu_infer'`"
        raise ValueError(f"{error} To predict on Intel Gaudi, pass {ours}.") from error


def _trace_instead_of_compiling(module: LightningModule) -> None:
    """Take `torch.compile` off the steps: they get graphs, and its default backend does not know the device.

    Lightning puts it on again when the compiled module is next given to a Trainer.
    """
    if _lightning.is_compiled(module):
        to_uncompiled(module)
        rank_zero_info(
            "`torch.compile` is taken off the LightningModule: `hpu_graphs` traces `predict_step` itself. To keep your"
            " own compilation, pass `hpu_graphs=False` and compile for a backend that the device has."
        )


def _repair_precision(plugin: Precision, device_type: str) -> None:
    """Lightning builds mixed precision for "cuda" where it does not know the accelerator: no autocast, silently."""
    if not isinstance(plugin, MixedPrecision):
        return
    plugin.device = device_type
    plugin.scaler = None  # one for CUDA; prediction scales no gradients
    if device_type == "cpu" and plugin.precision == "16-mixed":
        rank_zero_warn("`precision='16-mixed'` is not supported on the CPU: predicting with 'bf16-mixed' instead.")
        plugin.precision = "bf16-mixed"
