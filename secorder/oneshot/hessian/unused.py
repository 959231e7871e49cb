"""The loss does not depend on the layer: its curvature is zero."""

from torch import Tensor

from ...layers.dtypes import zeros
from ...layers.selection import Layer
from ...results import Strategy
from .facts import Facts

NAME = Strategy.UNUSED


def applies(facts: Facts) -> bool:
    """Where the graph shows no way from the layer to the loss."""
    return not facts.used


def run(layer: Layer) -> list[Tensor]:
    """Zeros, by parameter."""
    return zeros(layer)
