"""Refuse a release whose tag, `__version__`, CHANGELOG and CITATION.cff do not name the same version."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def versions() -> dict[str, str]:
    """The version by the name of the file that says it; empty where a file says none."""
    patterns = {
        "lightning_hpu_infer/__init__.py": r'^__version__ = "(.+)"$',
        "CHANGELOG.md": r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$",
        "CITATION.cff": r'^version: "?([^"\n]+)"?$',
    }
    found = {file: re.search(pattern, (ROOT / file).read_text(), re.MULTILINE) for file, pattern in patterns.items()}
    return {file: match[1] if match else "" for file, match in found.items()}


def problems(tag: str) -> list[str]:
    """What speaks against a release by this tag."""
    version = tag.removeprefix("v")
    wrong = [f"{file} says {said or 'none'}" for file, said in versions().items() if said != version]
    if not tag.startswith("v"):
        wrong.append("a release's tag begins with v")
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)^## \[", (ROOT / "CHANGELOG.md").read_text(), re.M | re.S)
    if unreleased is not None and unreleased[1].strip():
        wrong.append("CHANGELOG.md has entries under Unreleased")
    return wrong


if __name__ == "__main__":
    tag = sys.argv[1] if len(sys.argv) > 1 else ""
    if wrong := problems(tag):
        sys.exit(f"No release by the tag {tag!r}: {'; '.join(wrong)}.")
