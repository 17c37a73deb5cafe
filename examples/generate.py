"""Generate with a small Llama and a static cache, on stock Lightning and with HPUInferenceAccelerator.

    python -m examples.generate
    LIGHTNING_HPU_INFER_EMULATOR=1 python -m examples.generate  # on the emulated HPU

The weights are random, with a fixed seed: what it says means nothing, but every token has to be the same. `generate`
calls its network once per token, so the network is traced and not the loop: see docs/graphs.md. With a static cache a
token has the same shapes as the one before it, and is one replay. Needs the extra `[examples]`.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from examples.compare import compare, needs, positive, predict

with needs("examples", __name__):
    from transformers import LlamaConfig, LlamaForCausalLM


class Writer(LightningModule):
    """Prompts and what follows them: `(batch, prompt + tokens)` int64."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        config = LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
        self.net: Any = LlamaForCausalLM(config)

    def predict_step(self, prompts: Tensor, batch_idx: int) -> Tensor:
        options: dict[str, Any] = {"max_new_tokens": self.tokens, "min_new_tokens": self.tokens, "do_sample": False}
        mask = torch.ones_like(prompts)
        return self.net.generate(prompts, attention_mask=mask, cache_implementation="static", pad_token_id=0, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=positive, default=16)
    parser.add_argument("--tokens", type=positive, default=8, help="to generate for each prompt")
    parser.add_argument("--batch-size", type=positive, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    module = Writer(options.tokens)
    loader = DataLoader(torch.randint(3, 512, (options.prompts, 12)), options.batch_size)  # type: ignore[arg-type,var-annotated]

    def run(trainer: Trainer) -> Tensor:
        return torch.cat(predict(trainer, module, loader))

    def check(tokens: Tensor, expected: Tensor) -> None:
        assert tokens.equal(expected)

    tokens = compare(options.prompts * options.tokens, "tokens", run, check)
    print(f"the first prompt goes on with {tokens[0, 12:].tolist()}")


if __name__ == "__main__":
    main()
