"""Unbiased estimates from random signs on the parameters: for any layer."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from ..._torch.vjp import stacked_vjp
from ...errors import AttributionError
from ...layers.dtypes import compute_dtype, zeros
from ...layers.selection import Layer
from ...results import Strategy
from ..independence import linear_products
from ..measurement import Measurement
from .budget import Budget
from .estimate import Estimate, average
from .output_draws import Reduce, reduced
from .output_draws import products as products  # one for each draw, here too
from .parameter_basis import applies as applies  # everywhere

NAME = Strategy.PARAMETER_DRAWS


def run(
    task: Measurement,
    layer: Layer,
    output_gradients: Sequence[Tensor | None],
    budget: Budget,
    elements: int,
    advance: Callable[[int], None],
    reduce: Reduce,
    seconds: float = math.inf,
) -> Estimate:
    """An estimate, of the loss's gradient in the replacement parameters, all uses of them counted.

    Raises :class:`AttributionError` where products are not linear in the vector: no mean of draws is the diagonal.
    """
    replacements = task.isolated.replacements(layer)
    if not (task.certain or linear_products(output_gradients, replacements, task.generator, together=True)):
        raise AttributionError(
            f"products with the Hessian of layer {layer.name!r} are not linear in the vector (by a hook that clamps "
            "gradients, a custom autograd.Function), so that no mean of draws is its diagonal: remove it; "
            'method="exact" takes it as it is.'
        )
    kind = compute_dtype(layer)

    def draw(count: int) -> list[Tensor]:
        vectors = task.signs(count, replacements)
        found = stacked_vjp(output_gradients, replacements, vectors)
        return reduce([(u * v).reshape(len(u), -1).to(kind) for u, v in zip(found, vectors, strict=True)])

    size = task.products_at_once(elements, replacements[0])
    return average(draw, reduced(reduce, zeros(layer)), budget, size, advance, seconds=seconds)
