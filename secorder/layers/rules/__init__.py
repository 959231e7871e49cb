"""Per-sample gradients, one rule a layer type: a file a family.

A rule is a function ``rule(module, inputs, g) -> {parameter name: per-sample gradient}``, entered for its layer types
with :func:`rule_of`. To add one: a function, in a file of this folder or of your own.
"""

from . import convolution, embedding, linear, normalisation, prelu
from .registry import RULES, SQUARES, rule_for, rule_of, takes_any_leading_dim

__all__ = [
    "RULES", "SQUARES", "convolution", "embedding", "linear", "normalisation", "prelu", "rule_for", "rule_of",
    "takes_any_leading_dim",
]  # fmt: skip
