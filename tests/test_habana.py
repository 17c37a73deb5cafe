"""The one door to the bridge: what it asks of it, on the emulator."""

import warnings

import pytest
import torch

from lightning_hpu_infer import _habana

pytestmark = pytest.mark.usefixtures("emulated")


def captured() -> list[float]:
    """What a graph gives that is captured now."""
    double = _habana.graphed(lambda tensors: [tensors[0] * 2])
    return [double([torch.full((1,), value, device="hpu")])[0].item() for value in (1.0, 2.0)]


def fail_in_capture() -> BaseException:
    def fail(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        raise ValueError("in the capture")

    try:
        try:
            _habana.graphed(fail)([torch.ones(1, device="hpu")])
        except ValueError as error:
            raise KeyError("around it") from error
    except KeyError as error:
        return error
    raise AssertionError


def test_a_failed_capture_is_cleared_through_the_causes_of_its_error() -> None:
    error = fail_in_capture()
    _habana.reset_capture(error)
    assert captured() == [2.0, 4.0]
    assert isinstance(error.__cause__, ValueError)


def test_a_failed_capture_is_cleared_though_its_graph_lives() -> None:
    graph = torch.get_device_module("hpu").HPUGraph()
    graph.capture_begin(dry_run=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _habana.reset_capture(ValueError())
    assert captured() == [2.0, 4.0]
    assert torch.ones(2, device="hpu").add(1).tolist() == [2.0, 2.0]
    del graph


def test_a_state_that_cannot_be_cleared_is_said_and_does_not_hide_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, dry_run: bool = False) -> None:
        raise RuntimeError("GRAPH:: graph Capture already in progress")

    with monkeypatch.context() as patch:
        patch.setattr(torch.get_device_module("hpu").HPUGraph, "capture_begin", refuse)
        with pytest.warns(UserWarning, match="could not be cleared.*already in progress.*hpu_graphs=False"):
            _habana.reset_capture(ValueError())
    assert captured() == [2.0, 4.0]
