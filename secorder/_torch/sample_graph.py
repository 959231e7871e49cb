"""Where the samples of a batch lie in the tensors of a recorded autograd graph, read off its nodes.

Of N samples that lie in one dimension of a tensor, sample n holds the elements whose index in row-major order, divided
by some *inner size* (the elements between two samples that follow each other), is n modulo N. Reshaping keeps the inner
size; transposing, reducing, multiplying matrices and acting element by element change it in ways that the node tells.
A node that mixes samples, or that is not known, tells nothing of what is behind it.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .graph import Node, collection_paused, operation_of, shape_of, signed

#: In place of an inner size: no sample owns any of it, such as of a weight, or of a table that is added to all samples.
SHARED = 0

#: By node, and the number of its output, the inner size of the samples in it; None where the graph does not tell.
InnerSizes = Mapping[tuple[Node, int], int | None]

#: Functions of each element, of tensors that are broadcast against one another, by the names of their nodes.
ELEMENTWISE = frozenset({
    "Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Pow", "Exp", "Expm1", "Log", "Log1P", "Log2", "Log10", "Sqrt", "Rsqrt",
    "Reciprocal", "Abs", "Sin", "Cos", "Tan", "Sinh", "Cosh", "Asin", "Acos", "Atan", "Atan2", "Asinh", "Acosh",
    "Atanh", "Erf", "Erfc", "Tanh", "Sigmoid", "LogSigmoid", "Relu", "Threshold", "Gelu", "Silu", "Mish", "Softplus",
    "Elu", "LeakyRelu", "Hardtanh", "Hardswish", "Hardsigmoid", "PreluKernel", "Clamp", "ClampMin", "ClampMax", "Where",
    "MaskedFill", "Clone", "ToCopy", "Alias", "NativeDropout", "Minimum", "Maximum", "Addcmul", "Addcdiv", "Lerp",
    "Expand",
})  # fmt: skip


class Place(NamedTuple):
    """Where samples are: the dimension, and the elements of that dimension between two samples that follow each other.

    Behind them in the dimension and in the shape, ``step · shape[dim+1:]`` is the inner size.
    """

    dim: int
    step: int


Shape = tuple[int, ...]

#: The place of what all samples share.
_EVERYWHERE = Place(-1, 0)

#: For each input of a node the place of the samples in it, or that all share it; None where that is not known.
Rule = Callable[[Any, Shape, Place, list[Shape]], list[Place | None]]


def inner_size(shape: Sequence[int], dim: int, step: int = 1) -> int:
    """The inner size of samples that lie in a dimension, so many elements of it apart."""
    return step * math.prod(shape[dim + 1 :])


def samples_in_leaves(inner_sizes: InnerSizes, leaves: Sequence[Tensor]) -> dict[int, int | None]:
    """What :func:`samples_in_nodes` tells of some leaves, by ``id``; a leaf without influence is missing."""
    wanted = {id(leaf) for leaf in leaves}
    found: dict[int, int | None] = {}
    for (node, _), inner in inner_sizes.items():
        key = id(getattr(node, "variable", None))
        if key in wanted:
            found[key] = inner
    return found


@collection_paused()
def samples_in_nodes(outputs: Sequence[Tensor], count: int, inner_sizes: Sequence[int] | None = None) -> InnerSizes:
    """Where samples lie in all that the nodes of the graph behind outputs computed.

    The outputs have these inner sizes, by default those of samples in dim 0; there are at least two samples. The answer
    holds for derivatives: a row has an influence on the outputs of its own sample alone. It does not see hooks on the
    nodes, which may change gradients as they like.
    """
    sizes = [inner_size(t.shape, 0) for t in outputs] if inner_sizes is None else inner_sizes
    edges = [(get_gradient_edge(t), size) for t, size in zip(outputs, sizes, strict=True) if t.requires_grad]
    return sizes_behind([(edge.node, edge.output_nr, size) for edge, size in edges], count)


def sizes_behind(
    begins: Iterable[tuple[Node, int, int | None]], count: int, ends: Collection[tuple[Node, int]] = ()
) -> InnerSizes:
    """The same behind places of the graph whose inner sizes are known, as far as others (``ends``)."""
    found: dict[tuple[Node, int], int | None] = {}
    shapes: dict[tuple[Node, int], Shape] = {}
    seen: set[tuple[Node, int, int | None]] = set()
    waiting = list(begins)
    while waiting:
        here = waiting.pop()
        if here in seen:
            continue
        seen.add(here)
        node, index, inner = here
        found[node, index] = inner if found.get((node, index), inner) == inner else None
        if (node, index) in ends:
            continue
        edges = [(k, following) for k, following in enumerate(node.next_functions) if following[0] is not None]
        # Behind what all share, or what is not known, is more of it.
        sizes = _through(node, index, inner, count, shapes) if inner else [inner] * len(node.next_functions)
        waiting.extend((following, number, sizes[k]) for k, (following, number) in edges)
    return found


def _through(node: Node, index: int, inner: int, count: int, known: dict[tuple[Node, int], Shape]) -> list[int | None]:
    """The inner sizes of a node's inputs, for that of one of its outputs; ``known`` keeps the shapes."""
    before = node.next_functions
    unknown: list[int | None] = [None] * len(before)
    rule = _RULES.get(operation_of(node))
    if rule is None:
        return unknown
    shape = known[node, index] if (node, index) in known else shape_of(node, index)
    place = place_of(shape, inner, count)
    if place is None:
        return unknown
    for edge in before:
        if edge[0] is not None and edge not in known:
            known[edge] = shape_of(*edge)
    shapes = [() if edge[0] is None else known[edge] for edge in before]
    if rule is _reshaped:
        return [inner if place_of(s, inner, count) is not None else None for s in shapes]
    places = rule(node, shape, place, shapes)
    sizes: list[int | None] = []
    for s, p in zip(shapes, places, strict=True):
        if p is _EVERYWHERE:
            sizes.append(SHARED)
            continue
        size = None if p is None else inner_size(s, p.dim, p.step)
        sizes.append(size if size is not None and place_of(s, size, count) == p else None)
    return sizes


@lru_cache(1 << 12)  # a graph asks again and again
def place_of(shape: Shape, inner: int, count: int) -> Place | None:
    """Where samples of an inner size are in a tensor; None where they do not lie in one dimension."""
    if not inner:  # of samples without elements, nothing tells where they are
        return None
    behind = 1
    for dim in range(len(shape) - 1, -1, -1):
        if inner % behind:
            return None
        if behind * shape[dim] % (inner * count) == 0 and shape[dim]:
            return Place(dim, inner // behind)
        behind *= shape[dim]
    return None


def _dim(value: int, size: int) -> int:
    """A dimension that a node has saved, counted from the first."""
    return signed(value) % size


# ---- rules


def _elementwise(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    """With broadcasting: an input that has no such dimension is shared by all samples."""
    found: list[Place | None] = []
    for s in shapes:
        dim = place.dim - len(shape) + len(s)
        found.append(Place(dim, place.step) if dim >= 0 and s[dim] == shape[place.dim] else _EVERYWHERE)
    return found


def _reshaped(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    raise AssertionError  # a reshape keeps the inner size


def _transposed(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    first, second = (_dim(d, len(shape)) for d in (node._saved_dim0, node._saved_dim1))
    return [Place({first: second, second: first}.get(place.dim, place.dim), place.step)]


def _matrix_transposed(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    return [Place(len(shape) - 1 - place.dim, place.step)]


def _permuted(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    return [Place(_dim(node._saved_dims[place.dim], len(shape)), place.step)]


def _product(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    """``[bias +] left @ right``, of matrices or stacks of them."""
    rows, columns = len(shape) - 2, len(shape) - 1
    left = place if place.dim <= rows else _EVERYWHERE
    right = place if place.dim < rows or place.dim == columns else _EVERYWHERE
    bias = _elementwise(node, shape, place, shapes[:-2])
    return [*bias, left, right]


def _normalised_behind(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    if place.dim >= len(shape) - len(node._saved_normalized_shape):
        return [None] * len(shapes)
    return [place, *[_EVERYWHERE] * (len(shapes) - 1)]


def _looked_up(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    """Rows of a table, which all samples have in common."""
    return [_EVERYWHERE if place.dim < len(shape) - 1 else None]


def _along(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    """Something along one dimension that keeps the number of dimensions: softmax, a slice, a split, a concatenation."""
    apart = _dim(node._saved_dim, len(shape)) != place.dim
    return [place if apart else None] * len(shapes)


def _sliced(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    """As others along a dimension, but for a slice that is all of it: older PyTorch has one for each colon."""
    return [place] if shapes[0] == shape else _along(node, shape, place, shapes)


def _flipped(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    return [None if place.dim in {_dim(d, len(shape)) for d in node._saved_dims} else place]


def _selected(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    gone = _dim(node._saved_dim, len(shapes[0]))
    return [Place(place.dim + (place.dim >= gone), place.step)]


def _stacked(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    new = _dim(node._saved_dim, len(shape))
    return [None if place.dim == new else Place(place.dim - (place.dim > new), place.step)] * len(shapes)


def _reduced(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    if not hasattr(node, "_saved_dim"):  # over all elements
        return [None]
    size = len(shapes[0])
    saved = node._saved_dim
    gone = {_dim(d, size) for d in ((saved,) if isinstance(saved, int) else saved or range(size))}
    kept = [d for d in range(size) if node._saved_keepdim or d not in gone]
    dim = kept[place.dim]
    return [None if dim in gone else Place(dim, place.step)]


def _rows_of_images(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    """Samples in dim 0 of a convolution, a pooling, a normalisation of groups."""
    return [place if place.dim == 0 and len(shapes[0]) > 2 else None, *[None] * (len(shapes) - 1)]


def _statistics_given(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    kept = place.dim == 0 and node._saved_training is False
    return [place if kept else None, *[None] * (len(shapes) - 1)]


def _attention(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    """Queries, keys and values in dim 0; nothing is told of an additive mask."""
    kept = place if place.dim == 0 and len(shape) > 3 else None
    return [*[kept] * 3, *[None] * (len(shapes) - 3)]


def _recurrent(node: Node, shape: Shape, place: Place, shapes: list[Shape]) -> list[Place | None]:
    """One layer of an LSTM: the input (T, N, features), weights, and states (N, features)."""
    steps = len(shape) == 3 and place == Place(1, 1)
    states = len(shape) == 2 and place == Place(0, 1)
    if not steps and not states:
        return [None] * len(shapes)
    weights = len(shapes) - 3
    return [Place(1, 1), *[None] * weights, Place(0, 1), Place(0, 1)]


def _names(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **_names(_reshaped, "View UnsafeView ReshapeAlias Squeeze Unsqueeze"),
    **_names(_transposed, "Transpose"),
    **_names(_matrix_transposed, "T"),
    **_names(_permuted, "Permute"),
    **_names(_product, "Mm Addmm Bmm Baddbmm"),
    **_names(_normalised_behind, "NativeLayerNorm FusedRmsNorm"),
    **_names(_looked_up, "Embedding"),
    **_names(_along, "Softmax LogSoftmax SafeSoftmax Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes Cat Narrow"),
    **_names(_sliced, "Slice"),
    **_names(_flipped, "Flip"),
    **_names(_selected, "Select Unbind"),
    **_names(_stacked, "Stack"),
    **_names(_reduced, "Sum Mean"),
    **_names(
        _rows_of_images,
        "Convolution MkldnnConvolution NativeGroupNorm MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D AvgPool3D "
        "AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D MkldnnAdaptiveAvgPool2D MaxPool2D",
    ),
    **_names(_statistics_given, "NativeBatchNorm CudnnBatchNorm"),
    **_names(
        _attention,
        "ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention ScaledDotProductEfficientAttention "
        "ScaledDotProductCudnnAttention ScaledDotProductFusedAttentionOverrideable",
    ),
    **_names(_recurrent, "MkldnnRnnLayer"),
}
