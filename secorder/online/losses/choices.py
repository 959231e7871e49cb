"""Does a loss choose among the samples of a batch, or compare them piece by piece? Seen in its graph.

The hardest samples, the nearest one, an order of ranks: where one sample stands among others decides what its gradient
is, and no second derivative tells, since pieces are linear. So the operations that choose (a maximum, sorting), those
that are bent (a hinge, an absolute value) and those of which PyTorch has no second derivative (distances) are looked at
one by one: what one number of theirs depends on, pulled back to the model's outputs, must belong to one sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from ..._torch.graph import Node, operation_of, shape_of, signed
from ..._torch.loss_graph import Place, nodes_between, pull_back
from ..._torch.random_state import fresh_generator
from ...layers.dtypes import rounding
from .marks import Output
from .seen import SeenLoss

#: Those that choose along a dimension, or among all numbers.
CHOICES = frozenset(
    {"Amax", "Amin", "Cummax", "Cummin", "Kthvalue", "Max", "Median", "Min", "Nanmedian", "Sort", "Topk"}
)

#: Those that are bent, number by number.
BENT = frozenset({"Abs", "Clamp", "ClampMax", "ClampMin", "Hardtanh", "LeakyRelu", "Maximum", "Minimum", "Relu"})

#: Distances and others of which PyTorch does not know the second derivative.
ONCE = frozenset({"Cdist", "CtcLoss", "EmbeddingBag", "Pdist"})

#: How many operations of one loss are looked at, those next to it, and how many numbers of each.
MOST, NUMBERS = 6, 3

#: More nodes are no loss but a part of a net, to which the probe is not attached.
MOST_NODES = 100


@torch.no_grad()
def chooses(loss: SeenLoss) -> list[Place]:
    """The outputs of which samples are chosen from, or compared with one another; raises :class:`UnknownNode`."""
    if len(loss.order) > MOST_NODES:
        return []
    generator = fresh_generator()
    for node in [x for x in loss.order if operation_of(x) in CHOICES | BENT | ONCE][:MOST]:
        for place, cotangent in _asked_for(node, loss, generator):
            found = samples_behind(place, cotangent, loss.outputs, generator)
            if len(set().union(*found.values())) > 1:
                return list(found)
    return []


def _asked_for(node: Node, loss: SeenLoss, generator: torch.Generator) -> Iterator[tuple[Place, Tensor]]:
    """Places, with cotangents of what some of an operation's numbers are made of: of those that the loss depends on."""
    operation, single = operation_of(node), prod(shape_of(node, 0)) <= 1
    if single and operation in BENT and _all_goes_through(node, loss):
        return  # on both sides of the bend the same loss, up to a factor
    gradient = pull_back(loss.roots, {(node, 0)}).get((node, 0))
    if gradient is None or not bool(gradient.isfinite().all()):
        return
    sources = {x for x in node.next_functions if x[0] is not None}
    if single and operation in BENT:  # a hinge on a mean, on whichever side it is
        yield from [(x, torch.ones_like(gradient)) for x in sources if gradient != 0]
        return
    if operation == "Sort" and not bool(gradient.diff(dim=_along(node, gradient)[0]).any()):
        return  # the order makes no difference
    at = {(node, 0): gradient} if operation in ONCE else pull_back({(node, 0): gradient}, sources)
    most = max((float(g.abs().amax()) for g in loss.roots.values()), default=0.0)
    for place, g in at.items():
        # What is taken off for rounding's sake comes back, such as the maximum in a softmax.
        there = g.abs() > rounding(g.dtype) * most / g.numel()
        for cotangent in _some(g, there, _along(node, g) if operation in CHOICES else (), generator):
            yield place, cotangent


def _some(g: Tensor, there: Tensor, whole: Sequence[int], generator: torch.Generator) -> Iterator[Tensor]:
    """Cotangents of a few numbers among some, each with all that stand with it along the dimensions of a choice."""
    drawn = torch.rand(g.shape, generator=generator, device="cpu").to(g.device) * there
    for number in drawn.flatten().topk(min(NUMBERS, int(there.sum()))).indices.tolist():
        index = torch.unravel_index(torch.tensor(number), g.shape)
        cotangent = torch.zeros_like(g)
        cotangent[tuple(slice(None) if dim in whole else int(i) for dim, i in enumerate(index))] = 1
        yield cotangent


def _along(node: Node, g: Tensor) -> Sequence[int]:
    """The dimensions that an operation chooses along; all where it does so among all numbers."""
    dims = getattr(node, "_saved_dim", ())
    dims = [signed(dim) for dim in (dims if isinstance(dims, (tuple, list)) else [dims])]
    return [dim % g.dim() for dim in dims if g.dim()] if dims else range(g.dim())


def _all_goes_through(node: Node, loss: SeenLoss) -> bool:
    """Whether a loss depends on the model's outputs through an operation alone."""
    ends, begins = {end for end, _ in loss.outputs}, [root for root, _ in loss.roots]
    others = nodes_between(begins, {node, *ends})  # none behind the operation
    return ends.isdisjoint(begins) and ends.isdisjoint(x for other in others for x, _ in other.next_functions)


def samples_behind(
    place: Place, cotangent: Tensor, outputs: Mapping[Place, Output], generator: torch.Generator
) -> dict[Place, set[tuple[int, int]]]:
    """By output of the model, the samples in it that numbers depend on: their group, and their number in it."""
    factors = torch.rand(cotangent.shape, generator=generator, device="cpu") + 0.5  # so that nothing cancels
    found = {}
    for output, g in pull_back({place: cotangent * factors.to(cotangent)}, outputs).items():
        samples = (outputs[output].layout.split(g).unsqueeze(-1).flatten(1) != 0).any(1).nonzero().flatten().tolist()
        if samples:
            found[output] = {(outputs[output].group, n) for n in samples}
    return found
