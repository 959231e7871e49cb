"""Exact diagonals by the basis of the parameters: for any layer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._torch.vjp import chunks, split_like, stacked_vjp
from ...layers.dtypes import compute_dtype
from ...layers.selection import Layer
from ...results import Strategy
from ..measurement import Measurement
from .budget import Budget
from .facts import Facts

NAME = Strategy.PARAMETER_BASIS


def applies(facts: Facts) -> bool:
    """Everywhere."""
    return True


def products(facts: Facts, budget: Budget) -> int:
    """One for each element of the parameters."""
    return facts.numel


def seconds(facts: Facts) -> float:
    """What a product takes; 0 where none was timed."""
    return facts.seconds_on_parameters


def run(
    task: Measurement,
    layer: Layer,
    output_gradients: Sequence[Tensor | None],
    elements: int,
    advance: Callable[[int], None],
    limit: int | None = None,
) -> list[Tensor]:
    """The diagonal, by parameter, of the loss's gradient in the replacement parameters, all uses of them counted.

    With ``limit`` so many products only, to see how long they last: the diagonal is not whole then.
    """
    replacements = task.isolated.replacements(layer)
    kind = compute_dtype(layer)
    sizes = [s.numel() for s in replacements]
    diagonal = []
    for ids in chunks(min(sum(sizes), limit or sum(sizes)), task.products_at_once(elements, replacements[0])):
        flat = replacements[0].new_zeros(len(ids), sum(sizes))
        flat[range(len(ids)), list(ids)] = 1
        vectors = split_like(flat, replacements)
        found = stacked_vjp(output_gradients, replacements, vectors, create_graph=task.create_graph)
        joined = torch.cat([u.reshape(len(u), -1).to(kind) for u in found], 1)
        diagonal.append(joined[range(len(ids)), list(ids)])
        del flat, vectors, found, joined  # before there are the next
        advance(len(ids))
    return [torch.cat(diagonal)] if limit else list(torch.cat(diagonal).split(sizes))
