"""Products of each position of a sample with each: of rows, and of patches of images without copies of the patches.

What two positions of a convolution see has the product ``Σ_o x_{p+o} · x_{q+o}`` over the places o of the kernel, a
sum of products of *pixels*. With pixels counted along the padded image, a place is one step along the diagonal of the
matrix of these, and the sum goes by one spatial dimension after the other::

    K ← Σ_{i<k} K[i·t:, i·t:]        for each dimension, with kernel k and neighbours t pixels apart.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch.onednn import multiplied_by_onednn, product_by_onednn
from .patches import Patches, product_in_float32

#: How many times as large as other matrices have to be those whose rows are multiplied with one another: products that
#: are small beside what is read (measured on a CPU, of 64 to 512 rows that other work has driven out of the caches).
SMALL = 2


def gram_by_onednn(like: Tensor, positions: int, width: int) -> bool:
    """Whether one sample's products of so many rows with one another are for oneDNN, by shape."""
    return multiplied_by_onednn(like, positions**2 * width // SMALL)


def row_grams(rows: Tensor) -> Tensor:
    """Each sample's rows (N, positions, width) with one another; of bfloat16 in float32: only sums are rounded."""
    if gram_by_onednn(rows, *rows.shape[1:]):
        return torch.stack([product_by_onednn(own, own.t()) for own in rows.unbind()])
    columns = rows.transpose(1, 2)
    return product_in_float32(rows, columns) if rows.dtype is torch.bfloat16 else torch.bmm(rows, columns)


def pixels(a: Patches) -> tuple[int, int] | None:
    """How many pixels a padded image has, and how many positions as :func:`pixel_grams` counts them.

    None where a position is more than one pixel from the next.
    """
    if any(step > 1 for step in a.stride):
        return None
    size = [pixel + 2 * pad for pixel, pad in zip(a.image.shape[2:], a.padding or (0,) * len(a.kernel), strict=True)]
    return prod(size), a.sizes[0] * prod(size[1:])


def pixel_grams(a: Patches, g: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """What some samples' positions see with one another, and their cotangents: ``(n · groups, P, P)`` each.

    Positions are counted as pixels of the padded image are, so that there are some beyond the end of each line: of
    those the products of cotangents are zero. Patches are one pixel from each other.
    """
    images = a.with_zeros(a.image[rows])
    size = images.shape[2:]
    columns = images.reshape(len(images) * a.groups, -1, prod(size))
    seen = row_grams(columns.transpose(1, 2))
    for dim, (kernel, gap) in enumerate(zip(a.kernel, a.dilation, strict=True)):
        seen = _along_the_diagonal(seen, kernel, gap * prod(size[dim + 1 :]))
    cotangents = g[rows].transpose(2, 3).flatten(0, 1).unflatten(2, a.sizes)
    beyond = [(0, whole - own) for whole, own in zip(size[1:], a.sizes[1:], strict=True)]
    cotangents = F.pad(cotangents, [side for sides in reversed(beyond) for side in sides]).flatten(2)
    return seen, row_grams(cotangents[:, :, : seen.shape[1]].transpose(1, 2))


def _along_the_diagonal(matrices: Tensor, count: int, step: int) -> Tensor:
    """Σ_{i < count} M[i · step:, i · step:] of each, as far as all of them reach."""
    if count == 1:
        return matrices
    length = matrices.shape[1] - (count - 1) * step
    shifted = [matrices[:, i : i + length, i : i + length] for i in range(0, count * step, step)]
    total = shifted[0] + shifted[1]
    for other in shifted[2:]:
        total += other
    return total
