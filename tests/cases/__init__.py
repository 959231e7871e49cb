"""Models, layers and graphs that users have: each is measured exactly or refused by a named error.

A file holds the cases of one prefix; a case is called by its file's name and its builder's.
"""

from . import coupled, data, generic, graph, layer, linear, operations, samples, transformers
from .case import CASES, Case

__all__ = [
    "CASES", "Case", "coupled", "data", "generic", "graph", "layer", "linear", "operations", "samples", "transformers",
]  # fmt: skip
