"""Every message of the package has its row in docs/troubleshooting.md, and every row its message."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import lightning_hpu_infer
from lightning_hpu_infer.links import explained

PACKAGE = Path(lightning_hpu_infer.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "troubleshooting.md").read_text()
SAYING = {"rank_zero_warn", "rank_zero_info", "warn", "add_note", "say"}
# As stock Lightning says it, and Python.
STOCK = ("predict returned None if it was on purpose", "module … has no attribute …")
ANY = "…"
# What is said there is said to TorchDynamo, to those who develop the emulator, or by a command that explains itself.
ELSEWHERE = ("_dynamo.py", "emulator/", "verify/", "cli.py", "doctor.py", "facts.py")


def template(node: ast.expr) -> str:
    """The text that an expression makes, with an ellipsis for what is not written down."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return ANY


def messages() -> Iterator[tuple[str, str]]:
    """Every text that is warned of, logged, noted or raised, with the line where that is."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(ELSEWHERE):
            continue
        tree = ast.parse(path.read_text())
        for constant in tree.body:
            text = template(constant.value) if isinstance(constant, ast.Assign) else ""
            if text.endswith(".") and len(text.split()) > 6:  # a sentence that has a name is said somewhere
                yield f"{name}:{constant.lineno}", text
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            said = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if isinstance(node, ast.Raise) or said in SAYING:
                text = template(call.args[-1] if said == "warn" else call.args[0])
                if re.search(r"\w{3}", text) and not text.startswith(STOCK):  # not only handed on
                    yield f"{name}:{call.lineno}", text


def patterns() -> Iterator[str]:
    """The messages of the page: everything in doubled or tripled backticks."""
    for found in re.finditer(r"(?<!`)(`{2,3})(?!`)(.+?)(?<!`)\1(?!`)", PAGE, re.DOTALL):
        yield " ".join(found[2].split())


def matches(pattern: str, text: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split(ANY))), text, re.DOTALL) is not None


MESSAGES = list(messages())
PATTERNS = list(patterns())


def test_there_is_something_to_compare() -> None:
    assert len(MESSAGES) > 100
    assert len(PATTERNS) > 80


def test_every_message_is_on_the_page() -> None:
    lost = [f"{place}: {text}" for place, text in MESSAGES if not any(matches(pattern, text) for pattern in PATTERNS)]
    assert lost == [], "add a row for each to docs/troubleshooting.md"


def test_every_row_is_of_a_message() -> None:
    assert [each for each in PATTERNS if len(re.findall(r"\w", each)) < 6] == [], "these match nearly anything"
    assert [each for each in PATTERNS if not any(matches(each, text) for _, text in MESSAGES)] == []


def test_links_in_messages_lead_to_headings() -> None:
    sources = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "links.py")
    sections = re.findall(r'explained\(([^)]+)\)|_SECTION = "([\w-]+)"', sources)
    linked = {(first or second).strip('"') for first, second in sections} - {"_SECTION"}
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)}
    assert len(linked) > 4
    assert linked - headings == set()


def test_the_page_is_where_the_links_say() -> None:
    address = explained("x").removeprefix(" See ").partition("#")[0]
    settings = (PACKAGE.parent / "setup.cfg").read_text()
    documentation = re.findall(r"Documentation = (\S+)", settings)[0]
    assert address == f"{documentation}docs/troubleshooting.html"
