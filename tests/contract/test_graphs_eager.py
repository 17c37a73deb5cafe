from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("eager_hpu")


def test_the_names_are_not_exported() -> None:
    import habana_frameworks.torch as htorch
    import habana_frameworks.torch.hpu.graphs as graphs

    assert not hasattr(htorch.hpu, "wrap_in_hpu_graph")
    assert callable(graphs.wrap_in_hpu_graph)


@pytest.mark.parametrize("disable_tensor_cache", [False, True])
def test_a_wrapped_function_cannot_be_called(disable_tensor_cache: bool) -> None:
    from habana_frameworks.torch.hpu.graphs import wrap_in_hpu_graph_func

    wrapped = wrap_in_hpu_graph_func(lambda x: x + 1, disable_tensor_cache=disable_tensor_cache)
    with pytest.raises(AttributeError, match="HPUGraph"):
        wrapped(torch.tensor([1.0]).to("hpu"))


def test_a_graph_that_is_used_anyway_records_nothing() -> None:
    from habana_frameworks.torch.hpu.graphs import HPUGraph

    recorded, x = HPUGraph(), torch.tensor([1.0]).to("hpu")
    recorded.capture_begin()
    y = x + 1
    recorded.capture_end()
    x.fill_(7.0)
    recorded.replay()
    assert y.item() == 2.0
