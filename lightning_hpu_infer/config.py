"""The plugin's flags as one frozen value that is passed down whole."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from os import PathLike, fspath
from typing import Any, Literal, TypeVar

from lightning_hpu_infer.lengths.pad import PadSpec

_Class = TypeVar("_Class", bound=type)


def knows_its_options(cls: _Class) -> _Class:
    """Make a class refuse arguments that it does not have with the name that was probably meant.

    The signature stays what it is, for type checkers and for LightningCLI. Python says so itself from 3.13 on, of some.

    Raises:
        TypeError: When the class is called, if it does not have an argument.
    """
    init = cls.__init__  # type: ignore[misc]
    options = [name for name in signature(init).parameters if name != "self"]

    @wraps(init)
    def checked(self: object, *args: Any, **flags: Any) -> None:
        for name in flags:
            if name not in options:
                meant = get_close_matches(name, options, 1)
                hint = f"Did you mean `{meant[0]}`?" if meant else f"Its options are {', '.join(options)}."
                raise TypeError(f"{cls.__name__} has no option `{name}`. {hint}")
        init(self, *args, **flags)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


@knows_its_options
@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """What `HPUInferenceAccelerator` was asked to do. Each technique is one flag; the rest are its options.

    The texts below are the only source: `make options` writes them into the accelerator's docstring and into
    docs/options.md, grouped by the comments.

    Raises:
        TypeError: If a value is of the wrong type.
        ValueError: If a value is out of its range, or does nothing without another.
    """

    # HPU graphs

    hpu_graphs: bool | Literal["hpu_graph", "compile", "direct"] = True
    """Trace `predict_step` with TorchDynamo and replay what it does: as HPU graphs in lazy mode, by `hpu_backend` in
    eager mode. True leaves out runs too short to win back what tracing costs. "hpu_graph" and "compile" insist on one
    of the two; "compile" also compiles on the CPU, with torch's inductor. "direct" captures the modules that
    `graph_modules` names without TorchDynamo, unguarded and not verified."""

    graph_modules: Sequence[str] | Literal["blocks"] | None = None
    """Modules to trace by themselves instead of the whole step, by their names in the LightningModule. "blocks" means
    the children of each `nn.ModuleList` that are alike, which are traced once per kind. Used when `hpu_graphs`."""

    max_graphs: int = 16
    """Captured graphs, that is, shapes, per traced graph and set of weights, 1 to 65536. Used when `hpu_graphs`."""

    graph_memory: int | None = None
    """Bytes of device memory that these may take; None sets no bound. Used when `hpu_graphs`."""

    verify_graphs: int = 1
    """Replays of each new graph that are compared with the plain ops, besides the capturing call, 0 to 65536. 0
    compares none. Used when `hpu_graphs`."""

    pad_batch: bool = False
    """Let a batch with fewer rows than a captured graph use it: rows are added to the graph's inputs and cut from its
    outputs. Used when `hpu_graphs`."""

    # Copies

    async_copy: bool = True
    """Copy inputs to pinned host memory first, so that their copy to the device does not hold up the host."""

    async_output: bool = True
    """Copy outputs to pinned host memory as soon as they are computed, without waiting, where the bridge can, instead
    of late and waiting. The first copies are compared with ones that are waited for. Used when `pipelining`."""

    # Pipelining

    pipelining: bool | Literal["auto"] = True
    """Prepare later batches in a thread, and fetch a batch's output only after later batches were launched. On an HPU
    the depths of both rise during a run where that proves faster, unless `prefetch` or `in_flight` is given. "auto"
    lets them rise from what is given, and on the CPU too."""

    prefetch: int | None = None
    """Batches that the host prepares ahead, in a thread, 0 to 1024. 0 prepares each batch when it is needed. None means
    2 or more on an HPU, and 0 on the CPU, where no device waits and a thread takes time from the network. Used when
    `pipelining`."""

    in_flight: int | None = None
    """Batches whose output may wait on the device while a later one is launched, 0 to 1024. Each takes the device
    memory of a batch and its output. None means 1 or more on an HPU, and 0 on the CPU, where an output is there at
    once. Used when `pipelining`."""

    depth_memory: int = 2**30
    """Bytes that the batches ahead, and the batches and outputs behind, may take where depths rise during a run."""

    defer_hooks: bool | Literal["auto"] = "auto"
    """Run the end hooks of a batch when its output has arrived, with host tensors, beside later batches. "auto" does so
    where all that there are may be late: those of prediction writers without other batch hooks, of Lightning's
    callbacks and ours. False, and "auto" otherwise, run them right after the step with device tensors, as stock
    Lightning does, and delay only the stored predictions. Used when `pipelining`."""

    # Post-processing

    postprocess: Callable[[Any], Any] | None = None
    """A function that is called with the output of each batch, with host tensors, such as one that decodes. What it
    returns takes the place of the prediction for end hooks, writers and the list of predictions. It runs beside the
    main thread, for several batches at once; in place without `pipelining`, and where end hooks run right after the
    step (`defer_hooks`)."""

    postprocess_workers: int = 2
    """Calls of `postprocess` at once, 0 to 256; twice as many outputs may be there for them. 0 calls it in place. Used
    with `postprocess`."""

    postprocess_backend: Literal["thread", "process"] = "thread"
    """What these workers are. Threads suit work outside of Python, as of torch, NumPy and tokenizers. Processes suit
    Python code; they take seconds to start, and what they call, take and return is pickled. Used with `postprocess`."""

    # Lengths

    lengths: Literal["auto"] | None = None
    """One flag for batches of a Hugging Face tokenizer, made of samples with `input_ids`: "auto" is short for
    `group_by_length="input_ids"`, `bucket_lengths="auto"` and `pad_spec="tokenizer"`, each unless it is given."""

    bucket_lengths: Sequence[int] | Literal["auto"] | None = None
    """Lengths to which batches are padded on the host, as `pad_spec` says. "auto" chooses them."""

    num_buckets: int = 8
    """Lengths that "auto" chooses at most, 1 to 1024."""

    bucket_multiple: int = 8
    """Lengths that "auto" chooses are multiples of this, 1 to 65536."""

    pad_spec: PadSpec | Literal["tokenizer"] | None = None
    """Which tensors of a batch are padded, in which dimension and with what, and which outputs are cut back.
    "tokenizer" is for batches of a Hugging Face tokenizer. Used with `bucket_lengths`."""

    warm_up: bool = False
    """Run every bucket before the first batch, so that none is captured later. Used with `bucket_lengths`."""

    group_by_length: str | Sequence[int] | Callable[[Any], int] | None = None
    """Predict samples of like lengths together: a key or a function that gives a sample's length, or one length per
    sample. Predictions come back in the dataset's order."""

    # Observation

    trace: str | PathLike[str] | None = None
    """A folder to which every run writes where its time went: `trace.json`, `report.json` and `timeline.png`."""

    def __post_init__(self) -> None:
        for name in ("async_copy", "async_output", "pad_batch", "warm_up"):
            _check_type(name, getattr(self, name), bool)
        if not (type(self.defer_hooks) is bool or self.defer_hooks == "auto"):
            raise TypeError(f"`defer_hooks` must be True, False or 'auto', got {self.defer_hooks!r}.")
        if not (type(self.pipelining) is bool or self.pipelining == "auto"):
            raise TypeError(f"`pipelining` must be True, False or 'auto', got {self.pipelining!r}.")
        if not (type(self.hpu_graphs) is bool or self.hpu_graphs in ("hpu_graph", "compile", "direct")):
            raise TypeError(
                f"`hpu_graphs` must be True, False, 'hpu_graph', 'compile' or 'direct', got {self.hpu_graphs!r}."
            )
        for name, low, high in (
            ("max_graphs", 1, 65536),
            ("verify_graphs", 0, 65536),
            ("num_buckets", 1, 1024),
            ("bucket_multiple", 1, 65536),
            ("depth_memory", 1, 2**63),
            ("postprocess_workers", 0, 256),
        ):
            _check_range(name, getattr(self, name), low, high)
        for name in ("prefetch", "in_flight"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), 0, 1024)
        if not (self.postprocess is None or callable(self.postprocess)):
            raise TypeError(f"`postprocess` must be a function or None, got {self.postprocess!r}.")
        if self.postprocess_backend not in ("thread", "process"):
            raise TypeError(f"`postprocess_backend` must be 'thread' or 'process', got {self.postprocess_backend!r}.")
        if self.graph_memory is not None:
            _check_range("graph_memory", self.graph_memory, 1, 2**63)
        if self.graph_modules is not None and self.graph_modules != "blocks":
            self._set("graph_modules", _checked_names(self.graph_modules))
        if self.hpu_graphs == "direct" and (self.graph_modules is None or self.graph_modules == "blocks"):
            raise ValueError(
                "`hpu_graphs='direct'` captures only modules that you name: pass `graph_modules=['encoder', ...]`."
            )
        if self.lengths not in (None, "auto"):
            raise TypeError(f"`lengths` must be 'auto' or None, got {self.lengths!r}.")
        if self.lengths == "auto":
            chosen = {"group_by_length": "input_ids", "bucket_lengths": "auto", "pad_spec": "tokenizer"}
            for name, value in chosen.items():
                if getattr(self, name) is None:
                    self._set(name, value)
        if self.bucket_lengths is not None and self.bucket_lengths != "auto":
            self._set("bucket_lengths", _checked_lengths(self.bucket_lengths))
        if self.pad_spec == "tokenizer":
            self._set("pad_spec", PadSpec.tokenizer())
        elif not (self.pad_spec is None or isinstance(self.pad_spec, PadSpec)):
            raise TypeError(f"`pad_spec` must be a PadSpec, 'tokenizer' or None, got {self.pad_spec!r}.")
        if (self.bucket_lengths is None) != (self.pad_spec is None):
            raise ValueError(
                f"`bucket_lengths` and `pad_spec` do nothing without each other, got {self.bucket_lengths!r} and"
                f" {self.pad_spec!r}. For batches of a Hugging Face tokenizer, pass pad_spec='tokenizer'."
            )
        if self.warm_up and self.bucket_lengths is None:
            raise ValueError("`warm_up=True` warms up buckets: pass `bucket_lengths` and `pad_spec` too.")
        if self.warm_up and not self.pipelining:
            raise ValueError("`warm_up=True` needs `pipelining=True`.")
        if not (self.trace is None or isinstance(self.trace, str | PathLike)):
            raise TypeError(f"`trace` must be a folder or None, got {self.trace!r}.")
        if self.trace is not None and not fspath(self.trace):
            raise ValueError("`trace` is empty. Name a folder, such as '.', or pass None to record nothing.")
        group = self.group_by_length
        if not (group is None or isinstance(group, str | Sequence) or callable(group)):
            raise TypeError(f"`group_by_length` must be a key, a function or a list of lengths, got {group!r}.")

    def prefetch_depth(self, device_type: str) -> int:
        """Batches to prepare ahead where the network runs on a device of that type ("hpu" or "cpu")."""
        return self._depth(self.prefetch, 2, device_type)

    def in_flight_depth(self, device_type: str) -> int:
        """Batches that may be launched behind one whose output is awaited, on a device of that type, likewise."""
        return self._depth(self.in_flight, 1, device_type)

    def tunes_depths(self, device_type: str) -> bool:
        """Whether the depths rise during a run on a device of that type."""
        if self.pipelining == "auto":
            return True
        return self.pipelining and device_type != "cpu" and self.prefetch is None and self.in_flight is None

    def _depth(self, chosen: int | None, default: int, device_type: str) -> int:
        if not self.pipelining:
            return 0
        if chosen is not None:
            return chosen
        return 0 if device_type == "cpu" and self.pipelining is True else default

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _check_type(name: str, value: object, expected: type) -> None:
    # bool is an int to Python, not to a user: `prefetch=True` is a mistake.
    if type(value) is not expected:
        raise TypeError(f"`{name}` must be of type {expected.__name__}, got {value!r}.")


def _are(values: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(values, Iterable) and all(map(fits, values))


def _check_range(name: str, value: int, low: int, high: int) -> None:
    _check_type(name, value, int)
    if not low <= value <= high:
        raise ValueError(f"`{name}` must be from {low} to {high}, got {value}.")


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not _are(names, lambda name: isinstance(name, str)):
        raise TypeError(f"`graph_modules` must be a list of module names or 'blocks', got {names!r}.")
    if not names:
        raise ValueError("`graph_modules` is empty. Name a module, or pass `hpu_graphs=False`.")
    return tuple(names)


def _checked_lengths(lengths: Any) -> tuple[int, ...]:
    if isinstance(lengths, str) or not _are(lengths, lambda length: type(length) is int):
        one = f" For one length, write [{lengths}]." if type(lengths) is int else ""
        raise TypeError(f"`bucket_lengths` must be a list of int, 'auto' or None, got {lengths!r}.{one}")
    if not lengths or min(lengths) < 1:
        raise ValueError(f"`bucket_lengths` must be positive, and at least one, got {lengths!r}.")
    return tuple(sorted(set(lengths)))
