"""`hpu_graphs="direct"`: named modules in HPU graphs of the bridge's own wrapper, without TorchDynamo.

Nothing is traced, guarded or verified: the user vouches that these modules do nothing but device ops on their arguments
and weights, the same for every call with tensors of one layout.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lightning_hpu_infer import _habana, _torch
from lightning_hpu_infer.graphs.context import GraphContext

_CONSTANTS = bool | int | float | str | None | torch.dtype


class DirectGraphs:
    """Calls modules through one bridge wrapper per module and exact layout of its arguments.

    Args:
        context: What the graphs of a run share.
    """

    def __init__(self, context: GraphContext) -> None:
        self._context = context
        self._wrappers: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        """Per module and layout, least recently used first."""
        context.register(self)

    holds_graphs = True

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Replay the module for these arguments; the results are the caller's."""
        context = self._context
        leaves, structure = tree_flatten((args, kwargs))
        key = self._key(module, leaves, structure)
        if context.capturing or torch.is_grad_enabled() or key is None:
            context.counts.plain("an argument of a module is neither a tensor on the device nor a constant")
            return _torch.call_module(module, *args, **kwargs)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[place].clone() if _habana.is_view(leaves[place]) else leaves[place] for place in places]
        wrapper = self._wrappers.get(key)
        if wrapper is not None:
            self._wrappers.move_to_end(key)
            context.counts.replays += 1
            return _copied(wrapper(*tensors))
        limit = context.config.max_graphs
        if sum(1 for known in self._wrappers if known[0] == key[0]) >= limit:
            context.warn("more shapes", f"There are more layouts in use than `max_graphs={limit}`: others run plainly.")
            context.counts.plain("there are more shapes than `max_graphs`")
            return _torch.call_module(module, *args, **kwargs)
        constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def function(*given: Tensor) -> Any:
            filled = constants.copy()
            for place, tensor in zip(places, given, strict=True):
                filled[place] = tensor
            again, named = tree_unflatten(filled, structure)
            return _torch.call_module(module, *again, **named)

        wrapper = _habana.graphed(function)
        with context.capture():
            own = wrapper(*[tensor.clone() for tensor in tensors])
        if odd := next((each for each in tree_leaves(own) if not isinstance(each, Tensor | _CONSTANTS)), None):
            # Its tensors would be overwritten unseen.
            raise TypeError(
                f"`hpu_graphs='direct'` needs modules that return tensors in tuples, lists and dicts, and"
                f" {type(module).__name__} returns a {type(odd).__name__}. Do not name it in `graph_modules`."
            )
        result = _copied(own)
        self._wrappers[key] = wrapper
        context.counts.captures += 1
        return result

    def release(self) -> None:
        """Free all graphs, of which none may be running."""
        self._wrappers.clear()

    def rebind(self, now: dict[int, Tensor | None]) -> None:
        """Another run begins: the weights lie elsewhere."""
        self.release()

    def _key(self, module: nn.Module, leaves: list[Any], structure: Any) -> Any:
        described: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.device.type != self._context.device.type:
                    return None
                described.append(_torch.tensor_description(leaf))
            elif isinstance(leaf, _CONSTANTS):
                described.append((type(leaf), repr(leaf)))
            else:
                return None
        modes = module.training, torch.is_inference_mode_enabled(), _torch.guard_gaps(self._context.device.type)
        return id(module), str(structure), tuple(described), modes


def _copied(result: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)
