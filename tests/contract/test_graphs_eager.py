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
def test_a_graph_returns_the_first_result_for_ever(disable_tensor_cache: bool) -> None:
    from habana_frameworks.torch.hpu.graphs import wrap_in_hpu_graph_func

    wrapped = wrap_in_hpu_graph_func(lambda x: x + 1, disable_tensor_cache=disable_tensor_cache)
    assert wrapped(torch.tensor([1.0]).to("hpu")).item() == 2.0
    assert wrapped(torch.tensor([7.0]).to("hpu")).item() == 2.0
