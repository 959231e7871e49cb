"""Does a loss weight its samples, as far as its operations tell? Seen in its graph.

A mean over targets with class weights, over those that are not ignored, or a sum that is divided by the number of
tokens, is L = Σ_n c_n ℓ_n with other c_n than 1/N. What a loss does with masks of its own does not show, unless the
number that it divides by does.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..._torch.graph import Node
from ..._torch.loss_graph import Place, divisor_of_sum, mean_over_targets, pull_back
from .choices import HasLayout

__all__ = ["weights_of_loss"]

_WEIGHTED = (
    "the loss weights its samples ({}), which is no mean over them: pass reduction= with a function of the model's "
    "arguments that returns the weights c_n of L = Σ_n c_n ℓ_n, such as secorder.token_weights."
)


def weights_of_loss(
    order: Sequence[Node], roots: Mapping[Place, Tensor], outputs: Mapping[Place, HasLayout], num_samples: int
) -> str:
    """How a loss weights the samples of a batch otherwise than alike; empty where that does not show.

    Args:
        order: the nodes between the loss and the outputs.
        roots: the gradients that the backward pass begins with.
        outputs: of the model, by where the graph has them.
        num_samples: of the batch.

    Raises:
        UnknownNode: what is between them cannot be looked at.
    """
    for node in order:
        mean = mean_over_targets(node)
        if mean is not None and mean.by_class is not None and bool((mean.by_class != mean.by_class[0]).any()):
            return _WEIGHTED.format("class weights in a mean")
        if mean is not None and bool(mean.ignored.any()) and _differ(order, roots, outputs, mean.classes):
            return _WEIGHTED.format("a mean over targets that are not ignored, of which some have more than others")
        divisor, count = divisor_of_sum(node)
        number = round(divisor)
        if number < 2 or abs(divisor - number) > 1e-6 * number:
            continue
        each, rest = divmod(number, num_samples)
        uneven = not rest and number < count and (2 * count // num_samples) % each  # as of tokens without padding
        if rest or (uneven and _differ(order, roots, outputs, 1)):
            return _WEIGHTED.format(f"a sum that is divided by {number} for {num_samples} samples")
    return ""


def _differ(
    order: Sequence[Node], roots: Mapping[Place, Tensor], outputs: Mapping[Place, HasLayout], classes: int
) -> bool:
    """Whether samples have different numbers of targets: the gradient on the classes of one that is ignored is zero."""
    with torch.no_grad():
        gradients = pull_back(order, roots, outputs)
    counts = [(outputs[place].layout.split(g) != 0).flatten(1).sum(1) for place, g in gradients.items()]
    return any(bool(2 * (own.amax() - own.amin()) >= classes) for own in counts)
