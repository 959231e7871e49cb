"""The backward pass of recorded forwards: entered with the first gradient, left when the engine has done its work."""

import threading
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._torch.collectives import has_ranks
from .._torch.compile import in_compiled_backward, never_compiled
from .._torch.engine import (
    NO_BACKWARD,
    accumulate_node,
    after_backward,
    current_backward,
    executes_all,
    in_backward,
    untouched,
    will_accumulate,
)
from .._torch.fsdp import local
from .._torch.graph import current_node
from .._torch.surroundings import inside_transform, out_of_sight
from ..layers.selection import Layer
from .audit.freivalds import Audit
from .audit.penalty import watch
from .closing import check_together, close, unrecorded
from .fisher import OnlineFisher, quietly
from .norms import norms_due, read_squares, watch_squares
from .record import Backward, ForwardRecord
from .waiting import add_waiting

if TYPE_CHECKING:
    from .hooks import Attachment


_COMPILED = (
    "its backward pass is compiled (torch._dynamo.config.compiled_autograd), so that hooks do not run when gradients "
    "come: call backward outside of compiled autograd while the probe is attached, or measure with one-shot calls."
)


def enter(attachment: "Attachment", record: ForwardRecord) -> bool:
    """A gradient has come to a record's forward; False where that is a second backward, through the same graph."""
    number = current_backward()
    if number == NO_BACKWARD:
        return False
    if record.runs_in(number):
        return True
    fisher = attachment.fisher
    if record.closed:  # a second backward
        saves_again(attachment, record)
    if record.backward is not None:
        # A checkpoint of the reentrant kind runs a backward of its own inside of the one that is on its way.
        return not record.closed and record.recomputes
    if record.closed:
        return False
    backward = fisher.backwards.get(number)
    if backward is None:
        if in_compiled_backward():
            fisher.troubles.mark(fisher.by_layer, _COMPILED)
            return False
        backward = Backward(number, Audit(fisher.directions))
        fisher.backwards.begin(backward)
        if attachment.verifying is not None:  # in another thread, which may take hooks off parameters
            backward.alone = False
        fisher.directions.begin()  # from here on the audits of others, which are not alone any more, may be of no use
        if fisher.accumulation.scale != 1.0:
            _tell_accumulation(fisher)
        after_backward(partial(leave, attachment, backward))
    record.backward = backward
    if backward.records:
        check_together(fisher, backward, record)
    backward.records.append(record)
    _watch(fisher, backward, record)
    if record.verified and not backward.partial:
        backward.partial = not executes_all(current_node())
    if len(backward.records) == 1 and norms_due(fisher):
        watch_squares(fisher, backward, record, _fresh(fisher))
    if record.recomputes and not record.handles:
        attachment.register(record)
    return True


@never_compiled
def enters(attachment: "Attachment", record: ForwardRecord, returned: bool, g: Tensor) -> None:
    """A hook on an output of the model: its backward begins. ``returned``: whether that is the loss itself."""
    if inside_transform():
        return
    troubles = attachment.fisher.troubles
    if record.unattributed:
        troubles.guarded(record, (), _tell, attachment.fisher, record.unattributed)
        return
    if attachment.pauses:
        troubles.guarded(record, (), saves_again, attachment, record)
        return
    record.create_graph = torch.is_grad_enabled()
    if returned and record.backward is None:  # what it is multiplied by in training
        weights, scale = record.weights, g.detach().double()
        own = scale.new_ones(record.num_samples) if weights is None else weights.to(scale)
        record.weights = own / scale
    troubles.guarded(record, (), enter, attachment, record)


def _tell(fisher: OnlineFisher, reason: str) -> None:
    """A gradient has come to a forward of which it is not known where samples are: in a training step, that is told."""
    own = {id(p): p for layer in fisher.layers for p in layer.parameters.values() if p.requires_grad}
    if any(will_accumulate(accumulate_node(p)) for p in own.values()):
        fisher.troubles.mark(fisher.sums, reason)


@never_compiled
def enters_unrecorded(attachment: "Attachment", _: Tensor) -> None:
    """A hook on an output of a forward that was not recorded."""
    if not attachment.suspensions:
        unrecorded(attachment.fisher)
        _tell_accumulation(attachment.fisher)


def _tell_accumulation(fisher: OnlineFisher) -> None:
    """A backward begins: mark all layers where it adds to gradients of a loss that was divided, with no scale given."""
    if reason := fisher.accumulation.begins(fisher.layers):
        fisher.troubles.mark(fisher.sums, reason)


def saves_again(attachment: "Attachment", record: ForwardRecord) -> None:
    """A backward that is not recorded: layers that a checkpoint computes again save as much as at first."""
    if record.recomputes and not record.handles and in_backward():
        attachment.register(record)
        after_backward(record.unhook)


def _fresh(fisher: OnlineFisher) -> set[int]:
    """By ``id``, the parameters whose ``.grad`` will be this backward's gradient at its end, and nothing else."""
    if has_ranks():
        return set()  # .grad may be all ranks' then
    every = [layer.parameters.values() for layer in fisher.layers if not layer.sharded]
    return untouched(chain.from_iterable(every))


def _watch(fisher: OnlineFisher, backward: Backward, record: ForwardRecord) -> None:
    """See the whole gradients of parameters that are audited, and of all whose layers have no call to explain any."""
    if fisher.penalty is not None:
        watch(backward, fisher.layers)
        return
    captured = {name for one in backward.records for name, own in one.layers.items() if own.hooked}
    complete = captured.issuperset(fisher.by_layer)
    if len(backward.records) == 1:  # what an earlier forward has brought of another layer is not known any more
        every = record.verified or record.scheduled or fisher.failures.known
        layers = fisher.layers if complete else [layer for layer in fisher.layers if layer.name in captured]
        backward.audited = fisher.audited.draw(record, layers, every=every)
    if complete and not backward.audited:
        return
    watched = [x for x in fisher.layers if x.name in backward.audited or x.name not in captured]
    ties, fresh = record.attribution.ties, _fresh(fisher)
    for layer in watched:
        graph = record.parameters(layer)
        apart = bool(ties) and (layer.name in ties or bool(record.attribution.sharing(layer.name)))
        parts = {name: local(p) for name, p in graph.items()} if layer.split else graph
        outputs = record.layers[layer.name].elements
        for name in backward.audit.watch(layer.parameters, parts, apart=apart, outputs=outputs):
            parameter = layer.parameters[name]
            if id(parameter) in fresh:
                backward.fresh.append(parameter)
                continue
            if not layer.sharded and record.moved(parameter) and will_accumulate(accumulate_node(parameter)):
                backward.early |= {id(parameter)}  # and not torch.autograd.grad
            saw = partial(_saw, backward, record, layer, parameter, accumulate_node(graph[name]))
            backward.on_gradient(graph[name], saw, gathered=layer.sharded)


@never_compiled
def _saw(
    backward: Backward, record: ForwardRecord, layer: Layer, parameter: Tensor, node: Any, gradient: Tensor
) -> None:
    """The whole gradient of a parameter: what is compared with what the captured calls explain."""
    if not backward.ended and _runs(backward) and (record.layers[layer.name].received or will_accumulate(node)):
        part = layer.gradient(parameter, gradient)
        if part is not None:
            out_of_sight(backward.audit.see, parameter, part)


def _runs(backward: Backward) -> bool:
    """Whether it is this backward that runs now, and no other thread's; those of reentrant checkpoints belong to it."""
    inner = any(record.recomputes for record in backward.records) and backward.thread == threading.get_ident()
    return inner or current_backward() == backward.number


@never_compiled
def leave(attachment: "Attachment", backward: Backward) -> None:
    """The backward has ended: close its records."""
    fisher, told = attachment.fisher, not attachment.pauses
    try:
        if told and (backward.fresh or backward.unread):
            fisher.troubles.guarded(None, fisher.by_layer, quietly, _read_gradients, backward)
    finally:
        fisher.backwards.end(backward)
    if told:
        fisher.troubles.guarded(None, fisher.by_layer, quietly, close, fisher, backward)


def let_go(fisher: OnlineFisher, backwards: Sequence[Backward]) -> None:
    """Backward passes were broken off: what waits to be added is, and nothing of ours stays on the model."""
    for backward in backwards:
        for record in backward.records:
            quietly(add_waiting, fisher, record)
        fisher.backwards.end(backward)


def _read_gradients(backward: Backward) -> None:
    """See what is in ``.grad``, as long as another thread's backward that begins is noticed."""
    if backward.fresh:
        backward.audit.see_all({id(p): p.grad for p in backward.fresh if p.grad is not None})  # of no process group
        backward.fresh.clear()
    read_squares(backward)
