"""Figures in the documents are those of the stored results."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()


def stored(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def multiples(name: str) -> dict[str, str]:
    """Least and most time per batch of each arm, of the longest stage."""
    arms: dict[str, list[float]] = {}
    for result in stored(name)["results"]:
        for arm, ms in result["ms"].items():
            arms.setdefault(arm, []).append(ms / max(result["stages"].values()))
    return {arm: f"{min(found):.2f} to {max(found):.2f}" for arm, found in arms.items()}


@pytest.mark.parametrize("arm", multiples("bound"))
def test_the_readme_has_every_arm_of_the_picture(arm: str) -> None:
    assert f"| {arm} | {multiples('bound')[arm]} |" in README


def test_the_readme_has_the_random_mixes() -> None:
    assert f"the writer takes {multiples('unseen')['defaults, writer']}" in README.replace("\n", " ")


def above(device: str, group: str, name: str) -> int:
    """Microseconds per batch above the plain loop's, of ready batches on the CPU's DataLoader or the emulated HPU."""
    source = "DataLoader" if device == "cpu" else "ready batches"
    here = [each for each in stored("overhead")["results"] if (each["device"], each["source"]) == (device, source)]
    plain = next(each["micros"] for each in here if each["name"] == "plain loop")
    own = next(each["micros"] for each in here if (each["group"], each["name"]) == (group, name))
    return round(statistics.median(a - b for a, b in zip(own, plain, strict=True)))


def test_the_readme_has_what_the_loop_costs() -> None:
    stock, ours = above("cpu", "5 callbacks", "stock"), above("cpu", "5 callbacks", "defaults")
    assert f"| {stock} us | {ours} us | CPU |" in README
    stock, off, ours = (above("hpu", "no callbacks", name) for name in ("stock", "all flags off", "defaults"))
    assert f"| {stock} us | {off} us with all techniques off, {ours} us with the defaults | emulated HPU |" in README


def test_the_page_about_overhead_has_the_figures_of_its_pictures() -> None:
    found = stored("pictures")
    if "steps" not in found:
        pytest.skip("`python -m benchmarks.pictures --page docs/overhead.md --json ...` was not recorded yet")
    page = (ROOT / "docs" / "overhead.md").read_text()
    for name, step in found["steps"].items():
        times = step["ms"]
        row = (
            f"| {name[2:].replace('-', ' ')} | {statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f}) |"
        )
        assert row in page


def test_what_the_gallery_shows_names_no_folder_of_a_machine() -> None:
    for path in (ROOT / "docs" / "outputs").glob("*.txt"):
        text = path.read_text()
        assert "agree with stock Lightning's" in text or path.stem == "write_and_resume"
        assert not re.search(r"/(tmp|root|home|work)/", text), path


def test_every_benchmark_is_on_the_page_about_performance() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"common"}
    assert {name for name in names if f"| `python -m benchmarks.{name}" not in page} == set()
