"""Processes that call one function and know nothing of the device, and what is sent to them and back."""

import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from multiprocessing.context import SpawnContext, SpawnProcess
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

Mode = Callable[[], AbstractContextManager[object]]
"""Makes the context of each call, such as `torch.inference_mode`, which is per thread."""

_THREADS = "pass `postprocess_backend='thread'`"
# Importing torch imports the bridge otherwise, and importing this package the emulator.
_NO_DEVICE = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PT_HPU_AUTOLOAD": "0", "LIGHTNING_HPU_INFER_EMULATOR": "0"}


def timed(mode: Mode, function: Callable[[Any], Any], argument: Any) -> tuple[float, float, Any]:
    """Call a function: start and end in seconds of `time.perf_counter`, and what it returned.

    That clock is the machine's, so times of several processes can be compared (Linux, macOS).
    """
    with mode():
        start = perf_counter()
        value = function(argument)
        return start, perf_counter(), value


class Processes:
    """Worker processes, started one by one when there is work for them. Main thread only.

    They are spawned, so that they inherit no state of the device, and end with the process that started them. Values
    are pickled through pipes: shared memory would take a file descriptor per tensor, of which there are few.

    Args:
        function: What they call. It is pickled, which keeps its name only: they import its module.
        workers: How many.
        mode: The context of each call, a class that can be imported.

    Raises:
        TypeError: If the function cannot be pickled.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int, mode: Mode) -> None:
        try:
            job = dumps((function, mode))
        except Exception as error:
            raise TypeError(
                f"`postprocess={function!r}` cannot be sent to other processes ({error}). Define it with `def` at the"
                f" top level of a module, or {_THREADS}."
            ) from error
        self._new_pool = partial(ProcessPoolExecutor, workers, initializer=_begin, initargs=(job,))
        self._pools: WeakKeyDictionary[Future[Any], tuple[ProcessPoolExecutor, _Context]] = WeakKeyDictionary()
        self._start()

    def _start(self) -> None:
        self._context = _Context()
        self._pool = self._new_pool(mp_context=self._context)

    def submit(self, argument: Any) -> "Future[tuple[float, float, Any]]":
        """Have the function called as `timed` does; `opened` gives its value.

        If a process died, all calls that had not ended fail. This one, and those after it, go to new processes.

        Raises:
            RuntimeError: If Python is ending.
        """
        parcel, dtype = Parcel(argument, "What `predict_step` returned"), torch.get_default_dtype()
        try:
            call = self._pool.submit(_work, parcel, dtype)
        except BrokenProcessPool:
            self._pool.shutdown()  # with its other processes
            self._start()
            call = self._pool.submit(_work, parcel, dtype)
        self._pools[call] = self._pool, self._context
        return call

    def cause(self, call: "Future[Any]") -> str:
        """Why a call failed, if that is none of the function: its process died. Empty otherwise."""
        if call not in self._pools or not isinstance(call.exception(), BrokenProcessPool):
            return ""
        pool, context = self._pools[call]
        # A thread of the pool joins them all. Joining them here too could take the exit code away from it.
        pool.shutdown()
        codes = {process.exitcode for process in context.processes} - {None, 0, -signal.SIGTERM}
        return (
            f"a worker process of `postprocess` died (exit codes {sorted(codes)}; minus 9 is often a lack of"  # type: ignore[type-var]
            " memory). If its own message above says that the main module must be importable, put what your script"
            f" does under `if __name__ == '__main__':`. Or {_THREADS}."
        )

    def close(self, *, abandon: bool) -> None:
        """End the processes and wait for them; with `abandon` those that are at work too."""
        if abandon:
            for process in self._context.processes:
                process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


def opened(value: Any) -> Any:
    """What a function returned, in a process or not."""
    return value.open() if isinstance(value, Sealed) else value


class _Process(SpawnProcess):
    """Starts without the device, and deaf to Ctrl-C, which a terminal sends to all processes: the first one acts."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            with _environment(_NO_DEVICE):
                super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    """Makes processes, and knows those that it made."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[_Process] = []

    def Process(self, *args: Any, **kwargs: Any) -> _Process:  # type: ignore[override]
        process = _Process(*args, **kwargs)
        self.processes.append(process)
        return process


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# In a worker


class _Job:
    """What a worker process is for."""

    pickled = b""


def _begin(pickled: bytes) -> None:
    # Nothing in here may fail: the executor would only say that the process died.
    torch.set_num_threads(1)
    _Job.pickled = pickled
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits for work without an end, also if the process that started it was killed."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _work(argument: Any, dtype: torch.dtype) -> tuple[float, float, "Parcel"]:
    try:
        torch.set_default_dtype(dtype)
        function, mode = _job()
        with mode():
            opened = argument.open()
        start, end, value = timed(mode, function, opened)
    except BaseException as error:
        raise _portable(error).with_traceback(error.__traceback__) from error.__cause__
    return start, end, Parcel(value, "What `postprocess` returned")


@cache
def _job() -> tuple[Callable[[Any], Any], Mode]:
    try:
        function, mode = pickle.loads(_Job.pickled)
    except Exception as error:
        raise RuntimeError(
            f"a worker process cannot import `postprocess` ({type(error).__name__}: {error}). Define it in a module"
            f" that it can import, not in a notebook or an interactive session, or {_THREADS}."
        ) from error
    if "habana_frameworks" in sys.modules:
        raise RuntimeError(
            "importing `postprocess` in a worker process imports `habana_frameworks` too, which would take the device"
            f" away. Define `postprocess` in a module that does not import it, or {_THREADS}."
        )
    return function, mode


def _portable(error: BaseException) -> BaseException:
    """The error, or one that says the same, if it cannot be sent: unpickling calls its class with its `args`."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# On the way


class Parcel:
    """A value to be sent: it is pickled by the thread that sends it, and arrives as `Sealed`."""

    def __init__(self, value: Any, what: str) -> None:
        self._value = value
        self._what = what

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            return Sealed, (dumps(self._value),)
        except Exception as error:
            # Raised where it is opened: a thread of the pool pickles, and would race with the one that ends it.
            return Unsendable, (self._what, str(error))


class Sealed:
    """A pickled value that is unpickled where an error of that has its place."""

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    def __reduce__(self) -> tuple[Any, ...]:
        return Sealed, (self._pickled,)

    def open(self) -> Any:
        """The value."""
        return pickle.loads(self._pickled)


class Unsendable(Sealed):
    """In place of a value that does not pickle: says so where it is opened."""

    def __init__(self, what: str, why: str) -> None:
        self._what = what
        self._why = why

    def __reduce__(self) -> tuple[Any, ...]:
        return Unsendable, (self._what, self._why)

    def open(self) -> Any:
        """Raise.

        Raises:
            TypeError: In any case.
        """
        raise TypeError(
            f"{self._what} cannot be sent between processes ({self._why}). Use tensors, arrays and plain Python"
            f" objects, or {_THREADS}."
        )


def dumps(value: Any) -> bytes:
    """A value as bytes for `pickle.loads`, in which a tensor takes no more than its elements.

    torch's own way copies a tensor four times, with all of the storage that it is a part of (2.13 `storage.py`).

    Raises:
        TypeError: If it holds a tensor of a device, which would be opened where this is read.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        if value.device.type not in ("cpu", "meta"):
            raise TypeError(f"it holds a tensor on {value.device}")
        if (
            type(value) is not Tensor
            or value.device.type == "meta"
            or value.layout is not torch.strided
            or value.requires_grad
            or value.is_quantized
            or not value.numel()
            or vars(value)
        ):
            return NotImplemented
        elements = value.resolve_conj().resolve_neg().contiguous().flatten()
        return _tensor, (pickle.PickleBuffer(elements.view(torch.uint8).numpy().data), value.dtype, value.shape)


def _tensor(elements: bytearray, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.frombuffer(elements, dtype=torch.uint8).view(dtype).view(shape)
