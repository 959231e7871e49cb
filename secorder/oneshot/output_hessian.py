"""The loss as a function of the model's output: its Hessian there, sample by sample, and the roots of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch.failures import is_missing_graph
from .._torch.pytree import map_tensors
from .._torch.vjp import chunks, default_chunk_size, stacked_vjp
from ..layers.layout import DIM_ZERO
from .independence import block_diagonal

__all__ = [
    "Dimensions",
    "Pairs",
    "expose_output",
    "known_roots",
    "loss_of_output",
    "loss_separates",
    "output_hessian",
    "signed_roots",
]

#: Tells which dimension of an output tensor holds the samples.
Dimensions = Callable[[Tensor], int | None]


def loss_separates(gradients: Sequence[Tensor | None], points: Sequence[Tensor], generator: torch.Generator) -> bool:
    """Whether a loss of outputs ``points`` (samples in dim 0) is a sum over samples, to second order."""
    return block_diagonal(gradients, points, [DIM_ZERO] * len(points), generator)


def loss_of_output(
    loss_fn: Callable[[Any, Any], Tensor], output: Any, targets: Any, dims: Dimensions | None, loss: Tensor
) -> tuple[Tensor, list[Tensor], Any] | None:
    """The loss once more, on leaves that stand for the model's output; these leaves, and the output made of them.

    Args:
        loss_fn: the loss.
        output: the model's output.
        targets: what the loss takes second.
        dims: where an output tensor's samples are (see :func:`expose_output`).
        loss: its value on ``output``.

    Returns:
        None where the loss does not go by the output alone: it cannot be computed there (it differentiates the model,
        say), has another value (it draws random numbers), or does not depend on the leaves at all.
    """
    points: list[Tensor] = []
    exposed = expose_output(output, points, dims, detach=True)
    try:
        again = loss_fn(exposed, targets)
    except RuntimeError as error:
        if not is_missing_graph(error):
            raise
        return None
    if not again.requires_grad or not torch.equal(again.detach().reshape(()), loss.detach()):
        return None
    return again.reshape(()), points, exposed


@dataclass
class Pairs:
    """K pairs of cotangents on the model's output, sample by sample.

    Attributes:
        u: shape ``(K, N, C)``, C the elements of one sample's output (all output tensors together).
        v: the same; None means ``u`` times ``sign``.
        sign: shape ``(K, N)``; None means one.
    """

    u: Tensor
    v: Tensor | None = None
    sign: Tensor | None = None


def signed_roots(gradients: Sequence[Tensor | None], points: Sequence[Tensor], chunk_size: int | None = None) -> Pairs:
    """Signed square root of a per-sample Hessian as pairs: H_n = Σ_c sign[c, n] u[c, n] u[c, n]ᵀ.

    Args:
        gradients: of a loss that does not couple samples, with respect to ``points``, differentiable.
        points: tensors with samples in dim 0; C elements of one sample in all.
        chunk_size: products batched at most.

    Returns:
        at most C pairs; columns that vanish for every sample are left out.
    """
    hessian = output_hessian(gradients, points, chunk_size).detach().double()
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    size = values.abs()
    size[size <= torch.finfo(torch.float64).eps * size.amax()] = 0  # rounding of a singular matrix
    columns = (vectors * size.sqrt()[:, None]).permute(2, 0, 1)
    keep = (size > 0).any(0)
    keep[-1] = True  # never none, so that a loss without curvature needs no case of its own
    sign = torch.where(size > 0, values.sign(), 1.0).T[keep].to(points[0].dtype)
    return Pairs(columns[keep].to(points[0].dtype), None, None if bool((sign >= 0).all()) else sign)


def known_roots(gradients: Sequence[Tensor | None], points: Sequence[Tensor]) -> Pairs | None:
    """The roots of cross entropy's Hessian, ``√(c p_k) (e_k − p)``, or of a quadratic's, ``√c e_k``, where they fit.

    A guess from the outputs alone, which holds if the product of the Hessian with a random vector is that of the guess,
    to rounding: a loss with another Hessian, such as one that couples samples, passes with probability zero, but for
    differences below rounding.
    """
    if len(points) != 1 or points[0].dim() != 2:
        return None
    f = points[0].detach()
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(f.shape, generator=generator, dtype=torch.float32).to(f)
    product = stacked_vjp(gradients, points, [r[None]])[0][0].detach()
    p = f.softmax(1)
    centred = p * (r - (p * r).sum(1, keepdim=True))
    for shape in (centred, r):
        scale = (product * shape).sum(1) / (shape * shape).sum(1).clamp(min=torch.finfo(f.dtype).tiny)
        bound = 64 * torch.finfo(f.dtype).eps * product.abs().amax()
        if bool((scale < 0).any()) or bool(((product - scale[:, None] * shape).abs() > bound).any()):
            continue
        eye = torch.eye(f.shape[1]).to(f)
        if shape is r:
            return Pairs(scale.sqrt()[None, :, None] * eye[:, None])
        return Pairs((scale[:, None] * p).sqrt().T[..., None] * (eye[:, None] - p))
    return None


def output_hessian(
    gradients: Sequence[Tensor | None],
    points: Sequence[Tensor],
    chunk_size: int | None = None,
    *,
    create_graph: bool = False,
) -> Tensor:
    """The loss's Hessian in the outputs, sample by sample, shape ``(N, C, C)``."""
    count = points[0].shape[0]
    sizes = [x[0].numel() for x in points]
    total = sum(sizes)
    rows = []
    for ids in chunks(total, default_chunk_size(count * total, points[0], chunk_size)):
        basis = points[0].new_zeros(len(ids), total)
        basis[range(len(ids)), list(ids)] = 1
        vectors = [
            part[:, None].expand(-1, count, -1).reshape(-1, *x.shape)
            for part, x in zip(basis.split(sizes, 1), points, strict=True)
        ]
        products = stacked_vjp(gradients, points, vectors, create_graph=create_graph)
        rows.append(torch.cat([u.reshape(len(ids), count, -1) for u in products], 2))
    return torch.cat(rows).permute(1, 0, 2)


def expose_output(output: Any, points: list[Tensor], dims: Dimensions | None, *, detach: bool) -> Any:
    """The model's output, made of new points with samples in dim 0, which are entered in ``points``.

    Args:
        output: tensors in any structure; those that are differentiable are replaced.
        points: receives the points: with ``detach`` leaves of equal value, else views of the tensors.
        dims: where a tensor's samples are; None makes the whole output one sample, points of shape ``(1, numel)``.
        detach: cut the points off the model.
    """

    def replace(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        dim = None if dims is None else dims(tensor)
        point = tensor.reshape(1, -1) if dim is None else tensor.movedim(dim, 0)
        points.append(point.detach().clone().requires_grad_(True) if detach else point)
        return points[-1].view(tensor.shape) if dim is None else points[-1].movedim(0, dim)

    return map_tensors(replace, output)
