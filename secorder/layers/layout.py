"""Where the samples of a layer's input and output are."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .._torch.sample_graph import inner_size


class Layout(NamedTuple):
    """Where the samples of a layer's input and output are."""

    dim: int = 0  #: the dimension that holds them
    #: how many rows of that dimension belong to one sample (flattened tokens; of a layer's output, dim 0 only)
    rows: int = 1
    #: whether the rows of one sample follow each other (``n·T + t``) or are T apart (``t·N + n``)
    sample_major: bool = True

    def size(self, tensor: Tensor) -> int:
        """The number of samples in a tensor of this layout."""
        return tensor.shape[self.dim] // self.rows

    def inner_size(self, shape: Sequence[int]) -> int:
        """Elements, in row-major order, between two samples that follow each other in a tensor."""
        return inner_size(shape, self.dim, self.rows if self.sample_major else 1)

    def split(self, tensor: Tensor) -> Tensor:
        """The tensor as ``(N, ...)``, a view where it can be."""
        if self.rows == 1:
            return tensor.movedim(self.dim, 0)
        tensor = tensor.movedim(self.dim, 0)
        count = tensor.shape[0] // self.rows
        if self.sample_major:
            return tensor.reshape(count, self.rows, *tensor.shape[1:])
        return tensor.reshape(self.rows, count, *tensor.shape[1:]).movedim(1, 0)

    def join(self, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        if self.rows == 1:
            return tensor.movedim(0, self.dim)
        return (tensor if self.sample_major else tensor.movedim(0, 1)).flatten(0, 1).movedim(0, self.dim)


DIM_ZERO = Layout()


def layouts_of(shape: Sequence[int], count: int, *, any_dim: bool = True) -> list[Layout]:
    """Every layout that a shape admits for so many samples, the usual first.

    With ``any_dim`` any dimension may hold several rows a sample (flattened tokens), else the first alone.
    """
    found = [Layout(dim) for dim, size in enumerate(shape) if size == count]
    for dim, size in enumerate(shape if any_dim else shape[:1]):
        if count and size > count and size % count == 0:
            found += [Layout(dim, size // count, major) for major in (True, False)]
    return found


def layout_of(shape: Sequence[int], count: int, inner_size: int | None) -> Layout | None:
    """The layout of samples of a known inner size; None where it is not known, or they have none."""
    return next((x for x in layouts_of(shape, count) if x.inner_size(shape) == inner_size), None)


def candidate_layouts(
    inputs: tuple[Tensor, ...], output: Tensor, num_samples: int, *, any_leading_dim: bool
) -> list[Layout]:
    """Where the samples of a call of a layer with a rule may be, by shape alone; to be verified by the caller.

    In dim 1 only where the layer treats all leading dimensions alike.
    """
    last = 1 if any_leading_dim and output.dim() > 2 else 0
    candidates = [c for c in layouts_of(output.shape, num_samples, any_dim=False) if c.dim <= last]
    candidates.sort(key=lambda c: c.dim)
    return [c for c in candidates if all(x.dim() > c.dim and x.shape[c.dim] == output.shape[c.dim] for x in inputs)]
