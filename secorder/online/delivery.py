"""From the calls of a layer, all of which have come, to squares of per-sample gradients that are added up.

A layer with a rule brings its inputs and cotangents, one that is measured by operations what each of them makes, and a
module that is run again the per-sample gradients of all its parts. What they bring is told to the audit on the way.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch.fsdp import local
from .._torch.versions import versions
from ..layers.dtypes import cast, compute_dtype
from ..layers.layout import DIM_ZERO, Layout
from ..layers.low_precision import contraction
from ..layers.norms import DenseNorms
from ..layers.per_sample import PerSample, Rows, dense, per_sample_gradients, weighted
from ..layers.rank_one import RankOne, rank_one
from ..layers.rules import SQUARES, takes_any_leading_dim
from ..layers.selection import Layer
from ..layers.uses import Later, Piece, pieces
from ..oneshot.isolation import run_isolated
from ..parallel.tensor_parallel import own_rows
from .audit.penalty import explain
from .finite import total_of, witness
from .fisher import OnlineFisher
from .formed import form, is_formed, may_be_later, wait_formed
from .layer_record import Call
from .norms import keep_norms, take_norms, takes_norms
from .plan import plan_of
from .record import ForwardRecord
from .rerun import rerun_gradients
from .waiting import may_wait, wait

#: The layouts of a layer's calls where there is one, and row n of what it returns is sample n's.
ONE_ROW_A_SAMPLE = [[DIM_ZERO]]


def bring(
    fisher: OnlineFisher,
    record: ForwardRecord,
    layer: Layer,
    index: int,
    call: Call | Piece | Later | Exception,
    total: Tensor | None,
) -> None:
    """Take a call of a layer whose gradient has come; with the last of them the layer's squares are added.

    Where ranks wait for one another, a call may be what went wrong, raised at the layer's turn. ``total`` is the sum of
    the gradient's elements, if it is known yet.
    """
    own = record.layers[layer.name]
    own.captured.append((index, call, total))
    if fisher.forwards != "joined" and len(own.captured) == len(own.calls):
        deliver(fisher, [record], layer)


def bring_rank_one(
    fisher: OnlineFisher, record: ForwardRecord, layer: Layer, inputs: Sequence[Tensor], g: Tensor
) -> bool:
    """:func:`bring` of a linear layer's only call whose samples are its rows, at once; False where it is another."""
    plan, own, a = plan_of(fisher, layer), record.layers[layer.name], inputs[0]
    if plan is None or not plan.admits(a, g, record.waiting) or own.troubled or len(own.calls) != 1:
        return False
    if own.layouts != ONE_ROW_A_SAMPLE or record.weights is not None or record.autocast_dtype is not None:
        return False
    if record.attribution.ties and record.attribution.sharing(layer.name):
        return False
    if fisher.accumulate == "trace" and record.backward is not None and record.backward.audit.idle:
        own.received = True
        keep_norms(record, RankOne(layer, a, g, []))  # nothing else is asked of its factors, nor later
    else:
        g = g.detach() if g.requires_grad else g
        wait(fisher, record, RankOne(layer, a, g, versions((a, g))))
    return True


def deliver(fisher: OnlineFisher, records: Sequence[ForwardRecord], layer: Layer) -> None:
    """Add the squares of a layer's per-sample gradients: all calls of one backward (or of joined ones) have come."""
    record, came = records[0], []
    for own in [one.layers[layer.name] for one in records]:
        captured, own.captured = sorted(own.captured, key=lambda found: found[0]), []
        if not record.layers[layer.name].troubled:
            came += [(call, own.layouts[index][0], total) for index, call, total in captured]
    if not came:
        return
    calls, layouts, totals = zip(*came, strict=True)
    forms = pieces(calls) if layer.by_operations else {}
    if layer.by_operations and any(len(forms.get(name, ())) != 1 for name in layer.parameters):
        _deliver_pieces(fisher, record, layer, forms)
        return
    try:
        gradients: Mapping[str, PerSample] = {name: own[0] for name, own in forms.items()}
        gradients = gradients or _gradients(layer, calls, list(layouts))
        found = _squares(fisher, record, layer, gradients, calls, totals)
    except Exception:
        if fisher.ranks is not None and fisher.accumulate == "diagonal":  # others wait for what this rank cannot form
            fisher.ranks.give_up(layer.name)
        raise
    if found is None:
        return
    own = record.layers[layer.name]
    own.received = True
    if fisher.accumulate == "diagonal":
        parts, numbers = found
        good = fisher.good(layer, numbers)
        if own.parts is not None:
            own.parts = (own.parts[0], good)
        else:
            fisher.add_squares(record, layer, parts, good)


def _squares(
    fisher: OnlineFisher,
    record: ForwardRecord,
    layer: Layer,
    gradients: Mapping[str, PerSample],
    calls: Sequence[Call],
    totals: Sequence[Tensor | None],
) -> tuple[list[Tensor | Sequence[PerSample]], list[Tensor | None]] | None:
    """The squares of per-sample gradients, one form a parameter, or what they are made of; None where they wait.

    With numbers that are finite where all of them are; ``totals`` are the sums of the calls' cotangents, where known.
    """
    one = rank_one(layer, gradients) if len(calls) == 1 and fisher.ranks is None else None
    if one is not None and may_wait(fisher, record, one):
        wait(fisher, record, one)
        return None
    gradients, products = _weighted_and_audited(fisher, record, layer, gradients, () if layer.by_operations else calls)
    squares = form(fisher, record, layer, gradients)
    if squares is not None and may_be_later(fisher, layer, squares, [own for _, own in record.formed[:1]]):
        wait_formed(fisher, record, layer, squares)
        return None
    numbers: list[Tensor | None] = []
    if squares is None and fisher.accumulate == "diagonal":
        numbers += _multiplied_by(record)
        if layer.by_operations:
            numbers += map(_total_of, gradients.values())
        else:
            numbers += [total_of(local(c[1])) if own is None else own for c, own in zip(calls, totals, strict=True)]
    return _parts(fisher, record, layer, gradients, products, squares, numbers), numbers


def _weighted_and_audited(
    fisher: OnlineFisher, record: ForwardRecord, layer: Layer, gradients: Mapping[str, PerSample], calls: Sequence[Call]
) -> tuple[Mapping[str, PerSample], Mapping[str, Tensor]]:
    """A layer's per-sample gradients as they are weighted, whose norms are taken; the audit's numbers, by parameter."""
    products = _tell(fisher, record, layer, gradients, [g for _, g in calls])
    if record.weights is not None:
        gradients = {name: weighted(part, record.weights) for name, part in gradients.items()}
    if takes_norms(record) and not record.attribution.sharing(layer.name):
        take_norms(fisher, record, layer, [[gradients[name]] for name in layer.parameters])
    return gradients, products


def _parts(
    fisher: OnlineFisher,
    record: ForwardRecord,
    layer: Layer,
    gradients: Mapping[str, PerSample],
    products: Mapping[str, Tensor],
    squares: Tensor | None,
    seen: list[Tensor | None],
) -> list[Tensor | Sequence[PerSample]]:
    """The squares of a layer's per-sample gradients, or what they are made of.

    Formed already, they are those of all parameters (``squares``). What is finite where they are is added to ``seen``.
    """
    if record.attribution.sharing(layer.name):
        seen += [witness(part, products.get(name)) for name, part in gradients.items()]
        record.layers[layer.name].parts = (gradients, None)
        return []
    if fisher.accumulate != "diagonal":
        return []
    asked = fisher.on_nonfinite != "keep"
    if squares is not None:
        seen += [squares.amax()] if asked else []  # squares that are formed tell themselves whether they are finite
        return list(squares.split(layer.sizes()))
    found: list[Tensor | Sequence[PerSample]] = []
    contracted = contraction(fisher.low(record, layer))
    for name, numel in zip(layer.parameters, layer.sizes(), strict=True):
        part = gradients[name]
        if layer.sharded or is_formed(part, numel):  # before other ranks wait for it
            found.append(own := contracted([part], numel=numel))
            seen.append(own.amax() if asked and numel else None)
        else:
            found.append([part])
            seen.append(witness(part, products.get(name)) if asked else None)
    return found


def _deliver_pieces(
    fisher: OnlineFisher, record: ForwardRecord, layer: Layer, parts: dict[str, list[PerSample]]
) -> None:
    """The same for a layer that is measured by operations: several forms a parameter, none where it is not used."""
    seen = [*_multiplied_by(record), *[_total_of(form) for forms in parts.values() for form in forms]]
    for turn in range(max(map(len, parts.values()), default=0)):
        gradients = {name: forms[turn] for name, forms in parts.items() if turn < len(forms)}
        products = _tell(fisher, record, layer, gradients)
        if fisher.on_nonfinite != "keep":
            seen += [w for n, p in gradients.items() if (w := witness(p, products.get(n))) is not None]
    good = fisher.good(layer, seen)
    if record.weights is not None:
        weights = record.weights
        parts = {name: [weighted(form, weights) for form in forms] for name, forms in parts.items()}
    record.layers[layer.name].received = True
    own = [parts.get(name, []) for name in layer.parameters]
    if takes_norms(record):
        take_norms(fisher, record, layer, own)
    if fisher.accumulate == "diagonal":
        fisher.add_squares(record, layer, own, good)


def _gradients(layer: Layer, calls: Sequence[Call], layouts: list[Layout]) -> Mapping[str, PerSample]:
    """Per-sample gradients of a layer with a rule."""
    assert layer.rule is not None
    kind = compute_dtype(layer)
    cleaned = []
    for call in calls:
        if isinstance(call, Exception):
            raise call
    for index, (inputs, g) in enumerate(calls):
        inputs = tuple(cast(x if x.layout is torch.strided else x.to_dense(), kind) for x in inputs)
        g = cast(g.detach(), kind)
        if g.dim() == 1 and takes_any_leading_dim(layer.rule):  # one sample, without a dimension for it
            inputs, g, layouts[index] = tuple(x.unsqueeze(0) for x in inputs), g.unsqueeze(0), DIM_ZERO
        cleaned.append((inputs, g))
    rule = SQUARES.get(layer.rule, layer.rule)
    return _own_rows(layer, per_sample_gradients(rule, layer.module, cleaned, layouts))


def _own_rows(layer: Layer, gradients: Mapping[str, PerSample]) -> Mapping[str, PerSample]:
    """Of a table whose rows lie over the ranks, those that are here."""
    part = gradients.get("weight")
    if layer.spread is None or not layer.split or not isinstance(part, Rows):
        return gradients
    weight, (dim,) = layer.parameters["weight"], layer.spread.tensor
    if layer.spread.sharded_dim(weight, dim) != 0:
        return gradients
    first, count = layer.spread.part(weight, dim)
    return {"weight": Rows(*own_rows(part.ids, part.g, first, count), count)}


def deliver_module(fisher: OnlineFisher, records: Sequence[ForwardRecord], key: Layer) -> None:
    """The same for layers that are parts of a module that is run again."""
    record = records[0]
    layers = [x for x in record.parts_of(key) if not record.layers[x.name].troubled]
    calls = []
    for own in [one.layers[key.name] for one in records]:
        for call in own.modules:
            call.layouts = list(own.layouts[call.index]) if layers else []
            calls.append(call)
        own.modules = ()
    if not layers or not calls:
        return
    totals = [total_of(g) for call in calls for g in call.gradients if g is not None] + _multiplied_by(record)
    found: list[Any] = run_isolated(lambda direct: _rerun(fisher, record, layers, calls, direct))
    for layer, (squares, norms) in zip(layers, found, strict=True):
        own = record.layers[layer.name]
        if norms is not None:
            own.norms, own.squares = norms.squares()
        if fisher.accumulate == "diagonal":
            fisher.add_squares(record, layer, squares, fisher.good(layer, totals + [x.sum() for x in squares]))
        own.received = True


def _rerun(
    fisher: OnlineFisher, record: ForwardRecord, layers: list[Layer], calls: list[Any], direct: bool
) -> list[Any]:
    """Σ of squares of each layer by parameter, and norms; the audit's side of them on the way."""
    found: list[tuple[list[Tensor], DenseNorms | None]] = [
        (
            [p.new_zeros(p.numel(), dtype=compute_dtype(layer)) for p in layer.parameters.values()]
            if fisher.accumulate == "diagonal"
            else [],
            DenseNorms() if takes_norms(record) else None,
        )
        for layer in layers
    ]
    at = 0
    for chunk in rerun_gradients(layers, calls, record.num_samples, direct=direct):
        digits = [call.computed_in for call in calls if call.computed_in is not None]
        for layer, (sums, norms), gradients in zip(layers, found, chunk, strict=True):
            record.note_digits(compute_dtype(layer), digits)
            _tell(fisher, record, layer, dict(zip(layer.parameters, gradients, strict=True)))
            parts: Sequence[PerSample] = gradients
            if record.weights is not None:
                parts = [weighted(g, record.weights[at : at + len(g)]) for g in gradients]
            flats = [dense(part, p.numel()) for part, p in zip(parts, layer.parameters.values(), strict=True)]
            for total, flat in zip(sums, flats, strict=bool(sums)):
                total.add_((flat * flat).sum(0))
            if norms is not None:
                norms.add(flats)
        at += len(chunk[0][0]) if chunk and chunk[0] else 0
    return found


def _tell(
    fisher: OnlineFisher,
    record: ForwardRecord,
    layer: Layer,
    gradients: Mapping[str, PerSample],
    cotangents: Sequence[Tensor] = (),
) -> Mapping[str, Tensor]:
    """Tell the audit what a layer's gradients explain; the numbers, by parameter, where there are any."""
    if fisher.penalty is not None:
        explain(record, layer, gradients)
    elif record.backward is not None:
        audit, low, own = record.backward.audit, record.autocast_dtype, record.layers[layer.name]
        return audit.explain(layer.name, layer.parameters, gradients, low, own.elements, cotangents, own.sizes)
    return {}


def _total_of(part: PerSample) -> Tensor:
    """The sum of the elements of the cotangents that a per-sample gradient is made of."""
    return total_of(part if isinstance(part, Tensor) else part.g)


def _multiplied_by(record: ForwardRecord) -> list[Tensor]:
    """A number that is finite where what the samples' gradients are multiplied by is."""
    return [] if record.weights is None else [record.weights.sum()]
