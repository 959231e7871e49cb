"""Layers that wait to be added together: those whose per-sample gradients are products of one input and one cotangent.

They wait until their factors take memory that counts, and at most until the backward ends.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..layers.rank_one import RankOne, add_rank_one
from ..layers.side_by_side import SideBySide
from .finite import finite, total_of
from .norms import keep_norms, take_norms_together, takes_norms
from .record import ForwardRecord
from .troubles import OVERWRITTEN

if TYPE_CHECKING:
    from .fisher import OnlineFisher

__all__ = ["add_waiting", "may_wait", "wait"]

#: Elements of factors that wait, at most, and layers.
MOST_ELEMENTS, MOST_LAYERS = 1 << 18, 64
#: Elements of factors up to which a copy of them costs less than the calls of the operations that it saves.
SMALL_ELEMENTS = 1 << 16


def may_wait(fisher: "OnlineFisher", record: ForwardRecord, one: RankOne) -> bool:
    """Whether a layer is added as any other is: here, in one dtype, by itself, and whatever other ranks find."""
    layer, like = one.layer, one.cotangents
    if fisher.penalty is not None or fisher.ranks is not None or fisher.on_nonfinite == "raise":
        return False
    if record.weights is not None or record.attribution.sharing(layer.name) or fisher.low(record, layer):
        return False
    dtype, device = like.dtype, like.device
    others = [one.inputs, *fisher.sums[layer.name].sums, *(x.cotangents for x in record.waiting[:1])]
    return all(other.dtype is dtype and other.device == device for other in others)


def wait(fisher: "OnlineFisher", record: ForwardRecord, one: RankOne) -> None:
    """A layer waits from now on; where too much would, all are added."""
    record.received.add(one.layer.name)
    record.waiting.append(one)
    elements = sum([x.inputs.numel() + x.cotangents.numel() for x in record.waiting])
    if elements > MOST_ELEMENTS or len(record.waiting) >= MOST_LAYERS:
        add_waiting(fisher, record)


def add_waiting(fisher: "OnlineFisher", record: ForwardRecord) -> None:
    """Add the layers of a record that wait."""
    waiting, record.waiting = record.waiting, []
    layers = [one for one in waiting if one.layer.name not in record.troubled]
    overwritten = [one.layer.name for one in layers if one.overwritten()]
    if overwritten:
        fisher.troubles.leave_out(record, overwritten, OVERWRITTEN)
        layers = [one for one in layers if one.layer.name not in overwritten]
    if layers:
        fisher.troubles.guarded(record, [one.layer.name for one in layers], _add, fisher, record, layers)


def _add(fisher: "OnlineFisher", record: ForwardRecord, layers: Sequence[RankOne]) -> None:
    together = _side_by_side(fisher, record, layers)
    if together is not None:
        _add_side_by_side(fisher, record, layers, together)
        return
    assert record.backward is not None
    explain, low = record.backward.audit.explain, record.autocast_dtype
    products = [explain(x.layer.name, x.layer.parameters, x.gradients, low).get("weight") for x in layers]
    if takes_norms(record):
        take_norms_together(fisher, record, layers)
    if fisher.accumulate == "diagonal":
        goods = None
        if fisher.on_nonfinite == "skip":
            seen = [one.total for one in layers]  # a product has seen all of the inputs
            seen += [total_of(x.inputs) if own is None else own for x, own in zip(layers, products, strict=True)]
            goods = finite(torch.stack(seen).view(2, -1).sum(0))
        add = partial(add_rank_one, [one.factors for one in layers], keeps=None if goods is None else goods.unbind())
        fisher.add_rank_one(record, layers, add, goods)


def _side_by_side(fisher: "OnlineFisher", record: ForwardRecord, layers: Sequence[RankOne]) -> SideBySide | None:
    """The factors of small layers side by side; None where they are not, or a number that is none is to be kept."""
    if fisher.on_nonfinite != "skip" or sum([x.inputs.numel() + x.cotangents.numel() for x in layers]) > SMALL_ELEMENTS:
        return None
    assert record.backward is not None
    vectors = record.backward.audit.looks_at_weights(layers)
    if vectors is None:
        return None
    flags = [float("bias" in one.layer.parameters) for one in layers]
    frame = fisher.directions.frame([one.layer.parameters["weight"] for one in layers], vectors, flags)
    return None if frame is None else SideBySide(frame, [one.factors for one in layers])


def _add_side_by_side(
    fisher: "OnlineFisher", record: ForwardRecord, layers: Sequence[RankOne], together: SideBySide
) -> None:
    assert record.backward is not None
    goods = together.finite()
    bad, (values, sizes) = ~goods, together.explained()
    record.backward.audit.explain_weights(layers, values.masked_fill_(bad, torch.nan), sizes, record.autocast_dtype)
    if takes_norms(record):
        keep_norms(fisher, record, layers, together.norms().masked_fill_(bad[:, None], torch.nan))
    if fisher.accumulate == "diagonal":
        fisher.add_rank_one(record, layers, together.add_to, goods)
