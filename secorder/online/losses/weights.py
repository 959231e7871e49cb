"""Does a loss weight its samples, as far as its operations tell? Seen in its graph.

A mean over targets with class weights, over those that are not ignored or were selected, or a sum that is divided by
the number of tokens, is L = Σ_n c_n ℓ_n with other c_n than 1/N. What a loss does with masks of its own does not show,
unless the number that it divides by does.

Where each of several forwards has samples of its own, ``reduction="mean"`` is a mean over these: L = Σ_f (1/N_f) Σ_n
ℓ_fn, as of D(real) + D(fake). A loss of outputs that were put together before, such as of a batch that is cut into
chunks, or of the steps of an episode, divides by the number of all samples.

A sum that is told to be a mean, or the other way round, shows where nothing is multiplied that may make it one.
"""

from collections.abc import Collection
from math import prod

import torch

from ..._torch.graph import Node, operation_of, run_node, shape_of
from ..._torch.loss_graph import UnknownNode, pull_back
from ..._torch.loss_terms import (
    divided_by,
    divisor_of_sum,
    is_mean,
    mean_over_targets,
    reduced_alone,
    selected,
    weighted,
)
from .seen import SeenLoss

__all__ = ["MEAN_OF_SEVERAL", "reduced_otherwise", "takes_mean_of_several", "weights_of_loss"]

_WEIGHTED = (
    "the loss weights its samples ({}), which is no mean over them: pass reduction= with a function of the model's "
    "arguments that returns the weights c_n of L = Σ_n c_n ℓ_n, such as secorder.token_weights."
)

#: Operations by constants that are looked at, at most.
MOST_WEIGHTED = 8

_REDUCED = 'the loss is the {0} of its samples\' losses, and was taken to be their {1}: pass reduction="{0}".'

MEAN_OF_SEVERAL = (
    'the loss is one mean over what several forwards returned together, where reduction="mean" is a mean over the '
    'samples of each forward: pass loss_scale=1/k for k forwards of as many samples each, reduction="sum" and '
    "loss_scale=1/n for n samples in all, or loss_scale=1 where it is as specified."
)


def reduced_otherwise(loss: SeenLoss, told: str, num_samples: int) -> str:
    """Why a loss is not the mean, or the sum, of samples' losses that it is told to be; empty where that is not known.

    A loss does not tell that multiplies numbers of samples, or is multiplied by about N: that may make it the other.
    """
    if any(g.dim() or float(g) != 1.0 for g in loss.roots.values()):
        return ""
    seen = reduced_alone(loss.order, num_samples)
    return _REDUCED.format(seen, told) if seen not in ("", told) else ""


def weights_of_loss(loss: SeenLoss, num_samples: int) -> str:
    """How a loss weights the samples of a batch otherwise than alike; empty where that does not show.

    Raises:
        UnknownNode: what is between loss and outputs cannot be looked at.
    """
    means = divided_by(loss.order, num_samples)  # whatever else they are divided by
    sums = {node: found for node in loss.order if (found := divisor_of_sum(node))[1]}
    for node in loss.order:
        mean = mean_over_targets(node)
        if mean is not None and mean.by_class is not None and bool((mean.by_class != mean.by_class[0]).any()):
            return _WEIGHTED.format("class weights in a mean")
        if mean is not None and bool(mean.ignored.any()) and _differ(loss, mean.classes):
            return _WEIGHTED.format("a mean over targets that are not ignored, of which some have more than others")
        divisor, count = (0.0, 0) if node in means else sums.get(node, (0.0, 0))
        number = round(divisor)
        if number < 2 or number == count or abs(divisor - number) > 1e-6 * number:  # or a mean, as others are
            continue
        each, rest = divmod(number, num_samples)
        uneven = not rest and number < count and (2 * count // num_samples) % each  # as of tokens without padding
        if rest or (uneven and _differ(loss, 1)):
            return _WEIGHTED.format(f"a sum that is divided by {number} for {num_samples} samples")
    if _normalised(loss, num_samples, sums.values()):
        return _WEIGHTED.format("weights that add up to one")
    number = _unequal_shares(loss, num_samples, sums.values())
    return _WEIGHTED.format(f"a mean of {number} that were selected for {num_samples} samples") if number else ""


def _normalised(loss: SeenLoss, num_samples: int, sums: Collection[tuple[float, int]]) -> bool:
    """Whether numbers of samples are added with weights that differ and add up to one, as that of one sample is.

    In a mean over samples, what differs is a part of each one's loss, such as an advantage.

    Args:
        sums: what sums are divided by, and how many numbers they have.
    """
    if any(is_mean(node) and shape_of(node, 0)[:1] != (num_samples,) for node in loss.order) or any(
        abs(divisor - round(divisor)) < 1e-6 * divisor and not round(divisor) % num_samples for divisor, _ in sums
    ):
        return False
    found = [(node, index) for node in loss.order if (index := weighted(node)) is not None]
    for node, index in found[:MOST_WEIGHTED]:
        shape = shape_of(*node.next_functions[index])
        if num_samples not in (shape[0], prod(shape)):
            continue
        try:
            with torch.no_grad():
                g = pull_back(loss.roots, {(node, 0)})[node, 0]
                weights = run_node(node, [g], index).reshape(num_samples, -1).sum(1).double()
        except UnknownNode:
            continue
        if abs(float(weights.sum().abs()) - 1) < 1e-4 and float(weights.max() - weights.min()) > 1e-3 / num_samples:
            return True
    return False


def _unequal_shares(loss: SeenLoss, num_samples: int, sums: Collection[tuple[float, int]]) -> int:
    """Of how many selected rows a loss is the mean that cannot be as many of each sample; 0 where it is of none.

    As of tokens that a mask selects, or that are packed: of rows that no dimension of samples is left in.
    """
    ends = [node for node in loss.order if prod(shape_of(node, 0)) == 1 and is_mean(node)]
    counts = [prod(shape_of(*node.next_functions[0])) for node in ends]
    counts += [count for divisor, count in sums if round(divisor) == count]
    for rows, *rest in filter(None, map(selected, loss.order)):
        if rows % num_samples and num_samples not in rest and any(count % rows == 0 for count in counts):
            return rows
    return 0


def _differ(loss: SeenLoss, classes: int) -> bool:
    """Whether samples have different numbers of targets: the gradient on the classes of one that is ignored is zero."""
    with torch.no_grad():
        gradients = loss.gradients()
    counts = [(loss.outputs[place].layout.split(g) != 0).flatten(1).sum(1) for place, g in gradients.items()]
    return any(bool(2 * (own.amax() - own.amin()) >= classes) for own in counts)


def takes_mean_of_several(loss: SeenLoss) -> bool:
    """Whether a loss puts outputs of several groups into one tensor, and takes a mean of that."""
    groups: dict[Node, set[int]] = {}
    together: set[Node] = set()
    for node in reversed(loss.order):
        before = [place for place in node.next_functions if place[0] is not None]
        own = [{loss.outputs[x].group} if x in loss.outputs else groups.get(x[0], set()) for x in before]
        groups[node] = set().union(*own)
        joined = operation_of(node) in ("Cat", "Stack") and len(groups[node]) > 1
        # Numbers that are put together are means already, unless each forward holds one sample.
        samples = max((loss.groups[group] for group in groups[node]), default=0)
        if joined and (samples == 1 or any(prod(shape_of(*x)) > 1 for x in before)):
            together.add(node)
        elif any(x in together for x, _ in before):
            if prod(shape_of(node, 0)) == 1 and is_mean(node):
                return True
            together.add(node)
    return False
