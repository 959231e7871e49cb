"""Does a loss take one mean over what several forwards returned?

Where each forward has samples of its own, ``reduction="mean"`` is a mean over these: L = Σ_f (1/N_f) Σ_n ℓ_fn, as of
D(real) + D(fake). A loss of outputs that were put together before, such as of a batch that is cut into chunks, or of
the steps of an episode, divides by the number of all samples.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Protocol

from ..._torch.graph import Node, operation_of, shape_of
from ..._torch.loss_graph import MEAN, Place

__all__ = ["MEAN_OF_SEVERAL", "takes_mean_of_several"]

MEAN_OF_SEVERAL = (
    'the loss is one mean over what several forwards returned together, where reduction="mean" is a mean over the '
    'samples of each forward: pass loss_scale=1/k for k forwards of as many samples each, reduction="sum" and '
    "loss_scale=1/n for n samples in all, or loss_scale=1 where it is as told."
)


class HasGroup(Protocol):
    """An output of the model."""

    @property
    def num_samples(self) -> int:
        """How many it holds."""

    @property
    def group(self) -> int:
        """The same number for outputs whose row n is one sample."""


def takes_mean_of_several(order: Sequence[Node], outputs: Mapping[Place, HasGroup]) -> bool:
    """Whether a loss puts outputs of several groups into one tensor, and takes a mean of that.

    Args:
        order: the nodes between the loss and the outputs, the loss first.
        outputs: of the model, by where the graph has them.
    """
    groups: dict[Node, set[int]] = {}
    together: set[Node] = set()
    for node in reversed(order):
        before = [place for place in node.next_functions if place[0] is not None]
        own = [{outputs[x].group} if x in outputs else groups.get(x[0], set()) for x in before]
        groups[node] = set().union(*own)
        joined = operation_of(node) in ("Cat", "Stack") and len(groups[node]) > 1
        # Numbers that are put together are means already, unless each forward holds one sample.
        samples = max((x.num_samples for x in outputs.values() if x.group in groups[node]), default=0)
        if joined and (samples == 1 or any(prod(shape_of(*x)) > 1 for x in before)):
            together.add(node)
        elif any(x in together for x, _ in before):
            if prod(shape_of(node, 0)) == 1 and _is_mean(node):
                return True
            together.add(node)
    return False


def _is_mean(node: Node) -> bool:
    return operation_of(node) == "Mean" or getattr(node, "_saved_reduction", None) == MEAN
