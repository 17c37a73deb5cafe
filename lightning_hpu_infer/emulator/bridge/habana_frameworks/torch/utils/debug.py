"""Debug helpers; only the names that callers use."""


def _hg_print(text: str) -> None:
    return None


def _mem_log(text: str) -> None:
    return None
