"""What leads from a parameter to an operation: its transpose carries each sample's gradient on."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..._torch.graph import Node, saved, signed
from ..dtypes import cast
from ..per_sample import Outer, PerSample, Rows
from .registry import parameter_map
from .tables import rows_of, without_padding

Shape = tuple[int, ...]


@parameter_map(
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ViewAsBackward0", "UnsqueezeBackward0",
    "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "AliasBackward0", "CloneBackward0", "ToCopyBackward0",
)  # fmt: skip
def as_it_is(node: Node, number: int, gradient: PerSample, shape: Shape, before: Shape) -> PerSample | None:
    """The same elements in the same order."""
    if isinstance(gradient, Tensor):
        return gradient.reshape(len(gradient), *before)
    return gradient


@parameter_map("TBackward0", "TransposeBackward0", "PermuteBackward0")
def transposed(node: Node, number: int, gradient: PerSample, shape: Shape, before: Shape) -> PerSample | None:
    """Other dimensions in each place."""
    order = _order(node, len(shape))
    if isinstance(gradient, Tensor):
        back = [order.index(d) + 1 for d in range(len(order))]
        return gradient.permute(0, *back)
    if not isinstance(gradient, Outer) or not isinstance(gradient.a, Tensor):
        return None
    factors = (gradient.g.shape[3], gradient.a.shape[3])
    if order == [1, 0] and gradient.g.shape[1] == 1 and shape == factors:
        return Outer(gradient.g, gradient.a)
    if order == [0, 2, 1] and shape == (gradient.g.shape[1], *factors):
        return Outer(gradient.g, gradient.a)
    return None


def _order(node: Node, dims: int) -> list[int]:
    """For each dimension of the output, that of the input."""
    name = node.name()
    if name == "PermuteBackward0":
        return [signed(d) % dims for d in saved(node, "dims")]
    order = list(range(dims))
    if dims < 2:
        return order
    one, other = (
        (0, 1) if name == "TBackward0" else (signed(saved(node, "dim0")) % dims, signed(saved(node, "dim1")) % dims)
    )
    order[one], order[other] = order[other], order[one]
    return order


@parameter_map("SplitBackward0", "SplitWithSizesBackward0", "UnsafeSplitBackward0", "SliceBackward0")
def split_off(node: Node, number: int, gradient: PerSample, shape: Shape, before: Shape) -> PerSample | None:
    """A part of the rows, or of another dimension."""
    dim = signed(saved(node, "dim")) % len(shape)
    if node.name() == "SliceBackward0":
        if saved(node, "step") != 1:
            return None
        start = signed(saved(node, "start"))
        start = min(max(start + before[dim] if start < 0 else start, 0), before[dim])
    elif node.name() == "SplitWithSizesBackward0":
        start = sum(saved(node, "split_sizes")[:number])
    else:
        start = number * saved(node, "split_size")
    sides = (start, before[dim] - start - shape[dim])
    if isinstance(gradient, Tensor):
        return pad(gradient, [0, 0] * (len(shape) - dim - 1) + list(sides))
    if isinstance(gradient, Outer) and dim == 0 and gradient.g.shape[1] == 1 and shape[0] == gradient.g.shape[3]:
        return gradient._replace(g=pad(gradient.g, sides))
    return None


@parameter_map("AddBackward0", "SubBackward0")
def plus_constant(node: Node, number: int, gradient: PerSample, shape: Shape, before: Shape) -> PerSample | None:
    """A number more, such as the one of 1 + w."""
    given = [i for i, (other, _) in enumerate(node.next_functions) if other is not None]
    return gradient if given == [0] and shape == before else None


@parameter_map("MulBackward0", "DivBackward0")
def times_constant(node: Node, number: int, gradient: PerSample, shape: Shape, before: Shape) -> PerSample | None:
    """A multiple by what no gradient comes to: the scale or the mask of a weight, or its norm, if that is detached."""
    first, divided = node.next_functions[0][0] is not None, node.name() == "DivBackward0"
    if shape != before or (divided and not first):
        return None
    factor, times = saved(node, "other" if first else "self"), torch.div if divided else torch.mul
    if isinstance(gradient, Tensor):
        return cast(times(gradient, factor), gradient.dtype)
    if isinstance(gradient, Outer) and factor.numel() == 1:
        return gradient._replace(g=cast(times(gradient.g, factor), gradient.g.dtype))
    return None


@parameter_map("EmbeddingBackward0", "IndexBackward0")
def looked_up(node: Node, number: int, gradient: PerSample, shape: Shape, before: Shape) -> PerSample | None:
    """Rows of a table that are the same for all samples, such as those of positions."""
    ids = rows_of(node, before)
    if ids is None or not isinstance(gradient, Tensor):
        return None
    flat = ids.reshape(1, -1).expand(len(gradient), -1)
    g = without_padding(node, gradient, ids)
    return Rows(flat, g.reshape(len(gradient), flat.shape[1], before[-1]), before[0])


@parameter_map("SelectBackward0", "UnbindBackward0")
def selected(node: Node, number: int, gradient: PerSample, shape: Shape, before: Shape) -> PerSample | None:
    """One of the parts of a parameter that is several in one, such as an expert's matrix."""
    if not isinstance(gradient, Tensor):
        return None
    dim = signed(saved(node, "dim")) % len(before)
    place = signed(saved(node, "index")) % before[dim] if node.name() == "SelectBackward0" else number
    whole = gradient.new_zeros(len(gradient), *before)
    whole.select(dim + 1, place).copy_(gradient)
    return whole
