"""Of how many samples is a number between a loss and the outputs that it is made of?

One number of several samples, such as their mean, may be taken once for each of them, to which their losses are added;
or it is one of several, such as the sums of columns, of which the mean is none over samples.
"""

from math import prod

import torch
from torch import Tensor

from ..._torch.graph import Node, operation_of, run_node, shape_of
from ..._torch.loss_graph import Place, UnknownNode, pull_back
from ..._torch.loss_terms import alone, is_mean, ones_for, selected, sums
from ..._torch.random_state import fresh_generator
from ..._torch.sample_graph import inner_size, sizes_behind
from ...layers.dtypes import rounding
from .choices import samples_behind
from .seen import SeenLoss

#: What takes a number as often as the shape of another tensor, or a shape that is given, tells.
BROADCASTS = frozenset({"Add", "Div", "Expand", "Mul", "Repeat", "Rsub", "Sub", "Where"})

#: What adds up products, or powers, of numbers, with no factor of its own.
ADDS = frozenset({"Bmm", "Dist", "Dot", "LinalgVectorNorm", "Mm", "Mv", "Norm"})

#: What takes a piece of a tensor.
CUTS = frozenset({"Index", "IndexSelect", "Narrow", "Select", "Slice", "Split", "SplitWithSizes", "Unbind"})


def samples_of(loss: SeenLoss, node: Node, number: int) -> int:
    """How many samples the first number is of that a node makes; zero where its gradient is."""
    kind = _kind(node, number)
    if kind not in loss.samples_of:
        found = samples_behind((node, number), _first(node, number), loss.outputs, fresh_generator())
        loss.samples_of[kind] = len(set().union(*found.values()))
    return loss.samples_of[kind]


def of_several(loss: SeenLoss, place: Place) -> bool:
    """Whether a tensor is of more than one sample, as far as its graph tells."""
    try:
        found = samples_behind(place, ones_for(*place), loss.outputs, fresh_generator())
    except UnknownNode:
        return True
    return len(set().union(*found.values())) > 1


def copies(loss: SeenLoss, samples: int, node: Node, index: int) -> tuple[int, bool]:
    """How often a node takes a number of several samples, once or more for each of all; and whether with one factor.

    As a mean over them is to which losses of samples are added. Of any other input, once.
    """
    before = node.next_functions[index]
    times, rest = divmod(prod(shape_of(node, 0)), prod(shape_of(*before)) or 1)
    if rest or times < samples or times % samples or operation_of(node) not in BROADCASTS:
        return 1, True
    try:
        if samples_of(loss, *before) < 2:
            return 1, True
    except UnknownNode:
        return 1, True
    ones = ones_for(node)
    drawn = torch.rand(ones.shape, generator=fresh_generator(), device="cpu").to(ones)
    whole, part = (run_node(node, [g], index) for g in (ones, drawn))
    return times, torch.allclose(part * times, whole * drawn.sum_to_size(whole.shape))


def over_samples(loss: SeenLoss, node: Node) -> bool:
    """Whether a mean may be over samples: of numbers that are of several each, two differ by what two samples make."""
    behind = loss.order[loss.order.index(node) + 1 :]
    if not any(is_mean(x) or sums(x) or operation_of(x) in ADDS for x in behind):
        return True  # what would be asked for below may be as large as all logits
    place = next(x for x in node.next_functions if x[0] is not None)
    one = _first(*place)
    other = one.clone()
    other.view(-1)[-1] -= 1
    try:
        if samples_of(loss, *place) < 2 or _samples_beyond_rounding(loss, place, one) < 2:
            return True
        return _samples_beyond_rounding(loss, place, other) < min(3, sum(loss.groups.values()))
    except UnknownNode:
        return True


def _samples_beyond_rounding(loss: SeenLoss, place: Place, g: Tensor) -> int:
    """How many samples a gradient, pulled back to the outputs, comes to, but for what cancels to rounding."""
    sizes = [
        loss.outputs[output].layout.split(pulled).unsqueeze(-1).flatten(1).abs().amax(1)
        for output, pulled in pull_back({place: g}, loss.outputs).items()
    ]
    return max((int((own > rounding(own.dtype) * own.max()).sum()) for own in sizes), default=0)


def is_of_samples(place: Place, loss: SeenLoss, count: int) -> bool:
    """Whether samples are somewhere in what a node has computed, each made of what is the same one's in the outputs."""
    shape = shape_of(*place)
    for dim, size in enumerate(shape):
        for step in {1, size // count} if size and not size % count else ():
            inner = inner_size(shape, dim, step)
            found = sizes_behind([(*place, inner)], count, loss.outputs)
            reached = [x for x in loss.outputs if x in found]
            if reached and all(found[x] == loss.outputs[x].layout.inner_size(shape_of(*x)) for x in reached):
                return True
    return False


def in_pieces(loss: SeenLoss, node: Node, samples: int) -> int:
    """How many samples the pieces hold that a node's numbers are made of; 0 where there are none, or it is not known.

    The gradient alone does not tell, which is zero for samples that keep a margin.
    """
    pieces = _pieces(loss, node, samples)
    kind = _kind(node, 0), frozenset(_kind(*x) for x in pieces)
    if kind not in loss.samples_of:
        try:
            found = [samples_behind(x, ones_for(*x), loss.outputs, fresh_generator()) for x in pieces]
        except UnknownNode:
            found = []
        loss.samples_of[kind] = len(set().union(*(samples for by_output in found for samples in by_output.values())))
    return loss.samples_of[kind]


def of_a_part(loss: SeenLoss, node: Node, samples: int) -> int:
    """How many samples a number is of that a node makes of pieces, without the others; 0 where it is of one, or of all.

    All of them where pieces hold each sample once. Of one choice by indices, :mod:`.powers` looks at what is chosen.
    """
    pieces = _pieces(loss, node, samples)
    if not pieces or (len(pieces) == 1 and selected(pieces[0][0])):
        return 0
    held = in_pieces(loss, node, samples)
    try:
        if held == samples:
            return samples if sum((*shape_of(*x), 1)[0] for x in pieces) == samples else 0
        return held if held > 1 and samples_of(loss, node, 0) <= held else 0
    except UnknownNode:
        return 0


def mixes(place: Place, index: int) -> bool:
    """Whether the first number that a node makes is of several that it is given."""
    node, number = place
    return int(run_node(node, alone(node, number, _first(node, number)), index).count_nonzero()) > 1


def _pieces(loss: SeenLoss, node: Node, samples: int) -> list[Place]:
    """What was taken of tensors in which all samples lie, of which a node's numbers are made."""
    leads, seen = set(loss.order), set[Place]()
    found, waiting = [], [node]
    for x in waiting:  # which grows meanwhile
        for place in x.next_functions:
            if place[0] in leads and place not in seen:
                seen.add(place)
                if operation_of(place[0]) in CUTS and not is_of_samples(place, loss, samples):
                    found.append(place)
                else:
                    waiting.append(place[0])
    return found


def _first(node: Node, number: int) -> Tensor:
    """One for the first number that a node has computed, and zeros for all others."""
    one = ones_for(node, number)
    one.view(-1)[1:] = 0
    return one


def _kind(node: Node, number: int) -> object:
    """The same for nodes that do the same with tensors of the same shapes."""
    before = tuple(tuple(shape_of(*place)) for place in node.next_functions if place[0] is not None)
    return operation_of(node), number, tuple(shape_of(node, number)), before
