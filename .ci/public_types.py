"""Check that a type checker knows every type of the public API: what `__all__` of the package and the emulator names.

`basedpyright --verifytypes` judges every module whose name has no underscore. Most of these are internal, so of its
findings only those about public names are shown.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning_hpu_infer
from lightning_hpu_infer import emulator

PACKAGE = "lightning_hpu_infer"
ROOT = Path(__file__).parents[1]


def is_public(name: str) -> bool:
    """Whether a fully qualified name is that of a public class or function, or of a member of one."""
    exported = [getattr(module, each) for module in (lightning_hpu_infer, emulator) for each in module.__all__]
    names = [f"{each.__module__}.{each.__qualname__}" for each in exported if hasattr(each, "__qualname__")]
    return any(name == each or name.startswith(f"{each}.") for each in names)


def symbols() -> list[dict[str, Any]]:
    """What basedpyright found out about each name."""
    tools = Path(sys.executable).parent
    # It looks for packages where the `python` on the path does, and does not understand editable installations.
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [str(tools / "basedpyright"), "--verifytypes", PACKAGE, "--ignoreexternal", "--outputjson"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    try:
        report = json.loads(found.stdout)["typeCompleteness"]
    except (ValueError, KeyError):
        sys.exit(f"basedpyright failed: {found.stdout}{found.stderr}")
    return list(report["symbols"])


def main() -> None:
    """Print what is incomplete; the exit code is 1 if a type is unknown."""
    found = [symbol for symbol in symbols() if is_public(symbol["name"])]
    # A type that has to be inferred is ambiguous: other type checkers may infer another one.
    ambiguous = [symbol for symbol in found if symbol["isTypeAmbiguous"] and symbol["diagnostics"]]
    unknown = [symbol for symbol in found if not symbol["isTypeAmbiguous"] and not symbol["isTypeKnown"]]
    for symbol in (*ambiguous, *unknown):
        for diagnostic in symbol["diagnostics"]:
            sys.stdout.write(f"{symbol['name']}: {diagnostic['message']}\n")
    sys.stdout.write(f"{len(found)} public names: types of {len(ambiguous)} ambiguous, of {len(unknown)} unknown\n")
    if unknown or not found:
        sys.exit(1)


if __name__ == "__main__":
    main()
