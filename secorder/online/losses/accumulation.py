"""Gradients of several batches that are added up, each of a loss that is divided by their number, without being told.

Two things are seen: that the loss of a verification batch is divided by a whole number (of batches; of samples,
where it is a sum), and that the gradients of a backward are still there, as it left them, when the next one adds its
own. The first alone may be a mean of several terms, and the second a sum over batches; it is looked for once the first
is seen.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, prod

from torch import Tensor

from ..._torch.graph import Node
from ..._torch.loss_graph import Place
from ..._torch.loss_terms import factors_between
from ...layers.selection import Layer
from ..record import ForwardRecord, Slot, slot
from .powers import Path
from .sizes import as_a_mean

#: What may be rounding in numbers of half precision.
TOLERANCE = 1e-2

_REASON = (
    "the loss is multiplied by {0} before backward, gradients of several backward passes are added up, and loss_scale= "
    "does not say so: pass loss_scale={0} where that makes a mean of all of these, or loss_scale=1 where it is a part "
    "of the loss."
)
_UNKNOWN = (
    "gradients of several backward passes are added up, of losses that the model does not return, so that "
    'loss_scale="returned" does not tell what they are multiplied by: pass loss_scale= with the number, or with a '
    "function that returns it."
)


def one_over(scale: float) -> int:
    """The whole number that a scale is one over, to rounding; one where it is no such fraction."""
    number = round(1 / scale) if 0 < scale < 1 else 1
    return number if abs(scale * number - 1) < TOLERANCE else 1


def fraction(scale: float) -> str:
    """A scale as people write it: ``1/4``, else as a decimal number."""
    number = one_over(scale)
    return f"1/{number}" if number > 1 else f"{scale:.4g}"


@dataclass
class Accumulation:
    """What is seen of it."""

    #: what the loss is multiplied by, of those that are one over a whole number; one where it is none, nan if unknown
    scale: float = 1.0
    #: of a parameter that got a gradient in the latest backward, the number of its layer, its name there, and what was
    #: in ``.grad`` then
    left: tuple[int, str, Slot] | None = None
    reason: str = ""  #: why nothing is told, where it has been seen; else empty

    def see_division(self, roots: Mapping[Place, Tensor], outputs: Collection[Node]) -> None:
        """See what the loss of a backward that begins is divided by; what divides ``outputs`` is the model's affair."""
        scales = {
            prod([float(g), *factors_between(node, outputs)]) if not g.dim() else 1.0 for (node, _), g in roots.items()
        }
        self.scale = 1 / one_over(scales.pop()) if len(scales) == 1 else 1.0

    def see_share(self, paths: Collection[Path], specified: str, samples: int) -> None:
        """See the same within a loss, by what it multiplies its samples' mean, or sum, by, as is specified."""
        of_sum = specified == "sum"
        factors = [as_a_mean(path, samples) / (samples if of_sum else 1) for path in paths]
        # A sum over all numbers that is divided by how many these are is a mean as well.
        whole = [path.scale * (1 if path.mean or of_sum else path.added) for path in paths]
        numbers = [0 if abs(other - 1) < 1e-4 else one_over(x) for x, other in zip(factors, whole, strict=True)]
        if min(numbers, default=0) > (samples if of_sum else 1):
            self.scale = 1 / min(numbers)

    def begins(self, layers: Sequence[Layer]) -> str:
        """A backward begins: why none of the layers is told from now on, where it adds to the gradients of the last."""
        if self.scale == 1.0 or self.left is None or self.reason:
            return ""
        index, name, before = self.left
        parameter = layers[index].parameters.get(name)
        if parameter is not None and parameter.grad is not None and slot(parameter) == before:
            self.reason = _UNKNOWN if isnan(self.scale) else _REASON.format(fraction(self.scale))
        return self.reason

    def ended(self, layers: Sequence[Layer], records: Iterable[ForwardRecord]) -> None:
        """A backward has ended: what it left in ``.grad`` of a parameter."""
        for record in records:
            for index, layer in enumerate(layers):
                for name, p in layer.parameters.items():
                    if record.moved(p):
                        self.left = index, name, slot(p)
                        return
