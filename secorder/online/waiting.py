"""Layers whose calls wait to be added together: those whose per-sample gradients are outer products.

They wait until their factors take memory that counts, and at most until the backward ends.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers.one_by_one import OneByOne, Vectors
from ..layers.rank_one import RankOne, overwritten
from ..layers.side_by_side import Frame, SideBySide, columns_of
from .audit.freivalds import Audit
from .fisher import OnlineFisher
from .formed import add_formed, may_be_later
from .norms import keep_norms, takes_norms
from .record import ForwardRecord
from .sums import ADDING
from .troubles import OVERWRITTEN

#: Elements of factors that wait, at most, and layers.
MOST_ELEMENTS, MOST_LAYERS = 1 << 18, 64
#: Elements of factors up to which a copy of them costs less than the calls of the operations that it saves; and layers
#: up to which norms, which tell by themselves whether they are finite, take fewer calls layer by layer.
SMALL_ELEMENTS, FEW_LAYERS = 1 << 16, 6


def may_wait(fisher: OnlineFisher, record: ForwardRecord, one: RankOne) -> bool:
    """Whether a layer may be added later, together with others: by itself, without weights, in full precision."""
    layer, like = one.layer, one.cotangents
    if record.weights is not None or (record.attribution.ties and record.attribution.sharing(layer.name)):
        return False
    if fisher.low(record, layer):
        return False
    return may_be_later(fisher, layer, like, (one.inputs, record.waiting[0].cotangents if record.waiting else like))


def wait(fisher: OnlineFisher, record: ForwardRecord, one: RankOne) -> None:
    """A layer waits from now on; where too much would, all are added."""
    record.layers[one.layer.name].received = True
    record.waiting.append(one)
    record.elements_waiting += one.inputs.numel() + one.cotangents.numel()
    if record.elements_waiting > MOST_ELEMENTS or len(record.waiting) >= MOST_LAYERS:
        add_waiting(fisher, record)


def add_waiting(fisher: OnlineFisher, record: ForwardRecord) -> None:
    """Add the layers of a record that wait."""
    if record.formed:
        add_formed(fisher, record)
    waiting, record.waiting = record.waiting, []
    elements, record.elements_waiting = record.elements_waiting, 0
    layers = [one for one in waiting if not record.layers[one.layer.name].troubled]
    if gone := overwritten(layers):
        fisher.troubles.leave_out(record, gone, OVERWRITTEN)
        layers = [one for one in layers if one.layer.name not in gone]
    if layers:
        fisher.troubles.guarded(record, [one.layer.name for one in layers], _add, fisher, record, layers, elements)


def _add(fisher: OnlineFisher, record: ForwardRecord, layers: Sequence[RankOne], elements: int) -> None:
    assert record.backward is not None
    audit, low = record.backward.audit, record.autocast_dtype
    vectors = None if audit.idle else [audit.vectors(one) for one in layers]
    flags = [float("bias" in one.layer.parameters) for one in layers]
    frame: Frame | None = None
    few = fisher.accumulate == "trace" and len(layers) <= FEW_LAYERS
    if elements <= SMALL_ELEMENTS and not few and fisher.on_nonfinite == "skip":  # or what is no number is to be kept
        frame = _frame(fisher, layers, vectors, flags)
    if frame is not None and vectors is None and _may_be_stacked(fisher, record, layers):
        alpha = fisher.factor(record)
        record.stacked = True
        with ADDING:
            fisher.stacked.wait(layers, frame, record.num_samples, alpha, fisher.settle)
        return
    norms = [keep_norms(record, one) for one in layers] if takes_norms(record) else None
    goods: Tensor | None = None
    together: SideBySide | OneByOne
    if frame is not None:
        together = SideBySide(frame, columns_of([(one.inputs, one.cotangents) for one in layers])[None])
        goods = together.finite()[0]
        if vectors is not None:
            audit.explain_weights(layers, *together.explained(), low)
    else:
        together = OneByOne(layers, norms if fisher.accumulate == "trace" else None)
        if fisher.accumulate == "diagonal" and fisher.on_nonfinite == "skip":  # norms tell by themselves
            goods = together.finite()
        if vectors is not None:
            _explain(audit, together, layers, vectors, fisher.directions.constants.vector(flags, layers[0].inputs), low)
    if fisher.accumulate == "diagonal":
        fisher.add_together(record, [one.layer for one in layers], together.add_to, goods)


def _explain(
    audit: Audit,
    together: OneByOne,
    layers: Sequence[RankOne],
    vectors: Sequence[Vectors | None],
    with_bias: Tensor,
    low: torch.dtype | None,
) -> None:
    """Tell an audit what layers bring that are added one by one, all in few calls but those without vectors."""
    covered = [
        own if own is not None and audit.covers(one.layer.parameters["weight"]) else None
        for one, own in zip(layers, vectors, strict=True)
    ]
    if seen := [one for one, own in zip(layers, covered, strict=True) if own is not None]:
        audit.explain_weights(seen, *together.explained(covered, with_bias), low)
    for one, own in zip(layers, vectors, strict=True):
        if own is None:
            audit.explain(one.layer.name, one.layer.parameters, one.gradients, low)


def _may_be_stacked(fisher: OnlineFisher, record: ForwardRecord, layers: Sequence[RankOne]) -> bool:
    """Whether layers may be added together with those of later batches: all that there are, in a plain sum."""
    if fisher.accumulate != "diagonal" or fisher.decay is not None or takes_norms(record):
        return False
    return len(layers) == len(fisher.layers)


def _frame(
    fisher: OnlineFisher, layers: Sequence[RankOne], vectors: Sequence[Vectors | None] | None, flags: Sequence[float]
) -> Frame | None:
    """The frame of small layers whose factors go side by side; None where they cannot."""
    weights = [one.layer.parameters["weight"] for one in layers]
    for one, weight in zip(layers, weights, strict=True) if vectors is None else ():
        if weight.dim() != 2 or weight.dtype is not one.inputs.dtype:
            return None
    known = None if vectors is None else [own for own in vectors if own is not None]
    if known is not None and len(known) < len(layers):
        return None
    return fisher.directions.frame(weights, known, flags)
