"""Products of each position of a sample with each: of rows, and of patches of images without copies of the patches.

What two positions of a convolution see has the product ``Σ_o x_{p+o} · x_{q+o}`` over the places o of the kernel, a
sum of products of *pixels*. With pixels counted along the image, a place is some steps along the diagonal of the matrix
of these, and the sum goes by one spatial dimension after the other::

    K[i, j] ← Σ_o K[i + o, j + o]        for each dimension, over the offsets o of its places, zero beyond the ends.

Lines have the zeros that are seen beyond their ends behind them alone: they are before the next line, too.
"""

from collections.abc import Sequence
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


def row_grams(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """Each sample's rows (N, positions, width) with one another, or with as many others.

    Of bfloat16 in float32: only sums are rounded.
    """
    others = rows if others is None else others
    if gram_by_onednn(rows, *rows.shape[1:]):
        pairs = zip(rows.unbind(), others.unbind(), strict=True)
        return torch.stack([product_by_onednn(own, other.t()) for own, other in pairs])
    columns = others.transpose(1, 2)
    return product_in_float32(rows, columns) if rows.dtype is torch.bfloat16 else torch.bmm(rows, columns)


def pixels(a: Patches) -> tuple[int, int] | None:
    """How many pixels and positions :func:`pixel_grams` counts, zeros between lines among them.

    None where a position is more than one pixel from the next.
    """
    if any(step > 1 for step in a.stride):
        return None
    lines = _lines(a)
    return a.image.shape[2] * prod(lines), a.sizes[0] * prod(lines)


def _lines(a: Patches) -> list[int]:
    """Pixels of each spatial dimension but the first, with the zeros behind them; not fewer than positions."""
    of_lines = zip(a.image.shape[3:], a.padding[1:], a.sizes[1:], strict=True)
    return [max(own + pad, positions) for own, pad, positions in of_lines]


def pixel_grams(a: Patches, g: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """What some samples' positions see with one another, and their cotangents: ``(n · groups, P, P)`` each.

    Positions are counted as pixels are, so that there are some beyond the end of each line: of those the products of
    cotangents are zero. For patches of which :func:`pixels` tells.
    """
    lines = _lines(a)
    columns = _with_zeros_behind(a.image[rows].unflatten(1, (a.groups, -1)).flatten(0, 1), lines).flatten(2)
    seen, length = row_grams(columns.transpose(1, 2)), a.sizes[0] * prod(lines)
    for dim, (kernel, gap, pad) in enumerate(zip(a.kernel, a.dilation, a.padding, strict=True)):
        step = prod(lines[dim:])
        seen = _along_the_diagonal(seen, length, [(place * gap - pad) * step for place in range(kernel)])
    cotangents = g[rows].transpose(2, 3).flatten(0, 1).unflatten(2, a.sizes)
    return seen, row_grams(_with_zeros_behind(cotangents, lines).flatten(2).transpose(1, 2))


def _with_zeros_behind(images: Tensor, lines: Sequence[int]) -> Tensor:
    """Images whose spatial dimensions but the first are as long as lines."""
    behind = [line - own for own, line in zip(images.shape[3:], lines, strict=True)]
    return F.pad(images, [side for zeros in reversed(behind) for side in (0, zeros)]) if any(behind) else images


def _along_the_diagonal(matrices: Tensor, length: int, offsets: Sequence[int]) -> Tensor:
    """Σ_o M[i + o, j + o] of each for i and j below a length, over offsets that differ; M is zero beyond its ends."""
    before = matrices.shape[1]
    first = next((o for o in offsets if 0 <= o <= before - length), None)  # which reaches all of them
    if first is None:
        total = matrices.new_zeros(len(matrices), length, length)
    elif len(offsets) == 1:
        return matrices[:, first : first + length, first : first + length]
    else:
        total = matrices[:, first : first + length, first : first + length].clone()
    for offset in offsets:
        start, stop = max(0, -offset), min(length, before - offset)
        if offset != first and start < stop:
            here = slice(start + offset, stop + offset)
            total[:, start:stop, start:stop] += matrices[:, here, here]
    return total
