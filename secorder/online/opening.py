"""The beginning and the end of a recorded forward: a record is opened, and it is settled where its samples are."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from .._torch.graph import nodes_made
from .._torch.pytree import tensors_in
from ..layers.layout import Layout
from ..layers.selection import Layer
from ..parallel.ranks import Ranks
from .agreement import leave_out_together, opened_together
from .capture import module_called
from .carried import carried
from .exchanged import refresh, tell_of_new
from .finite import finite
from .fisher import OnlineFisher
from .layer_record import Start
from .looking import look_again, look_at_other_kind, look_before, told_otherwise
from .losses.reduction import weights_of
from .losses.watching import watch_losses, watches
from .operations import explain_uses, follow, hook_uses
from .record import ForwardRecord, slot
from .samples.attribution import Attribution
from .samples.hypotheses import shapes_of
from .samples.linear_backward import NOT_LINEAR
from .samples.relation import Shape, explain, whole_call
from .troubles import OPEN, OUTSIDE, coupled, no_dimension

if TYPE_CHECKING:
    from .hooks import Attachment

#: Shapes of calls of which an attribution remembers where their samples are, and what stands for others.
REMEMBERED, UNSEEN = 4096, cast(Any, object())

_REQUIRES_GRAD = attrgetter("requires_grad")


def open_record(attachment: "Attachment", args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardRecord | None:
    """The record of a forward that begins; None where there is nothing to record."""
    fisher, attributions = attachment.fisher, attachment.attributions
    if not refresh(fisher, attributions):
        return None
    shapes = shapes_of((args, kwargs) if kwargs else args)
    known, count, scheduled = attributions.meet((args, kwargs), shapes)
    verified = False
    unknown = count is None and (known is None or scheduled or not known.undecided)
    needed = unknown or (known is not None and known.provisional and count != 0)
    wanted = scheduled and not attributions.certain(known) and count is not None and count > 1
    if fisher.ranks is None:  # those that hold other numbers of samples are not to differ in what they look at
        scheduled = (
            scheduled or attachment.wanted or watches(attachment) or (count is not None and fisher.sizes.wants(count))
        )
    if not (needed or wanted or fisher.ranks):
        return _opened(fisher, known, count, shapes, (False, scheduled), (args, kwargs))
    empty = True in [0 in shape[:2] for shape in shapes]
    if fisher.ranks is not None:  # verification runs the model: all ranks take it, or none
        someone_needs, someone_does_not_want, someone_has_none = fisher.ranks.largest([needed, not wanted, empty])
        needed, wanted, empty = someone_needs > 0, not someone_does_not_want, someone_has_none > 0
    error: Exception | None = None
    if needed or wanted:
        if empty:
            fisher.troubles.saw("empty")
            return None
        with attachment.alone() as alone:
            if alone:
                verified = True
                try:
                    known = look_before(fisher, attributions, known, args, kwargs)
                except Exception as raised:
                    if fisher.ranks is None:
                        raise
                    known, error = None, raised
                count = None if known is None else known.count((args, kwargs), shapes)
            elif needed:
                fisher.troubles.saw("other threads")
                return None
    opened = partial(_opened, fisher, known, count, shapes, (verified, scheduled), (args, kwargs))
    return opened() if fisher.ranks is None else opened_together(fisher, fisher.ranks, error, opened)


def _opened(
    fisher: OnlineFisher, known: Attribution | None, count: int | None, shapes: Any, looked: Any, arguments: Any
) -> ForwardRecord | None:
    """The record of a batch of which it is known where samples are, or is not."""
    if known is not None and known.coupled and not known.normalised:
        return _unattributed(fisher, coupled(fisher.troubles, known, shapes))
    if known is None or count is None:
        return None if known is None or not known.undecided else _unattributed(fisher, f"{known.undecided}.")
    if count == 0 and fisher.ranks is None:
        fisher.troubles.saw("empty")
        return None
    args, kwargs = arguments
    record = ForwardRecord(known, count, shapes, verified=looked[0], scheduled=looked[1])
    if not known.certain:  # what is run again, if any
        again = known.reruns(fisher.model)
        draws = looked[0] or fisher.draws or again  # else what is run again is watched for it
        record.start = Start(fisher.model, args, kwargs, known.changing, held=again, draws=draws)
    if any(looked):
        tell_of_new(fisher)
    if known.carries:
        record.carried = carried(fisher.model)
    weights = weights_of(fisher.reduction, args, kwargs, count) if callable(fisher.reduction) else None
    if fisher.reduction == "sum":
        record.mean = False
    elif weights is not None:
        record.mean, weights = False, weights.double()
        weights = torch.where(finite(weights), weights, torch.nan)  # of an infinite one, too, the batch does not count
        record.counted = (weights != 0).sum()
        record.weights = torch.where(weights != 0, 1 / weights, 0.0)
    return record


def _unattributed(fisher: OnlineFisher, reason: str) -> ForwardRecord | None:
    """A forward of which it is not known where samples are: no harm is done unless a backward comes to it."""
    if fisher.troubles.strict or fisher.ranks is not None:
        fisher.troubles.mark(fisher.sums, reason)
        return None
    return ForwardRecord(Attribution(), 0, (), verified=False, unattributed=reason)


def settle(attachment: "Attachment", record: ForwardRecord, arguments: Any, output: Any) -> None:
    """The forward has ended: where the samples are in each call, by what is known, or verified anew."""
    fisher = attachment.fisher
    made = nodes_made() - record.began
    start, record.start = record.start, None
    carried, record.carried = record.carried, ()
    fisher.draws = fisher.draws or (record.verified and start is not None and start.drew())
    if True not in map(_REQUIRES_GRAD, tensors_in(output)):
        fisher.troubles.saw("no gradient")
        record.closed = record.unreturned = True
        return
    if record.unattributed:
        return
    watch_losses(attachment, record, output)
    record.slots = {id(p): slot(p) for layer in fisher.layers for p in layer.parameters.values() if p.grad is not None}
    if record.attribution.by_operations:
        begins = [*tensors_in(arguments), *carried]  # what another forward has computed them by is not followed
        outputs = list(tensors_in(output))
        if follow(record, record.attribution, outputs, begins):
            attachment.attributions.give_up_on([name for name, own in record.layers.items() if own.unfollowed])
    if fisher.ranks is not None:
        _settle_together(attachment, fisher.ranks, record, start)
        return
    _require_present(fisher, record)
    unexplained = _explain(record, record.attribution)
    found = record.attribution if record.verified else None
    if start is not None:
        last = [t.grad_fn.name() for t in tensors_in(output) if t.grad_fn is not None]
        kind = made, *last, *[(number - record.began, *before) for number, *before in record.path]
        if found is None and attachment.attributions.graphs.is_new(kind):
            found = look_at_other_kind(attachment, record, start, output, unexplained)
            unexplained += [] if found is None else [x for x in told_otherwise(record, found) if x not in unexplained]
        if found is not None:
            attachment.attributions.graphs.saw(kind)
    if unexplained and start is not None:
        if found is None and _may_be_told(fisher, record.attribution, unexplained):
            found = look_again(attachment, start)
        if found is not None and not (found.unclear or found.undecided):
            same = {x.name for x in record.attribution.layers if x in found.layers}
            if record.attribution.by_operations:
                follow(record, found, outputs, begins)
            unexplained = [x for x in _explain(record, found) if x in unexplained or x.name not in same]
            hook_uses(attachment, record)
            _fall_back(attachment, record, found, unexplained, start, output)
            return
    hook_uses(attachment, record)
    for layer in unexplained:
        _unknown(fisher, record, record.attribution, layer)


def _settle_together(attachment: "Attachment", ranks: Ranks, record: ForwardRecord, start: Start | None) -> None:
    """Settle where parameters lie over ranks: they verify again together, and leave out the same layers."""
    fisher = attachment.fisher
    error: Exception | None = None
    unexplained: list[Layer] = []
    try:
        _require_present(fisher, record)
        unexplained = _explain(record, record.attribution)
    except Exception as raised:
        error = raised
        record.leave_out(fisher.sums)
    wanted, unable = ranks.largest([bool(unexplained), start is None or record.verified])
    if wanted and not unable:
        assert start is not None
        found = look_again(attachment, start)
        if found is not None and not (found.unclear or found.undecided):
            unexplained = [x for x in _explain(record, found) if x in unexplained]
    for layer in unexplained:
        _unknown(fisher, record, record.attribution, layer)
    leave_out_together(fisher, ranks, record)
    if error is not None:
        raise error


def _may_be_told(fisher: OnlineFisher, found: Attribution, layers: Sequence[Layer]) -> bool:
    """Whether another verification may tell of layers: of one that is not refused anyway, nor sought in vain."""
    nowhere = not _tells(fisher, found) or all(layout is None for layout in found.outputs)
    untold = [x.name for x in layers if x.name in found.unknown and x.enclosing is fisher.model]
    in_vain = found.not_linear | {name for name in untold if nowhere or found.sharing(name)}
    return any(x.name not in in_vain and x.name not in fisher.troubles.marks for x in layers)


def _tells(fisher: OnlineFisher, found: Attribution) -> bool:
    """Whether the outputs that hold samples tell all of the loss, but for a penalty that is known to be in it."""
    return found.made_of == "ends" or (fisher.penalty is not None and found.made_of == "parameters")


def _explain(record: ForwardRecord, attribution: Attribution) -> list[Layer]:
    """Decide on the layouts of the record's calls; the layers of which some cannot be explained."""
    unexplained = []
    for layer in record.attribution.layers:
        name, own = layer.name, record.layers[layer.name]
        if own.unfollowed:
            unexplained.append(layer)
            continue
        if not own.calls:
            continue
        key = (name, record.shapes, record.num_samples, *own.calls)
        layouts = UNSEEN if layer.by_operations else attribution.explained.get(key, UNSEEN)
        if layouts is UNSEEN:
            if len(attribution.explained) > REMEMBERED:
                attribution.explained.clear()
            layouts = attribution.explained[key] = _layouts(record, attribution, layer)
        if layouts is not None and name not in attribution.outside:
            own.layouts = layouts
        else:
            unexplained.append(layer)
    return unexplained


def _layouts(record: ForwardRecord, attribution: Attribution, layer: Layer) -> list[list[Layout | None]] | None:
    """Where the samples are in each output of a layer's calls; None where that is not known of some."""
    name, own = layer.name, record.layers[layer.name]
    known = () if name in attribution.outside | attribution.unknown else attribution.known.get(name, ())
    if own.uses is not None:
        found = explain_uses(record, own.uses, known)
        return None if any(None in row for row in found) else found
    indices = itertools.count()
    found = [
        [explain(known, next(indices), shape, record.shapes, record.num_samples) for shape in shapes]
        for shapes in own.calls
    ]
    nowhere = {seen.place for seen in known if seen.layout is None}
    told = [x for place, x in enumerate(itertools.chain(*found)) if place not in nowhere]
    return found if told and None not in told else None


def _fall_back(
    attachment: "Attachment",
    record: ForwardRecord,
    found: Attribution,
    layers: Sequence[Layer],
    start: Start,
    output: Any,
) -> None:
    """Layers whose own calls do not tell in this batch: the whole model runs again for them."""
    fisher, model = attachment.fisher, attachment.model
    fisher.draws = True
    able = [x for x in layers if x.name not in found.not_linear and not record.attribution.sharing(x.name)]
    if found.grouping is None and not found.count_by_shapes(record.shapes):  # it is of another number of samples
        able = []
    for layer in layers:
        if layer not in able:
            _unknown(fisher, record, found, layer)
    if not able:
        return
    for own in [record.layers[x.name] for x in able]:
        own.calls, own.hooked, own.replaced = [], set(), True
    record.fallback = [replace(x, enclosing=model, rule=None, by_operations=False) for x in able]
    record.layers[able[0].name].starts += (start,)
    module_called(attachment, record, record.fallback[0], (), {}, output)
    calls = record.layers[record.fallback[0].name].calls
    outputs = calls[0] if calls else ()
    layouts = [_output_layout(found, i, shape, record) for i, shape in enumerate(outputs)]
    nowhere = all(layout is None for layout in layouts)
    if nowhere or not _tells(fisher, found):
        reason = no_dimension(record, record.fallback[0]) if nowhere else OPEN
        fisher.troubles.leave_out(record, [x.name for x in able], reason)
        return
    for layer in record.fallback:
        record.layers[layer.name].layouts = [layouts]


def _output_layout(found: Attribution, index: int, shape: Shape, record: ForwardRecord) -> Layout | None:
    """Where samples are in an output of the model: verified by this batch."""
    if record.num_samples == 1:
        return whole_call(shape)
    return found.outputs[index] if index < len(found.outputs) else None


def _unknown(fisher: OnlineFisher, record: ForwardRecord, attribution: Attribution, layer: Layer) -> None:
    if layer.name in attribution.not_linear:
        reason = NOT_LINEAR
    else:
        reason = OUTSIDE if layer.name in attribution.outside else no_dimension(record, layer)
    record.leave_out([layer.name])
    fisher.troubles.leave_out(record, record.attribution.owners(layer.name), reason)


def _require_present(fisher: OnlineFisher, record: ForwardRecord) -> None:
    """Mark layers that were not called since they are no longer in the model."""
    missing = [x for x in record.attribution.layers if not record.layers[x.name].calls and x.name in fisher.by_layer]
    if not missing:
        return
    modules: dict[str, nn.Module] = dict(fisher.model.named_modules())
    gone = [x.name for x in missing if modules.get(x.name) is not x.module]
    fisher.troubles.mark(gone, "it is no longer in the model (another module has taken its place): make a new probe.")
    record.leave_out(gone)
