"""Runs examples and stores what they print, which the gallery shows: on an idle machine, since they print times.

`python docs/make_gallery.py` runs all of them, on the emulated HPU, and `python docs/make_gallery.py generate` one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "outputs"
NAMES = (
    "classify_images",
    "embed_sentences",
    "generate",
    "read_text",
    "speaker_embeddings",
    "transcribe",
    "write_and_resume",
)


def printed(name: str, *arguments: str) -> str:
    """What an example prints, without the folders of this machine.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    settings = {"LIGHTNING_HPU_INFER_EMULATOR": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "90"}
    command = [sys.executable, "-m", f"examples.{name}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True, timeout=600
    )
    text = re.sub(r"(?<!\S)/(?:[^\s/]+/)+", "", done.stdout)  # of a file, only its name
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(lines).strip() + "\n"


def main() -> None:
    """Store what the examples of the command line print, or all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or NAMES:
        (FOLDER / f"{name}.txt").write_text(printed(name))
        sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main()
