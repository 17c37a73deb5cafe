"""What the plugin assumes of the device and of torch on it."""

import os
import threading

import torch
from torch import Tensor, nn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.verify.ask import DEVICE, expect, expect_equal, host
from lightning_hpu_infer.verify.assumptions import assume
from lightning_hpu_infer.verify.check import Broken


@assume(
    "`PT_HPU_LAZY_MODE`, set before Python starts, chooses the mode, and the bridge says which one it is.",
    source="bridge 1.19 `utils/internal.py`",
    turns_off="`hpu_graphs=False`",
)
def mode_is_as_asked() -> str:
    """The environment against the bridge's own answer."""
    asked, lazy = os.environ.get("PT_HPU_LAZY_MODE", "1") != "0", _habana.is_lazy()
    expect(asked == lazy, f"asked for {_word(asked)} mode, got {_word(lazy)}")
    return f"{_word(lazy)} mode"


def _word(lazy: bool) -> str:
    return "lazy" if lazy else "eager"


@assume(
    "A process has one device, and its tensors say that they are on `hpu:0`.",
    source="bridge 1.19 `csrc/bindings.cpp`",
    turns_off="`devices=1`",
)
def one_device_per_process() -> str:
    """The device of new tensors, with and without an index."""
    count = _habana.device_count()
    expect(count >= 1, f"{count} devices")
    found = {str(torch.ones(1).to(asked).device) for asked in ("hpu", "hpu:0", DEVICE)}
    expect(found == {"hpu:0"}, f"tensors are on {sorted(found)}")
    return f"{count} counted, tensors are on hpu:0"


@assume(
    "`memory_stats` has `InUse`, `MaxInUse` and `Limit` in bytes, and `InUse` grows with each tensor.",
    source="bridge 1.19 `csrc/bindings.cpp`",
    turns_off="no `graph_memory`",
)
def memory_is_counted_in_bytes() -> str:
    """The counters before and after a tensor of 4 MiB."""
    before = _in_use()
    kept = host(1024, 1024).to(DEVICE)
    grown = _in_use() - before
    del kept
    # Allocators round up.
    expect(2**22 <= grown <= 2**23, f"a tensor of {2**22} bytes made `InUse` grow by {grown}")
    return f"a tensor of {2**22} bytes makes `InUse` grow by {grown}"


def _in_use() -> int:
    _habana.mark_step()
    _habana.synchronize()
    stats = _habana.memory_stats(DEVICE)
    missing = [name for name in ("InUse", "MaxInUse", "Limit") if name not in stats]
    expect(not missing, f"{missing} are missing from {sorted(stats)}")
    return int(stats["InUse"])


@assume(
    "Ops in inference mode return tensors that say so (`is_inference`), and weights do not.",
    source="PyTorch; `graphs/weights.py` keeps the weights of the run before, and no output, by it",
    turns_off="`hpu_graphs=False`",
)
def inference_tensors_say_so() -> str:
    """An output, a view of it, and a weight."""
    weight = torch.ones(4, device=DEVICE)
    with torch.inference_mode():
        output = weight * 2
        expect(output.is_inference(), "an output does not say so")
        expect(output[1:].is_inference(), "a view of an output does not say so")
        expect(not weight.is_inference(), "a weight says so")
        expect(not weight[1:].is_inference(), "a view of a weight says so")
    return "outputs do, weights do not"


@assume(
    "`data_ptr()` of tensors that share memory is equal, or 0, and does not raise.",
    source="bridge 1.19 `tensor_impl.cpp`; `graphs/capture.py` finds inputs that share memory by it",
    turns_off="`hpu_graphs=False`",
    modes=("lazy",),
)
def addresses_tell_shared_memory() -> str:
    """A tensor, an alias of it, and another one, all computed."""
    one, other = host(64).to(DEVICE) + 1, host(64).to(DEVICE) + 1
    alias = one.detach()
    _habana.mark_step()
    _habana.synchronize()
    try:
        found = [tensor.data_ptr() for tensor in (one, alias, other)]
    except RuntimeError as error:
        raise Broken(f"it raised {error}") from error
    if not any(found):
        return "all addresses are 0"
    expect(found[0] == found[1], "an alias has another address")
    expect(found[0] != found[2], "two tensors have one address")
    return "equal for aliases only"


@assume(
    "A tensor that is assigned to `weight.data` becomes the weight's memory, shared with the one that was assigned.",
    source="bridge 1.19 `tensor_impl.cpp`, `shallow_copy_from`; `graphs/weights.py` keeps weights between runs by it",
    turns_off="a new Trainer for each run, or `hpu_graphs=False`",
)
def data_can_be_replaced() -> str:
    """A weight whose memory is replaced, then written."""
    weight, kept = nn.Parameter(host(4).to(DEVICE)), host(4, seed=1).to(DEVICE)
    weight.data = kept
    expect_equal(weight.detach(), host(4, seed=1), "the weight")
    with torch.no_grad():
        weight.mul_(2)
    expect_equal(kept, host(4, seed=1) * 2, "what was assigned, after a write to the weight")
    return "it can"


@assume(
    "`pin_memory('hpu')` gives a copy of its own in any thread, while another one calls the device.",
    source="bridge 1.19 `pin_memory.cpp`: a mutex, and no device tensor",
    turns_off="`async_copy=False`",
)
def threads_can_pin() -> str:
    """A thread that pins, as the one that prepares batches does, beside ops."""
    sources = [host(1000 + 100 * number, seed=number) for number in range(40)]
    pinned: list[Tensor] = []
    problems: list[BaseException] = []

    def pin() -> None:
        try:
            pinned.extend(source.pin_memory(_habana.DEVICE_TYPE) for source in sources)
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=pin, name="verify-pin")
    thread.start()
    x = torch.zeros(100, device=DEVICE)
    while thread.is_alive():
        x = x + 1
        _habana.mark_step()
        thread.join(0.001)
    expect(not problems, f"it raised {problems[0]!r}" if problems else "")
    for source, copy in zip(sources, pinned, strict=True):
        expect_equal(copy, source, "a pinned copy")
        expect(copy.is_pinned(_habana.DEVICE_TYPE), "a pinned copy says that it is not")
        expect(copy.data_ptr() != source.data_ptr(), "a pinned copy is its source")
    expect(len({float(value) for value in x.cpu()}) == 1, "ops beside it went wrong")
    return f"{len(sources)} tensors pinned beside ops"


@assume(
    "In `torch.autocast('hpu', torch.bfloat16)` linear layers give bfloat16, and outside of it float32.",
    source="bridge 1.19 `hpu_ops/autocast_helpers.h`",
    turns_off="`precision='32-true'`",
)
def autocast_casts_linear_layers() -> str:
    """One layer, inside and outside."""
    layer, x = nn.Linear(4, 4).to(DEVICE), host(2, 4).to(DEVICE)
    with torch.no_grad():
        with torch.autocast(_habana.DEVICE_TYPE, torch.bfloat16):
            inside = layer(x).dtype
        outside = layer(x).dtype
    expect((inside, outside) == (torch.bfloat16, torch.float32), f"{inside} inside, {outside} outside")
    return "bfloat16 inside, float32 outside"


@assume(
    "In lazy mode, all hooks that the bridge puts on modules to name them are functions of `habana_frameworks`.",
    source="bridge 1.19 `core/torch_overwrites.py`",
    turns_off="`hpu_graphs=False`",
    modes=("lazy",),
)
def naming_hooks_are_recognised() -> str:
    """A module's hooks, with and without the bridge's."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU())).to(DEVICE)
    before = _hooks(net)
    with _habana.without_naming_hooks(net):
        left = _hooks(net)
    expect(left == 0, f"{left} of {before} hooks are not recognised")
    expect(_hooks(net) == before, f"{_hooks(net)} of {before} hooks came back")
    return f"{before} hooks, all recognised"


def _hooks(root: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in root.modules())
