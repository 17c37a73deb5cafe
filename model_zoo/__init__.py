"""Architectures as users bring them: `ZOO` with a forward per batch, `GENERATION` with `generate()`.

Weights are random, sizes tiny, and nothing is downloaded. The steps are written as in a notebook: nothing in them
refers to the accelerator; masks, caches and types are what tokenizers and networks have by default.
"""

# In this order, which is that of reports.
from model_zoo import hub as hub  # registers its models
from model_zoo import networks as networks  # likewise
from model_zoo.registry import GENERATION, ZOO, Entry

__all__ = ["GENERATION", "ZOO", "Entry"]
