"""Squared norms of per-sample gradients, without a tensor of the parameters' size where there is a way.

With g_{n,p} and a_{n,p} the factors of an :class:`~secorder.layers.per_sample.Outer` at position p of sample n::

    ‖Σ_p g_{n,p} a_{n,p}ᵀ‖² = Σ_{p,q} (g_{n,p} · g_{n,q}) (a_{n,p} · a_{n,q})

One position needs no matrix product at all. With P of them the right side costs P² (in + out), of patches that are a
pixel apart less (:mod:`.grams`), and the left, which forms one sample's gradient after the other, P · in · out: the
cheapest form is taken, by shape.

Sources: Goodfellow (2015), "Efficient per-example gradient computations", for one position; Rochette, Manoel, Tramel
(2019), "Efficient per-example gradient computations in convolutional neural networks", for products of positions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch.onednn import multiplied_by_onednn, product_by_onednn
from .._torch.vjp import chunks
from .contraction import CONVOLUTION_ELEMENTS, alike
from .grams import gram_by_onednn, pixel_grams, pixels, row_grams
from .low_precision import rounded
from .patches import Patches, matrix_products, whole_input
from .per_sample import Outer, PerSample, Rows, chunk_elements, distinct_rows, in_rows, sum_in_forms, total_gradient

__all__ = ["squared_norm_of_sum", "squared_norms"]

#: What an element costs that is written and read again, in multiplications of a matrix product (measured on a CPU).
TRAFFIC = 16
#: What a multiplication of oneDNN's, in a convolution or a large product, costs in those of another (the same).
BY_ONEDNN = 0.625

#: Elements of per-sample gradients, and of the patches for them, that are formed at once: in the middle of a backward,
#: whose peak of memory they are not to raise; a part of what a step of a contraction may form.
FORMED_PART = 2

#: Positions of a sample up to which each is compared with each.
FEW_POSITIONS = 128


def squared_norms(parts_of: Sequence[Sequence[PerSample]], sizes: Sequence[int], *, low: bool = False) -> Tensor:
    """Σ over parameters of ‖Σ_i u_{i, n}‖², for each sample n: shape ``(N,)``, in the per-sample gradients' dtype.

    Args:
        parts_of: of each parameter its per-sample gradients, one or one of each layer that shares it.
        sizes: of each, its number of elements.
        low: whether factors of matrix products are rounded to bfloat16.

    Example:
        >>> import torch
        >>> from secorder.layers.norms import squared_norms
        >>> from secorder.layers.per_sample import Outer
        >>> a, g = torch.randn(8, 1, 1, 3), torch.randn(8, 1, 1, 2)
        >>> norms = squared_norms([[Outer(a, g)], [Outer(None, g)]], [6, 2])  # of a weight and a bias
        >>> torch.allclose(norms, g.square().sum((1, 2, 3)) * (a.square().sum((1, 2, 3)) + 1))
        True
    """
    if len(parts_of) == 2 and len(parts_of[0]) == len(parts_of[1]) == 1:
        weight, bias = parts_of[0][0], parts_of[1][0]
        if isinstance(weight, Outer) and isinstance(bias, Outer) and bias.g is weight.g and weight.g.shape[1] == 1:
            return _of_outer(rounded(weight) if low else weight, with_bias=True)
    if low:
        parts_of = [
            [rounded(p) if isinstance(p, Outer) and len(parts) == 1 else p for p in parts] for parts in parts_of
        ]
    norms = [_of_sum(parts, size) for parts, size in zip(parts_of, sizes, strict=True) if parts]
    return norms[0] if len(norms) == 1 else torch.stack(norms).sum(0)


def squared_norm_of_sum(parts_of: Sequence[Sequence[PerSample]], sizes: Sequence[int]) -> Tensor:
    """‖Σ_n u_n‖² over all parameters of a layer, a tensor without dimensions: arguments as of :func:`squared_norms`.

    Example:
        >>> import torch
        >>> from secorder.layers.norms import squared_norm_of_sum
        >>> gradients = torch.randn(8, 6)
        >>> torch.allclose(squared_norm_of_sum([[gradients]], [6]), gradients.sum(0).square().sum())
        True
    """
    ones = [[_one_sample(part, size) for part in parts] for parts, size in zip(parts_of, sizes, strict=True)]
    return squared_norms(ones, sizes)[0]


class DenseNorms:
    """Norms of per-sample gradients that are formed some samples at a time."""

    def __init__(self) -> None:
        self._norms: list[Tensor] = []
        self._totals: list[Tensor] = []

    def add(self, flats: Sequence[Tensor]) -> None:
        """Some samples' gradients, ``(n, numel)`` by parameter."""
        self._norms.append(torch.stack([_squares(flat) for flat in flats]).sum(0))
        sums = [flat.sum(0) for flat in flats]
        self._totals = sums if not self._totals else [t.add_(s) for t, s in zip(self._totals, sums, strict=True)]

    def squares(self) -> tuple[Tensor, Tensor]:
        """‖u_n‖² of each sample, and ‖Σ_n u_n‖²."""
        total = torch.stack([_squares(total[None])[0] for total in self._totals]).sum()
        return torch.cat(self._norms), total


def _one_sample(part: PerSample, size: int) -> PerSample:
    """Per-sample gradients as that of one sample, whose positions are those of all."""
    if isinstance(part, Tensor):
        return part.reshape(1, len(part), size).sum(1)
    if isinstance(part, Rows):
        return Rows(part.ids.reshape(1, -1), part.g.flatten(0, 1)[None], part.rows)
    if isinstance(part.a, Patches):
        return total_gradient(part, size)[None]
    a = None if part.a is None else part.a.transpose(0, 1).flatten(1, 2)[None]
    return Outer(a, part.g.transpose(0, 1).flatten(1, 2)[None])


def _of_sum(parts: Sequence[PerSample], size: int) -> Tensor:
    """Of the sum of per-sample gradients of one parameter."""
    first, *rest = parts if len(parts) == 1 else sum_in_forms(parts, size)
    if not rest:
        return _of_one(first, size)
    (rows,) = rest  # ‖A + B‖² = ‖A‖² + ‖B‖² + 2 ⟨A, B⟩, the last by the few rows of B
    assert isinstance(first, Outer)
    assert isinstance(rows, Rows)
    return _of_one(first, size) + _of_one(rows, size) + 2 * in_rows(first, rows).flatten(1).sum(1)


def _of_one(part: PerSample, size: int) -> Tensor:
    """Of per-sample gradients in one form."""
    if isinstance(part, Tensor):
        return _squares(part.reshape(len(part), size))
    return _of_rows(part) if isinstance(part, Rows) else _of_outer(part)


def _of_outer(part: Outer, *, with_bias: bool = False) -> Tensor:
    """Of an outer product; with that of a bias that has the same cotangents: a weight whose input is one."""
    a, g = part
    if a is None:
        return _squares(g.flatten(1) if g.shape[2] == 1 else g.sum(2).flatten(1))
    if g.shape[2] > 1:
        return _of_positions(a, g, with_bias)
    a = whole_input(a)
    if g.shape[1] > 1:
        return (g.square().sum(3) * a.square().sum(3)).flatten(1).sum(1)
    of_g, of_a = _squares(g.flatten(1)), _squares(a.flatten(1))
    return torch.addcmul(of_g, of_g, of_a) if with_bias else of_g * of_a


def _squares(flat: Tensor) -> Tensor:
    """‖·‖² of each row; without products that are written and read again, twice as fast."""
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return norms.square()


def _of_positions(a: Tensor | Patches, g: Tensor, with_bias: bool) -> Tensor:
    """Of an outer product with several positions, a few samples at a time."""
    form, most = _cheaper_form(a, g)
    few = alike(len(g), max(1, most))
    found = [form(a, g, slice(n.start, n.stop), with_bias) for n in chunks(len(g), few)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _cheaper_form(a: Tensor | Patches, g: Tensor) -> tuple[Callable[[Any, Tensor, slice, bool], Tensor], int]:
    """The cheapest form, by shape, and of how many samples at once, at most."""
    _, groups, positions, width = g.shape
    fan_in, most = a.shape[-1], chunk_elements(g.device) // FORMED_PART // max(1, groups)
    copied = positions * fan_in if isinstance(a, Patches) else 0
    convolved = isinstance(a, Patches) and a.convolves_well(width)
    onednn = convolved or _formed_by_onednn(a, g)
    gradients = width * fan_in * (positions * (BY_ONEDNN if onednn else 1.0) + TRAFFIC)
    of_pairs = positions**2 * (_gram_cost(g, positions, fan_in) + _gram_cost(g, positions, width) + TRAFFIC)
    of_pairs *= 0.75 if _halved(a, g) else 1.0
    if isinstance(a, Patches) and (of_image := pixels(a)) is not None:
        pixel, position = of_image
        passes = 2 + sum([size - 1 for size in a.kernel])
        of_pixels = pixel**2 * (_gram_cost(g, pixel, a.image.shape[1] // groups) + passes * TRAFFIC)
        if of_pixels + position**2 * _gram_cost(g, position, width) < gradients:
            return _by_pixels, most // (3 * pixel**2)  # so many matrices are there at once
    elif of_pairs < gradients:
        return _by_products, most // (positions**2 + copied)
    if convolved:
        return _by_gradients, min(CONVOLUTION_ELEMENTS, most) // max(1, width * fan_in)
    return _by_gradients, most // max(1, width * fan_in + copied)


def _by_products(a: Tensor | Patches, g: Tensor, rows: slice, with_bias: bool) -> Tensor:
    """Σ_{p,q} (g_p · g_q)(a_p · a_q) of some samples."""
    found = _of_pairs(a[rows].flatten(0, 1), g[rows].flatten(0, 1), with_bias)
    return found if g.shape[1] == 1 else found.view(-1, g.shape[1]).sum(1)


def _of_pairs(a: Tensor, g: Tensor, with_bias: bool) -> Tensor:
    """The same of rows ``(n, positions, in)`` and ``(n, positions, out)``; pairs across two halves count twice."""
    if not _halved(a, g):
        return _sum_of_products(row_grams(a), row_grams(g), 1, with_bias)
    (first, second), (g_first, g_second) = [x.unflatten(1, (2, -1)).unbind(1) for x in (a, g)]
    across = _sum_of_products(row_grams(first, second), row_grams(g_first, g_second), 1, with_bias)
    own_a, own_g = [x.view(-1, x.shape[1] // 2, x.shape[2]) for x in (a, g)]
    within = _of_pairs(own_a, own_g, with_bias)
    return within.view(-1, 2).sum(1).add_(across, alpha=2)


def _halved(*factors: Tensor | Patches) -> bool:
    """Whether a sample's pairs are compared by halves: where products of half as many rows are for oneDNN, too.

    Others are slower for fewer rows, and gain nothing (measured on a CPU).
    """
    return all(
        isinstance(x, Tensor)
        and x.is_contiguous()
        and x.shape[-2] % 2 == 0
        and gram_by_onednn(x, x.shape[-2] // 2, x.shape[-1])
        for x in factors
    )


def _by_pixels(a: Patches, g: Tensor, rows: slice, with_bias: bool) -> Tensor:
    """The same of patches, without copies of them."""
    return _sum_of_products(*pixel_grams(a, g, rows), g.shape[1], with_bias)


def _sum_of_products(of_a: Tensor, of_g: Tensor, groups: int, with_bias: bool) -> Tensor:
    """Σ_{p,q} of both, shape ``(n · groups, positions, positions)``, which are overwritten."""
    if with_bias:
        of_a += 1
    return of_g.mul_(of_a).view(-1, groups * of_g.shape[1] ** 2).sum(1)


def _by_gradients(a: Tensor | Patches, g: Tensor, rows: slice, with_bias: bool) -> Tensor:
    """The norms of some samples' gradients, which are formed."""
    norms = _norms_of_formed(a, g, rows)
    return norms + _squares(g[rows].sum(2, dtype=norms.dtype).flatten(1)) if with_bias else norms


def _norms_of_formed(a: Tensor | Patches, g: Tensor, rows: slice) -> Tensor:
    """:func:`_by_gradients` of the weight alone."""
    if isinstance(a, Patches) and a.convolves_well(g.shape[3]):
        formed = a.weight_gradients(rows, g)
    elif _formed_by_onednn(a, g):
        pairs = zip(g[rows].squeeze(1).transpose(1, 2).unbind(), a[rows].squeeze(1).unbind(), strict=True)
        return torch.stack([torch.linalg.vector_norm(product_by_onednn(*pair)) for pair in pairs]).square()
    else:
        formed = matrix_products(g[rows].flatten(0, 1).transpose(1, 2), a[rows].flatten(0, 1), a)
    return _squares(formed.reshape(rows.stop - rows.start, g.shape[1] * g.shape[3] * a.shape[3]))


def _formed_by_onednn(a: Tensor | Patches, g: Tensor) -> bool:
    """Whether one sample's gradient is a product that oneDNN makes."""
    _, groups, positions, width = g.shape
    return groups == 1 and multiplied_by_onednn(g, positions * width * a.shape[-1])


def _gram_cost(like: Tensor, positions: int, width: int) -> float:
    """What a product of two of so many positions costs, of so many numbers each."""
    return width * (BY_ONEDNN if gram_by_onednn(like, positions, width) else 1.0)


def _of_rows(part: Rows) -> Tensor:
    """Of rows that each sample looks up: positions that look up the same row are added before they are squared."""
    (count, positions), g = part.ids.shape, part.g
    if positions == 1:
        return _squares(g.flatten(1))
    if positions <= FEW_POSITIONS:
        same = (part.ids[:, :, None] == part.ids[:, None, :]).to(g.dtype)
        return (torch.bmm(same, g) * g).flatten(1).sum(1)
    places, where = distinct_rows(part)
    summed = g.new_zeros(len(places), g.shape[-1]).index_add_(0, where, g.flatten(0, 1))
    return g.new_zeros(count).index_add_(0, places // part.rows, _squares(summed))
