"""Worker processes of `postprocess`: what is sent, what they must not import, and how they end."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.postprocess import Postprocess
from lightning_hpu_infer.workers import Mode, Parcel, Processes, Sealed, dumps
from tests.helpers import assert_equal

ROOT = Path(__file__).parents[1]


class Fussy(Exception):
    """Cannot be unpickled: its class is called with its only argument."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one + two)


class Seen(NamedTuple):
    """What a worker process is like."""

    doubled: Tensor
    threads: int
    inference: bool
    bridge: bool
    dtype: torch.dtype
    pid: int


def processes(function: Callable[[Any], Any], mode: Mode = torch.no_grad) -> Postprocess[Any]:
    config = InferenceConfig(postprocess=function, postprocess_workers=1, postprocess_backend="process")
    return Postprocess(config, mode)


def look(output: Any) -> Any:
    if output == "error":
        raise KeyError("no such token")
    if output == "fussy":
        raise Fussy(1, 2)
    if output == "generator":
        return (each for each in "abc")
    if output == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    bridge = "habana_frameworks" in sys.modules
    doubled = 2 * output["x"]
    return Seen(doubled, torch.get_num_threads(), doubled.is_inference(), bridge, torch.tensor(1.0).dtype, os.getpid())


@pytest.mark.usefixtures("emulated", "path_without_vision")
def test_processes_in_order_without_the_device_with_errors_and_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """One test of many things, since a process takes seconds to start."""
    monkeypatch.setenv("LIGHTNING_HPU_INFER_EMULATOR", "1")  # of this process only
    x = torch.arange(6.0).reshape(2, 3).T
    outputs = [{"x": x}, "error", "fussy", "generator", {"x": x + 1}, "die", {"x": x}]
    results: list[Any] = []
    with (
        torch.inference_mode(),
        processes(look, torch.inference_mode) as stage,
    ):
        for index, output in enumerate(outputs):
            torch.set_default_dtype(torch.float64 if index == 4 else torch.float32)
            stage.submit(f"batch {index}", output, index)
        while stage:
            try:
                results.append(stage.take()[1])
            except Exception as error:
                results.append(error)
        for index in (7, 8):  # of a pool that broke
            stage.submit(f"batch {index}", {"x": x}, index)
        results += [stage.take()[1], stage.take()[1]]
    assert_equal([results[0].doubled, results[4].doubled], [2 * x, 2 * x + 2])
    assert results[0][1:-1] == (1, True, False, torch.float32)
    assert results[4][1:-1] == (1, True, False, torch.float64)
    assert results[0].pid == results[4].pid != os.getpid()
    assert isinstance(results[1], KeyError)
    words = "".join(traceback.format_exception(results[1]))
    assert 'raise KeyError("no such token")' in words
    assert "Raised by `postprocess` of batch 1" in words
    assert isinstance(results[2], RuntimeError)
    assert str(results[2]) == "Fussy: 3"
    assert isinstance(results[3], TypeError)
    assert "What `postprocess` returned cannot be sent" in str(results[3])
    assert isinstance(results[5], RuntimeError)
    words = "or of a batch that was in the pool with it: a worker process of `postprocess` died (exit codes [-9];"
    assert f"batch 5, {words}" in str(results[5])
    assert f"batch 6, {words}" in str(results[6])
    assert_equal([results[7].doubled, results[8].doubled], [2 * x, 2 * x])
    assert results[0].pid != results[7].pid == results[8].pid
    with pytest.raises(ProcessLookupError):
        os.kill(results[0].pid, 0)


@pytest.mark.usefixtures("path_without_vision")
def test_the_exit_code_is_known_while_the_pool_still_joins_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever of two threads reaps a process knows its code, a moment later than the other learns that it is gone."""
    wait = os.waitpid

    def waitpid(pid: int, flags: int) -> tuple[int, int]:
        reaped = wait(pid, flags)
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait(0.3)
        return reaped

    with processes(look) as stage:
        stage.submit("batch 0", "die", 0)
        monkeypatch.setattr(os, "waitpid", waitpid)
        with pytest.raises(RuntimeError, match=r"died \(exit codes \[-9\]"):
            stage.take()


def wait_without_end(output: Any) -> None:
    signal.pause()


@pytest.mark.full
def test_what_runs_is_cut_off_when_the_pool_is_left() -> None:
    with processes(wait_without_end) as stage:
        stage.submit(0, None, 0)
    assert isinstance(stage._pool, Processes)
    assert all(process.exitcode == -signal.SIGTERM for process in stage._pool._context.processes)


SCRIPT = """
import os
IMPORTS
import torch
from lightning_hpu_infer import InferenceConfig
from lightning_hpu_infer.postprocess import Postprocess

def function(output):
    return os.getpid()

if GUARD:
    config = InferenceConfig(postprocess=function, postprocess_workers=1, postprocess_backend="process")
    with Postprocess(config, torch.no_grad) as stage:
        stage.submit(0, None, 0)
        print("worker", stage.take()[1], flush=True)
        os.kill(os.getpid(), 9)
"""


def run_script(folder: Path, *, imports: str = "", guard: str = "__name__ == '__main__'") -> tuple[str, str]:
    """What a user's script printed and said; it kills itself while its pool is open."""
    path = folder / "script.py"
    path.write_text(SCRIPT.replace("IMPORTS", imports).replace("GUARD", guard))
    done = subprocess.run(
        [sys.executable, path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    return done.stdout, done.stderr


@pytest.mark.full
def test_workers_end_with_the_process_that_started_them_even_if_it_is_killed(tmp_path: Path) -> None:
    # What it prints is complete when all processes that could print have ended.
    printed, _ = run_script(tmp_path)
    assert printed.startswith("worker ")


@pytest.mark.full
def test_a_script_that_imports_the_bridge_is_told_so(tmp_path: Path) -> None:
    imports = "import sys; sys.modules['habana_frameworks'] = type(sys)('habana_frameworks')"
    _, said = run_script(tmp_path, imports=imports)
    assert "imports `habana_frameworks` too, which would take the device away" in said


@pytest.mark.full
def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    _, said = run_script(tmp_path, guard="True")
    assert "put what your script does under `if __name__ == '__main__':`" in said


def test_a_function_that_cannot_be_sent() -> None:
    with pytest.raises(TypeError, match=r"`postprocess=<function .*<lambda> .*Define it with `def` at the top level.*"):
        processes(lambda output: output)


class Decoder(nn.Module):
    def decode(self, output: Any) -> Any:
        return output


@pytest.mark.usefixtures("emulated", "path_without_vision")
def test_a_function_that_holds_device_tensors_is_not_sent() -> None:
    model = Decoder()
    model.register_buffer("table", torch.ones(3, device="hpu"))
    with pytest.raises(TypeError, match=r"cannot be sent to other processes .it holds a tensor on hpu"):
        processes(model.decode)


WHOLE = torch.arange(24.0).reshape(4, 6)


@pytest.mark.parametrize(
    "tensor",
    [
        WHOLE,
        WHOLE.T,
        WHOLE[1:3, ::2],
        WHOLE[:1].expand(5, 6),
        torch.tensor(3),
        torch.empty(0, 4),
        torch.empty(2, device="meta"),
        WHOLE > 3,
        WHOLE.bfloat16(),
        WHOLE.to(torch.float8_e4m3fn),
        torch.tensor([1 + 2j]).conj(),
        WHOLE.to_sparse(),
        nn.Parameter(WHOLE),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_tensors_arrive_as_they_are(tensor: Tensor) -> None:
    parcel = pickle.loads(pickle.dumps(Parcel({"tensor": tensor}, "it")))
    assert isinstance(parcel, Sealed)
    arrived = parcel.open()["tensor"]
    assert type(arrived) is type(tensor)
    assert (arrived.dtype, arrived.shape, arrived.requires_grad) == (tensor.dtype, tensor.shape, tensor.requires_grad)
    if tensor.device.type != "meta":
        assert torch.equal(arrived.to_dense().to(torch.complex64), tensor.to_dense().to(torch.complex64))


def test_a_part_of_a_tensor_is_sent_without_the_rest() -> None:
    assert len(dumps(torch.zeros(1000, 1000)[3])) < 5000


@pytest.mark.usefixtures("path_without_vision")
def test_what_does_not_pickle_is_an_error_where_it_is_opened_and_none_of_the_pools_threads() -> None:
    """These pickle, and fail the futures that others end at the same time."""
    sent = pickle.loads(pickle.dumps(Parcel((each for each in "abc"), "What `predict_step` returned")))
    for arrived in (sent, pickle.loads(pickle.dumps(sent))):
        with pytest.raises(TypeError, match=r"What `predict_step` returned cannot be sent .*generator.*Use tensors"):
            arrived.open()
    pool = Processes(look, 1, torch.no_grad)
    bad = pool.submit(each for each in "abc")
    assert isinstance(bad.exception(60), TypeError)
    assert isinstance(pool.submit("error").exception(60), KeyError)
    pool.close(abandon=False)
