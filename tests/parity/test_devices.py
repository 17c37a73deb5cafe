"""Several devices: real processes, gloo standing in for hccl, compared with stock Lightning's on the CPU."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.helpers import Net, Rows, launch, predict


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def check(ranks: list[dict[str, Any]]) -> None:
    """Every sample is predicted exactly once, under its index in the dataset."""
    expected = [row for batch in predict("cpu", Net(), DataLoader(Rows(23), 23)) for row in batch.tolist()]
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    found: dict[int, list[float]] = {}
    for rank in ranks:
        assert rank["written"] == rank["predictions"]
        for indices, batch in zip(rank["indices"], rank["predictions"], strict=True):
            for index, row in zip(indices, batch, strict=True):
                assert index not in found
                found[index] = row
    assert sorted(found) == list(range(23))
    for index, row in found.items():
        assert row == pytest.approx(expected[index], rel=1e-5)


@pytest.mark.parametrize(
    ("device", "strategy"),
    [("emulator", "auto"), ("emulator", "hpu_infer_ddp"), ("cpu", "auto")],
)
def test_two_devices_predict_every_sample_once(device: str, strategy: str, tmp_path: Path) -> None:
    code, output = launch(tmp_path, device, strategy, "2")
    assert code == 0, output
    ranks = results(tmp_path)
    check(ranks)
    assert [rank["strategy"] for rank in ranks] == ["HPUInferenceDDPStrategy"] * 2
    assert [rank["root_device"] for rank in ranks] == ["hpu" if device == "emulator" else "cpu"] * 2
    # Six batches on each rank, the last of the second one short. The first of a rank runs plainly.
    assert [rank["replays"] for rank in ranks] == ([5, 4] if device == "emulator" else [0, 0])


def test_two_devices_split_the_samples_as_stock_does(tmp_path: Path) -> None:
    shares = []
    for device in ("stock", "emulator"):
        (folder := tmp_path / device).mkdir()
        code, output = launch(folder, device, "auto" if device == "emulator" else "ddp", "2")
        assert code == 0, output
        shares.append([rank["indices"] for rank in results(folder)])
    assert shares[1] == shares[0]


def test_started_by_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29713"]
    code, output = launch(tmp_path, "emulator", "auto", "2", command=torchrun)
    assert code == 0, output
    check(results(tmp_path))


def test_an_error_on_one_rank_ends_all_ranks_with_that_error(tmp_path: Path) -> None:
    code, output = launch(tmp_path, "emulator", "auto", "2", "fault")
    assert code != 0
    assert "ValueError: rank 1 fails" in output
    assert not (tmp_path / "1.json").exists()
