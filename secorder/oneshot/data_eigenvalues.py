"""Extreme eigenvalues of a data set's blocks: those of the mean, and not the mean of those of batches."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import NO_BATCH, batch_size
from ..errors import InvalidArgumentError
from ..monitor.progress import progress_bar
from .data_set import batches_of
from .eigenvalues import Eigenvalues, Ends, lanczos_steps, nothing, restricted, start_of
from .hessian.on_parameters import on_parameters
from .loss_reduction import Kind, LossReduction
from .measurement import Measurement
from .operators import Blocks, By, Curvature, ProductOnParameters, blocks_of, operators

#: Runs work on a batch.
Measure = Callable[[Callable[[Measurement], Any], Any, Any], Any]


def eigenvalues_of_data(
    measure: Measure,
    model: nn.Module,
    sample_dim: int,
    told: Kind | None,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    *,
    ends: Ends,
    of: Curvature,
    by: By,
    progress: bool,
) -> dict[str, Eigenvalues]:
    """Largest and smallest eigenvalues of each block of the whole data set; ``measure`` runs work on a batch.

    ``told`` is the loss's reduction, where it was given.

    All blocks go through the data together, once for each product: a forward and a gradient of each batch for all of
    them, and a product for each. What can be iterated over only once is kept in memory.
    """
    data = list(batches_of(data, sample_dim)) if isinstance(data, Iterator) else data
    reduction = LossReduction(model, loss_fn, sample_dim, told, None if of == "hessian" else "mean")
    sizes, first = [], None
    for x, t in batches_of(data, sample_dim):
        sizes.append(batch_size(x, t, sample_dim))
        first = first or (x, t)
        reduction.add_batch(x, t, sizes[-1])
    if first is None:
        raise InvalidArgumentError(NO_BATCH)
    reduction.require()
    weights = [1.0 if reduction.summed else n / sum(sizes) for n in sizes]
    layers, starts = measure(lambda task: (task.layers, _starts(task, by)), *first)
    steps = {
        name: lanczos_steps(start, replace(ends, max_iterations=min(ends.max_iterations, len(start))))
        for name, start in starts.items()
    }
    waiting = {name: next(step) for name, step in steps.items() if len(starts[name])}
    found: dict[str, Eigenvalues] = {}
    with progress_bar(progress, "Eigenvalues", ends.max_iterations, unit="passes") as advance:
        while waiting:
            totals = {name: torch.zeros_like(v) for name, v in waiting.items()}
            for (x, t), weight in zip(batches_of(data, sample_dim), weights, strict=True):
                products = measure(lambda task: _products(task, of, by, waiting), x, t)
                for name, product in products.items():
                    totals[name] += weight * product
            for name, total in totals.items():
                try:
                    waiting[name] = steps[name].send(total)
                except StopIteration as done:
                    found[name] = done.value
                    del waiting[name]
            advance(1)
    names = [name for layer in layers for name in blocks_of(layer, by)]
    return {name: found.get(name) or nothing(ends.count, ends.which) for name in names}


def _starts(task: Measurement, by: By) -> dict[str, Tensor]:
    """A random vector for each block."""
    blocks = [(layer, *block) for layer in task.layers for block in blocks_of(layer, by).items()]
    return {name: start_of(task, layer, None, block) for layer, name, block in blocks}


def _products(task: Measurement, of: Curvature, by: By, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each block of one batch with its vector; those of blocks that are zero are missing."""
    found = {}
    # Operators that need no checks of the batch, where there are such.
    with closing(operators(task, of) if of != "hessian" else _on_parameters(task)) as blocks:
        for layer, product in blocks:
            total = sum(layer.sizes())
            for name, block in blocks_of(layer, by).items():
                if name in vectors and product is not None:
                    own = product if len(vectors[name]) == total else restricted(product, block, total)
                    found[name] = own(vectors[name])
    return found


def _on_parameters(task: Measurement) -> Blocks:
    for layer, own in on_parameters(task, task.layers):
        yield layer, ProductOnParameters.of(task, layer, own)
