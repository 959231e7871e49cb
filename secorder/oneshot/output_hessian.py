"""The loss as a function of the model's output, and its Hessian there, sample by sample."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch.failures import is_missing_graph
from .._torch.pytree import map_tensors
from .._torch.vjp import chunks, default_chunk_size, split_like, stacked_vjp

#: Tells which dimension of an output tensor holds the samples.
Dimensions = Callable[[Tensor], int | None]


def loss_of_output(
    loss_fn: Callable[[Any, Any], Tensor], output: Any, targets: Any, dims: Dimensions | None, loss: Tensor
) -> tuple[Tensor, list[Tensor], Any] | None:
    """The loss once more, on leaves that stand for the model's output; these leaves, and the output made of them.

    None where the loss does not go by the output alone: it cannot be computed there (it differentiates the model, say),
    has another value (it draws random numbers), or does not depend on the leaves at all.
    """
    exposed, points = expose_output(output, dims, detach=True)
    try:
        again = loss_fn(exposed, targets)
    except RuntimeError as error:
        if not is_missing_graph(error):
            raise
        return None
    except (TypeError, AttributeError) as error:  # the derivative that is not there is None
        if "None" not in str(error):
            raise
        return None
    if not again.requires_grad or not torch.equal(again.detach().reshape(()), loss.detach()):
        return None
    return again.reshape(()), points, exposed


def as_samples(tensor: Tensor) -> Tensor:
    """One row a sample of a tensor that has them in dim 0, also where it has no elements."""
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))


def filled(gradients: Sequence[Tensor | None], points: Sequence[Tensor]) -> list[Tensor]:
    """Zeros where there is no gradient."""
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, points, strict=True)]


def output_hessian(gradients: Sequence[Tensor | None], points: Sequence[Tensor], chunk_size: int | None) -> Tensor:
    """The loss's Hessian in the outputs, sample by sample, differentiable, of shape ``(N, C, C)``."""
    count = points[0].shape[0]
    total = sum(x[0].numel() for x in points)
    rows = []
    for ids in chunks(total, default_chunk_size(count * total, points[0], chunk_size)):
        basis = points[0].new_zeros(len(ids), total)
        basis[range(len(ids)), list(ids)] = 1
        vectors = split_like(basis[:, None].expand(-1, count, -1), points)
        products = stacked_vjp(gradients, points, vectors, create_graph=True)
        rows.append(torch.cat([u.reshape(len(ids), count, math.prod(u.shape[2:])) for u in products], 2))
    return torch.cat(rows).permute(1, 0, 2)


def expose_output(output: Any, dims: Dimensions | None, *, detach: bool) -> tuple[Any, list[Tensor]]:
    """The model's output, made of new points with samples in dim 0, and these.

    Real ones of complex tensors; with ``detach`` leaves of equal value in the same memory, else views. Without ``dims``
    the whole output is one sample, points of shape ``(1, numel)``.
    """
    points: list[Tensor] = []

    def replace(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        dim = None if dims is None else dims(tensor)
        real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        point = real.reshape(1, -1) if dim is None else real.movedim(dim, 0) if dim else real
        points.append(point.detach().requires_grad_(True) if detach else point)  # of the output's own memory
        result = points[-1].view(real.shape) if dim is None else points[-1].movedim(0, dim) if dim else points[-1]
        return torch.view_as_complex(result.contiguous()) if tensor.is_complex() else result

    return map_tensors(replace, output), points


def output_points(output: Any, dims: Dimensions | None) -> list[Tensor]:
    """The points of :func:`expose_output` that are on the model's graph."""
    return expose_output(output, dims, detach=False)[1]
