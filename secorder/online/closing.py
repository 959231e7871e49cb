"""The end of a backward: waiting calls are added, the gradient is audited, and failures are marked."""

from collections import Counter
from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from .._torch.engine import accumulate_node, current_backward, in_backward, will_accumulate
from .._torch.fsdp import local
from .._torch.sparse import entries
from ..layers.contraction import IN_PLACE_ELEMENTS
from ..layers.low_precision import contraction
from ..layers.per_sample import PerSample
from ..layers.selection import Layer
from .agreement import share_troubles
from .audit.freivalds import Comparison
from .audit.penalty import add_shared, explains_all, keep_early
from .delivery import deliver, deliver_module
from .fisher import OnlineFisher
from .losses.scale import tell_scale
from .norms import add_norms, bring_zeros, take_norms, takes_norms
from .record import Backward, ForwardRecord
from .sums import ADDING, count_samples
from .waiting import add_waiting

_MEASURED_BY = attrgetter("name", "measured_by")

_SECOND = (
    "it got its gradient in a second backward through one forward, after its samples were counted without it: add the "
    "losses and call backward once."
)
_NOT_ASKED_FOR = (
    "its gradient is left out of the backward, which was called with inputs= and not all of its parameters among them: "
    "name them all, or call backward without inputs=, or leave the layer out with layers=."
)
_UNLIKE = (
    "one backward runs through several forwards, in which it was measured in different ways, so that row n's "
    "gradients cannot be added up over them (a state that objects in lists hand from one forward to the next, rows "
    "that depend on data): hand the state on as tensors, leave the layer out with layers=, or measure it with a "
    "one-shot call."
)
_UNRETURNED = (
    "its gradient comes from a forward of the model that returned nothing that depends on it (an output that is kept "
    "on the module, an iterator, or a forward that raised): let the model return what the loss is computed from."
)


def check_together(fisher: OnlineFisher, backward: Backward, record: ForwardRecord) -> None:
    """One more forward takes part in a backward: are its samples its own, or those of the others?"""
    others = backward.records
    same = [one for one in others if one.num_samples == record.num_samples]
    if fisher.forwards == "separate" or (fisher.forwards is None and not same):
        return
    if fisher.forwards == "joined":
        if len(same) < len(others):
            fisher.troubles.mark(
                record.called,
                'the forwards of one backward hold different numbers of samples, so that forwards="joined" cannot '
                'be: pass forwards="separate".',
            )
        return
    both = [name for name in record.called if any(one.layers[name].calls for one in same)]
    names = [own for name in both for own in record.attribution.owners(name)]
    if derived := [name for name in names if fisher.troubles.saw_derivative(name)]:  # which no answer would help
        fisher.troubles.mark(derived, fisher.troubles.outside(derived[0]))
    fisher.troubles.mark(
        names,
        "one backward runs through several forwards of the model with as many samples each, and it cannot be seen "
        'whether row n of all of them is one sample: pass forwards="joined" where it is (a siamese net, a rollout), '
        'or forwards="separate" where each forward has samples of its own.',
    )


def unrecorded(fisher: OnlineFisher) -> None:
    """A gradient has come to a forward that was not recorded."""
    if in_backward():
        fisher.others.append(current_backward())


def second_backward(
    fisher: OnlineFisher, record: ForwardRecord, names: Iterable[str], before: Tensor | None, now: Tensor
) -> None:
    """A second backward reaches layers through a forward whose samples are counted.

    The same loss once more changes nothing: the forward is counted once. Another loss is to be told of, at all layers
    that it reaches, also by no call: the derivatives that a gradient penalty is made of.
    """
    owners = [own for name in names for own in record.attribution.owners(name) if own in fisher.sums]
    if record.unreturned:
        fisher.troubles.leave_out(record, owners, _UNRETURNED)
    elif before is None:
        fisher.troubles.mark(owners, _SECOND)
    else:
        if record.again is None or record.again[0] != current_backward():
            reached = [x.name for x in fisher.layers if _reached(record, x)]
            fisher.troubles.saw_at("second", reached)
            is_one = [int(x.name in reached) for x in fisher.layers]
            record.again = current_backward(), torch.tensor(is_one, device=fisher.failures.counts.device)
        reaches = record.again[1]
        fisher.failures.counts.add_(reaches * (before != now).to(reaches))


def _reached(record: ForwardRecord, layer: Layer) -> bool:
    """Whether the backward that runs now accumulates a gradient of a layer; of a frozen one, whether it may pass by."""
    own = [p for p in record.parameters(layer).values() if p.requires_grad]
    return any(will_accumulate(accumulate_node(p)) for p in own) if own else layer.name in record.called


def close(fisher: OnlineFisher, backward: Backward) -> None:
    """A backward has ended: add what its records still hold, and audit it."""
    records = []
    for record in backward.records:
        if not backward.audit.empty or backward.whole or any(own.reached for own in record.layers.values()):
            records.append(record)
        else:  # torch.autograd.grad, or a backward that stopped before the parameters
            record.backward = None
    if records and backward.number in fisher.others:
        fisher.troubles.mark(
            [own for record in records for name in record.called for own in record.attribution.owners(name)],
            "one backward runs through several forwards of the model of which some are not recorded (every=), so "
            "that their gradients cannot be separated: pass every=1, or call backward for each forward.",
        )
    if not fisher.called.issuperset(fisher.by_layer):
        fisher.called.update([name for record in records for name in record.called])
    if len(records) == 1 and records[0].scales:
        tell_scale(fisher, records[0].scales)
    if fisher.penalty is not None and len(records) == 1:
        keep_early(backward, records[0], fisher.layers)
    fisher.at_once = len(records)
    groups = [records] if fisher.forwards == "joined" and records else [[record] for record in records]
    for group in groups:
        _add_group(fisher, backward, group)
    if fisher.penalty is not None:
        add_shared(fisher, backward, records)
    else:
        _audit(fisher, backward)
        if fisher.ranks is not None and groups:
            share_troubles(fisher, fisher.ranks)
        if fisher.troubles.strict and (failed := failed_audits(fisher)):  # on all ranks, as they share it
            fisher.troubles.mark(failed, fisher.troubles.outside(failed[0]))
    if fisher.accumulation.scale == 1.0:
        fisher.accumulation.left = None
    else:
        fisher.accumulation.ended(fisher.layers, records)
    backward.records.clear()  # which refer to it


def _add_group(fisher: OnlineFisher, backward: Backward, group: Sequence[ForwardRecord]) -> None:
    """Add what a forward, or several whose row n is one sample, still hold."""
    first, *others = group
    if others:
        _leave_out_unlike(fisher, group)
    elif _is_complete(fisher, backward, first):
        if first.waiting or first.formed:
            add_waiting(fisher, first)
        _close(fisher, first)
        return
    brought = [(name, own) for record in group for name, own in record.layers.items() if own.captured or own.modules]
    captured = {name for name, own in brought if own.captured}
    for layer in first.attribution.layers if captured else ():
        if layer.name in captured:
            fisher.troubles.guarded(first, (layer.name,), deliver, fisher, group, layer)
    for record in group:
        if record.waiting or record.formed:
            add_waiting(fisher, record)
    for key in dict.fromkeys([name for name, own in brought if own.modules]):
        layer = next(x for x in (*first.fallback, *first.attribution.layers) if x.name == key)
        names = [x.name for x in first.parts_of(layer)]
        fisher.troubles.guarded(first, names, deliver_module, fisher, group, layer)
    for record in others:
        record.closed = True
    _leave_out_unasked(fisher, backward, first)
    _add_record(fisher, first)


def _is_complete(fisher: OnlineFisher, backward: Backward, record: ForwardRecord) -> bool:
    """Whether the only forward of a backward has brought what it has to bring of every layer, and nothing beside."""
    if backward.early or record.attribution.ties or record.layers.keys() != fisher.by_layer.keys():
        return False
    return not [own for own in record.layers.values() if own.captured or own.modules or not own.received]


def _add_record(fisher: OnlineFisher, record: ForwardRecord) -> None:
    """Add what a record does not bring by calls whose gradient has come, and close it: tied layers, zeros."""
    if record.attribution.ties:
        _add_tied(fisher, record)
    nothing_early = record.backward is not None and not record.backward.early
    for index, layer in enumerate(fisher.layers):
        name, own = layer.name, record.layers[layer.name]
        if own.received and nothing_early:
            continue
        if own.received or own.troubled or own.without_gradient:
            _audit_early(fisher, record, index)
            continue
        if not any(p.requires_grad for p in layer.parameters.values()) and not own.calls:
            continue
        sums = fisher.by_layer[name]
        _audit_early(fisher, record, index)
        _audit_trained(fisher, record, index)
        if takes_norms(record):
            bring_zeros(fisher, record, name)
        if fisher.accumulate == "diagonal":
            with ADDING:
                if fisher.decay is not None:
                    for total in sums.sums:
                        total.mul_(fisher.decay)
                sums.count(fisher.count_of(record), None, fisher.decay, fisher.of_all(record))
    if not fisher.called.issuperset(fisher.by_layer):
        audit_uncalled(fisher)
    _close(fisher, record)


def _close(fisher: OnlineFisher, record: ForwardRecord) -> None:
    """Close a record of which everything is added: count it."""
    record.closed = True
    fisher.measured_by.update(map(_MEASURED_BY, (*record.attribution.layers, *record.fallback)))
    with ADDING:
        fisher.batches += 1
        if not (record.stacked or (takes_norms(record) and _add_norms(fisher, record))):
            count = fisher.count_of(record)
            if record.goods or isinstance(count, Tensor):
                count_samples(fisher.counted, count, record.goods, len(fisher.layers))
            else:
                fisher.count_later((), count)


def _add_norms(fisher: OnlineFisher, record: ForwardRecord) -> bool:
    """Add what the norms tell; whether it is they that count the samples, where nothing else is accumulated."""
    if fisher.accumulate != "trace":
        add_norms(fisher, record, None)
        return False
    counted = add_norms(fisher, record, fisher.counted)
    for name, own in record.layers.items():
        if own.norms is not None:
            fisher.by_layer[name].batches += 1
    return counted


def _leave_out_unlike(fisher: OnlineFisher, group: Sequence[ForwardRecord]) -> None:
    """Leave the batch out of layers that the forwards are not measured alike at."""
    names = dict.fromkeys(name for record in group for name in record.called)
    unlike = [x for x in names if len({record.strategy(x) for record in group if record.layers[x].calls}) > 1]
    owners = dict.fromkeys(own for name in unlike for record in group for own in record.attribution.owners(name))
    fisher.troubles.leave_out(group[0], owners, _UNLIKE)
    group[0].leave_out(unlike)


def _audit(fisher: OnlineFisher, backward: Backward) -> None:
    """Compare the whole gradients of a backward that has ended with what its records explain."""
    if backward.audit.empty or not backward.alone:
        return  # nothing was looked at, or what reached the parameters meanwhile may be another thread's
    troubled = {name for record in backward.records for name, own in record.layers.items() if own.troubled}
    tied = [record.attribution for record in backward.records if record.attribution.ties]
    chosen = [(index, layer) for index, layer in enumerate(fisher.layers) if layer.name not in troubled]
    if halves := backward.audit.halves():
        names = [x.name for _, x in chosen if any(id(p) in halves for p in x.parameters.values())]
        fisher.troubles.mark(names, _NOT_ASKED_FOR)
    found: list[Comparison] = []
    for index, layer in chosen:
        holders = {layer.name}.union(*[one.holders(layer.name) for one in tied]) if tied else (layer.name,)
        found += backward.audit.compared(index, layer.parameters, holders)
    fisher.failures.compare(found)


def _audit_early(fisher: OnlineFisher, record: ForwardRecord, index: int) -> None:
    """Whether something came for a layer before the audit could see it, where no call brought a gradient.

    A penalty's gradient is accumulated before the backward reaches the forward, and so is that of a derivative, or of a
    parameter that the loss uses.
    """
    layer, backward = fisher.layers[index], record.backward
    if record.layers[layer.name].troubled:
        return
    if fisher.penalty is not None and explains_all(record, layer):
        return
    records = [record] if backward is None else backward.records
    reached = any(one.layers[layer.name].received for one in records)
    for p in layer.parameters.values() if not layer.sharded else ():
        unseen = not reached or (
            backward is not None and backward.alone and id(p) in backward.early and not backward.audit.saw(p)
        )
        if unseen and p.grad is not None and record.moved(p):
            fisher.failures.counts[index].add_((entries(local(p.grad)) != 0).any())


def _audit_trained(fisher: OnlineFisher, record: ForwardRecord, index: int) -> None:
    """Whether a layer that no forward has called is trained all the same: then that is by other calls."""
    layer = fisher.layers[index]
    if layer.name in fisher.called or (fisher.penalty is not None and explains_all(record, layer)):
        return
    for p in layer.parameters.values():
        if p.requires_grad and p.grad is not None and fisher.uncalled.trained(p):
            fisher.troubles.saw_at("uncalled", [layer.name])
            fisher.failures.counts[index].add_(entries(local(p.grad)).abs().sum() != 0)


def failed_audits(fisher: OnlineFisher) -> list[str]:
    """The layers that have failed an audit; the host waits for the device to know."""
    return [layer.name for layer, count in zip(fisher.layers, fisher.failures.read(), strict=True) if count]


def audit_uncalled(fisher: OnlineFisher) -> None:
    """Layers that are trained by calls that no hook sees are not told."""
    for index, moved in fisher.uncalled.moved(fisher.layers, fisher.called) if fisher.batches or fisher.called else ():
        fisher.troubles.saw_at("uncalled", [fisher.layers[index].name])
        fisher.failures.counts[index].add_(moved)


def _leave_out_unasked(fisher: OnlineFisher, backward: Backward, record: ForwardRecord) -> None:
    """Layers that a backward with ``inputs=`` does not ask for have a gradient that is not known, rather than none."""
    missing = {name: own for name, own in record.layers.items() if not (own.received or own.parts)}
    if not missing:
        return
    passed = [name for name, own in missing.items() if own.passed == backward.number]
    if passed:
        owners = [own for name in passed for own in record.attribution.owners(name)]
        fisher.troubles.leave_out(record, [x for x in fisher.sums if x in owners], _NOT_ASKED_FOR)
    if backward.partial:
        without = [x for x, own in missing.items() if own.calls and not (own.troubled or own.without_gradient)]
        fisher.troubles.mark([x for x in fisher.sums if x in without], _NOT_ASKED_FOR)
        record.leave_out(without)


def _add_tied(fisher: OnlineFisher, record: ForwardRecord) -> None:
    """Add what the layers that share a parameter brought in this backward."""
    parts = {name: own.parts for name, own in record.layers.items() if own.parts is not None}
    for own in record.layers.values():
        own.parts = None
    found: list[tuple[Layer, list[list[PerSample]], Tensor | None]] = []
    for layer in fisher.layers:
        holders = record.attribution.ties.get(layer.name, {})
        brought = {local: [(parts[x], name) for x, name in by if x in parts] for local, by in holders.items()}
        here = [part for pairs in brought.values() for part, _ in pairs]
        if here and not record.layers[layer.name].troubled:
            gradients = [[part[0][name] for part, name in brought[local]] for local in layer.parameters]
            goods = [good for _, good in here if good is not None]
            found.append((layer, gradients, torch.stack(goods).all() if goods else None))
            record.layers[layer.name].received = True
        elif holders:
            record.layers[layer.name].received = False
    _add_forms(fisher, record, found)


def _add_forms(
    fisher: OnlineFisher,
    record: ForwardRecord,
    found: Sequence[tuple[Layer, Sequence[Sequence[PerSample]], Tensor | None]],
) -> None:
    """Add layers' per-sample gradients of each parameter; what several layers hold is worked out once."""
    holding = Counter(_same(own) for _, gradients, _ in found for own in gradients)
    squares: dict[tuple[int, ...], Tensor] = {}
    norms: dict[tuple[tuple[int, ...], ...], Layer] = {}
    for layer, gradients, good in found:
        if takes_norms(record):
            first = norms.setdefault(tuple(map(_same, gradients)), layer)
            take_norms(fisher, record, layer, gradients, None if first is layer or layer.split else first.name)
        if fisher.accumulate != "diagonal":
            continue
        parts: list[Tensor | Sequence[PerSample]] = list(gradients)
        for index, (own, numel) in enumerate(zip(gradients, layer.sizes(), strict=True)):
            key = _same(own)
            if own and holding[key] > 1 and numel <= IN_PLACE_ELEMENTS:
                if key not in squares:
                    squares[key] = contraction(fisher.low(record, layer))(own, numel=numel)
                parts[index] = squares[key].clone()  # what is handed in is overwritten
        fisher.add_squares(record, layer, parts, good)


def _same(parts: Sequence[PerSample]) -> tuple[int, ...]:
    return tuple(map(id, parts))
