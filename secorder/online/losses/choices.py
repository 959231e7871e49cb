"""Does a loss choose among the samples of a batch, or compare them piece by piece? Seen in its graph.

The hardest samples, the nearest one, an order of ranks: where one sample stands among others decides what its gradient
is, and no second derivative tells, since pieces are linear. So the operations that choose (a maximum, sorting), those
that are bent (a hinge, an absolute value) and distances, whose second derivative PyTorch does not know, are looked at
one by one: what one number of theirs depends on, pulled back to the model's outputs, must belong to one sample.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..._torch.graph import Node, operation_of, shape_of, signed
from ..._torch.loss_graph import Place, nodes_between, pull_back
from ..._torch.random_state import fresh_generator
from ...layers.dtypes import rounding
from ...layers.layout import Layout

__all__ = ["chooses"]

#: Those that choose along a dimension, or among all numbers.
CHOICES = frozenset(
    {"Amax", "Amin", "Cummax", "Cummin", "Kthvalue", "Max", "Median", "Min", "Nanmedian", "Sort", "Topk"}
)

#: Those that are bent, number by number.
BENT = frozenset({"Abs", "Clamp", "ClampMax", "ClampMin", "Hardtanh", "LeakyRelu", "Maximum", "Minimum", "Relu"})

#: Of two sets of vectors.
DISTANCES = frozenset({"Cdist"})

#: How many operations of one loss are looked at, those next to it, and how many numbers of each.
MOST, NUMBERS = 6, 3

#: More nodes are no loss but a part of a net, to which the probe is not attached.
MOST_NODES = 100


class HasLayout(Protocol):
    """An output of the model."""

    @property
    def layout(self) -> Layout:
        """Where its samples are."""

    @property
    def group(self) -> int:
        """The same number for outputs whose row n is one sample."""


def chooses(order: Sequence[Node], roots: Mapping[Place, Tensor], outputs: Mapping[Place, HasLayout]) -> list[Place]:
    """The outputs of which samples are chosen from, or compared with one another.

    Args:
        order: the nodes between the loss and the outputs.
        roots: the gradients that the backward pass begins with.
        outputs: of the model, by where the graph has them.

    Raises:
        UnknownNode: what is between them cannot be looked at.
    """
    if len(order) > MOST_NODES:
        return []
    generator = fresh_generator()
    for node in [node for node in order if operation_of(node) in CHOICES | BENT | DISTANCES][:MOST]:
        whole = operation_of(node) in BENT and not math.prod(shape_of(node, 0)) > 1
        if whole and _all_goes_through(node, order, roots, outputs):
            continue  # on both sides of the bend the same loss, up to a factor
        for place, cotangent in _asked_for(node, roots, generator):
            found = _samples_behind(place, cotangent, outputs, generator)
            if len(set().union(*found.values())) > 1:
                return list(found)
    return []


def _asked_for(node: Node, roots: Mapping[Place, Tensor], generator: torch.Generator) -> Iterator[tuple[Place, Tensor]]:
    """Places, with cotangents of what some of an operation's numbers are made of: of those that the loss depends on."""
    before = nodes_between([place[0] for place in roots], {node})
    gradient = pull_back(before, roots, {(node, 0)}).get((node, 0))
    if gradient is None or not bool(gradient.isfinite().all()):
        return
    operation, dims = operation_of(node), _dims(node)
    if operation in BENT and gradient.numel() == 1:  # a hinge on a mean, on whichever side it is
        yield from [(x, torch.ones_like(gradient)) for x in node.next_functions if x[0] is not None and gradient != 0]
        return
    if operation == "Sort" and bool((gradient.diff(dim=dims[0]) == 0).all()):  # the order makes no difference
        return
    sources = {x for x in node.next_functions if x[0] is not None}
    at = {(node, 0): gradient} if operation in DISTANCES else pull_back([node], {(node, 0): gradient}, sources)
    most = max((float(g.abs().amax()) for g in roots.values()), default=0.0)
    for place, g in at.items():
        # What is taken off for rounding's sake comes back, such as the maximum in a softmax.
        there = g.abs() > rounding(g.dtype) * most / g.numel()
        drawn = torch.rand(g.shape, generator=generator, device="cpu").to(g.device) * there
        for number in drawn.flatten().topk(min(NUMBERS, int(there.sum()))).indices.tolist():
            cotangent = torch.zeros_like(g)
            index: list[Any] = [int(i) for i in torch.unravel_index(torch.tensor(number), g.shape)]
            if operation in CHOICES:
                chosen = range(g.dim()) if not dims else [dim % g.dim() for dim in dims if g.dim()]
                index = [slice(None) if dim in chosen else i for dim, i in enumerate(index)]
            cotangent[tuple(index)] = 1
            yield place, cotangent


def _all_goes_through(
    node: Node, order: Sequence[Node], roots: Mapping[Place, Tensor], outputs: Mapping[Place, HasLayout]
) -> bool:
    """Whether a loss depends on the model's outputs through an operation alone."""
    ends = {end for end, _ in outputs}
    leads, waiting = {*order, *ends} - {node}, [root for root, _ in roots if root is not node]
    while waiting:
        here = waiting.pop()
        if here in ends:
            return False
        if here in leads:
            leads.remove(here)
            waiting.extend(x for x, _ in here.next_functions if x is not None)
    return True


def _dims(node: Node) -> list[int]:
    """Along which an operation chooses; none where among all."""
    dims = getattr(node, "_saved_dim", ())
    return [signed(dim) for dim in (dims if isinstance(dims, (tuple, list)) else [dims])]


def _samples_behind(
    place: Place, cotangent: Tensor, outputs: Mapping[Place, HasLayout], generator: torch.Generator
) -> dict[Place, set[tuple[int, int]]]:
    """By output of the model, the samples in it that numbers depend on: their group, and their number in it."""
    order = nodes_between([place[0]], {node for node, _ in outputs})
    factors = torch.rand(cotangent.shape, generator=generator, device="cpu") + 0.5  # so that nothing cancels
    with torch.no_grad():
        reached = pull_back(order, {place: cotangent * factors.to(cotangent)}, outputs)
    found = {}
    for output, g in reached.items():
        samples = (outputs[output].layout.split(g).flatten(1) != 0).any(1).nonzero().flatten().tolist()
        if samples:
            found[output] = {(outputs[output].group, n) for n in samples}
    return found
