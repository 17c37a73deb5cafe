"""Dynamo traces code that uses the emulated device, in both modes, with any backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from tests.helpers import installed

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
MODES = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
# What takes seconds is traced alike in both modes.
SELDOM_EAGER = pytest.mark.parametrize(
    "lazy", [True, pytest.param(False, marks=pytest.mark.full)], ids=["lazy", "eager"]
)
GRAD_MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


class _Traced:
    """A backend that runs dynamo's graphs as they are and looks at what dynamo knew of each value."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        for value in self.values():
            assert isinstance(value, FakeTensor)
        return gm.forward

    def values(self) -> list[Any]:
        examples = [node.meta.get("example_value") for gm in self.graphs for node in gm.graph.nodes]
        return [value for value in examples if isinstance(value, torch.Tensor)]


HOST = torch.arange(3.0)
LITERALS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tensor": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device="hpu"),
    "empty": lambda x: torch.cat([torch.tensor([], device=x.device), x]),
    "scalar": lambda x: x + torch.tensor(2, device=x.device),
    "index": lambda x: x[torch.tensor([2, 1, 0], device=x.device)],
    "other type": lambda x: x + torch.tensor([1, 2, 3], dtype=torch.float64, device=x.device).float(),
    "size": lambda x: x + torch.tensor([x.shape[0], 2, 3], device=x.device),
    "as_tensor": lambda x: x + torch.as_tensor([1.0, 2.0, 3.0], device=x.device),
    "as_tensor of host": lambda x: x + torch.as_tensor(torch.tensor([1.0, 2.0, 3.0]), device=x.device),
    "to": lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to("hpu"),
    "to like": lambda x: x + torch.tensor([1, 2, 3]).to(x),
    "scalar to": lambda x: x + torch.tensor(3).to(x.device),
    "computed": lambda x: x + torch.tensor([3, 4]).max().to(x.device),
    "global": lambda x: x + HOST.to(x.device, non_blocking=True),
    "new_tensor": lambda x: x + x.new_tensor([1.0, 2.0, 3.0]),
    "factories": lambda x: x + torch.arange(3, device="hpu") + torch.full((3,), 2.0, device=x.device) + x.new_ones(3),
    "host scalar": lambda x: x.masked_fill(x > 1, torch.tensor(-1.0)),
    "where": lambda x: torch.where(x > 1, torch.tensor(0.0, device=x.device), x),
    "data": lambda x: x.data + torch.tensor([1.0], device=x.device).data,
}


@GRAD_MODES
@pytest.mark.parametrize("name", LITERALS)
@MODES
def test_constants_are_fake_while_tracing_and_real_in_each_call(lazy: bool, name: str, mode: Any) -> None:
    function = LITERALS[name]
    with installed(lazy=lazy), mode():
        batches = [torch.tensor([1.0, 2.0, 0.0]).to("hpu"), torch.tensor([3.0, 0.0, 1.0]).to("hpu")]
        expected = [function(x).tolist() for x in batches]
        traced = _Traced()
        compiled = torch.compile(function, backend=traced, fullgraph=True)
        assert [compiled(x).tolist() for x in batches] == expected
        assert len(traced.graphs) == 1
        assert traced.values()[-1].device.type == "hpu"


@MODES
def test_uninstall_leaves_fake_tensors_as_they_were(lazy: bool) -> None:
    from torch._dynamo import trace_rules
    from torch._subclasses import FakeTensorMode

    before = dict(vars(FakeTensorMode)), set(trace_rules.get_legacy_mod_inlinelist())
    with installed(lazy=lazy):
        pass
    assert (dict(vars(FakeTensorMode)), trace_rules.get_legacy_mod_inlinelist()) == before


@MODES
def test_a_forward_that_assigns_attributes_is_one_graph(lazy: bool) -> None:
    class Remembers(nn.Module):
        count: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))
            self.seen: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count = self.count + 1
            self.seen = x * 2
            return self.seen + self.count

    net = Remembers()
    with installed(lazy=lazy), torch.inference_mode():
        net.to("hpu")
        traced = _Traced()
        # Not torch.compile(net), which makes the network a child of another module: it would get the hooks.
        compiled = torch.compile(lambda x: net(x), backend=traced, fullgraph=True)
        x = torch.ones(2).to("hpu")
        assert [compiled(x).tolist() for _ in range(2)] == [[3.0, 3.0], [4.0, 4.0]]
        assert net.seen.tolist() == [2.0, 2.0]
        assert net.count.tolist() == [2.0]


@MODES
def test_weights_replaced_through_data_are_seen_by_traced_code(lazy: bool) -> None:
    net = nn.Linear(2, 1, bias=False)
    with installed(lazy=lazy), torch.inference_mode():
        net.to("hpu")
        compiled = torch.compile(lambda x: net(x) + net.weight.data.sum(), backend=_Traced())
        x = torch.ones(1, 2).to("hpu")
        for value in (1.0, 2.0):
            net.weight.data = torch.full((1, 2), value).to("hpu")
            assert compiled(x).item() == 4 * value


SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 40,
}
BOTH_SIDES: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Config class, model class, settings.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, **TOKENS}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, **TOKENS}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SIZES, **TOKENS, "sliding_window": 4}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**SIZES, **TOKENS, "num_local_experts": 4}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {**BOTH_SIDES, **TOKENS, "max_position_embeddings": 40, "decoder_start_token_id": 2},
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {**BOTH_SIDES, **TOKENS, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
        | {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    "deberta": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
        | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
}


def _model(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    transformers: Any = pytest.importorskip("transformers")
    config, model, settings = MODELS[name]
    torch.manual_seed(0)
    net = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    for module in net.modules():  # which break every graph
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called):
            hooks.clear()
    if name == "whisper":
        return net, {"input_features": torch.randn(2, 8, 40)}
    ids = torch.randint(3, 50, (2, 7))
    mask = torch.ones_like(ids)
    # Decoders are padded on the left.
    mask[1, slice(5, None) if name in ("t5", "bart", "deberta") else slice(2)] = 0
    return net, {"input_ids": ids, "attention_mask": mask}


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", MODELS)
@SELDOM_EAGER
def test_a_model_of_transformers_is_one_graph(lazy: bool, name: str) -> None:
    with installed(lazy=lazy), torch.inference_mode():
        net, inputs = _model(name)
        if name in ("t5", "bart", "whisper"):
            inputs["decoder_input_ids"] = torch.randint(3, 50, (2, 4))
        expected = net(**inputs).logits
        net.to("hpu")
        inputs = {key: value.to("hpu") for key, value in inputs.items()}
        plain = net(**inputs)
        traced = _Traced()
        compiled = torch.compile(lambda batch: net(**batch), backend=traced)
        for _ in range(2):
            result = compiled(inputs)
            for value, other in zip(pytree.tree_leaves(dict(result)), pytree.tree_leaves(dict(plain)), strict=True):
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value.cpu(), other.cpu())
        assert len(traced.graphs) == 1
        torch.testing.assert_close(result.logits.cpu(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' advice, and dynamo's about caches and limits
@pytest.mark.filterwarnings("ignore::FutureWarning")
@SELDOM_EAGER
def test_generate(lazy: bool) -> None:
    name = "gpt2" if lazy else "bart"  # each takes ten seconds
    with installed(lazy=lazy), torch.inference_mode():
        net, inputs = _model(name)
        generate: Any = net.generate
        expected = generate(**inputs, max_new_tokens=2, do_sample=False)
        net.to("hpu")
        batch = {key: value.to("hpu") for key, value in inputs.items()}
        compiled = torch.compile(lambda x: generate(**x, max_new_tokens=2, do_sample=False), backend=_Traced())
        assert torch.equal(compiled(batch).cpu(), expected)
