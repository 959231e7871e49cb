"""The forms that a loss's Hessian in the outputs may have, each held against the Hessian itself.

A form is a guess from the outputs and their shape: that of cross entropy over some dimension, c (diag p − p pᵀ); of a
loss element by element; of blocks that do not interact, such as pairs of a mean and a variance, or positions. A guess
stands where the product with a random vector is that of the guess, to rounding, in every entry. So it does not matter
how the loss was written, and a loss with another Hessian passes with probability zero, but for differences below
rounding.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._torch.vjp import chunks, default_chunk_size
from .independence import sample_bits
from .roots import Map, Root

#: Products of the loss's Hessian with vectors (M, N, K).
Product = Callable[[Tensor], Tensor]

#: Bytes that the blocks of a Hessian, and what is computed from them, may take.
MAX_BLOCK_BYTES = 1 << 27

#: The largest block that is factored.
MAX_BLOCK = 512

#: Classes up to which a softmax has one column fewer than classes: of many, one matters little, and running sums lose
#: digits.
FEW_CLASSES = 64


def form_root(product: Product, f: Tensor, num_tensors: int, chunk_size: int | None = None) -> Root:
    """A root by the first form that fits; the pairs ``(e_k, H e_k)`` where none does.

    The product is with the Hessian, on vectors of the elements of one sample in one row; the outputs f, samples in dim
    0, none of them without curvature, are of so many tensors of one shape, or ``(N, K)`` and 1 where shapes differ.
    """
    found = softmax_root(product, f) if num_tensors == 1 else None
    if found is not None:
        return found
    for order in _orders(f, num_tensors):
        blocks = _blocks(product, f, order, chunk_size)
        if blocks is not None:
            return _block_root(blocks, order, f.flatten(1))
    size = f[0].numel()
    return Root(lambda xi: xi.expand(-1, len(f), -1), size, f.flatten(1), lambda xi: product(xi.expand(-1, len(f), -1)))


# ---- cross entropy


def softmax_root(product: Product, f: Tensor, dim: int | None = None) -> Root | None:
    """The root of c (diag p − p pᵀ), p the softmax over one dimension, c a number for each position.

    Of outputs with samples in dim 0; without a dimension each is tried, and all together.
    """
    flat = f.flatten(1)
    found = product(_random(flat)[None])[0]
    dims = [d for d in (1, *range(f.dim() - 1, 1, -1)) if f.dim() > 1 and f.shape[d] > 1]
    shapes = [(1, math.prod(f.shape[1:d]), f.shape[d], math.prod(f.shape[d + 1 :])) for d in dims]
    if dim is not None:
        shapes = [shape for d, shape in zip(dims, shapes, strict=True) if d == dim]
    elif len(dims) > 1:
        shapes.append((1, 1, flat.shape[1], 1))
    for _, before, classes, after in shapes:
        shape = (len(f), before, classes, after)
        p = flat.view(shape).softmax(2)
        scale = _scale_of_softmax(p, _random(flat).view(shape), found.view(shape))  # drawn again: as large as f
        if scale is not None:
            return _root_of_softmax(p, scale, flat)
    return None


def cross_entropy_root(f: Tensor, scale: float) -> Root:
    """The root of c (diag p − p pᵀ), p the softmax over dim 1, c the scale at each position, by definition."""
    flat = f.flatten(1)
    p = flat.view(len(f), 1, f.shape[1], -1).softmax(2)
    return _root_of_softmax(p, torch.full_like(p[:, :, :1], scale), flat)


def _scale_of_softmax(p: Tensor, r: Tensor, product: Tensor) -> Tensor | None:
    """c of each position, shape (N, before, 1, after), where the product is c p ⊙ (r − ⟨p, r⟩); else None.

    In place of r, which is forgotten: outputs may be wide.
    """
    centred = r.sub_((p * r).sum(2, keepdim=True)).mul_(p)
    square = (centred * centred).sum(2, keepdim=True)
    # Of a probability near one, differences cancel to rounding: c is told by the others, however small.
    others = centred.masked_fill(p > 0.5, 0)
    largest = others.abs().amax(2, keepdim=True)
    others.div_(largest)
    size = (others * others).sum(2, keepdim=True)
    scale = others.mul_(product / largest).sum(2, keepdim=True) / size
    del others
    scale = scale.masked_fill(largest == 0, 0)
    # And where rounding is more than a product, it is that of other positions.
    eps = torch.finfo(p.dtype).eps
    size, known = scale.abs(), (square > (1e4 * eps) ** 2) & (scale != 0)
    usual = size[known].median() if bool(known.any()) else size.amax()
    size = torch.where(known, size, size.clamp(min=usual))
    bound = min(64 * eps, 1 / 16) * (product.abs().amax(2, keepdim=True) + size)
    wrong = centred.mul_(scale).sub_(product).abs_() > bound
    return None if bool(wrong.any()) else scale


def _root_of_softmax(p: Tensor, scale: Tensor, flat: Tensor) -> Root:
    """By a column for each class, or by one fewer where that is worth it."""
    _, before, classes, after = p.shape
    fewer = classes <= FEW_CLASSES and p.dtype in (torch.float32, torch.float64)
    number = classes - 1 if fewer else classes
    places = torch.arange(before * after, device=p.device).view(before, 1, after).expand(-1, classes, -1)
    sign = None
    if bool((scale < 0).any()):
        sign = torch.where(scale < 0, -1.0, 1.0).to(p.dtype).expand(-1, -1, number, -1).flatten(1)
    left, weights = (_cholesky_factor if fewer else _centred_columns)(p, scale.abs())
    diagonal = (p - p * p).mul_(scale).flatten(1)
    return Root(left, before * number * after, flat, None, sign, diagonal, places.flatten(), weights)


def _centred_columns(p: Tensor, scale: Tensor) -> tuple[Map, Callable[[], Tensor]]:
    """``√(c p_k) (e_k − p)``, and their ``‖u_k‖²``; c positive."""
    weight = scale.sqrt()

    def left(coefficients: Tensor) -> Tensor:
        xi = coefficients.unflatten(2, p.shape[1:]) * p.sqrt()
        if xi.shape[1] != len(p):
            xi = xi.expand(-1, len(p), -1, -1, -1)
        result: Tensor = (xi - p * xi.sum(3, keepdim=True)).mul_(weight).flatten(2)
        return result

    def weights() -> Tensor:
        square = (p * p).sum(2, keepdim=True)
        return (scale * p * (1 - 2 * p + square)).flatten(1)

    return left, weights


def _cholesky_factor(p: Tensor, scale: Tensor) -> tuple[Map, Callable[[], Tensor]]:
    """The Cholesky factor of ``c (diag p − p pᵀ)``, of rank one less than there are classes.

    With ``q_k = Σ_{i ≥ k} p_i``: on the diagonal ``√(p_k q_{k+1} / q_k)``, below it ``−p_i √(p_k / (q_k q_{k+1}))``.
    Every entry is a product of positive numbers, and right to rounding of its own size.

    Source: Tanabe, Sagae (1992), "An exact Cholesky decomposition and the generalized inverse of the
    variance-covariance matrix of the multinomial distribution", Journal of the Royal Statistical Society B 54.
    """
    weight = scale.sqrt()
    rest = p.flip(2).cumsum(2).flip(2)
    own, rest = (p / rest)[:, :, :-1].sqrt(), rest[:, :, 1:].sqrt()
    own = own.nan_to_num_(0.0)  # where it, and what comes after, is zero
    beside, below = own * rest, (own / rest).masked_fill_(rest == 0, 0.0)

    def left(coefficients: Tensor) -> Tensor:
        xi = coefficients.unflatten(2, own.shape[1:])
        result = p.new_zeros(len(xi), *p.shape)
        result[:, :, :, :-1] = xi * beside
        result[:, :, :, 1:] -= (xi * below).cumsum_(3) * p[:, :, 1:]
        return result.mul_(weight).flatten(2)

    def weights() -> Tensor:
        size = (p * p).flip(2).cumsum(2).flip(2)[:, :, 1:].sqrt()
        return (scale * (beside.square() + (below * size).square())).flatten(1)

    return left, weights


# ---- blocks


def _orders(f: Tensor, num_tensors: int) -> Iterator[Tensor]:
    """Arrangements of one sample's elements in blocks (B, s) that may not interact, small ones first."""
    size = f[0].numel()
    ids = torch.arange(size, device=f.device).view(f.shape[1:])
    yield ids.reshape(-1, 1)
    if num_tensors > 1:
        yield ids.view(num_tensors, -1).T
    elif f.dim() > 1:
        for d in range(ids.dim()):  # a mean and a variance for each element, as halves of a dimension or in turn
            if ids.shape[d] % 2 == 0 and ids.shape[d] > 2:
                for pair in ((2, -1), (-1, 2)):
                    yield ids.unflatten(d, pair).movedim(d + (pair[0] != 2), -1).reshape(-1, 2)
        by_dim = [ids.movedim(d, -1).reshape(-1, ids.shape[d]) for d in range(ids.dim()) if 1 < ids.shape[d] < size]
        yield from sorted(by_dim, key=lambda order: order.shape[1])
    yield ids.view(1, -1)


def _blocks(product: Product, f: Tensor, order: Tensor, chunk_size: int | None) -> Tensor | None:
    """The Hessian's blocks (N, B, s, s), or None where it is not made of them, or they are too large."""
    count, (number, width) = len(f), order.shape
    if (32 * count * number * width**2 > MAX_BLOCK_BYTES and width > 2) or width > MAX_BLOCK:
        return None
    flat = f.flatten(1)
    if width == 1:  # in the order of the elements
        return _elements(product, flat)
    half = torch.zeros_like(flat[0], dtype=torch.bool).index_fill_(0, order[::2].flatten(), True)
    if number > 1 and _reaches_others(product, flat, half):  # a look before all columns are paid
        return None
    blocks = flat.new_empty(count, number, width, width)
    for ids in chunks(width, default_chunk_size(3 * flat.numel(), flat, chunk_size)):
        basis = flat.new_zeros(len(ids), flat.shape[1])
        basis[torch.arange(len(ids), device=f.device)[:, None], order.T[ids.start : ids.stop]] = 1
        columns = product(basis[:, None].expand(-1, count, -1))
        blocks[..., ids.start : ids.stop] = columns[..., order].permute(1, 2, 3, 0)
    return blocks if number == 1 or _explained(product, blocks, flat, order) else None


def _explained(product: Product, blocks: Tensor, flat: Tensor, order: Tensor) -> bool:
    """Whether a product with the Hessian is that of its blocks, to rounding; few samples at a time."""
    vectors = _random(flat)
    found = product(vectors[None])[0]
    for ids in chunks(len(flat), default_chunk_size(blocks[0].numel(), flat, None)):
        own, here = blocks[ids.start : ids.stop], slice(ids.start, ids.stop)
        v, u = vectors[here, order], found[here, order]
        size = torch.einsum("nbij,nbj->nbi", own.abs(), v.abs())
        if bool(((u - torch.einsum("nbij,nbj->nbi", own, v)).abs() > _rounding(flat) * size).any()):
            return False
    return True


def _elements(product: Product, flat: Tensor) -> Tensor | None:
    """Blocks of one element; few copies of the outputs at once, which may be wide."""
    diagonal = product(flat.new_ones(1, 1, 1).expand(1, *flat.shape))[0]
    vector = _random(flat)
    found = product(vector[None])[0]
    vector.mul_(diagonal)
    difference = found - vector
    del found
    wrong = bool((difference.abs_() > vector.abs_().mul_(_rounding(flat))).any())
    del difference, vector
    return None if wrong and not _apart(product, flat) else diagonal[:, :, None, None]


def _apart(product: Product, flat: Tensor) -> bool:
    """Whether no element of a sample interacts with another, whatever rounding is in a product.

    The others' entries must be zero exactly, for a random half of the elements, and for those with each bit of the
    index: any two differ in one.
    """
    half = _random(flat[0]) > 0
    return not any(_reaches_others(product, flat, mask) for mask in (half, *sample_bits(flat.shape[1], flat.device)))


def _reaches_others(product: Product, flat: Tensor, mask: Tensor) -> bool:
    """Whether some elements of a sample interact with the others."""
    found = product(_random(flat).mul_(mask)[None])[0]
    return bool((found != 0).logical_and_(~mask).any())


def _rounding(like: Tensor) -> float:
    return min(64 * torch.finfo(like.dtype).eps, 1 / 16)


def _block_root(blocks: Tensor, order: Tensor, flat: Tensor) -> Root:
    """The root of blocks (N, B, s, s), block by block."""
    count, number, width = blocks.shape[:3]
    index = order.flatten()

    def placed(values: Tensor) -> Tensor:  # (..., B, s) -> (..., C)
        flat: Tensor = values.flatten(-2)
        result: Tensor = torch.empty_like(flat).index_copy_(-1, index, flat)
        return result

    diagonal = placed(blocks.diagonal(dim1=2, dim2=3))
    places = torch.empty_like(index).index_copy_(
        0, index, torch.arange(number, device=index.device).repeat_interleave(width)
    )
    factors = signed_factors(blocks.flatten(0, 1))
    if factors is None:

        def pair(xi: Tensor) -> Tensor:
            pairs: Tensor = xi.expand(-1, count, -1).unflatten(2, (number, width))
            return pairs

        return Root(
            lambda xi: placed(pair(xi)),
            number * width,
            flat,
            lambda xi: placed(torch.einsum("mnbj,nbij->mnbi", pair(xi), blocks)),
            None,
            diagonal,
            places,
        )
    columns, sign = (t.unflatten(0, (count, number)) for t in factors)
    kept = columns.shape[-1]

    def left(xi: Tensor) -> Tensor:
        xi = xi.unflatten(2, (number, kept))
        if width == 1:
            return placed(xi * columns[..., 0])
        return placed(torch.einsum("mnbj,nbij->mnbi", xi.expand(-1, count, -1, -1), columns))

    signs = None if bool((sign > 0).all()) else sign.flatten(1)
    return Root(left, number * kept, flat, None, signs, diagonal, places, lambda: columns.square().sum(2).flatten(1))


def signed_factors(hessian: Tensor) -> tuple[Tensor, Tensor] | None:
    """Signed square roots of symmetric matrices (Q, s, s): H_q = Σ_k sign[q, k] u[q, :, k] u[q, :, k]ᵀ.

    Of the matrix scaled to a unit diagonal, so that every entry is right to rounding of its own size, whatever the
    sizes of others. Columns that vanish for all are left out; None where a diagonal does not bound its matrix (a
    product of two outputs has a diagonal of zeros).
    """
    kind = hessian.dtype
    if hessian.shape[1] == 1:
        one = hessian[..., 0]
        return one.abs().sqrt()[..., None], torch.where(one < 0, -1.0, 1.0).to(kind)
    columns, sign = torch.empty_like(hessian), torch.empty_like(hessian[..., 0])
    keep = torch.zeros(hessian.shape[1], dtype=torch.bool, device=hessian.device)
    keep[-1] = True  # never none
    for ids in chunks(len(hessian), default_chunk_size(4 * hessian[0].numel(), hessian, None)):
        found = _factors(hessian[ids.start : ids.stop].double())
        if found is None:
            return None
        columns[ids.start : ids.stop], values = found
        sign[ids.start : ids.stop] = torch.where(values < 0, -1.0, 1.0)
        keep |= (values != 0).any(0)
    return (columns, sign) if bool(keep.all()) else (columns[..., keep], sign[:, keep])


def _factors(hessian: Tensor) -> tuple[Tensor, Tensor] | None:
    """Columns (Q, s, s), and the eigenvalues that they are made of, zeros of those that are none."""
    hessian = (hessian + hessian.mT) / 2
    scale = hessian.diagonal(dim1=1, dim2=2).abs().sqrt()
    scaled = hessian / scale[:, :, None] / scale[:, None, :]
    scaled = torch.where(hessian == 0, 0.0, scaled)
    if not bool((scaled.abs() <= 4).all()):
        return None
    values, vectors = torch.linalg.eigh(scaled)
    tiny = values.abs() <= len(values.T) * torch.finfo(torch.float64).eps  # of a singular matrix
    values = values.masked_fill(tiny, 0.0)
    return scale[:, :, None] * vectors * values.abs().sqrt()[:, None], values


def _random(like: Tensor) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(1)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu").to(like)
