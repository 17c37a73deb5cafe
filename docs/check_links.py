"""Checks the links of the built site: every file and every anchor that a page names exists. Needs no network.

python docs/check_links.py build/site/html
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what a tag links to, and the anchor that it is."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name == "id" and value:
                self.anchors.add(value)


def broken(folder: Path) -> list[str]:
    """Links that lead nowhere, each with its page.

    Args:
        folder: The built site.
    """
    pages = {path.resolve(): Page(path.read_text()) for path in folder.rglob("*.html")}
    found = []
    for path, page in sorted(pages.items()):
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            lost = not target.exists() or (target in pages and unquote(parts.fragment) not in pages[target].anchors)
            if lost:
                found.append(f"{path.relative_to(folder.resolve())}: {link}")
    return found


def main() -> int:
    """Print the broken links; exit code 1 if there are any, or no page."""
    folder = Path(sys.argv[1])
    lines = broken(folder)
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 1 if lines or not list(folder.glob("docs/*.html")) else 0


if __name__ == "__main__":
    sys.exit(main())
