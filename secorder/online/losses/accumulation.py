"""Gradients of several batches that are added up, each of a loss that is divided by their number, without being told.

Two things are seen: that the loss of a batch that is looked at is divided by a whole number before backward, and that
the gradients of a backward are still there, as it left them, when the next one adds its own. The first alone may be a
mean of several terms, and the second a sum over batches.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from ..._torch.graph import Node
from ..._torch.loss_graph import Place
from ..._torch.loss_terms import factors_between
from ..record import ForwardRecord, Slot, slot
from .scale import fraction, one_over

if TYPE_CHECKING:
    from ..fisher import OnlineFisher

_REASON = (
    "the loss is multiplied by {0} before backward, gradients of several backward passes are added up, and loss_scale= "
    "is not specified: pass loss_scale={0} where that makes a mean of as many batches, or loss_scale=1 where it is a "
    "part of the loss."
)


@dataclass
class Accumulation:
    """What is seen of it."""

    #: what the loss is multiplied by, of those that are one over a whole number; one where it is none
    scale: float = 1.0
    #: of a parameter that got a gradient in the latest backward, the number of its layer, its name there, and what was
    #: in ``.grad`` then
    left: tuple[int, str, Slot] | None = None
    reason: str = ""  #: why nothing is told, where it has been seen; else empty


def tell_division(fisher: "OnlineFisher", roots: Mapping[Place, Tensor], outputs: Collection[Node]) -> None:
    """See what the loss of a backward that begins is divided by, where nothing is told of its scale.

    What divides the model's ``outputs`` is the model's affair.
    """
    scales = {
        prod([float(g), *factors_between(node, outputs)]) if not g.dim() else 1.0 for (node, _), g in roots.items()
    }
    fisher.accumulation.scale = 1 / one_over(scales.pop()) if len(scales) == 1 else 1.0


def tell_accumulation(fisher: "OnlineFisher") -> None:
    """A backward begins: mark all layers where it adds to the gradients of the one before, of a loss so divided."""
    seen = fisher.accumulation
    if seen.scale == 1.0 or seen.left is None or seen.reason or fisher.returned is not None:
        return
    index, name, before = seen.left
    parameter = fisher.layers[index].parameters.get(name)
    if parameter is not None and parameter.grad is not None and slot(parameter) == before:
        seen.reason = _REASON.format(fraction(seen.scale))
        fisher.troubles.mark(fisher.sums, seen.reason)


def note_gradients(fisher: "OnlineFisher", records: Iterable[ForwardRecord]) -> None:
    """A backward has ended: what it left in ``.grad`` of a parameter."""
    if fisher.returned is not None:
        return
    for record in records:
        for index, layer in enumerate(fisher.layers):
            for name, p in layer.parameters.items():
                if record.moved(p):
                    fisher.accumulation.left = index, name, slot(p)
                    return
