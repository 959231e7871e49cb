"""The strategies by which a layer is measured, from the fastest to the slowest.

By its rule; by the operations that use its parameters; by its module, run once more; by one around that, up to the
model.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ...layers.selection import Layer
from .sample_dimension import Question


def by_operations(asked: Question, layer: Layer) -> Layer:
    """The layer measured by operations, where that may be: its parameters are trained, so that the graph holds them."""
    trained = all(p.requires_grad for p in layer.parameters.values())
    if not trained or asked.ranks is not None or layer.name in asked.not_followed:
        return layer
    return replace(layer, rule=None, by_operations=True)


def slower_of(asked: Question, parents: Mapping[int, nn.Module], layer: Layer) -> Layer | None:
    """The layer by the next slower strategy; None where there is none: the slowest is by the whole model."""
    if layer.by_operations:
        return replace(layer, by_operations=False)
    if layer.rule is not None and (followed := by_operations(asked, layer)) is not layer:
        return followed
    return None if layer.enclosing is asked.model else replace(layer, enclosing=_around(parents, layer), rule=None)


def _around(parents: Mapping[int, nn.Module], layer: Layer) -> nn.Module:
    """The module around a layer's enclosing module that is itself called: not a mere list of modules."""
    module = parents[id(layer.enclosing)]
    while isinstance(module, (nn.ModuleList, nn.ModuleDict)) and id(module) in parents:
        module = parents[id(module)]
    return module
