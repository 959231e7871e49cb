"""Does a loss weight its samples, as far as its operations tell? Seen in its graph.

A mean over targets with class weights, over those that are not ignored or were selected, or a sum that is divided by
the number of tokens, is L = Σ_n c_n ℓ_n with other c_n than 1/N. What a loss does with masks of its own does not show,
unless the number that it divides by does.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..._torch.graph import Node, run_node
from ..._torch.loss_graph import UnknownNode, pull_back
from ..._torch.loss_terms import hides, is_mean, mean_over_targets, multiplier, uniform, weights_within
from .extent import copies, of_several
from .powers import WEIGHTED, differ
from .seen import SeenLoss

_TOO_LATE = (
    "the loss multiplies one number of all samples, such as their mean, by numbers of each of them, which then do not "
    'weight their losses: multiply the losses of samples (reduction="none") before they are added up.'
)

#: Operations by constants that are looked at, at most.
MOST_WEIGHTED = 8


@torch.no_grad()
def weights_of_loss(loss: SeenLoss, num_samples: int) -> str:
    """How a loss weights samples otherwise than alike; empty where that does not show. Raises :class:`UnknownNode`."""
    for mean in filter(None, map(mean_over_targets, loss.order)):
        if mean.by_class is not None and bool((mean.by_class != mean.by_class[0]).any()):
            return WEIGHTED.format("class weights in a mean")
        if bool(mean.ignored.any()) and differ(loss, mean.classes):
            return WEIGHTED.format("a mean over targets that are not ignored, of which some have more than others")
    if any(_too_late(loss, num_samples, node) for node in loss.order if not hides(node)):
        return _TOO_LATE
    return WEIGHTED.format("weights that add up to one") if _normalised(loss, num_samples) else ""


def _too_late(loss: SeenLoss, num_samples: int, node: Node) -> bool:
    """Whether a node multiplies one number of several samples by numbers of each, other than to average these."""
    for index, place in enumerate(node.next_functions):
        times, alike = copies(loss, num_samples, node, index) if place[0] is not None else (1, True)
        if times > 1 and not alike:
            found = pull_back(loss.roots, {place}).get(place)
            return found is not None and not _near(abs(float(found.sum())), 1)
    return False


def _normalised(loss: SeenLoss, num_samples: int) -> bool:
    """Whether numbers of samples are added with weights that differ and add up to one, as that of one sample is.

    Other weights than those are a part of each sample's loss, such as an advantage. What multiplies the whole loss, or
    this term, is taken off.
    """
    factors = {1.0}
    found = []
    for place, g in loss.roots.items():
        other = bool(g.any()) and not uniform(g) and place not in loss.outputs
        rows = _by_sample(g, num_samples) if other else None
        if rows is not None and _near(float(rows.sum()), 1) and not _by_chance(rows, factors):
            return True
    for node, index, by in _multipliers(loss):
        if uniform(by):
            factors.add(abs(float(by.flatten()[0])))
        elif (rows := _by_sample(by, num_samples)) is not None:
            found.append((node, index, rows))
    for node, index, by in found[:MOST_WEIGHTED]:
        if _by_chance(by, factors):
            continue
        try:
            g = pull_back(loss.roots, {(node, 0)})[node, 0]
        except UnknownNode:
            continue
        if index is None:
            each = by.sum(1).double() * float(g.sum()) / (by.numel() if is_mean(node) else g.numel())
        else:
            rows = _by_sample(run_node(node, [g], index), num_samples)
            assert rows is not None  # of the shape of what it was multiplied by
            each = rows.sum(1).double()
        total, columns = abs(float(each.sum())), by.numel() / num_samples
        one = any(_near(total, factor, factor * columns) for factor in factors)
        place = (node, 0) if index is None else node.next_functions[index]
        if one and float(each.max() - each.min()) > 1e-3 * total / num_samples and of_several(loss, place):
            return True
    return False


def _multipliers(loss: SeenLoss) -> Iterator[tuple[Node, int | None, Tensor]]:
    """What multiplies by constants, which input, and by what; None for the weights that a loss of PyTorch takes."""
    leads = {node for node, _ in loss.outputs}.union(loss.order)
    for node in loss.order:
        if hides(node):
            continue
        if (within := weights_within(node)) is not None:
            yield node, None, within
        for index, (before, _) in enumerate(node.next_functions):
            if before in leads and (by := multiplier(node, index, leads)) is not None and by.numel():
                yield node, index, by


def _by_sample(numbers: Tensor, count: int) -> Tensor | None:
    """Numbers with a row for each sample; None where no dimension holds samples."""
    dim = next((dim for dim, size in enumerate(numbers.shape) if not size % count), None)
    return None if dim is None else numbers.movedim(dim, 0).reshape(count, -1)


def _by_chance(weights: Tensor, factors: set[float]) -> bool:
    """Whether they may add up to a number by chance: masks, labels, and weights of classes, as many of each.

    One of the loss's factors is one over the sum of the weights, where they were divided by it.
    """
    total = float(weights.sum())
    if any(_near(factor * total, 1, len(weights), weights.numel()) for factor in factors - {1.0}):
        return False
    counts = weights.sum(1).unique(return_counts=True)[1]
    return bool((weights == weights.round()).all()) or bool((counts == counts[0]).all() and counts[0] > 1)


def _near(number: float, *others: float) -> bool:
    return any(abs(number - other) < 2e-5 * other for other in others)
