"""Patches of images: what a convolution's output positions see of its input."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch.float32 import products_as_convolutions
from .._torch.onednn import multiplied_by_onednn

#: Numbers of float32 that fill a register of a CPU: so many columns of a matrix product are made at once.
LANES = 16

#: Elements of one sample's gradient up to which it is a convolution's, and up to which it is where oneDNN multiplies
#: matrices, too: from there on products are 1.5 to 2 times as fast, the copies of the patches included.
CONVOLUTION_MOST, CONVOLUTION_BEFORE_ONEDNN = 1 << 20, 1 << 18


@dataclass(frozen=True)
class Patches:
    """The patches of images, to be copied out a few samples at a time: the input factor of a convolution."""

    image: Tensor  #: images, shape ``(N, channels, …)``
    kernel: tuple[int, ...]  #: size of a patch
    stride: tuple[int, ...]  #: steps between patches
    dilation: tuple[int, ...]  #: steps inside of a patch
    groups: int  #: groups of channels
    shape: tuple[int, int, int, int]  #: that of the patches, ``(N, groups, positions, in)``
    padding: tuple[int, ...]  #: by spatial dimension, zeros that are seen beyond either end
    of_cotangents: bool = False  #: whether the images are cotangents, and the layer's input is in the place of these

    def with_zeros(self, images: Tensor) -> Tensor:
        """Images, or some channels of them, with the zeros that are seen beyond their ends."""
        if not any(self.padding):
            return images
        return F.pad(images, [side for pad in reversed(self.padding) for side in (pad, pad)])

    @property
    def sizes(self) -> list[int]:
        """How many positions there are in each spatial dimension."""
        dims = zip(self.image.shape[2:], self.padding, self.kernel, self.stride, self.dilation, strict=True)
        return [(size + 2 * pad - gap * (k - 1) - 1) // step + 1 for size, pad, k, step, gap in dims]

    def seen_at(self, place: int, images: Tensor) -> Tensor:
        """What each position sees of images, or some channels of them, at one place of the kernel: a view."""
        images, sizes = self.with_zeros(images), self.sizes
        for dim in reversed(range(len(self.kernel))):
            place, offset = divmod(place, self.kernel[dim])
            first, step = offset * self.dilation[dim], self.stride[dim]
            last = first + step * (sizes[dim] - 1)
            images = images[(slice(None),) * (2 + dim) + (slice(first, last + 1, step),)]
        return images

    def convolves_well(self, width: int) -> bool:
        """Whether :meth:`weight_gradients` is faster than copies of the patches and a matrix product.

        By shape alone, so that a run can be repeated bit for bit: measured on oneDNN with AVX2 and AVX-512, from 1 to
        512 channels and 1 to 16 groups; where there is enough to do at each sample for what a call and its reordering
        of memory cost, and a sample's gradient is not so large that the reordering is most of it. A kernel of one pixel
        has no patches to copy.
        """
        image, (_, groups, positions, fan_in) = self.image, self.shape
        if image.device.type != "cpu" or image.dtype is not torch.float32 or not torch.backends.mkldnn.enabled:
            return False
        pixels = prod(self.kernel)
        if pixels == 1 or positions < 48 or groups * width * fan_in > CONVOLUTION_MOST:
            return False
        channels = fan_in // pixels
        if groups == 1:
            if width * fan_in > CONVOLUTION_BEFORE_ONEDNN and multiplied_by_onednn(image, positions * width * fan_in):
                return False
            return channels >= 16 or (pixels >= 49 and positions >= 48 * 48)  # a stem's patches alone fill the cache
        if channels == width == 1:
            return groups >= 16 and pixels <= 9
        return channels % 8 == 0

    def weight_gradients(self, rows: slice, g: Tensor) -> Tensor:
        """Gradients ``(n · groups, out, in)`` of some samples, for a cotangent factor ``(N, groups, positions, out)``.

        By one convolution with a group for each, no patches copied.
        """
        image = self.image[rows]
        factor = g[rows].transpose(2, 3)
        count, groups, width, _ = factor.shape
        shape = (count * groups * width, image.shape[1] // groups, *self.kernel)
        _, gradients, _ = torch.ops.aten.convolution_backward(
            factor.reshape(1, -1, *self.sizes),
            image.reshape(1, -1, *image.shape[2:]),
            factor.new_empty(shape),  # whose shape alone matters; one number expanded to it would be copied
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.kernel),
            count * groups,
            [False, True, False],
        )
        formed: Tensor = gradients.view(count * groups, width, -1)
        return formed

    def __getitem__(self, rows: slice) -> Tensor:
        """The patches of some samples (a slice), copied out."""
        spatial = len(self.kernel)
        a = windows(self.with_zeros(self.image[rows]), self.kernel, self.stride, self.dilation, [None] * spatial)
        patches: Tensor = a.unflatten(1, (self.groups, -1)).transpose(2, 3)
        return patches


def matrix_products(left: Tensor, right: Tensor, factor: "Tensor | Patches") -> Tensor:
    """Batched matrix products, whose right ones are of an input factor: of patches, as exact as a convolution is.

    Of bfloat16 they are in float32. On a CPU those of an input that fills no registers (27 numbers of a patch of
    colours) are made transposed where that does: up to six times as fast.
    """
    on_cpu = left.device.type == "cpu" and left.dtype is torch.float32
    if on_cpu and right.shape[2] % LANES and left.shape[1] % (LANES // 2) == 0:
        return torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2)
    if left.dtype is torch.bfloat16:
        return product_in_float32(left, right)
    if not (left.is_cuda and isinstance(factor, Patches)):
        return torch.bmm(left, right)
    with products_as_convolutions(left.device):
        return torch.bmm(left, right)


def whole_input(a: Tensor | Patches) -> Tensor:
    """An input factor as a tensor: patches copied out."""
    return a[:] if isinstance(a, Patches) else a


def windows(
    a: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], positions: Sequence[int | None]
) -> Tensor:
    """Patches of an image (N, C, …) as ``(N, C · kernel, P)``.

    The copy runs along rows of pixels, which makes it several times faster than ``F.unfold`` on the CPU.
    """
    spatial = len(kernel)
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        a = a.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
        wanted = positions[dim - 2]
        if wanted is not None:
            a = a.narrow(dim, 0, wanted)
    order = [0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial)]
    return a.permute(order).flatten(-spatial).flatten(1, -2)


def product_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """Products of bfloat16 matrices ``(groups, rows, inner)`` and ``(groups, inner, columns)`` with sums in float32.

    By matrix units on CUDA; elsewhere of the same factors in float32, in which each product is exact.
    """
    return torch.bmm(left, right, out_dtype=torch.float32) if left.is_cuda else torch.bmm(left.float(), right.float())
