"""What is watched of a forward's loss: it is looked at once a backward pass begins that leads to the forward.

It takes the part of the graph between loss and outputs before the user's backward pass frees it; see the other files
for what each look is for.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import nan, prod
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from ..._torch.autocast import no_autocast
from ..._torch.beginning import before_backward, wait_no_more, waits
from ..._torch.graph import Node, current_node, is_builtin, nodes_behind, number_of, shape_of, tells_recomputation
from ..._torch.loss_graph import Place, UnknownNode, normalises
from ..._torch.surroundings import inside_transform
from ...layers.selection import Layer
from ..changed_gradients import watch_gradients
from ..fisher import OnlineFisher
from ..record import ForwardRecord
from ..samples.beside import Beside, is_made, made_beside, tensor_at
from ..samples.hypotheses import floating
from ..troubles import tell_normalised
from .choices import chooses
from .coupling import couples
from .kinds import kind_of
from .marks import Output, mark_by_number, mark_outputs, outputs_behind
from .powers import paths_of, reduced_otherwise
from .scale import tell_scaler, watch_scale
from .seen import SeenLoss, roots_of, see
from .several import reduced_over_several
from .weights import weights_of_loss

if TYPE_CHECKING:
    from ..hooks import Attachment

_COUPLED = (
    "the loss couples the samples of a batch: the gradient on each one's outputs changes with those of others (a "
    "contrastive loss, the hardest samples, a statistic of the batch, the root of a mean), so that no sample has a "
    "gradient of its own: {}use a loss that is a mean or a sum over samples, pass sample_dim= where samples are in "
    "another dimension of the model's arguments than the first, or leave the layers out with layers=."
)

_COUPLED_BESIDE = (
    "the loss uses {}, which the model's forward makes beside outputs of samples, and which is no sum of what each "
    "sample makes (a balance of experts, a statistic of the batch): samples influence one another's gradients, so that "
    "none has one of its own: leave the term out of the loss, or these layers with layers=."
)
#: Where all that the model returns is so: then it may have been called with no more than one sample.
_NO_SAMPLES = (
    "no output of the model holds the samples that a dimension of its arguments was taken to hold, and {} is no sum of "
    'what each of them makes, as a loss would be: pass None by the arguments\' names (sample_dim={{"x": None}}) where '
    "each call is one sample without a dimension for it; else samples influence one another's gradients, so that "
    "none has one of its own: leave the term out of the loss, or these layers with layers=."
)

_UNSEEN = (
    "it cannot be seen whether the loss couples the samples of a batch, nor how it reduces them, since {}: it was "
    "taken to be the mean or the sum over samples that is specified; let probe.verify(loss_fn, inputs, targets) find "
    "out."
)

_THROUGH = (
    "it runs through {} (a custom function, a compiled one, a checkpoint, complex numbers, or what puts samples "
    "together in a way of its own)"
)

_UNMARKED = (
    "it takes what the model has returned without a dimension that holds the samples, such as one tensor for each"
)

_GIVEN = "backward() was given the gradient on what the model has returned, and no loss"

#: Of the first forwards, those that come behind one that is looked at, in the same backward, are looked at, too;
#: later where few share a backward: of a long episode, one is looked at nearly each time.
FIRST, FEW = 256, 8

_OF_SEVERAL = 'pass forwards="joined" if row n of one forward is combined with row n of another only, '


def watch_losses(attachment: "Attachment", record: ForwardRecord, output: Any) -> None:
    """Mark layers once a backward begins at a loss of which it is found that it is not to be told of."""
    fisher, found = attachment.fisher, record.attribution
    if record.verified:
        watch_scale(fisher, record, output)
    if found.coupling or found.unreduced:
        watch_beside(fisher, output, found.coupling, found.unreduced)
    attachment.latest, attachment.forwards = ref(record), attachment.forwards + 1
    if not record.scheduled:
        if attachment.watched is not None and fisher.ranks is None:
            record.ends = [_end(tensor) for tensor in floating(output)]
            before_backward(attachment, _begins_otherwise, attachment)
        return
    attachment.wanted = False
    # Of layers that lie in parts, operations of the loss, too, may speak with other ranks.
    looks = tells_recomputation() and not any(layer.split for layer in fisher.layers)
    if looks and mark_outputs(attachment, record, output, () if found.provisional else found.outputs):
        before_backward(record, partial(_begins, ref(attachment)), attachment)
        attachment.watched = ref(record)


def _end(tensor: Tensor) -> tuple[int, int] | None:
    node = None if tensor.is_complex() else tensor.grad_fn
    return None if node is None else (number_of(node), tensor.output_nr)


def watches(attachment: "Attachment") -> bool:
    """Whether the latest forward of those that are watched waits for its backward: that may be this forward's, too."""
    latest = None if attachment.watched is None else attachment.watched()
    if latest is None or not waits(latest):
        return False
    return attachment.fisher.at_once <= FEW or sum(attachment.counts.values()) <= FIRST


def watch_beside(
    fisher: OnlineFisher, output: Any, coupling: Iterable[Beside], unreduced: Mapping[Beside, str]
) -> None:
    """Mark layers once a loss uses what is not to be told of: of :func:`coupling` tensors, those that made them."""
    places, returned = set(coupling), made_beside(None, output)
    of_none = returned.keys() <= places and any(t.dim() for t in returned.values())
    watched = [(place, reason, False) for place, reason in unreduced.items()]
    watched += [(place, (_NO_SAMPLES if of_none else _COUPLED_BESIDE).format(place), True) for place in places]
    for place, reason, behind in watched:
        tensor = tensor_at(fisher.model, output, place)
        if tensor is not None and is_made(tensor) and (behind or not tensor.dim()):
            tensor.register_hook(partial(_used, ref(fisher), reason, behind))


def _used(fisher: "ref[OnlineFisher]", reason: str, behind: bool, gradient: Tensor) -> None:
    """A hook: the gradient of a loss has come to a tensor. The model may keep that, and is not kept by it."""
    own = fisher()
    if own is not None and not inside_transform():
        own.troubles.guarded(None, (), _mark, own, reason, behind, gradient)


def _mark(fisher: OnlineFisher, reason: str, behind: bool, gradient: Tensor) -> None:
    names = [layer.name for layer in fisher.layers if layer.name not in fisher.troubles.marks]
    if names and bool((gradient != 0).any()):
        made = _layers_behind(fisher.layers, [current_node()]) if behind else names
        fisher.troubles.mark([name for name in names if name in made], reason)


def _layers_behind(layers: Sequence[Layer], roots: Sequence[Node]) -> list[str]:
    """The layers whose parameters a graph leads to; all of them where nodes of others hide what is behind them."""
    nodes = list(nodes_behind(roots))
    if not all(map(is_builtin, nodes)):  # such as a checkpoint of the reentrant kind
        return [layer.name for layer in layers]
    reached = {id(getattr(node, "variable", None)) for node in nodes}
    return [layer.name for layer in layers if any(id(p) in reached for p in layer.parameters.values())]


def _begins(
    attachment: "ref[Attachment]", record: ForwardRecord, ends: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> bool:
    """A backward pass begins; whether this forward is watched no more."""
    own = attachment()
    if own is None or _is_over(own, record):
        return True
    if record.thread != threading.get_ident():
        return False
    return bool(own.fisher.troubles.guarded(None, (), _look_or_say, own, record, ends, gradients))


def _begins_otherwise(own: "Attachment", ends: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> bool:
    """The same of a forward that is not watched: its loss is looked at where it is of another kind than those were."""
    record = None if own.latest is None else own.latest()
    if record is None or _is_over(own, record) or record.thread != threading.get_ident():
        return True
    own.fisher.troubles.guarded(None, (), _look_if_other, own, record, ends, gradients)
    own.forwards = 0
    return True


def _is_over(own: "Attachment", record: ForwardRecord) -> bool:
    """Whether no loss of a forward is looked at any more; what parameters are computed from is told of as that."""
    return own.pauses > 0 or record.closed or own.fisher.troubles.has_seen("computed")


def _look_if_other(
    own: "Attachment", record: ForwardRecord, ends: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> None:
    """Look at a loss of a kind that no look has seen; of another, expect what counts of it to go on as there."""
    fisher, kind = own.fisher, kind_of(record, ends, own.forwards)
    if fisher.losses.is_new(kind.key):
        own.wanted = True
        own.wanted = own.forwards > 1 or not _look_or_say(own, record, ends, gradients)
    elif fisher.reduction == "mean":
        even = fisher.losses.found(kind.key)
        if even is not None and (kind.means or True in even):
            kind.expect(even, record.num_samples, fisher.doubts)
            if fisher.troubles.strict:
                for reason in fisher.doubts.read():
                    fisher.troubles.mark(fisher.by_layer, reason)


def _look_or_say(
    attachment: "Attachment", record: ForwardRecord, ends: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> bool:
    """Look at the loss if it is a forward's, and have the first read say so where that fails; whether it is."""
    met: dict[int, dict[Place, Output | None]] = {}
    fisher, kind = attachment.fisher, kind_of(record, ends, attachment.forwards)
    try:
        roots, even = roots_of(ends, gradients), kind.even()
        if not record.scheduled:
            mark_by_number(attachment, record, [node for node, _ in roots])
        met = outputs_behind([node for node, _ in roots], attachment)
        if id(record) in met:
            _look(attachment, record, roots, met)
    except Exception as error:
        if fisher.troubles.strict:
            raise
        reason = f"analysing it failed ({type(error).__name__}: {error})"
        fisher.troubles.unseen = _UNSEEN.format(reason)
    if id(record) not in met:
        return False
    wait_no_more(owners=met)  # it was the loss of all these forwards
    if attachment.latest is not None and attachment.latest() is record:
        fisher.losses.saw(kind.key, even)
        attachment.forwards = 0
    return True


def _look(
    attachment: "Attachment",
    record: ForwardRecord,
    roots: Mapping[Place, Tensor],
    met: Mapping[int, Mapping[Place, Output | None]],
) -> None:
    """Mark layers whose samples a loss couples, or weights otherwise than told, and see what it is multiplied by."""
    fisher = attachment.fisher
    # The loss that the model returns tells it where training takes that one.
    takes_returned = any(not shape_of(*place) for held in met.values() for place in held)
    record.scale_told = fisher.returned is False or (fisher.returned is True and takes_returned)
    if not record.scale_told:
        tell_scaler(fisher, roots)
        fisher.accumulation.see_division(roots, {node for places in met.values() for node, _ in places})
        if fisher.returned and record.weights is not None:
            fisher.accumulation.scale = nan  # nothing is seen of what the weights are multiplied by
    else:
        fisher.accumulation.scale = 1.0
    if any(own is None and prod(shape_of(*place)) > 1 for held in met.values() for place, own in held.items()):
        fisher.troubles.unseen = _UNSEEN.format(_UNMARKED)
    outputs = {place: own for held in met.values() for place, own in held.items() if own is not None}
    if any(outputs[place].num_samples > 1 and g.numel() > 1 for place, g in roots.items() if place in outputs):
        fisher.troubles.unseen = _UNSEEN.format(_GIVEN)
    loss = see(roots, met, joined=fisher.forwards == "joined")
    if loss is None:
        return

    def names(places: Iterable[Place]) -> list[str]:
        return _layers_behind(fisher.layers, [node for node, _ in places])

    with contextlib.suppress(UnknownNode), torch.no_grad(), no_autocast():
        watch_gradients(fisher, attachment.factors, loss)
    also = f" Also, {fisher.assumed}" if fisher.assumed else ""  # perhaps wrongly
    coupled = _seen(fisher, loss, chooses, couples)
    if not coupled:
        try:
            with no_autocast():
                reason = _otherwise(fisher, record, loss)
        except UnknownNode as unknown:
            fisher.troubles.unseen = _UNSEEN.format(_THROUGH.format(unknown))
            return
        if reason:
            fisher.troubles.mark(names(loss.outputs), reason + also)
        return
    if any(map(normalises, loss.order)):
        tell_normalised(fisher.troubles, names(coupled))
        coupled = _seen(fisher, loss, partial(couples, statistics_fixed=True))  # and besides
    if coupled:
        reason = _COUPLED.format(_OF_SEVERAL if len(loss.groups) > 1 else "")
        fisher.troubles.mark(names(coupled), reason + also)


def _seen(fisher: OnlineFisher, loss: SeenLoss, *ways: Callable[[SeenLoss], list[Place]]) -> list[Place]:
    """The outputs whose samples the first of some ways of looking sees to be coupled, if any does."""
    for sees in ways:
        try:
            with no_autocast():
                coupled = sees(loss)
        except UnknownNode as unknown:
            fisher.troubles.unseen = _UNSEEN.format(_THROUGH.format(unknown))
        except Exception:  # of what has no second derivative
            continue
        else:
            if coupled:
                return coupled
    return []


def _otherwise(fisher: OnlineFisher, record: ForwardRecord, loss: SeenLoss) -> str:
    """Why a loss is not the mean or sum over the samples that it is told, or assumed, to be; else empty."""
    told = fisher.reduction
    if callable(told):
        if record.weights is not None or len(loss.groups) > 1:
            return ""
        told = "mean"
    if len(loss.groups) > 1:
        untold = not record.scale_told and (fisher.forwards is not None or len(set(loss.groups.values())) > 1)
        return reduced_over_several(loss, told) if untold else ""
    (count,) = loss.groups.values()
    if (reason := weights_of_loss(loss, count)) or record.scale_told:
        return reason
    paths = paths_of(loss, count, told)
    fisher.accumulation.see_share(paths, told, count)
    differ = fisher.sizes.differ(paths, told, count)
    reason, sure = reduced_otherwise(loss, paths, told, constant=fisher.sizes.agree)
    if not sure:
        fisher.troubles.unseen = fisher.troubles.unseen or reason
    return differ or (reason if sure else "")
