"""Debug helpers; only the names that callers use."""


def _hg_print(text: str) -> None:
    return None


def _mem_log(text: str) -> None:
    return None


def _set_module_name(name: str) -> None:
    return None
