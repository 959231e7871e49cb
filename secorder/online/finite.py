"""Whether what a batch adds is finite, decided from few numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..layers.patches import Patches
from ..layers.per_sample import PerSample, Rows

#: Numbers that one operation on a stack of them adds up, rather than one for each.
MANY = 8


def total_of(g: Tensor) -> Tensor:
    """The sum of a gradient's elements, which is finite where the squares of all of them are."""
    return g.sum(dtype=torch.promote_types(g.dtype, torch.float32))


def finite(number: Tensor) -> Tensor:
    """Whether it is finite: in a third of the time that ``isfinite`` takes, which looks twice."""
    return (number - number) == 0


def all_finite(numbers: Sequence[Tensor]) -> Tensor:
    """Whether numbers, which may be on several devices, are all finite: by their sum."""
    first, *rest = numbers
    others = [x if x.device == first.device else x.to(first) for x in rest]
    return finite(sum(others, first) if len(others) < MANY else torch.stack([first, *others]).sum())


def witness(part: PerSample, product: Tensor | None) -> Tensor | None:
    """A number that is finite where what multiplies the cotangents is: an infinite input makes nan of a zero of them.

    The audit's ``product`` is one, if it was formed: it has seen all of the input.
    """
    if isinstance(part, Tensor):
        return total_of(part)
    if isinstance(part, Rows) or part.a is None:
        return None
    if isinstance(part.a, Patches):
        return total_of(part.g if part.a.of_cotangents else part.a.image)
    return total_of(part.a) if product is None or product.dtype not in (torch.float32, torch.float64) else product


def largest(values: Tensor) -> Tensor:
    """The largest size among some numbers, which are not copied for it; nan where one is."""
    return torch.maximum(values.amax(), -values.amin())


def not_finite(name: str) -> NonFiniteError:
    """What is raised, if asked for, where the gradient at a layer is not finite."""
    return NonFiniteError(
        f"the gradient at layer {name!r} holds nan or inf: lower the learning rate or the loss scale, or pass "
        'on_nonfinite="skip" to leave such batches out.'
    )
