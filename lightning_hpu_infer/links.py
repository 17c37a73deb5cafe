"""Links from messages to the page that explains them."""

_PAGE = "https://lightning-hpu-infer.github.io/lightning-hpu-infer/docs/troubleshooting.html"


def explained(section: str) -> str:
    """The last sentence of a message that has more behind it than fits into it.

    Args:
        section: A heading of docs/troubleshooting.md, as in a link to it: small letters and hyphens.
    """
    return f" See {_PAGE}#{section}"
