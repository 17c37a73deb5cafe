from __future__ import annotations

import math

import pytest
import torch

from tests.contract.models import hpu

MIB = 1 << 20


def _source(nbytes: int, *, pinned: bool) -> torch.Tensor:
    source = torch.ones(nbytes // 4)
    return source.pin_memory("hpu") if pinned else source


@pytest.mark.usefixtures("hpu")
def test_pinned_means_the_base_address_of_a_block() -> None:
    x = torch.arange(6.0)
    pinned = x.pin_memory("hpu")
    assert torch.equal(pinned, x)
    assert pinned.is_pinned("hpu")
    assert pinned[:3].is_pinned("hpu")
    assert not pinned[1:].is_pinned("hpu")
    assert not pinned.is_pinned()
    assert not x.is_pinned("hpu")
    assert pinned.pin_memory("hpu") is not x


@pytest.mark.usefixtures("lazy_hpu")
def test_int64_is_range_checked_in_lazy_mode() -> None:
    ids = torch.tensor([1, -(2**31), 2**31 - 1])
    assert ids.to("hpu").dtype is torch.int64
    assert torch.equal(ids.to("hpu").cpu(), ids)
    with pytest.raises(RuntimeError, match="Error when trying to cast Long to Int, Input values range"):
        torch.tensor([2**31]).to("hpu")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("nbytes", "pinned", "corrupts"),
    [(64, True, True), (MIB, True, True), (64, False, False), (MIB, False, True)],
    ids=["small-pinned", "large-pinned", "small-pageable", "large-pageable"],
)
def test_source_of_an_asynchronous_copy_is_read_late(nbytes: int, pinned: bool, corrupts: bool) -> None:
    from lightning_hpu_infer.emulator import paused

    source = _source(nbytes, pinned=pinned)
    with paused("h2d"):
        on_device = source.to("hpu", non_blocking=True)
        source.fill_(2.0)
    assert on_device[0].item() == (2.0 if corrupts else 1.0)


@pytest.mark.usefixtures("eager_hpu")
def test_pageable_sources_are_staged_in_eager_mode() -> None:
    source = _source(MIB, pinned=False)
    on_device = source.to("hpu", non_blocking=True)
    source.fill_(2.0)
    assert on_device[0].item() == 1.0


@pytest.mark.usefixtures("emulated")
def test_64_bit_sources_go_through_a_temporary_in_lazy_mode() -> None:
    from lightning_hpu_infer.emulator import paused, stats

    source = torch.ones(MIB, dtype=torch.int64).pin_memory("hpu")
    before = stats().h2d_pinned
    with paused("h2d"):
        on_device = source.to("hpu", non_blocking=True)
        source.fill_(2)
    assert on_device[0].item() == 1
    assert stats().h2d_pinned == before


@pytest.mark.usefixtures("emulated")
def test_source_stays_alive() -> None:
    from lightning_hpu_infer.emulator import paused

    with paused("h2d"):
        on_device = torch.full((4,), 3.0).pin_memory("hpu").to("hpu", non_blocking=True)
    assert on_device.tolist() == [3.0] * 4


@pytest.mark.usefixtures("hpu")
def test_overwriting_an_input_is_ordered_behind_its_readers() -> None:
    static = torch.zeros(1000).to("hpu")
    results = []
    for value in range(20):
        static.copy_(torch.full((1000,), float(value)), non_blocking=True)
        results.append(static + 1)
    assert [result[0].item() for result in results] == [float(value + 1) for value in range(20)]


@pytest.mark.usefixtures("emulated")
def test_blocking_read_waits_for_its_own_producer_only() -> None:
    import habana_frameworks.torch.core as htcore

    from lightning_hpu_infer.emulator import paused

    first = torch.ones(3, device="hpu") + 1
    htcore.mark_step()
    hpu().synchronize()
    with paused("compute"):
        later = torch.ones(3, device="hpu") + 2
        htcore.mark_step()
        assert first.cpu().tolist() == [2.0] * 3
    assert later.cpu().tolist() == [3.0] * 3


@pytest.mark.usefixtures("emulated")
def test_destination_is_poisoned_until_an_asynchronous_copy_is_done() -> None:
    from lightning_hpu_infer.emulator import paused

    source = torch.ones(3, device="hpu") * 5
    destination = torch.zeros(3).pin_memory("hpu")
    event = hpu().Event()
    with paused("d2h"):
        destination.copy_(source, non_blocking=True)
        event.record()
        assert destination.isnan().all()
        assert not event.query()
    event.synchronize()
    assert destination.tolist() == [5.0] * 3


@pytest.mark.usefixtures("emulated")
def test_an_event_is_not_enough_for_a_pageable_destination() -> None:
    from lightning_hpu_infer.emulator import paused

    source = torch.ones(3, device="hpu") * 5
    with paused("d2h_host"):
        destination = source.to("cpu", non_blocking=True)
        event = hpu().Event()
        event.record()
        event.synchronize()
        hpu().synchronize()
        assert destination.isnan().all()


@pytest.mark.usefixtures("emulated")
def test_64_bit_device_to_host_copies_always_block() -> None:
    values = (torch.arange(4).to("hpu") + 1).to("cpu", non_blocking=True)
    assert values.tolist() == [1, 2, 3, 4]


PERMUTED = "handlePermutedTensor we only support non_blocking = false"


def _launched(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Outputs of a program that was launched by a step marker, which nobody has waited for."""
    import habana_frameworks.torch.core as htcore

    outputs = [torch.arange(float(math.prod(shape)), device="hpu").reshape(shape) * 1 for shape in shapes]
    hpu().synchronize()
    outputs = [output + 1 for output in outputs]
    htcore.mark_step()
    return outputs


def _copied(source: torch.Tensor) -> torch.Tensor:
    return torch.empty(source.shape).pin_memory("hpu").copy_(source, non_blocking=True)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (2, 3, 4, 4)])
def test_a_permuted_output_arrives_as_it_lies_and_the_next_join_says_so(shape: tuple[int, ...]) -> None:
    (output,) = _launched(shape)
    found = _copied(output)
    with pytest.raises(RuntimeError, match=PERMUTED):
        hpu().Event().record()
    hpu().synchronize()
    expected = torch.arange(float(math.prod(shape))).reshape(shape) + 1
    assert not torch.equal(found, expected)
    assert torch.equal(found.flatten().sort().values, expected.flatten())
    assert torch.equal(output.cpu(), expected)


@pytest.mark.usefixtures("emulated")
def test_the_error_of_a_permuted_output_is_lost_behind_another_copy() -> None:
    outputs = _launched((2, 3), (6,))
    found = [_copied(output) for output in outputs]
    hpu().Event().record()
    hpu().synchronize()
    assert found[0].tolist() == [[1.0, 4.0, 2.0], [5.0, 3.0, 6.0]]
    assert found[1].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.usefixtures("emulated")
def test_the_error_of_a_permuted_output_is_lost_behind_another_launch() -> None:
    import habana_frameworks.torch.core as htcore

    (output,) = _launched((2, 3))
    found = _copied(output)
    later = output + 1
    htcore.mark_step()
    hpu().Event().record()
    hpu().synchronize()
    assert found.tolist() == [[1.0, 4.0, 2.0], [5.0, 3.0, 6.0]]
    assert later.cpu().tolist() == [[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("pinned", [True, False])
def test_without_a_launch_under_way_the_copy_of_a_permuted_output_raises(pinned: bool) -> None:
    (output,) = _launched((2, 3))
    hpu().Event().record()
    with pytest.raises(RuntimeError, match=PERMUTED):
        _copied(output) if pinned else output.to("cpu", non_blocking=True)
    assert output.cpu().tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


@pytest.mark.usefixtures("lazy_hpu")
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (2, 3, 4, 4)])
def test_a_flat_clone_is_never_permuted(shape: tuple[int, ...]) -> None:
    (output,) = _launched(shape)
    found = _copied(output.flatten().clone())
    hpu().Event().record()
    hpu().synchronize()
    assert torch.equal(found.reshape(shape), output.cpu())


@pytest.mark.usefixtures("eager_hpu")
def test_eager_mode_puts_permuted_outputs_in_order() -> None:
    (output,) = _launched((2, 3))
    found = _copied(output)
    hpu().synchronize()
    assert found.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


@pytest.mark.usefixtures("hpu")
def test_layouts_survive() -> None:
    image = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert torch.equal(image.to("hpu").cpu(), image)
    assert image.to("hpu").is_contiguous(memory_format=torch.channels_last)
    strided = torch.arange(12.0).reshape(3, 4).t()
    assert torch.equal(strided.to("hpu").cpu(), strided)
    assert torch.equal(strided[:, 1:].to("hpu", torch.float64).cpu(), strided[:, 1:].double())
