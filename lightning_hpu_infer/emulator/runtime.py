"""The emulated device of this process: its queues, memory, counters and lazy queue."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from lightning_hpu_infer.emulator.config import Counters, EmulatorConfig
from lightning_hpu_infer.emulator.engine import Engine, sleep_until
from lightning_hpu_infer.emulator.events import EventDispatcher, EventId
from lightning_hpu_infer.emulator.plan import Plan
from lightning_hpu_infer.emulator.program import LazyQueue, Program
from lightning_hpu_infer.emulator.storage import Cell, Memory, Storage
from lightning_hpu_infer.emulator.task import Task
from lightning_hpu_infer.emulator.timeline import Timeline

_UNJOINED = ("", "mark_step", "replay", "stream_switch")
"""Causes of a flush that leave the launch to the launch thread (bridge: hpu_lazy_tensors.cpp:1648-1662)."""


class CaptureState:
    """What the bridge keeps once per process about graph capture (bridge: lazy_executor.h:433-435)."""

    def __init__(self) -> None:
        self.graph: Any = None
        self.capturing = False
        self.dry_run = False
        self.marked_inputs: list[Any] = []


class Runtime:
    """Everything behind one installed emulator."""

    def __init__(self, config: EmulatorConfig) -> None:
        self.config = config
        self.counters = Counters()
        self.memory = Memory(lazy=config.lazy)
        self.generator = torch.Generator()
        self.capture = CaptureState()
        self.lock = threading.RLock()
        self.queue = LazyQueue()
        self.interrupted = False
        """Whether the host worked on values since the last `gather` began."""
        self._gathering = 0
        """The thread that gathers ops into one program in eager mode, and has the lock; 0 if there is none."""
        self.plans: dict[tuple[Any, ...], Plan] = {}
        self.programs: dict[tuple[Any, ...], Program] = {}
        self.compiled: set[tuple[Any, ...]] = set()
        self.settings = dict.fromkeys(("dynamic_shape", "deterministic"), False) | {"recompute_sdp": True}
        """What programs switch on and off (`c_api`); these can be asked for."""
        self.timeline = Timeline()
        names = ("compute", "h2d", "d2h", "d2h_host")
        self.compute, self.h2d, self.d2h, self.d2h_host = (Engine(name, self.timeline) for name in names)
        self.engines: dict[int, Engine] = {}
        """Queues of user-created streams by stream id."""
        self.stream_id = 0
        self.owner_thread = 0
        self.pid = os.getpid()
        self.unreported: BaseException | None = None
        self.uncopied: BaseException | None = None
        """The error of an asynchronous copy to the host, for the next event that is waited for."""
        self.has_queued_launch = False
        """Whether the launch thread of lazy mode was given a job that nobody has waited for."""
        self.launch_error: BaseException | None = None
        """What the newest job of the launch thread raised; the next job replaces it (bridge: lazy_kernels.cpp:870)."""

    # Queues

    def all_engines(self) -> list[Engine]:
        """Return the queues of stream 0 and of every other stream."""
        return [self.compute, self.h2d, self.d2h, *self.engines.values()]

    def engine(self, kind: str) -> Engine:
        """Return the queue for work of a kind: stream 0 has one per kind, any other stream is a single one."""
        if self.stream_id:
            return self.stream_engine(self.stream_id)
        return getattr(self, kind)  # type: ignore[no-any-return]

    def stream_engine(self, stream_id: int) -> Engine:
        """Return the queue of a user-created stream."""
        engine = self.engines.get(stream_id)
        if engine is None:
            engine = self.engines[stream_id] = Engine(f"stream-{stream_id}", self.timeline)
        return engine

    def wait(self, task: Task) -> None:
        """Block the calling thread until `task` has run, and raise what it raised."""
        self.wait_all([task])
        self.check(task)

    def check(self, task: Task) -> None:
        """Raise the error of a finished task."""
        if task.error is not None:
            raise task.error.with_traceback(None)

    def touch(self) -> None:
        """Note which thread calls the device."""
        ident = threading.get_ident()
        if ident != self.owner_thread:
            if self.owner_thread == 0:
                self.owner_thread = ident
                self.notify("device_acquired")
            else:
                self.counters.add("off_thread_calls")

    # Ops

    def enqueue(self, plan: Plan, cells: Sequence[Cell]) -> list[Cell]:
        """Queue one op and return the cells of its new outputs."""
        with self.lock:
            queue = self.queue
            ins = tuple([queue.operand(cell) for cell in cells])
            made, outs = [], []
            for _, spec in plan.new:
                storage = Storage(self.memory, spec)
                outs.append(queue.define(storage))
                made.append(Cell(storage))
            queue.steps.append((plan, ins, tuple(outs)))
            if not (self.config.lazy or self._gathering):
                self.flush("")
        return made

    @contextlib.contextmanager
    def gather(self) -> Iterator[None]:
        """Queue this thread's ops inside, as in lazy mode; other threads' ops wait. The caller flushes."""
        with self.lock:
            self.interrupted, self._gathering = False, threading.get_ident()
            try:
                yield
            except BaseException:
                self.queue = LazyQueue()
                raise
            finally:
                self._gathering = 0

    def note_host_work(self) -> None:
        """Note something that no program repeats."""
        if self._gathering == threading.get_ident():
            self.interrupted = True

    def is_pending(self, storage: Storage) -> bool:
        """Tell whether an op that was not launched reads or writes `storage`."""
        return storage in self.queue.registers

    def flush(self, cause: str, *, join: bool | None = None) -> None:
        """Launch what is queued; `cause` is counted if that is anything.

        Args:
            cause: What asked for it.
            join: Whether to wait for the launch thread, which raises what its newest job raised. By default all do but
                step markers and replays.
        """
        self._launch_queue(cause)
        if cause not in _UNJOINED if join is None else join:
            self.join_launches()

    def join_launches(self) -> None:
        """Wait for the launch thread, as most device calls do (bridge: lazy_executor.cpp:97-120)."""
        error, self.launch_error, self.has_queued_launch = self.launch_error, None, False
        if error is not None:
            raise error.with_traceback(None)

    def queue_launch(self, error: BaseException | None = None) -> None:
        """Note that the launch thread got a job, whose error takes the place of that of the job before."""
        if self.config.lazy:
            self.has_queued_launch, self.launch_error = True, error

    def _launch_queue(self, cause: str) -> None:
        with self.lock:
            queue = self.queue
            if not queue.steps:
                if queue.registers:
                    self.queue = LazyQueue()
                return
            self.queue = LazyQueue()
            if cause:
                self.counters.flush(cause)
            program = self._cached(queue.program())
            capture = self.capture
            if capture.capturing and capture.graph is not None and self.config.lazy:
                capture.graph.append(queue)
            if capture.dry_run and self.config.lazy:
                self._compile(program)
                return
            env: list[Storage | None] = [storage if storage.has_live_cell() else None for storage in queue.storages]
            for register, _ in queue.inputs:
                env[register] = queue.storages[register]
        self.launch(program, env, single=not (self.config.lazy or self._gathering))

    def launch(self, program: Program, env: Sequence[Storage | None], *, single: bool = False) -> Task:
        """Submit a program to the compute queue."""
        if self.config.launch_us:
            time.sleep(self.config.launch_us * 1e-6)
        if not single:
            self._compile(program)
        # An input always has a storage, an output only while a tensor shows it.
        reads = [storage for register in program.inputs if (storage := env[register]) is not None]
        written = (*program.outputs, *program.mutated)
        writes = [storage for register in written if (storage := env[register]) is not None]
        for register in program.outputs:
            if (storage := env[register]) is not None:
                # The device may keep them in any order of dimensions (bridge: hpu_habana_launch_op_pt.cpp:2117-2150).
                storage.permuted = self.config.lazy and len(storage.spec.size) > 1
        self.queue_launch()
        task = Task(lambda: self._run(program, env, single), kind="compute")
        return self.engine("compute").submit(task, reads, writes)

    def _cached(self, program: Program) -> Program:
        known = self.programs.get(program.key)
        if known is not None and known.inputs == program.inputs:
            return known
        self.programs[program.key] = program
        return program

    def _run(self, program: Program, env: Sequence[Storage | None], single: bool) -> None:
        start = time.perf_counter()
        self.counters.add("programs")
        self.counters.add("device_ops", len(program.steps))
        try:
            program.run(env)
        except BaseException as error:
            self.unreported = error
            raise
        if not single and program.computes and self.config.program_ms:
            sleep_until(start + self.config.program_ms * 1e-3)

    def _compile(self, program: Program) -> None:
        """Let a program that was not launched before keep the compute queue busy for the compile time."""
        if program.key in self.compiled:
            self.notify("cache_hit", recipe_id=program)
            return
        self.compiled.add(program.key)
        kind = "compile" if self.config.compile_ms else ""
        self.engine("compute").submit(Task(lambda: self._spend_compile_time(program), kind=kind))

    def _spend_compile_time(self, recipe: Program) -> None:
        start = time.perf_counter()
        if self.config.compile_ms:
            sleep_until(start + self.config.compile_ms * 1e-3)
        self.counters.add("compiles")
        self.notify("cache_miss", recipe_id=recipe)
        self.notify("graph_compilation", duration=round((time.perf_counter() - start) * 1e6), recipe=recipe)

    def notify(self, event: str, **params: object) -> None:
        """Publish an event by the name of its `EventId`; what follows a colon is the name of an op.

        The values become strings only if anybody listens: this is called in every launch.
        """
        name, _, op_name = event.partition(":")
        dispatcher, topic = EventDispatcher.instance(), EventId[name.upper()]
        if dispatcher.has_subscribers(topic):
            params |= {"op_name": op_name} if op_name else {}
            dispatcher.publish(topic, [(key, str(value)) for key, value in params.items()])

    def synchronize(self) -> None:
        """Launch what is pending and wait for every queue of the device."""
        self.flush("synchronize")
        self.wait_all(engine.last for engine in self.all_engines())
        if (error := self.unreported) is not None:
            self.unreported = None
            raise error.with_traceback(None)

    def wait_all(self, tasks: Iterable[Task | None]) -> None:
        """Wait like `wait`, and leave errors to those who read the results.

        Counted as one wait even if all is done already, so that the counter does not depend on timing.
        """
        start = time.perf_counter()
        for task in tasks:
            if task is not None:
                task.wait()
        self.counters.add("blocking_waits")
        self.counters.add("blocked_s", time.perf_counter() - start)

    def seed(self, seed: int) -> None:
        """Seed the device's random state, behind the ops that were called before."""
        self.flush("synchronize")
        self.compute.submit(Task(lambda: self.generator.manual_seed(seed)))

    def set_stream(self, stream_id: int) -> None:
        """Make another stream current; a change launches what is pending (bridge: HPUStream.cpp:219-225)."""
        if stream_id != self.stream_id:
            if self.config.lazy:
                self.notify("mark_step")
            self.flush("stream_switch")
            self.stream_id = stream_id

    def stop(self) -> None:
        """Run what was launched and end the threads; pending ops are dropped."""
        self.queue = LazyQueue()
        for engine in (*self.all_engines(), self.d2h_host):
            engine.stop()


_runtime: Runtime | None = None
_forked = False


def set_current(runtime: Runtime | None) -> None:
    """Install or remove the runtime of this process."""
    global _runtime
    _runtime = runtime


def installed() -> Runtime | None:
    """Return the runtime, or None."""
    return _runtime


def current() -> Runtime:
    """Return the runtime for a device call."""
    if _runtime is None:
        raise RuntimeError("the HPU emulator is not installed; call lightning_hpu_infer.emulator.install() first")
    if _forked:
        raise RuntimeError(
            "Cannot use the HPU in a forked subprocess; start the process with the 'spawn' method"
            " (for a DataLoader: multiprocessing_context='spawn'), or keep device calls in the parent"
        )
    return _runtime


def _after_fork() -> None:
    global _forked
    _forked = _runtime is not None


os.register_at_fork(after_in_child=_after_fork)


def is_forked() -> bool:
    """Tell whether this process is a forked child of the one with the device."""
    return _forked
