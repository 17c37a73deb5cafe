"""What builds the site: broken links are found, and every page has its place."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers import script

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def check_links() -> ModuleType:
    return script(DOCS / "check_links.py")


def test_links_to_files_and_anchors_that_are_not_there_are_found(check_links: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text('<h1 id="top">x</h1><a href="sub/page.html#end">x</a><a href="#top">x</a>')
    (tmp_path / "sub" / "page.html").write_text('<p id="end"><a href="../index.html">x</a><img src="https://x.org/x">')
    assert check_links.broken(tmp_path) == []
    (tmp_path / "sub" / "page.html").write_text('<a href="../index.html#lost">x</a><img src="lost.png">')
    assert check_links.broken(tmp_path) == [
        "index.html: sub/page.html#end",
        "sub/page.html: ../index.html#lost",
        "sub/page.html: lost.png",
    ]


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text()
    listed = set(re.findall(r"^([\w/.]+)\*?$", index, re.MULTILINE))
    pages = [path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(set(pages) - listed) == ["index"]
