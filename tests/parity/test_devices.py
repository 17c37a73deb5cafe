"""Several devices: real processes, gloo standing in for hccl, compared with stock Lightning's on the CPU."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.parity.processes import check, launch, results


def predict_on_two(folder: Path, device: str, strategy: str) -> list[dict[str, Any]]:
    """What two ranks of the plugin did, after a look at whether it is right."""
    code, output = launch(folder, device, strategy, "2")
    assert code == 0, output
    ranks = results(folder)
    check(ranks)
    assert [rank["strategy"] for rank in ranks] == ["HPUInferenceDDPStrategy"] * 2
    assert [rank["root_device"] for rank in ranks] == ["hpu" if device == "emulator" else "cpu"] * 2
    # Six batches on each rank, the last of the second one short. The first of a rank runs plainly.
    assert [rank["replays"] for rank in ranks] == ([5, 4] if device == "emulator" else [0, 0])
    return ranks


@pytest.mark.parametrize(
    ("device", "strategy"), [("emulator", "hpu_infer_ddp"), pytest.param("cpu", "auto", marks=pytest.mark.full)]
)
def test_two_devices_predict_every_sample_once(device: str, strategy: str, tmp_path: Path) -> None:
    predict_on_two(tmp_path, device, strategy)


def test_two_devices_split_the_samples_as_stock_does(tmp_path: Path) -> None:
    ours = predict_on_two(tmp_path, "emulator", "auto")
    (folder := tmp_path / "stock").mkdir()
    code, output = launch(folder, "stock", "ddp", "2")
    assert code == 0, output
    assert [rank["indices"] for rank in ours] == [rank["indices"] for rank in results(folder)]


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
