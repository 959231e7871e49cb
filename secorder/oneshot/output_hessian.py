"""The loss as a function of the model's output: its Hessian there, sample by sample, and the roots of it."""

import math
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
    "as_samples",
    "basis_pairs",
    "diagonal_roots",
    "expose_output",
    "filled",
    "known_roots",
    "loss_of_output",
    "loss_separates",
    "output_hessian",
    "roots",
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
    except (TypeError, AttributeError) as error:  # the derivative that is not there is None
        if "None" not in str(error):
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


def roots(gradients: Sequence[Tensor | None], points: Sequence[Tensor], chunk_size: int | None = None) -> Pairs:
    """Pairs that make a per-sample Hessian: in closed form where one fits, else from the Hessian itself."""
    return (
        known_roots(gradients, points)
        or diagonal_roots(gradients, points)
        or signed_roots(gradients, points, chunk_size)
    )


def signed_roots(gradients: Sequence[Tensor | None], points: Sequence[Tensor], chunk_size: int | None = None) -> Pairs:
    """Signed square root of a per-sample Hessian as pairs: H_n = Σ_c sign[c, n] u[c, n] u[c, n]ᵀ.

    Of the Hessian scaled to a unit diagonal, so that every entry is right to rounding of its own size, whatever the
    sizes of others. Where its diagonal does not bound it (a product of two outputs has a diagonal of zeros), the pairs
    are ``(e_c, H e_c)``.

    Args:
        gradients: of a loss that does not couple samples, with respect to ``points``, differentiable.
        points: tensors with samples in dim 0; C elements of one sample in all.
        chunk_size: products batched at most.

    Returns:
        at most C pairs; columns that vanish for every sample are left out.
    """
    hessian = output_hessian(gradients, points, chunk_size).detach().double()
    hessian = (hessian + hessian.mT) / 2
    scale = hessian.diagonal(dim1=1, dim2=2).abs().sqrt()
    scaled = hessian / scale[:, :, None] / scale[:, None, :]
    scaled = torch.where(hessian == 0, 0.0, scaled)
    if not bool((scaled.abs() <= 4).all()):
        return basis_pairs(hessian.to(points[0].dtype))
    values, vectors = torch.linalg.eigh(scaled)
    size = values.abs()
    size = torch.where(size <= len(values.T) * torch.finfo(torch.float64).eps, 0.0, size)  # of a singular matrix
    columns = (scale[:, :, None] * vectors * size.sqrt()[:, None]).permute(2, 0, 1)
    keep = (size > 0).any(0)
    keep[-1] = True  # never none, so that a loss without curvature needs no case of its own
    sign = torch.where(size > 0, values.sign(), 1.0).T[keep].to(points[0].dtype)
    return Pairs(columns[keep].to(points[0].dtype), None, None if bool((sign >= 0).all()) else sign)


def basis_pairs(hessian: Tensor) -> Pairs:
    """``(e_c, H e_c)`` of a per-sample Hessian (N, C, C): differentiable, and right in every entry."""
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return Pairs(eye[:, None].expand(-1, len(hessian), -1), hessian.permute(1, 0, 2))


def diagonal_roots(gradients: Sequence[Tensor | None], points: Sequence[Tensor]) -> Pairs | None:
    """The roots ``√|d_c| e_c`` of a Hessian that is diagonal, as those of losses element by element are.

    That it is shows in the products with two random vectors, entry by entry to rounding.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    sizes = [x[0].numel() for x in points]

    def product() -> tuple[Tensor, Tensor]:
        vectors = [(0.5 + torch.rand(x.shape, generator=generator, device="cpu")).to(x) for x in points]
        found = stacked_vjp(gradients, points, [v[None] for v in vectors])
        first, second = ([as_samples(t) for t in tensors] for tensors in ([u[0] for u in found], vectors))
        return torch.cat(first, 1).detach(), torch.cat(second, 1)

    (first, r), (second, other) = product(), product()
    diagonal = first / r
    if not bool(((second - diagonal * other).abs() <= 64 * torch.finfo(r.dtype).eps * second.abs()).all()):
        return None
    keep = (diagonal != 0).any(0)
    keep[:1] |= ~keep.any()  # never none
    eye = torch.eye(sum(sizes), dtype=r.dtype, device=r.device)[keep]
    sign = torch.where(diagonal < 0, -1.0, 1.0).to(r.dtype).T[keep]
    u = diagonal.abs().sqrt().T[keep][..., None] * eye[:, None]
    return Pairs(u, None, None if bool((sign >= 0).all()) else sign)


def known_roots(gradients: Sequence[Tensor | None], points: Sequence[Tensor]) -> Pairs | None:
    """The roots of cross entropy's Hessian, ``√(c p_k) (e_k − p)``, or of a quadratic's, ``√c e_k``, where they fit.

    A guess from the outputs alone, which holds if, sample by sample, the product of the Hessian with a random vector is
    that of the guess, to rounding: a loss with another Hessian, such as one that couples samples, passes with
    probability zero, but for differences below rounding.
    """
    if len(points) != 1 or points[0].dim() != 2:
        return None
    f = points[0].detach()
    generator = torch.Generator(device="cpu").manual_seed(0)
    r = torch.randn(f.shape, generator=generator, dtype=torch.float32, device="cpu").to(f)
    product = stacked_vjp(gradients, points, [r[None]])[0][0].detach()
    p = f.softmax(1)
    centred = p * (r - (p * r).sum(1, keepdim=True))
    for shape in (centred, r):
        square = (shape * shape).sum(1)
        scale = torch.where(square > 0, (product * shape).sum(1) / square, torch.zeros_like(square))
        # Where a probability is near one, the products cancel to rounding of c itself.
        bound = 64 * torch.finfo(f.dtype).eps * (product.abs().amax(1, keepdim=True) + scale.abs().median())
        if bool((scale < 0).any()) or bool(((product - scale[:, None] * shape).abs() > bound).any()):
            continue
        eye = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
        if shape is r:
            return Pairs(scale.sqrt()[None, :, None] * eye[:, None])
        return Pairs((scale[:, None] * p).sqrt().T[..., None] * (eye[:, None] - p))
    return None


def as_samples(tensor: Tensor) -> Tensor:
    """One row a sample of a tensor that has them in dim 0, also where it has no elements."""
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))


def filled(gradients: Sequence[Tensor | None], points: Sequence[Tensor]) -> list[Tensor]:
    """Zeros where there is no gradient."""
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, points, strict=True)]


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
        rows.append(torch.cat([u.reshape(len(ids), count, math.prod(u.shape[2:])) for u in products], 2))
    return torch.cat(rows).permute(1, 0, 2)


def expose_output(output: Any, points: list[Tensor], dims: Dimensions | None, *, detach: bool) -> Any:
    """The model's output, made of new points with samples in dim 0, which are entered in ``points``.

    Args:
        output: tensors in any structure; those that are differentiable are replaced.
        points: receives the points, real ones of complex tensors: with ``detach`` leaves of equal value, else views.
        dims: where a tensor's samples are; None makes the whole output one sample, points of shape ``(1, numel)``.
        detach: cut the points off the model.
    """

    def replace(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        dim = None if dims is None else dims(tensor)
        real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        point = real.reshape(1, -1) if dim is None else real.movedim(dim, 0)
        points.append(point.detach().clone().requires_grad_(True) if detach else point)
        result = points[-1].view(real.shape) if dim is None else points[-1].movedim(0, dim)
        return torch.view_as_complex(result.contiguous()) if tensor.is_complex() else result

    return map_tensors(replace, output)
