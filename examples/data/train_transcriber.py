"""Train the small Wav2Vec2 that `transcribe.py` ships with, on commands that espeak-ng speaks.

    python -m examples.data.train_transcriber             # 10 minutes on one core; needs espeak-ng

Writes the weights and processor to `examples/data/transcriber/`, and clips of voices and sentences that were not
trained on to `examples/data/clips/`. Some 50 words, spoken by a synthesizer: enough to tell a right transcript from a
wrong one, and no more. Sentences and voices are drawn with a fixed seed; the time that training gets decides how far it
comes. Needs the extra `[examples]` and espeak-ng.
"""

import argparse
import io
import json
import random
import subprocess
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jiwer
import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from torch import Tensor
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

DATA = Path(__file__).parent
RATE = 8000
DIGITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HOURS = [*DIGITS, "ten", "eleven", "twelve"]
TENS = ["twenty", "forty"]
NUMBERS = ["ten", "twenty", "thirty", "forty", "fifty", *(f"{ten} {one}" for ten in TENS for one in DIGITS)]
COLOURS = ["red", "green", "blue", "yellow", "white"]
PLACES = [f"{row} {side}" for row in ("front", "rear", "side") for side in ("left", "right", "center")]
TURNS = ["left", "right", "back", "forward"]
ROOMS = ["kitchen", "garden", "office"]
TEMPLATES = [
    "set alarm for {hour} {number}",
    "set timer for {number} minutes",
    "turn {switch} the {colour} light",
    "turn {switch} the {room} light",
    "turn {turn}",
    "go {turn} {hour} meters",
    "call {digit} {digit} {digit} {digit}",
    "play song {number}",
    "open the {room} door",
    "close the {colour} door",
    "{place}",
    "speaker {place} {switch}",
]
ACCENTS = ["en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc"]
TRAINED_VOICES = [
    *("m1", "m2", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "Adam", "Alex", "Andy", "Annie", "Belinda", "Denis", "Ed"),
    *("Gene", "John", "Linda", "Mario", "Mike", "Steph"),
]
OTHER_VOICES = ["m3", "f4", "f5", "Lee", "Paul", "Michael", "Alicia"]


class Clip(NamedTuple):
    """Speech and what is said."""

    voice: str
    text: str
    samples: np.ndarray
    """float32, at 8 kHz."""


def sentence(draw: random.Random) -> str:
    """A command of the vocabulary."""
    text = draw.choice(TEMPLATES)
    words = {"hour": HOURS, "number": NUMBERS, "colour": COLOURS, "room": ROOMS, "turn": TURNS, "digit": DIGITS}
    for name, choices in (words | {"place": PLACES, "switch": ["on", "off"]}).items():
        while f"{{{name}}}" in text:
            text = text.replace(f"{{{name}}}", draw.choice(choices), 1)
    return text


def held_out(text: str) -> bool:
    """Whether a sentence is kept from training: a fifth of all."""
    return zlib.crc32(text.encode()) % 5 == 0


def speak(text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """What espeak-ng says, at 8 kHz, without the silence at its end."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text]
    wave, rate = soundfile.read(io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout))
    wave = resample_poly(wave, RATE, rate).astype(np.float32)
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    return wave[max(0, loud[0] - 400) : loud[-1] + 800]


def clips(count: int, voices: list[str], unseen: bool, seed: int) -> list[Clip]:
    """Spoken commands, of trained or of held-out sentences."""
    draw = random.Random(seed)
    orders: list[tuple[str, str, int, int]] = []
    while len(orders) < count:
        if held_out(text := sentence(draw)) == unseen:
            voice = f"{draw.choice(ACCENTS)}+{draw.choice(voices)}"
            orders.append((text, voice, draw.randint(130, 200), draw.randint(30, 70)))
    with ThreadPoolExecutor(2) as pool:
        waves = pool.map(lambda order: speak(*order), orders)
        return [Clip(voice, text, wave) for (text, voice, _, _), wave in zip(orders, waves, strict=True)]


def processor() -> Wav2Vec2Processor:
    """Letters, and waveforms of mean zero and variance one."""
    DATA.joinpath("transcriber").mkdir(exist_ok=True)
    vocabulary = DATA / "transcriber" / "vocab.json"
    letters = sorted(
        {letter for text in [*TEMPLATES, *HOURS, *NUMBERS, *COLOURS, *PLACES, *TURNS, *ROOMS] for letter in text}
    )
    names = ["<pad>", "<unk>", "|", *(letter for letter in letters if letter.isalpha())]
    vocabulary.write_text(json.dumps({name: number for number, name in enumerate(names)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(vocabulary), bos_token=None, eos_token=None)
    features = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True, return_attention_mask=True)
    return Wav2Vec2Processor(features, tokenizer)


def network(size: int) -> Wav2Vec2ForCTC:
    """50 frames per second. Layer norm all through, with which padding that is masked changes nothing."""
    model = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=size, pad_token_id=0, hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=384, conv_dim=(80, 96, 128), conv_kernel=(64, 4, 4), conv_stride=(20, 2, 4),
            conv_bias=True, feat_extract_norm="layer", do_stable_layer_norm=True, num_conv_pos_embeddings=32,
            num_conv_pos_embedding_groups=8, apply_spec_augment=False, layerdrop=0.0, hidden_dropout=0.05,
            attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, activation_dropout=0.0,
            ctc_loss_reduction="mean", ctc_zero_infinity=True,
        )
    )  # fmt: skip
    # The first filters start as sines and cosines of 40 pitches, as closely spaced as we hear them.
    mels = torch.linspace(100 / 700 + 1, 3800 / 700 + 1, 40).log()
    pitches = torch.linspace(float(mels[0]), float(mels[-1]), 40).exp().sub(1).mul(700)
    phases = 2 * torch.pi * pitches[:, None] * torch.arange(64) / RATE
    window = torch.hann_window(64) / 4
    filters = torch.cat([phases.cos() * window, phases.sin() * window])
    with torch.no_grad():
        dict(model.named_parameters())["wav2vec2.feature_extractor.conv_layers.0.conv.weight"].copy_(filters[:, None])
    return model


def varied(wave: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The same words, faster or slower, through another microphone, with noise."""
    length = int(len(wave) * draw.uniform(0.8, 1.25))
    wave = np.interp(np.linspace(0, len(wave) - 1, length), np.arange(len(wave)), wave)
    wave = wave - draw.uniform(-0.4, 0.8) * np.concatenate([[0], wave[:-1]])
    return wave + draw.normal(size=length) * wave.std() * 10 ** draw.uniform(-2.5, -0.7)


def batches(training: list[Clip], size: int, draw: np.random.Generator) -> Iterator[list[Clip]]:
    """Batches of like lengths without end."""
    while True:
        order = sorted(range(len(training)), key=lambda i: len(training[i].samples) * draw.uniform(0.9, 1.1))
        starts = list(range(0, len(order) - size + 1, size))
        draw.shuffle(starts)
        yield from ([training[i] for i in order[start : start + size]] for start in starts)


def transcripts(model: Wav2Vec2ForCTC, process: Wav2Vec2Processor, heard: list[Clip]) -> list[str]:
    """What the model hears, greedily decoded."""
    model.eval()
    texts = []
    for clip in heard:
        inputs = process(clip.samples, sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            texts += process.batch_decode(model(**inputs).logits.argmax(-1))
    model.train()
    return texts


def ship(heard: list[Clip]) -> None:
    """Keep clips as files, with who says what."""
    folder = DATA / "clips"
    folder.mkdir(exist_ok=True)
    lines = []
    for number, clip in enumerate(heard):
        soundfile.write(folder / f"{number:02}.flac", clip.samples, RATE)
        lines.append(f"{number:02}.flac\t{clip.voice}\t{clip.text}\n")
    (folder / "clips.tsv").write_text("".join(lines))


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    process = processor()
    training = clips(options.clips, TRAINED_VOICES, False, 1)
    sets = {
        "new sentences": clips(100, TRAINED_VOICES, True, 2),
        "new sentences, new voices": clips(100, OTHER_VOICES, True, 3),
    }
    ship(sets["new sentences, new voices"][: options.shipped])
    print(f"{sum(len(clip.samples) for clip in training) / RATE / 3600:.2f} h of speech", flush=True)
    model = network(len(process.tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01, betas=(0.9, 0.98))
    begin, spent, losses = time.process_time(), 0.0, []
    draw = np.random.default_rng(0)
    for step, batch in enumerate(batches(training, 16, draw)):
        spent = (time.process_time() - begin) / 60
        if spent > options.minutes:
            break
        warm, cool = min(1.0, (step + 1) / 200), min(1.0, 2 * (1 - spent / options.minutes))
        for group in optimizer.param_groups:
            group["lr"] = options.rate * warm * cool
        waves = [varied(clip.samples, draw) for clip in batch]
        inputs = process(waves, sampling_rate=RATE, padding=True, return_tensors="pt")
        labels = process.tokenizer([clip.text for clip in batch], padding=True, return_tensors="pt").input_ids
        loss: Tensor = model(**inputs, labels=labels.masked_fill(labels == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1}, {spent:.1f} minutes, loss {np.mean(losses[-50:]):.3f}", flush=True)
        if step % 500 == 499:
            model.half().save_pretrained(DATA / "transcriber")
            model.float()
            text = transcripts(model, process, sets["new sentences, new voices"][:40])
            print(text[:3], jiwer.wer([clip.text for clip in sets["new sentences, new voices"][:40]], text), flush=True)
    process.save_pretrained(DATA / "transcriber")
    model.half().save_pretrained(DATA / "transcriber")
    for path in (DATA / "transcriber").glob("*.json"):
        path.write_text(path.read_text().rstrip() + "\n")
    model.float()
    for name, heard in sets.items():
        print(f"{name}: WER {jiwer.wer([clip.text for clip in heard], transcripts(model, process, heard)):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of processor time for training")
    parser.add_argument("--clips", type=int, default=7000, help="to train on")
    parser.add_argument("--shipped", type=int, default=32, help="clips to keep, of new sentences and voices")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="the highest learning rate")
    train(parser.parse_args())
