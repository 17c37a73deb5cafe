"""`hpu_graphs="direct"`: named modules in HPU graphs of the bridge's own wrapper, without TorchDynamo.

Nothing is traced, guarded or verified: the user guarantees that these modules only run device ops on their arguments
and weights, the same ones in every call with tensors of one layout.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hpu_infer import _habana, _torch
from lightning_hpu_infer.graphs.context import GraphContext
from lightning_hpu_infer.graphs.store import tensor_description

_CONSTANTS = bool | int | float | str | None | torch.dtype


class DirectGraphs:
    """Calls modules through one bridge wrapper per module and exact layout of its arguments. Main thread only.

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
        leaves, structure = _torch.tree_flatten((args, kwargs))
        key = self._key(module, leaves, structure)
        if context.capturing or torch.is_grad_enabled() or key is None:
            context.counts.plain("an argument of a module is neither a tensor on the device nor a constant")
            return _torch.call_module(module, *args, **kwargs)
        slots = [slot for slot, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[slot].clone() if _habana.is_view(leaves[slot]) else leaves[slot] for slot in slots]
        wrapper = self._wrappers.get(key)
        if wrapper is not None:
            self._wrappers.move_to_end(key)
            context.counts.replays += 1
            return _cloned(wrapper(*tensors))
        limit = context.config.max_graphs
        if sum(1 for known in self._wrappers if known[0] == key[0]) >= limit:
            context.warn("more shapes", f"There are more layouts in use than `max_graphs={limit}`: others run plainly.")
            context.counts.plain("there are more shapes than `max_graphs`")
            return _torch.call_module(module, *args, **kwargs)
        constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def function(*given: Tensor) -> Any:
            filled = constants.copy()
            for slot, tensor in zip(slots, given, strict=True):
                filled[slot] = tensor
            positional, named = _torch.tree_unflatten(filled, structure)
            return _torch.call_module(module, *positional, **named)

        wrapper = _habana.graphed(function)
        with context.capture():
            captured = wrapper(*[tensor.clone() for tensor in tensors])
        unknown = [leaf for leaf in _torch.tree_leaves(captured) if not isinstance(leaf, Tensor | _CONSTANTS)]
        if unknown:
            # The next replay would overwrite its tensors, which cannot be found and cloned.
            raise TypeError(
                f"`hpu_graphs='direct'` needs modules that return tensors in tuples, lists and dicts, and"
                f" {type(module).__name__} returns a {type(unknown[0]).__name__}. Do not name it in `graph_modules`."
            )
        result = _cloned(captured)
        self._wrappers[key] = wrapper
        context.counts.captures += 1
        return result

    def release(self) -> None:
        """Free all graphs, of which none may be running."""
        self._wrappers.clear()

    def rebind(self, now: dict[int, Tensor | None]) -> None:
        """Begin another run, in which the weights have other memory."""
        self.release()

    def _key(self, module: nn.Module, leaves: list[Any], structure: Any) -> Any:
        described: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.device.type != self._context.device.type:
                    return None
                described.append(tensor_description(leaf))
            elif isinstance(leaf, _CONSTANTS):
                described.append((type(leaf), repr(leaf)))
            else:
                return None
        modes = module.training, torch.is_inference_mode_enabled(), _torch.guard_gaps(self._context.device.type)
        return id(module), str(structure), tuple(described), modes


def _cloned(result: Any) -> Any:
    return _torch.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)
