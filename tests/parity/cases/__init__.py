"""What users bring to `trainer.predict`: each function makes one case, with fresh objects.

`loaders`, `batches`, `outputs` and `runs` list their cases when they are imported.
"""

from tests.parity.cases import batches, loaders, outputs, runs
from tests.parity.cases.registry import CASES, Entry

__all__ = ["CASES", "Entry", "batches", "loaders", "outputs", "runs"]
