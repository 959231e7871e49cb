"""Products of matrices."""

from torch import Tensor

from ..layout import DIM_ZERO, Layout
from ..per_sample import Outer, PerSample
from .call import OperationCall
from .registry import operation_rule

__all__ = ["addmm", "bmm", "mm"]


@operation_rule("MmBackward0")
def mm(call: OperationCall, index: int) -> PerSample | None:
    """z = a b: of b with samples in the rows of a, of a with samples in the columns of b."""
    return _factor(call, index, call.saved("mat2" if index == 0 else "self"))


@operation_rule("AddmmBackward0")
def addmm(call: OperationCall, index: int) -> PerSample | None:
    """z = β c + α a b, a linear layer with a bias."""
    scale = call.saved("beta" if index == 0 else "alpha")
    if index:
        return _scaled(_factor(call, index - 1, call.saved("mat2" if index == 1 else "mat1")), scale)
    shape = call.shape(0)
    if call.layout.dim == 0 and len(shape) == 1 and shape[0] == call.g.shape[1]:
        return _scaled(Outer(None, call.rows), scale)
    found = call.of_samples(call.g, shape)
    return None if found is None else found * scale


def _factor(call: OperationCall, index: int, other: Tensor) -> PerSample | None:
    if index == 1 and call.layout.dim == 0:
        return Outer(call.rows, call.as_rows(other))
    if index == 0 and call.layout == Layout(1):
        return Outer(other.t()[:, None, None], call.g.t()[:, None, None])
    return None


def _scaled(part: PerSample | None, scale: float) -> PerSample | None:
    return part if scale == 1 or not isinstance(part, Outer) else part._replace(g=part.g * scale)


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
