"""Rows that data selected and that are put back into their places, such as the tokens that an expert has seen.

What is put back tells whose each row is: that of the sample whose place it gets. From there the gradient goes back row
by row, each sample's in its own rows, until it meets a parameter: through operations that do to each row the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch.graph import Node, operation_of, outputs_of, run_node, saved, shape_of, signed
from ..._torch.sample_graph import ELEMENTWISE
from ..dtypes import cast
from ..per_sample import Outer, PerSample
from .call import OperationCall


class OwnedRows(NamedTuple):
    """A gradient each row of which belongs to one sample."""

    g: Tensor  #: shape ``(rows, ...)``
    owner: Tensor  #: shape ``(rows,)``, the sample of each
    places: Tensor  #: shape ``(N, most)``, the rows of each sample, filled up with the number of all rows

    def written_out(self) -> Tensor:
        """Each sample's, shape ``(N, rows, ...)``."""
        own = self.owner == torch.arange(len(self.places), device=self.owner.device)[:, None]
        return torch.where(own.view(*own.shape, *(1,) * (self.g.dim() - 1)), self.g, self.g.new_zeros(()))


def put_back(call: OperationCall, index: int) -> OwnedRows | None:
    """The gradient on rows that were added or put into places of a whole, by ``index_add`` or ``x[ids] = rows``."""
    name, layout = call.node.name(), call.layout
    if index != 1 or layout.dim != 0 or name not in ("IndexAddBackward0", "IndexPutBackward0"):
        return None
    g = call.g
    scale = 1.0
    if name == "IndexAddBackward0":
        ids, scale = call.saved("index"), float(call.saved("alpha"))
        if signed(call.saved("dim")) % g.dim():
            return None
    else:
        ids, *more = call.saved("indices")
        if more or ids is None:
            return None
        ids = ids.nonzero().flatten() if ids.dtype == torch.bool and ids.dim() == 1 else ids
    if ids.dim() != 1 or call.shape(1) != (len(ids), *g.shape[1:]):
        return None
    ids = ids.long() % g.shape[0]
    owner = ids // layout.rows if layout.sample_major else ids % call.count
    rows = g.index_select(0, ids)
    return OwnedRows(rows if scale == 1 else rows * scale, owner, _places(owner, call.count))


def through_rows(
    node: Node, given: Sequence[OwnedRows | Tensor | None], wanted: Sequence[int]
) -> list[PerSample | OwnedRows] | None:
    """What a node makes of owned rows (``given`` on its outputs) for the inputs that are wanted.

    None where rows may meet, or nothing is known of the node.
    """
    rows = [g for g in given if isinstance(g, OwnedRows)]
    if not rows or len(rows) < sum(g is not None for g in given) or any(g.owner is not rows[0].owner for g in rows):
        return None
    found = [_through(node, rows[0], given, index) for index in wanted]
    known = [part for part in found if part is not None]
    return known if len(known) == len(found) else None


def _through(
    node: Node, own: OwnedRows, given: Sequence[OwnedRows | Tensor | None], index: int
) -> PerSample | OwnedRows | None:
    name, shape = node.name(), shape_of(*node.next_functions[index])
    outputs = outputs_of(node, real=False)
    first = outputs[0].shape
    alike = operation_of(node) in ELEMENTWISE and shape == first and own is given[0]
    alike |= name in ("ViewBackward0", "UnsafeViewBackward0") and bool(first) and shape[:1] == first[:1]
    if name in ("SplitBackward0", "SplitWithSizesBackward0"):
        alike = signed(saved(node, "dim")) % len(first) != 0
    if name in ("AddmmBackward0", "MmBackward0"):
        place = index - (name == "AddmmBackward0")
        if place == 1:
            other = saved(node, "mat1" if name == "AddmmBackward0" else "self")
            scale = saved(node, "alpha") if name == "AddmmBackward0" else 1
            return Outer(
                _grouped(own.g if scale == 1 else own.g * scale, own.places),
                _grouped(cast(other, own.g.dtype), own.places),
            )
        if place == -1:
            total = own.g.new_zeros(len(own.places), *own.g.shape[1:]).index_add(0, own.owner, own.g)
            return total * saved(node, "beta") if shape == tuple(own.g.shape[1:]) else None
        alike = True
    if not alike:
        return None
    whole = [
        own.g.new_zeros(output.shape, dtype=output.dtype) if g is None else g.g.to(output.dtype)  # type: ignore[union-attr]
        for g, output in zip(given, outputs, strict=True)
    ]
    return own._replace(g=run_node(node, whole, index).to(own.g.dtype))


def _places(owner: Tensor, count: int) -> Tensor:
    """The rows of each sample: one number is read on the host, as the model did that selected the rows."""
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner, minlength=count)
    ordered = owner[order]
    place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[ordered]
    table = order.new_full((count, max(1, int(counts.max()))), len(order))
    table[ordered, place] = order
    return table


def _grouped(rows: Tensor, places: Tensor) -> Tensor:
    """Rows by sample, zeros behind them: shape ``(N, 1, most, width)``."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])[places][:, None]
