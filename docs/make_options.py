"""Writes the options' names, defaults and texts, which stand in `InferenceConfig`, to where users read them.

python docs/make_options.py           # the accelerator's docstring, and docs/options.md
python docs/make_options.py --check   # exit code 1 if either is out of date
"""

import ast
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG, ACCELERATOR = (ROOT / "lightning_hpu_infer" / name for name in ("config.py", "accelerator.py"))
PAGE = ROOT / "docs" / "options.md"
INTRODUCTION = """# Options

All options of `HPUInferenceAccelerator(...)`, which are the fields of `InferenceConfig` too. `make options` writes this
page from the texts in `lightning_hpu_infer/config.py`. Which of them your kind of model needs is said in
[Choose options](choosing.md).
"""


@dataclass
class Option:
    """A field of the configuration."""

    group: str
    name: str
    type: str
    default: str
    text: str


def options() -> list[Option]:
    """The fields of `InferenceConfig`, with the comment above each group."""
    source = CONFIG.read_text()
    lines = source.splitlines()
    (config,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    found: list[Option] = []
    for field, text in zip(config.body, config.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign):
            continue
        assert isinstance(text, ast.Expr)
        assert isinstance(text.value, ast.Constant)
        assert field.value is not None
        above = [line.strip() for line in lines[: field.lineno - 1] if line.startswith("    # ")]
        words = " ".join(str(text.value.value).split())
        name, kind, default = (ast.unparse(node) for node in (field.target, field.annotation, field.value))
        found.append(Option(above[-1].removeprefix("# "), name, kind, default, words))
    return found


def docstring_of(found: list[Option]) -> str:
    """The accelerator's source with the options in its docstring."""
    entries = [
        textwrap.fill(
            f"{option.name}: {option.text}",
            120,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
            break_on_hyphens=False,
        )
        for option in found
    ]
    block = "    Args:\n" + "\n".join(entries) + "\n\n    Raises:"
    return re.sub(
        r"    Args:\n        hpu_graphs: .*?\n\n    Raises:", lambda _: block, ACCELERATOR.read_text(), flags=re.DOTALL
    )


def page_of(found: list[Option]) -> str:
    """The page of options, a table per group."""
    parts = [INTRODUCTION]
    for group in dict.fromkeys(option.group for option in found):
        rows = [
            f"| `{option.name}` | `{option.default}` | {option.text} |" for option in found if option.group == group
        ]
        parts.append(
            "\n".join([f"## {group}", "", "| option | default | what it does |", "| --- | --- | --- |", *rows, ""])
        )
    return "\n".join(parts)


def main() -> int:
    """Write both, or check them."""
    found = options()
    wanted = {ACCELERATOR: docstring_of(found), PAGE: page_of(found)}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" not in sys.argv:
        for path in stale:
            path.write_text(wanted[path])
        return 0
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
