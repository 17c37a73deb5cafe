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
    assert printed_by(script) == [str(number) for number in range(30)]


def test_python_ends_if_nobody_closes_and_postprocess_has_no_pool_any_more() -> None:
    """Python ends all pools before it waits for threads, and before exit handlers."""
    script = """
        import operator
        import sys
        import threading
        import torch
        from torch import nn
        from lightning_hpu_infer import InferenceConfig, InferencePipeline

        class Late(nn.Module):
            def forward(self, x):
                threading.main_thread().join()
                return x

        def pipeline(backend, model=Late):
            config = InferenceConfig(postprocess=operator.neg, postprocess_backend=backend)
            return InferencePipeline(model, "cpu", config)

        def go_on():
            threading.main_thread().join()
            for each in (*pipelines.values(), pipeline("thread", nn.Identity), pipeline("process", nn.Identity)):
                late.append(int(each.submit(torch.full((1,), 5.0)).result()))
            say("late", late)

        def say(name, found):
            sys.stdout.write(f"{name} {found}\\n")  # at once, beside other threads

        late, done = [], {"thread": [], "process": []}
        pipelines = {backend: pipeline(backend) for backend in done}
        for backend, each in pipelines.items():
            for number in range(5):
                future = each.submit(torch.full((1,), float(number)))
                future.add_done_callback(lambda future, backend=backend: done[backend].append(int(future.result())))
            future.add_done_callback(lambda _, backend=backend: say(backend, done[backend]))
        threading.Thread(target=go_on).start()
    """
    in_place = "`postprocess` runs in place, since the main thread has ended, and Python starts no pool any more.\n"
    assert sorted(printed_by(script, 2 * in_place)) == [  # of those that are made then
        "late [-5, -5, -5, -5]",
        "process [0, -1, -2, -3, -4]",
        "thread [0, -1, -2, -3, -4]",
    ]


def printed_by(script: str, said: str = "") -> list[str]:
    """The lines printed by a script whose Python ended as it should, and which warned of so much."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, said)
    return done.stdout.splitlines()


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
