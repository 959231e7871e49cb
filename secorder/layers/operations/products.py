"""Products of matrices."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import DIM_ZERO, Layout
from ..per_sample import Outer, PerSample
from .call import OperationCall
from .registry import TOGETHER, Together, operation_rule


@operation_rule("MmBackward0")
def mm(call: OperationCall, index: int) -> PerSample | None:
    """z = a b: of b with samples in the rows of a, of a with samples in the columns of b."""
    return _factor(call, index, call.saved("mat2" if index == 0 else "self"))


@operation_rule("AddmmBackward0")
def addmm(call: OperationCall, index: int) -> PerSample | None:
    """z = β c + α a b, a linear layer with a bias."""
    scale = call.saved("beta" if index == 0 else "alpha")
    if index:
        part = _factor(call, index - 1, call.saved("mat2" if index == 1 else "mat1"))
        return None if part is None else _scaled(part, scale)
    shape = call.shape(0)
    if call.layout.dim == 0 and len(shape) == 1 and shape[0] == call.g.shape[1]:
        return _scaled(Outer(None, call.rows), scale)
    found = call.of_samples(call.g, shape)
    return None if found is None else found * scale


def _factor(call: OperationCall, index: int, other: Tensor) -> Outer | None:
    if index == 1 and call.layout.dim == 0:
        return Outer(call.rows, call.as_rows(other))
    if index == 0 and call.layout == Layout(1):
        return Outer(other.t()[:, None, None], call.g.t()[:, None, None])
    return None


def _scaled(part: Outer, scale: float) -> Outer:
    return part if scale == 1 else part._replace(g=part.g * scale)


class Product(NamedTuple):
    """What is kept of a product whose rows are the samples."""

    g: Tensor  #: the gradient on it, a row a sample
    samples: Tensor | None  #: what was multiplied by the parameter; None where that is a bias alone
    targets: tuple[tuple[int, str], ...]  #: by the input's number, the parameter's name
    scales: tuple[float, float]  #: of a bias, and of the product


def _kept(call: OperationCall, targets: Mapping[int, str]) -> Product | None:
    """Of ``c + a b``: what b, and a c that is a vector, get."""
    added = call.node.name() == "AddmmBackward0"
    right = 1 + added
    if call.layout != DIM_ZERO or call.g.dim() != 2 or not targets.keys() <= {right, right - 2}:
        return None
    if 0 in targets and call.shape(0) != (call.g.shape[1],):
        return None
    samples = call.saved("mat1" if added else "self") if right in targets else None
    scales = (call.saved("beta"), call.saved("alpha")) if added else (1.0, 1.0)
    return Product(call.g, samples, tuple(targets.items()), scales)


def _with_the_same(product: Product) -> object:
    return product.targets, product.scales


def _as_positions(products: Sequence[Product]) -> Iterator[tuple[int, int, PerSample]]:
    """Products with the same parameters as one, whose positions they are."""
    first = products[0]
    rows = torch.stack([product.g for product in products], 1)[:, None]
    for index, _ in first.targets:
        if index == 0:
            yield 0, index, _scaled(Outer(None, rows), first.scales[0])
        else:
            samples = torch.stack([x for product in products if (x := product.samples) is not None], 1)[:, None]
            yield 0, index, _scaled(Outer(rows, samples), first.scales[1])


TOGETHER["AddmmBackward0"] = TOGETHER["MmBackward0"] = Together(_kept, _with_the_same, _as_positions)


@operation_rule("BmmBackward0")
def bmm(call: OperationCall, index: int) -> PerSample | None:
    """z[e] = a[e] b[e], of b with samples in the rows of a: experts that are slices of one parameter."""
    if index == 1 and call.layout.dim == 1:
        return Outer(_by_group(call.g, call.layout), _by_group(call.saved("self"), call.layout))
    return None


def _by_group(tensor: Tensor, layout: Layout) -> Tensor:
    """``(groups, rows of samples, width)`` as ``(N, groups, positions, width)``."""
    rows = DIM_ZERO._replace(rows=layout.rows, sample_major=layout.sample_major).split(tensor.transpose(0, 1))
    return rows[:, :, None] if layout.rows == 1 else rows.transpose(1, 2)
