"""What becomes of a pipeline that nobody closes when Python ends, and in a process that is forked."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from lightning_hpu_infer import InferencePipeline


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.full), "hpu"])
def test_python_ends_if_nobody_closes(device: str) -> None:
    """In a process of its own: what was submitted is computed, and nothing hangs or is killed at work."""
    script = f"""
        import torch
        from torch import nn
        from lightning_hpu_infer import InferencePipeline, emulator
        {"emulator.install()" if device == "hpu" else ""}
        pipeline = InferencePipeline(nn.Identity())
        assert pipeline.device.type == {device!r}
        for number in range(30):
            future = pipeline.submit(torch.full((1,), float(number)))
            future.add_done_callback(lambda future: print(int(future.result()), flush=True))
        generator = pipeline.predict(torch.zeros(1) for _ in iter(int, 1))
        next(generator)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(number) for number in range(30)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_a_process_that_was_forked_is_refused_and_ends() -> None:
    with InferencePipeline(nn.Identity(), "cpu") as pipeline:
        pipeline.push(torch.ones(1))
        found: list[str] = []
        reading, writing = os.pipe()
        with pipeline._engine._lock, pipeline._room._changed:  # as another thread may hold them
            child = os.fork()
        if child == 0:
            try:
                signal.alarm(30)
                for use in (pipeline.submit, pipeline.push, pipeline.predict, lambda _: pipeline.pop()):
                    try:
                        use([torch.ones(1)])
                    except RuntimeError as error:
                        found.append(str(error))
                pipeline.close()
                os.write(writing, "\n".join(found).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as said:
            assert said.read().count("before this process was forked") == 4
        os.waitpid(child, 0)
        assert pipeline.pop() == torch.ones(1)
