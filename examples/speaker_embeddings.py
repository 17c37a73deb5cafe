"""Tell voices apart with Resemblyzer's encoder, on stock Lightning and with HPUInferenceAccelerator.

    pip install --no-deps resemblyzer                                     # of which only the weights are needed
    python -m examples.speaker_embeddings                                 # the clips of examples/data/clips
    LIGHTNING_HPU_INFER_EMULATOR=1 python -m examples.speaker_embeddings  # on the emulated HPU

Clips of any length become windows of 1.6 s, so that all batches have one shape and there is one graph. A clip's
embedding is the mean of its windows'. Needs the extra `[examples]`.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import normalize, pad
from torch.utils.data import DataLoader

from examples.compare import compare, existing, needs, positive, predict

with needs("examples", __name__):
    import soundfile
    from scipy.signal import resample_poly
    from transformers.audio_utils import mel_filter_bank

CLIPS = Path(__file__).parent / "data" / "clips"
RATE, WINDOW, STEP = 16000, 400, 160  # Hz, and samples of a spectrum and between two of them
FRAMES, HOP = 160, 40  # spectra of a window of speech, and between the starts of two windows
MELS = torch.from_numpy(
    mel_filter_bank(WINDOW // 2 + 1, 40, 0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
).float()


class VoiceEncoder(LightningModule):
    """Of mel spectra `(batch, 160, 40)`: embeddings of length one, `(batch, 256)` float32."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, num_layers=3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
        self.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("similarity")})

    def predict_step(self, spectra: Tensor, batch_idx: int) -> Tensor:
        _, (states, _) = self.lstm(spectra)
        return normalize(self.linear(states[-1]).relu(), dim=1)


def windows_of(path: Path) -> Tensor:
    """The mel power spectra of a clip, in windows that overlap: `(windows, 160, 40)`."""
    samples, rate = soundfile.read(path, always_2d=True)
    wave = torch.from_numpy(resample_poly(samples[:, 0], RATE, rate).astype(np.float32))
    wave = wave * 10 ** (-30 / 20) / wave.square().mean().sqrt()  # as loud as what the encoder was trained on
    spectra = torch.stft(wave, WINDOW, STEP, window=torch.hann_window(WINDOW), pad_mode="constant", return_complex=True)
    mels = spectra.abs().square().T @ MELS
    missing = max(0, FRAMES - len(mels)) or -(len(mels) - FRAMES) % HOP
    return pad(mels, (0, 0, 0, missing)).unfold(0, FRAMES, HOP).mT


def weights() -> Path:
    """Resemblyzer's checkpoint, without importing Resemblyzer and what that needs.

    Raises:
        FileNotFoundError: If Resemblyzer is not installed.
    """
    spec = find_spec("resemblyzer")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("The weights are not there: `pip install --no-deps resemblyzer`, or give `--weights`.")
    return Path(spec.submodule_search_locations[0]) / "pretrained.pt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=existing, help="a checkpoint of Resemblyzer's")
    parser.add_argument("--clips", type=positive, default=32, help="at most")
    parser.add_argument("--batch-size", type=positive, default=8)
    options = parser.parse_args()
    lines = [line.split("\t") for line in (CLIPS / "clips.tsv").read_text().splitlines()[: options.clips]]
    # An accent and a speaker, such as en-gb+f4: the speaker is whom to find.
    speakers = [voice.partition("+")[2] for _, voice, _ in lines]
    windows = [windows_of(CLIPS / name) for name, _, _ in lines]
    try:
        module = VoiceEncoder(options.weights or weights())
    except OSError as error:
        parser.error(str(error))
    loader = DataLoader(torch.cat(windows), options.batch_size)  # type: ignore[arg-type,var-annotated]

    def run(trainer: Trainer) -> Tensor:
        parts = torch.cat(predict(trainer, module, loader)).split([len(each) for each in windows])
        return normalize(torch.stack([part.mean(0) for part in parts]), dim=1)

    def check(embeddings: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(embeddings, expected, rtol=1e-3, atol=1e-5)

    embeddings = compare(sum(map(len, windows)), "windows", run, check)
    alike = (embeddings @ embeddings.T).fill_diagonal_(-1)
    same = torch.tensor([[a == b for b in speakers] for a in speakers]).fill_diagonal_(False)
    found = sum(speakers[int(row.argmax())] == speaker for row, speaker in zip(alike, speakers, strict=True))
    others = alike[~same & (alike > -1)]
    print(f"similarity of clips of one speaker {alike[same].mean():.2f}, of two {others.mean():.2f}")
    print(f"the clip most alike is of the same speaker for {found} of {len(speakers)} clips")


if __name__ == "__main__":
    main()
