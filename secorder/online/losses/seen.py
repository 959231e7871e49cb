"""What is seen of a loss as a backward pass begins: the graph between it and the outputs that it is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ..._torch.graph import Node, shape_of
from ..._torch.loss_graph import Place, elements_of, made_by, nodes_between, place_of, pull_back
from .marks import Output

#: Numbers between loss and outputs, at most: so many, or so many times those of the outputs.
MOST_ELEMENTS, TIMES_OUTPUTS = 1 << 22, 16


@dataclass(frozen=True, eq=False)
class SeenLoss:
    """A loss."""

    roots: Mapping[Place, Tensor]  #: the gradients that the backward pass begins with
    order: Sequence[Node]  #: the nodes between the loss and the outputs, the loss first
    outputs: Mapping[Place, Output]  #: of the model, or of layers, by where the graph has them
    groups: Mapping[int, int]  #: by number of a group of outputs whose row n is one sample, how many samples these hold
    #: by kind of node, how many samples one number is of that it makes, as far as it was asked for
    samples_of: dict[object, int] = field(default_factory=dict)

    def of_group(self, group: int) -> "SeenLoss":
        """What there is of it between the loss and the outputs of one group, all others being constants."""
        outputs = {place: own for place, own in self.outputs.items() if own.group == group}
        order = nodes_between([node for node, _ in self.roots], {node for node, _ in outputs})
        return SeenLoss(self.roots, order, outputs, {group: self.groups[group]})

    @cached_property
    def gradients(self) -> dict[Place, Tensor]:
        """Those on the outputs, with their graph: see :func:`secorder._torch.loss_graph.pull_back`."""
        with torch.enable_grad():
            return pull_back(self.roots, self.outputs)


def roots_of(ends: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> dict[Place, Tensor]:
    """Where a backward pass begins, and the gradients that it begins with."""
    pairs = [(t, g) for t, g in zip(ends, gradients, strict=True) if made_by(t) is not None]
    return {place_of(t): torch.ones_like(t) if g is None else g.detach() for t, g in pairs}


def see(
    roots: Mapping[Place, Tensor], by_record: Mapping[int, Mapping[Place, Output | None]], *, joined: bool
) -> SeenLoss | None:
    """The loss that a backward pass begins at; None where there is nothing to see of it, or too much.

    With ``joined`` row n of all forwards of as many samples is one sample. See :func:`.marks.outputs_behind`.
    """
    counts = {own.num_samples for outputs in by_record.values() for own in outputs.values() if own is not None}
    outputs = {
        place: own._replace(group=0 if joined and len(counts) == 1 else group)
        for group, held in enumerate(by_record.values())
        for place, own in held.items()
        if own is not None
    }
    groups = {own.group: own.num_samples for own in outputs.values()}
    order = nodes_between([node for node, _ in roots], {node for node, _ in outputs})
    most = max(MOST_ELEMENTS, TIMES_OUTPUTS * sum(prod(shape_of(*place)) for place in outputs))
    if sum(groups.values()) < 2 or not order or elements_of(order) > most:
        return None
    return SeenLoss(roots, order, outputs, groups)
