"""A process is killed at random moments, and others go on with its predictions."""

import multiprocessing
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_hpu_infer.writing.read import read_predictions
from tests.writing import killed

SECONDS = 60.0
FLAGS: list[dict[str, Any]] = [{}, {"group_by_length": killed.length_of}, {"pipelining": False}, {"in_flight": 3}]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """Forks processes that have imported everything."""
    with pytest.MonkeyPatch.context() as patch:
        # A torchvision that does not fit to torch breaks `import lightning`; ours is out of sight in this environment.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.writing.killed"])
        patch.setenv("PYTHONWARNINGS", "ignore")
        yield context


def run(server: Any, path: Path, rng: random.Random, after: int | None) -> bool:
    """One process on the path, killed after so many batches and a moment; whether it came to its end."""
    received, told = server.Pipe(duplex=False)
    arguments = (path, told, rng.choice([3, 7, 8]), rng.random() < 0.5, rng.choice(FLAGS))
    process = server.Process(target=killed.predict, args=arguments)
    process.start()
    told.close()
    try:
        for _ in range(10**9 if after is None else after):
            assert received.poll(SECONDS), "it hangs"
            received.recv()
        time.sleep(rng.random() * 0.02)  # the moment is any
        process.kill()
    except EOFError:
        pass
    process.join(SECONDS)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == 0


@pytest.mark.usefixtures("path_without_vision")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 6))])
def test_each_sample_is_there_once_after_kills_at_random_moments(tmp_path: Path, server: Any, seed: int) -> None:
    rng, path = random.Random(seed), tmp_path / "out"
    kills = 0
    while kills < 4 and not run(server, path, rng, after=rng.randint(1, 20)):
        kills += 1
    assert kills
    assert run(server, path, rng, after=None)
    table = read_predictions(path)
    scores = table["prediction"].combine_chunks().to_numpy_ndarray().tolist()
    assert table["index"].to_pylist() == list(range(killed.COUNT))
    assert scores == [[6.0 * i + 1, 22.0 * i + 2] for i in range(killed.COUNT)]
    assert not [name for name in path.rglob("*") if name.name.endswith(".tmp")]
