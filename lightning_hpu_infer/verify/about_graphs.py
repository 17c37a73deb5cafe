"""What the plugin assumes of HPU graphs, in lazy mode, and of `hpu_backend`, in eager mode."""

import gc

import torch
from torch import Tensor, nn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.verify.ask import DEVICE, expect, expect_equal, host
from lightning_hpu_infer.verify.assumptions import NOTHING, assume
from lightning_hpu_infer.verify.check import Broken

_OFF = "`hpu_graphs=False`"
_COMPILED = "bridge 1.19 `dynamo/compile_backend/backends.py`"


def _doubled(x: Tensor) -> list[Tensor]:
    return [x * 2]


@assume(
    "A graph reads the tensors of each call, and leaves those of the capturing call alone.",
    source="bridge 1.19 `hpu/graphs.py`, `disable_tensor_cache=True`",
    turns_off=_OFF,
    modes=("lazy",),
)
@torch.inference_mode()
def replays_read_what_they_are_given() -> str:
    """Results of five calls, and the inputs afterwards."""
    graph, given = _habana.graphed(_doubled), [host(8, seed=seed).to(DEVICE) for seed in range(5)]
    for seed, x in enumerate(given):
        expect_equal(graph(x)[0].clone(), host(8, seed=seed) * 2, f"the result of call {seed}")
    for seed, x in enumerate(given):
        expect_equal(x, host(8, seed=seed), f"the input of call {seed}, after all calls")
    return "five calls gave five results, and their inputs are as they were"


@assume(
    "The next replay overwrites the tensors that a graph returned, so that they must be cloned.",
    source="bridge 1.19 `hpu/graphs.py`: each call returns the object of the capturing one",
    turns_off=NOTHING,
    modes=("lazy",),
)
@torch.inference_mode()
def outputs_are_overwritten_by_the_next_replay() -> str:
    """A result that is kept over the next replay."""
    graph = _habana.graphed(_doubled)
    graph(torch.ones(8, device=DEVICE))
    kept = graph(torch.full((8,), 2.0, device=DEVICE))[0]
    graph(torch.full((8,), 3.0, device=DEVICE))
    found = float(kept.cpu()[0])
    expect(found == 6.0, f"a result of 4 is {found} after a replay that gives 6: clones of results are not needed")
    return "they are"


@assume(
    "A clone of a graph's output, made before the next replay, keeps its values.",
    source="bridge 1.19 `hpu/graphs.py`; one queue computes in order",
    turns_off=_OFF,
    modes=("lazy",),
)
@torch.inference_mode()
def clones_of_outputs_last() -> str:
    """Clones of twenty results, read after all replays."""
    layer = nn.Linear(64, 64).to(DEVICE)
    graph = _habana.graphed(lambda x: [layer(x) * 2])
    given = [host(32, 64, seed=seed).to(DEVICE) for seed in range(20)]
    clones = []
    for x in given:
        clones.append(graph(x)[0].clone())
        _habana.mark_step()
    for number, (x, clone) in enumerate(zip(given, clones, strict=True)):
        expected = (layer(x) * 2).cpu()
        expect(torch.allclose(clone.cpu(), expected, rtol=1e-2, atol=1e-2), f"the clone of result {number} is wrong")
    return "20 clones are right after all replays"


@assume(
    "A replay reads a weight's memory as it is then, and writes to buffers where the plain ops do.",
    source="bridge 1.19 `HPUGraph.cpp`: inputs are launched by address",
    turns_off=_OFF,
    modes=("lazy",),
)
@torch.inference_mode()
def replays_see_writes_to_weights() -> str:
    """A weight written between replays, and a buffer written by them."""
    weight, total = torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)

    def step(x: Tensor) -> list[Tensor]:
        total.add_(1)
        return [x * weight]

    graph, x = _habana.graphed(step), torch.ones(4, device=DEVICE)
    for number in range(1, 4):
        weight.fill_(float(number))
        expect_equal(graph(x)[0].clone(), torch.full((4,), float(number)), f"the result for weight {number}")
        expect_equal(total.clone(), torch.full((4,), float(number)), f"the buffer after call {number}")
    return "three writes were seen, and three made"


@assume(
    "The bridge tells views from other tensors (`get_view_hash`).",
    source="bridge 1.19 `csrc/bindings.cpp`",
    turns_off=_OFF,
    modes=("lazy",),
)
def views_are_told() -> str:
    """Views of a batch and of a result, and tensors that are none."""
    batch = host(4, 4).to(DEVICE)
    for name, base in (("a batch", batch), ("a result", batch + 1)):
        for kind, view in (("a slice", base[1:]), ("a transposed view", base.t())):
            expect(_habana.is_view(view), f"{kind} of {name} is not told")
    _habana.mark_step()
    alike = [name for name, each in (("a batch", batch), ("a clone", batch[1:].clone())) if _habana.is_view(each)]
    return f"views are told; {' and '.join(alike)} taken for one, which costs a copy" if alike else "views are told"


@assume(
    "A graph whose input is a clone of a view gives the view's results.",
    source="bridge 1.19 `hpu/graphs.py`; `graphs/capture.py` clones views before a replay",
    turns_off=_OFF,
    modes=("lazy",),
)
@torch.inference_mode()
def clones_of_views_are_inputs() -> str:
    """Slices of one tensor as inputs."""
    graph, base = _habana.graphed(_doubled), host(6, 8).to(DEVICE)
    for row in range(6):
        expect_equal(graph(base[row].clone())[0].clone(), host(6, 8)[row] * 2, f"the result for row {row}")
    return "six rows gave six results"


@assume(
    "After a capture that failed, another one resets the bridge, and ops and graphs work again.",
    source="bridge 1.19 `HPUGraph.cpp`",
    turns_off=_OFF,
    modes=("lazy",),
)
@torch.inference_mode()
def failed_captures_can_be_reset() -> str:
    """A capture that raises, then an op and another graph."""

    def fail(x: Tensor) -> list[Tensor]:
        raise ValueError("as intended")

    x = torch.ones(4, device=DEVICE)
    try:
        _habana.graphed(fail)(x)
    except ValueError as error:
        _habana.reset_capture(error)
    else:
        raise Broken("an error inside of a capture did not come out of it")
    expect_equal(x + 1, torch.full((4,), 2.0), "an op after the reset")
    graph = _habana.graphed(_doubled)
    for value in (1.0, 2.0, 3.0):
        given = torch.full((4,), value, device=DEVICE)
        expect_equal(graph(given)[0].clone(), torch.full((4,), 2 * value), "a graph's result after the reset")
    return "an op and a graph were right afterwards"


@assume(
    "Each replay draws new random numbers.",
    source="bridge 1.19 `HPUGraph.cpp`: seeds are inputs",
    turns_off="no `hpu_graphs='direct'` for networks that draw random numbers",
    modes=("lazy",),
)
@torch.inference_mode()
def replays_draw_new_numbers() -> str:
    """Numbers of three replays."""
    graph, x = _habana.graphed(lambda x: [torch.rand_like(x) + x]), torch.zeros(64, device=DEVICE)
    drawn = [graph(x)[0].clone().cpu() for _ in range(3)]
    expect(not torch.equal(drawn[1], drawn[2]), "two replays drew the same numbers")
    return "two replays drew different numbers"


@assume(
    "The memory of a graph that is dropped is freed.",
    source="bridge 1.19 `HPUGraph.cpp`, `destroy`",
    turns_off="`max_graphs` to the number of your shapes, and no `graph_memory`",
    modes=("lazy",),
)
@torch.inference_mode()
def dropped_graphs_free_their_memory() -> str:
    """Memory in use after five graphs came and went."""
    x = host(256, 1024).to(DEVICE)
    sizes = []
    for _ in range(5):
        graph = _habana.graphed(lambda x: [((x * 2).relu() + 1) * x])
        for _ in range(2):
            graph(x)[0].clone().cpu()
        del graph
        gc.collect()
        _habana.mark_step()
        _habana.synchronize()
        sizes.append(int(_habana.memory_stats(DEVICE)["InUse"]))
    grown = sizes[-1] - sizes[1]
    expect(grown <= 2**20, f"three graphs of 1 MiB of output left {grown} bytes")
    return f"three graphs left {max(0, grown)} bytes"


@assume(
    "`torch.compile(backend='hpu_backend')` gives the plain ops' results, for each new shape too.",
    source=_COMPILED,
    turns_off=_OFF,
    modes=("eager",),
)
@torch.inference_mode()
def compiled_functions_are_right() -> str:
    """A compiled layer on batches of three sizes, against the plain one."""
    layer = nn.Linear(64, 64).to(DEVICE)
    compiled = torch.compile(lambda x: (layer(x).relu(), x.sum(-1)), backend="hpu_backend", dynamic=False)
    for rows in (4, 8, 4, 2):
        x = host(rows, 64, seed=rows).to(DEVICE)
        for found, expected in zip(compiled(x), (layer(x).relu(), x.sum(-1)), strict=True):
            close = torch.allclose(found.cpu(), expected.cpu(), rtol=1e-2, atol=1e-2)
            expect(close, f"the result for {rows} rows differs from the plain ops'")
    return "right for batches of three sizes"


@assume(
    "Results of a compiled function are new tensors, which its next call leaves alone.",
    source=_COMPILED,
    turns_off=_OFF,
    modes=("eager",),
)
@torch.inference_mode()
def compiled_results_last() -> str:
    """Results of ten calls, read after all of them."""
    compiled = torch.compile(lambda x: x * 2 + 1, backend="hpu_backend", dynamic=False)
    results = [compiled(torch.full((64,), float(value), device=DEVICE)) for value in range(10)]
    for value, result in enumerate(results):
        expect_equal(result, torch.full((64,), 2.0 * value + 1), f"result {value}, after all calls")
    return "ten results are right after all calls"


@assume(
    "In eager mode an op reads its inputs as they are when it is called, however far behind the device is.",
    source="bridge 1.19 `device.cpp`: one queue computes in order",
    turns_off=_OFF,
    modes=("eager",),
)
def eager_ops_are_in_order() -> str:
    """Ops on a tensor that is written in between."""
    x = torch.zeros(16, device=DEVICE)
    results = []
    for _ in range(10):
        x.add_(1)
        results.append(x * 2)
    for value, result in enumerate(results, start=1):
        expect_equal(result, torch.full((16,), 2.0 * value), f"result {value}")
    return "ten results around ten writes are right"
