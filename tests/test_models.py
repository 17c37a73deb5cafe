"""Models as users write them, with graphs: equal to stock, with so many captures and programs per batch.

`model_zoo/` has the models. Per model there are eight batches of one shape: the first runs plainly, the second is
traced and captured, the others are replays.
"""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from lightning_hpu_infer.graphs import GraphCounts
from model_zoo import GENERATION, ZOO, Entry
from tests.helpers import installed, predict, trainer

# Captures, replays beside them, and programs per batch: a replay, and the copies that make its results the caller's.
ONE_GRAPH = (1, 6, 2)
EXPECTED = {
    # Its attention branches by a value of the device: several graphs per batch.
    "longformer_first": (4, 24, 9),
    # Dynamo fails in the vmap of its scan.
    "mamba_score": (0, 0, 1),
    # A table of positions on the host, whose value is seen twice before it is taken for constant.
    "videomae_classify": (1, 5, 2),
    # The batch sizes of a packed sequence are on the host, so that what uses them runs plainly behind the graph.
    "packed_lstm": (1, 6, 3),
    # The mask comes from the host.
    "transformer": (1, 6, 3),
}
# The default run has one of each kind; `make full` has all.
FAMILIARS = [
    *(
        "big_bird_first",
        "roberta_first",
        "electra_tag",
        "xlm_roberta_tag",
        "bert_answer",
        "bert_classify",
        "bloom_score",
    ),
    *("phi_next_token", "qwen2_next_token", "gpt_neox_score", "marian_translate", "pegasus_translate", "opt_score"),
    *("deit_first", "siglip_similarity", "siglip_towers", "timesformer_classify", "hubert_transcribe", "wavlm_layers"),
    *("mpnet_embed", "albert_embed", "gpt2_classify", "timm_convnext_atto", "timm_mobilenetv3_small_050"),
    *("audio_spectrogram_transformer_classify", "bidirectional_lstm", "gemma_next_token", "mamba_score", "vae"),
    *("bert_layers", "t5_embed", "distilbert_classify", "mistral_next_token", "clip_similarity", "whisper_classify"),
    *("two_towers", "deep_sets", "autoencoder"),
]
EAGER = [
    *("bert_embed", "llama_next_token", "t5_translate", "vit_classify", "clip_towers", "wav2vec2_transcribe", "lstm"),
    *("mixtral_next_token", "unet", "diffusion_loop", "detector", "siamese"),
]


def loader(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class Programs(Callback):
    """Programs of the device that each step launched."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_predict_batch_start(self, *_: Any, **__: Any) -> None:
        self.before = self.run()

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(self.run() - self.before)

    def run(self) -> int:
        torch.get_device_module("hpu").synchronize()
        return emulator.stats().programs


def run(entry: Entry, lazy: bool) -> tuple[GraphCounts, int]:
    """Counts of a run that equals stock's, and the programs of its last step."""
    module, batches = entry.make()
    expected = predict("cpu", module, loader(batches))
    programs = Programs()
    with installed(lazy=lazy):
        module, batches = entry.make()
        flags: Any = {"hpu_graphs": "hpu_graph" if lazy else "compile", "prefetch": 0, "in_flight": 0}
        ours = trainer(HPUInferenceAccelerator(**flags), callbacks=[programs])
        actual = ours.predict(module, loader(batches))
        loop: Any = ours.predict_loop
        counts = loop.graph_counts
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)
    return counts, programs.seen[-1]


quiet = pytest.mark.filterwarnings("ignore:.*runs? without", "ignore:.*static cache", "ignore::FutureWarning")


@quiet
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] if n in FAMILIARS else []) for n in ZOO])
def test_a_model_equals_stock_with_one_graph_for_its_whole_step(name: str) -> None:
    counts, programs = run(ZOO[name], lazy=True)
    assert (counts.captures, counts.replays, programs) == EXPECTED.get(name, ONE_GRAPH), counts


@quiet
@pytest.mark.parametrize("name", EAGER)
def test_in_eager_mode_its_step_is_one_program(name: str) -> None:
    counts, programs = run(ZOO[name], lazy=False)
    assert (counts.captures, counts.replays, programs) == (1, 7, 1)


# Of six batches: captures, and replays beside them.
GENERATED = {
    "gpt2_greedy": (7, 13),
    "llama_static_cache": (2, 21),  # one for the prompt, one for every further token
    "t5_greedy": (6, 15),
    "bart_beams": (6, 15),
    "whisper_greedy": (6, 15),
}


@quiet
@pytest.mark.parametrize("name", GENERATION)
def test_generation_equals_stock_with_replays(name: str) -> None:
    counts, _ = run(GENERATION[name], lazy=True)
    assert (counts.captures, counts.replays) == GENERATED[name]


@quiet
@pytest.mark.parametrize("name", ["gpt2_greedy", "llama_static_cache"])
def test_in_eager_mode_generation_equals_stock(name: str) -> None:
    counts, _ = run(GENERATION[name], lazy=False)
    assert counts.replays > 20
