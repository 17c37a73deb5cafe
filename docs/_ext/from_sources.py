"""Directives for what the sources say themselves: the examples, the commands' help, the side-by-side cases."""

import argparse
import ast
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lightning_hpu_infer import cli

ROOT = Path(__file__).parents[2]
GITHUB = "https://github.com/lightning-hpu-infer/lightning-hpu-infer/blob/main"


class FromSources(SphinxDirective):
    """Writes Markdown and has it parsed in place of the directive."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(self.markdown()), allow_section_headings=True)

    def markdown(self) -> list[str]:
        raise NotImplementedError


class Gallery(FromSources):
    """Every example with the first paragraph of its docstring, its source, and what it printed (`make_gallery.py`)."""

    def markdown(self) -> list[str]:
        lines: list[str] = []
        for path in sorted((ROOT / "examples").glob("*.py")):
            if path.stem == "compare":  # what they share
                continue
            self.env.note_dependency(str(path))
            docstring = ast.get_docstring(ast.parse(path.read_text())) or path.stem
            title = path.stem.replace("_", " ").capitalize()
            lines += [f"## {title}", "", docstring.partition("\n\n")[0], ""]
            lines += [f"[`examples/{path.name}`]({GITHUB}/examples/{path.name})", ""]
            usage = [line.strip() for line in docstring.splitlines() if line.startswith("    ")]
            lines += ["```bash", *usage, "```", ""] if usage else []
            output = ROOT / "docs" / "outputs" / f"{path.stem}.txt"
            self.env.note_dependency(str(output))
            if output.exists():
                lines += ["It prints, on the emulated HPU:", "", "```text", output.read_text().rstrip(), "```", ""]
            lines += ["<details><summary>Source</summary>", ""]
            lines += [f"```{{literalinclude}} /examples/{path.name}", ":language: python", "```", "", "</details>", ""]
        return lines


class Commands(FromSources):
    """What each command prints with `--help`."""

    def markdown(self) -> list[str]:
        parser = cli._parser()
        (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
        lines: list[str] = []
        for name, command in commands.choices.items():
            command.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=86)
            lines += [f"## {name}", "", "```text", command.format_help().rstrip(), "```", ""]
        return lines


class ParityCases(FromSources):
    """The names of the functions marked as side-by-side cases, by file."""

    def markdown(self) -> list[str]:
        lines: list[str] = []
        for path in sorted((ROOT / "tests" / "parity" / "cases").glob("*.py")):
            self.env.note_dependency(str(path))
            tree = ast.parse(path.read_text())
            cases = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
            if cases:
                lines += [f"## {(ast.get_docstring(tree) or path.stem).splitlines()[0]}", ""]
                place = f"{GITHUB}/{path.relative_to(ROOT).as_posix()}"
                lines += [f"- [{case.name.replace('_', ' ')}]({place}#L{case.lineno})" for case in cases]
                lines.append("")
        return lines


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("gallery", Gallery)
    app.add_directive("commands", Commands)
    app.add_directive("parity-cases", ParityCases)
    return {"parallel_read_safe": True}
