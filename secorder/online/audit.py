"""The audit of each recorded backward: do the captured calls explain the whole gradient of a parameter?

Freivalds' check of a matrix identity. For a parameter seen as a matrix and normal random vectors r, s (signs would be
orthogonal to a constant too often)::

    rᵀ G s = Σ_{n,p} (r · g_{n,p}) (a_{n,p} · s),

G the whole gradient of this backward, before hooks on the parameter change it, and the right side what the captured
calls bring. It sees every gradient that they do not explain: a penalty at some steps only, a use of the parameter
outside of the layer, a gradient that is counted twice. Of large parameters a block of rows is looked at, another one
each time. It is blind to *which* sample a row belongs to. Nothing is read on the host.

Source: Freivalds (1977), "Probabilistic machines can use less running time".
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.patches import Patches
from ..layers.per_sample import Outer, PerSample, Rows

__all__ = ["Signs", "Vectors", "actual", "allowed", "explained"]

#: Elements of a parameter above which only a block of its rows is looked at, and rows of the block.
WHOLE_ELEMENTS = 1 << 17
BLOCK = 64
#: Elements of a cotangent up to which its norm is taken whole: few rows may happen to be orthogonal to r.
SMALL = 1 << 16
#: What passes for rounding, in units in the last place of the products' size: of the parameter's dtype, and of a lower
#: one that factors are rounded to before they are multiplied.
UNITS = 64
UNITS_OF_FACTORS = 8
#: Of what matrix units may round float32 to.
TF32 = 2.0**-10


class Vectors(NamedTuple):
    """The random vectors of one parameter in one backward.

    Attributes:
        r: normal, one a row of the block.
        s: normal, one a column.
        start: the first row of the block.
        rows: rows of the parameter.
    """

    r: Tensor
    s: Tensor
    start: int
    rows: int

    @property
    def whole(self) -> bool:
        """Whether the block is all of the parameter."""
        return len(self.r) == self.rows


class Signs:
    """Random numbers, drawn once and looked at from random places: a private stream that costs nothing."""

    def __init__(self) -> None:
        self._places = random.Random()
        self._generator = torch.Generator()
        self._generator.seed()
        self._pool: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Signs, ()  # a copy draws numbers of its own

    def _take(self, size: int, like: Tensor) -> Tensor:
        key = (like.device, like.dtype)
        pool = self._pool.get(key)
        if pool is None or len(pool) < 2 * size:
            numbers = torch.randn(max(2 * size, 1 << 13), generator=self._generator, device="cpu")
            pool = self._pool[key] = numbers.to(like)
        start = self._places.randrange(len(pool) - size + 1)
        return pool[start : start + size]

    def vectors(self, parameter: Tensor) -> Vectors:
        """Those of one parameter, for one backward."""
        rows = parameter.shape[0] if parameter.dim() else 1
        columns = parameter.numel() // max(rows, 1) if parameter.dim() > 1 else 1
        block = rows if parameter.numel() <= WHOLE_ELEMENTS or parameter.dim() < 2 else min(rows, BLOCK)
        start = self._places.randrange(rows - block + 1)
        like = parameter.detach()
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        s = self._take(columns, like) if parameter.dim() > 1 else like.new_ones(1)
        return Vectors(self._take(block, like), s, start, rows)

    def some(self, names: Sequence[str], most: int) -> set[str]:
        """So many of the names at most, drawn anew."""
        return set(names) if len(names) <= most else set(self._places.sample(list(names), most))

    def chance(self, one_in: int) -> bool:
        """True one time in so many."""
        return self._places.randrange(one_in) == 0


def actual(gradient: Tensor, vectors: Vectors) -> Tensor:
    """rᵀ G s, of the parameter's whole gradient."""
    matrix = gradient.detach().reshape(vectors.rows, -1)[vectors.start : vectors.start + len(vectors.r)]
    r, s = vectors.r, vectors.s
    if matrix.dtype is not r.dtype:
        matrix = matrix.to(r.dtype)
    return torch.dot(torch.mv(matrix, s), r)


def explained(gradient: PerSample, vectors: Vectors) -> tuple[Tensor, Tensor]:
    """rᵀ (Σ_n J_nᵀ g_n) s of per-sample gradients, and the size that its rounding is relative to."""
    r, s = vectors.r, vectors.s
    if isinstance(gradient, Tensor):
        matrix = gradient.reshape(len(gradient), vectors.rows, -1)[:, vectors.start : vectors.start + len(r)]
        products = (matrix.to(r.dtype) * (r[:, None] * s)).flatten()
        return products.sum(), products.abs().sum()
    if isinstance(gradient, Rows):
        weights = r.new_zeros(vectors.rows)
        weights[vectors.start : vectors.start + len(r)] = r
        left, right = weights[gradient.ids].flatten(), (gradient.g.to(r.dtype) @ s).flatten()
        return torch.dot(left, right), torch.linalg.vector_norm(left) * _size(gradient.g, right)
    g = gradient.g  # (N, groups, positions, out)
    groups, width = g.shape[1], g.shape[3]
    if groups == 1:
        seen = g if vectors.whole else g[..., vectors.start : vectors.start + len(r)]
        left = seen.to(r.dtype) @ r
    else:
        seen, weights = g, r.new_zeros(vectors.rows)
        weights[vectors.start : vectors.start + len(r)] = r
        left = (g.to(r.dtype) * weights.view(groups, 1, width)).sum(3)
    if gradient.a is None:
        return left.sum(), _size(seen, left) * left.numel() ** 0.5  # right is 1 in every row
    left, right = left.flatten(), _inputs(gradient, s).flatten()
    a = gradient.a.image if isinstance(gradient.a, Patches) else gradient.a
    return torch.dot(left, right), _size(seen, left) * _size(a, right)


def _inputs(gradient: Outer, s: Tensor) -> Tensor:
    """``a · s`` at every position, shape ``(N, groups, positions)``."""
    a = gradient.a
    if not isinstance(a, Patches):
        assert a is not None
        return a.to(s.dtype) @ s
    image, kernel = a.image.to(s.dtype), s.view(1, -1, *a.kernel).expand(a.groups, -1, *a.kernel)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(a.kernel) - 1]
    found: Tensor = convolve(image, kernel, stride=a.stride, dilation=a.dilation, groups=a.groups)
    return found.flatten(2)


def _size(whole: Tensor, product: Tensor) -> Tensor:
    """The norm of a factor, by its product with random numbers where that has rows enough to tell."""
    found: Tensor = torch.linalg.vector_norm(whole if whole.numel() <= SMALL else product)
    return found.to(product.dtype)


def allowed(size: Tensor, dtype: torch.dtype, autocast: torch.dtype | None, gradient: PerSample) -> Tensor:
    """What a difference may be by rounding.

    Args:
        size: what rounding is relative to.
        dtype: of the parameter.
        autocast: that factors were rounded to, if they were.
        gradient: that was explained.
    """
    factors = 0.0 if autocast is None else torch.finfo(autocast).eps
    if size.is_cuda and dtype is torch.float32:
        convolved = isinstance(gradient, Outer) and isinstance(gradient.a, Patches)
        lower = torch.backends.cudnn.allow_tf32 if convolved else torch.get_float32_matmul_precision() != "highest"
        factors = max(factors, TF32 if lower else 0.0)
    return size * max(UNITS * torch.finfo(dtype).eps, UNITS_OF_FACTORS * factors)
