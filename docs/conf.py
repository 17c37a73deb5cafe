"""How Sphinx builds the site (`make site`). Its pages are the repository's own Markdown files, where they lie.

The source folder is the root of the repository, so that links between pages are the same on GitHub and on the site.
"""

import fnmatch
import re
import sys
import zlib
from pathlib import Path
from posixpath import normpath

from sphinx.application import Sphinx

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "_ext"), str(ROOT)]

import lightning_hpu_infer  # noqa: E402

REPOSITORY = "https://github.com/lightning-hpu-infer/lightning-hpu-infer"

project = "lightning_hpu_infer"
author = "The lightning-hpu-infer developers"
project_copyright = author
version = release = lightning_hpu_infer.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "from_sources",
]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/reference/*.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "examples/README.md",
    "examples/*.ipynb",
    "lightning_hpu_infer/emulator/README.md",
    "tests/README.md",
]
exclude_patterns = [".*", "build", "*.egg-info"]

# Docstrings write code in single backticks; where that names something which is documented, it becomes a link.
default_role = "py:obj"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
add_module_names = False
nb_execution_mode = "off"  # tests/test_notebook.py runs the notebook; the page shows what was stored
myst_heading_anchors = 4

html_theme = "furo"
html_title = "lightning_hpu_infer"
html_extra_path = ["_root"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = html_copy_source = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "",
}


def inventory(name: str, url: str) -> tuple[str, str]:
    """What intersphinx needs to link to another project: its address, and a file of names.

    The names are those that our docstrings use, from `inventories/`, so that a build needs no network.
    """
    lines = (HERE / "inventories" / f"{name}.txt").read_text().splitlines()
    entries = "".join(f"{line} -\n" for line in lines if line and not line.startswith("#"))
    header = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n"
    header += "# The remainder of this file is compressed using zlib.\n"
    path = ROOT / "build" / "site" / f"{name}.inv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.encode() + zlib.compress(entries.encode()))
    return url, str(path)


intersphinx_mapping = {
    "python": inventory("python", "https://docs.python.org/3/"),
    "torch": inventory("torch", "https://docs.pytorch.org/docs/stable/"),
    "lightning": inventory("lightning", "https://lightning.ai/docs/pytorch/stable/"),
}


def link_to_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let links to files that are no pages of the site lead to GitHub."""
    page = Path(app.env.doc2path(docname))
    if page.suffix != ".md":
        return

    def linked(match: re.Match[str]) -> str:
        target = (page.parent / match[1]).resolve()
        if not target.exists() or target.suffix in (".png", ".svg") or str(target) in pages:
            return match[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{target.relative_to(ROOT.resolve()).as_posix()}{match[2] or ''})"

    found = app.env.found_docs
    pages = {str(Path(app.env.doc2path(each)).resolve()) for each in found}
    if docname == root_doc:
        # Pages of parts that may be missing are listed by patterns, and Sphinx warns of those that match nothing.
        lines = source[0].splitlines(keepends=True)
        listed = {line: normpath(f"docs/{line.strip()}") for line in lines if line.endswith("*\n")}
        source[0] = "".join(each for each in lines if each not in listed or fnmatch.filter(found, listed[each]))
    source[0] = re.sub(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", linked, source[0])


def link_to_tests(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let the names of tests, such as `test_loop.py::test_errors`, lead to their lines on GitHub."""

    def linked(match: re.Match[str]) -> str:
        before, found, _ = (ROOT / "tests" / match[1]).read_text().partition(f"def {match[2]}(")
        line = len(before.splitlines()) + 1
        return f"[{match[0]}]({REPOSITORY}/blob/main/tests/{match[1]}#L{line})" if found else match[0]

    source[0] = re.sub(r"`([\w/]+\.py)::(\w+)`", linked, source[0])


def keep_colons(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Let napoleon not take what stands before a colon in an attribute's text for its type."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = f": {lines[0]}"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before napoleon
    app.connect("source-read", link_to_repository)
    app.connect("source-read", link_to_tests)
