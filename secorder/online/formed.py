"""Squares that are formed apart from the sums, and wait to be added together: what is small is asked of all at once.

Squares over several positions are formed before they are added, so that they tell themselves whether they are finite;
where they are not, the batch does not count for their layer. They wait until they take as much memory
as a step of a contraction may, and at most until the backward ends.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from .._torch.several import add_each, add_products
from ..layers.common_factor import contract_each
from ..layers.contraction import IN_PLACE_ELEMENTS
from ..layers.dtypes import compute_dtype
from ..layers.low_precision import contract_sum_low
from ..layers.per_sample import Outer, PerSample, Rows, chunk_elements
from ..layers.selection import Layer
from .finite import finite
from .fisher import OnlineFisher
from .record import ForwardRecord


def form(
    fisher: OnlineFisher, record: ForwardRecord, layer: Layer, gradients: Mapping[str, PerSample]
) -> Tensor | None:
    """The squares of all of a layer's parameters, one after the other.

    None where they need not be formed to be added, or not by this rank alone, or are too many.
    """
    sizes = layer.sizes()
    if fisher.accumulate != "diagonal" or layer.sharded or not 0 < sum(sizes) <= IN_PLACE_ELEMENTS:
        return None
    if record.attribution.sharing(layer.name):
        return None
    parts = [gradients[name] for name in layer.parameters]
    formed = [isinstance(x, Tensor) or is_formed(x, size) for x, size in zip(parts, sizes, strict=True)]
    if not any(formed) or any(isinstance(x, Rows) for x in parts):
        return None
    like = next(iter(layer.parameters.values()))
    squares = torch.empty(sum(sizes), dtype=compute_dtype(layer), device=like.device)
    outs = squares.split_with_sizes(sizes)
    if fisher.low(record, layer):
        for part, size, out in zip(parts, sizes, outs, strict=True):
            contract_sum_low([part], numel=size, out=out, beta=0.0)
    else:
        contract_each(parts, outs)
    return squares


def is_formed(part: PerSample, numel: int) -> bool:
    """Whether the squares of a parameter are formed in a tensor of their own in any case."""
    return isinstance(part, Outer) and part.g.shape[-2] > 1 and numel <= IN_PLACE_ELEMENTS


def may_be_later(fisher: OnlineFisher, layer: Layer, like: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether a layer is added as any other is: here, in one dtype, and whatever other ranks find."""
    if fisher.penalty is not None or fisher.ranks is not None or fisher.on_nonfinite == "raise":
        return False
    dtype, device = like.dtype, like.device
    for other in (*others, *fisher.by_layer[layer.name].totals):
        if other.dtype is not dtype or other.device != device:
            return False
    return True


def wait_formed(fisher: OnlineFisher, record: ForwardRecord, layer: Layer, squares: Tensor) -> None:
    """A layer's squares wait from now on; where too much would, all are added."""
    record.layers[layer.name].received = True
    record.formed.append((layer, squares))
    record.elements_formed += squares.numel()
    if record.elements_formed > chunk_elements(squares.device):
        add_formed(fisher, record)


def add_formed(fisher: OnlineFisher, record: ForwardRecord) -> None:
    """Add the squares of a record that wait."""
    waiting, record.formed, record.elements_formed = record.formed, [], 0
    every = [(layer, squares) for layer, squares in waiting if not record.layers[layer.name].troubled]
    if every:
        fisher.troubles.guarded(record, [layer.name for layer, _ in every], _add, fisher, record, every)


def _add(fisher: OnlineFisher, record: ForwardRecord, every: Sequence[tuple[Layer, Tensor]]) -> None:
    goods = None
    if fisher.on_nonfinite == "skip":
        goods = finite(torch.stack([squares.amax() for _, squares in every]))
    fisher.add_together(record, [layer for layer, _ in every], partial(_add_to, every, goods), goods)


def _add_to(
    every: Sequence[tuple[Layer, Tensor]],
    goods: Tensor | None,
    outs: Sequence[Mapping[str, Tensor]],
    *,
    beta: float,
    alpha: float,
) -> None:
    """``out ← beta · out + alpha · squares`` of each parameter of the layers that are good; overwrites the squares."""
    totals = [total for own in outs for total in own.values()]
    parts = [part for layer, squares in every for part in squares.split_with_sizes(layer.sizes())]
    if goods is None:
        add_each(totals, parts, beta=beta, alpha=alpha)
        return
    for _, squares in every:
        squares.nan_to_num_()  # times zero, where it does not count
    factors = zip(every, goods.to(parts[0].dtype).unbind(), strict=True)
    by_parameter = [good for (layer, _), good in factors for _ in layer.parameters]
    add_products(totals, parts, by_parameter, beta=beta, alpha=alpha)
