"""Writes what is assumed of the bridge to docs/verify.md."""

from pathlib import Path

from lightning_hpu_infer.verify.catalogue import assumptions

PAGE = Path(__file__).with_name("verify.md")
START, END = "<!-- assumptions:", "<!-- end of assumptions -->"


def table() -> str:
    """The assumptions as Markdown."""
    rows = ["| assumption | mode | from | if broken, set |", "| --- | --- | --- | --- |"]
    for each in assumptions():
        modes = ", ".join(each.modes)
        rows.append(f"| **{each.name}**: {each.statement} | {modes} | {each.source} | {each.turns_off} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """The page with the assumptions of now.

    Args:
        text: The page.
    """
    before, _, rest = text.partition(START)
    comment, _, rest = rest.partition("\n")
    return f"{before}{START}{comment}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
