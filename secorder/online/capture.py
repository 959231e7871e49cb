"""Calls of layers, as their hooks see them: what is kept of a call, and what its gradient does when it comes."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from .._arguments import listed
from .._torch.compile import never_compiled
from .._torch.engine import (
    accumulate_node,
    accumulates_all,
    accumulates_into,
    current_backward,
    graph_is_kept,
    in_backward,
    will_accumulate,
)
from .._torch.fsdp import local, local_shape
from .._torch.graph import current_node, nodes_behind, number_of
from .._torch.pytree import map_tensors, tensors_in
from .._torch.saved_tensors import (
    Kept,
    KeptHere,
    OverwrittenError,
    checkpoint_section,
    keep,
    saved_tensor_hooks_active,
    surrounded_as_usual,
)
from .._torch.surroundings import inside_transform
from .._torch.views import lasting_place
from ..errors import AttributionError
from ..layers.selection import Layer
from ..layers.uses import reentrant
from ..parallel.tensor_parallel import Layouts, layouts
from ..parallel.tensor_parallel import own as own_part
from .backward import enter
from .closing import second_backward
from .delivery import bring, bring_rank_one
from .finite import total_of
from .fisher import quietly
from .layer_record import LayerRecord, ModuleCall, Start
from .losses.marks import mark_calls
from .record import ForwardRecord
from .samples.hypotheses import floating
from .samples.relation import Shape
from .troubles import OVERWRITTEN

if TYPE_CHECKING:
    from .fisher import OnlineFisher
    from .hooks import Attachment


def layer_called(
    attachment: "Attachment",
    record: ForwardRecord,
    layer: Layer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> None:
    """A layer with a rule ran."""
    ends, own, usual = None, record.layers[layer.name], surrounded_as_usual()
    inputs = tuple(tensors_in((args, kwargs) if kwargs else args))
    if layer.spread is not None and layer.split:
        ends = layouts(layer.module, next(iter(layer.parameters.values())), layer.spread)
        inputs = tuple(own_part(x, ends[0], "its input") for x in inputs)
    shapes = (output.shape if type(output) is Tensor else local_shape(output),)
    if usual and output.requires_grad:
        index = len(own.calls)
        own.calls.append(shapes)
    else:
        index = _call(record, own, shapes)
        if not _recordable(record, layer, (output,)):
            return
    # Also of a call that a checkpoint computes again: as many tensors as at first.
    kept = KeptHere(inputs) if usual else keep(inputs)
    if index in own.hooked:
        return
    own.hooked.add(index)
    if layer.sharded:
        own.gathered = dict(layer.module.named_parameters(recurse=False, remove_duplicate=False))
        (computed_in,) = {p.dtype for p in own.gathered.values()}  # by a policy of mixed precision
        if computed_in is not next(iter(layer.parameters.values())).dtype:
            record.autocast_dtype = computed_in
    made_by = output.grad_fn
    assert made_by is not None
    if record.start is not None:  # else its structure is not asked for
        record.path.append((number_of(made_by), type(inputs[0].grad_fn if inputs else None).__name__))
    if record.scheduled:
        mark_calls(attachment, record, layer.name, index, [output])
    node = accumulates_into((own.gathered or layer.parameters).values(), made_by)
    place, number = lasting_place(output)
    gradient = _LayerGradient(attachment, record, layer, index, number, kept, node)
    if place is not made_by:
        gradient.shape = output.shape
    if ends is not None:
        gradient.ends = ends
    place.register_prehook(gradient)


def keeps_as_many(
    attachment: "Attachment", record: ForwardRecord, layer: Layer, args: Any, kwargs: Any, output: Any
) -> None:
    """A checkpoint computes a call again in a backward that is not recorded: as many tensors are kept as at first.

    It refuses a computation that keeps fewer.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in floating(output)):
        keep(tensors_in((args, kwargs)), here=layer.rule is None and layer.enclosing is attachment.model)


def _call(record: ForwardRecord, own: LayerRecord, shapes: tuple[Shape, ...]) -> int:
    """Count a call of a layer: its number in the forward, the same where it is computed again in backward."""
    calls = own.calls
    if record.backward is None or not in_backward():
        calls.append(shapes)
        return len(calls) - 1
    index = next((i for i, seen in enumerate(calls) if seen == shapes and i not in own.recomputed), len(calls) - 1)
    own.recomputed |= {index}
    return max(index, 0)


def _recordable(record: ForwardRecord, layer: Layer, outputs: Sequence[Tensor]) -> bool:
    """Whether a call's gradient will come, by its own node or, under a checkpoint, when it is computed again."""
    kind = outputs[0].device.type if outputs else "cpu"
    if torch.is_autocast_enabled(kind):
        record.autocast_dtype = torch.get_autocast_dtype(kind)
    if not torch.is_grad_enabled():
        record.recomputes = True  # by a reentrant checkpoint; or never, under torch.no_grad
        return False
    if saved_tensor_hooks_active() and not in_backward():
        record.recomputes = True
        if (section := checkpoint_section()) is not None:
            record.sections = WeakSet() if record.sections is None else record.sections
            record.sections.add(section)
    for t in outputs:
        if t.requires_grad:
            return True
    if not any(p.requires_grad for p in layer.parameters.values()):
        record.layers[layer.name].without_gradient = True
    return False


def module_starts(
    attachment: "Attachment", record: ForwardRecord, layer: Layer, args: Any, kwargs: Any, output: Any
) -> None:
    """An enclosing module without a rule is about to run."""
    start = Start(layer.enclosing, args, kwargs, record.attribution.changing, held=True)
    record.layers[layer.name].starts += (start,)


def module_called(
    attachment: "Attachment", record: ForwardRecord, layer: Layer, args: Any, kwargs: Any, output: Any
) -> None:
    """An enclosing module ran whose parts are layers without a rule of their own."""
    own = record.layers[layer.name]
    if not own.starts:
        return
    *before, start = own.starts
    own.starts = tuple(before)
    tensors = floating(output)
    parts = record.parts_of(layer)
    index = _call(record, own, tuple(tuple(t.shape) for t in tensors))
    for part in parts[1:]:
        record.layers[part.name].calls = own.calls
    recordable = [_recordable(record, part, tensors) for part in parts]
    if not recordable[0]:
        return
    if start.overwritten():
        raise AttributionError(
            f"layers {listed([part.name for part in parts])} are measured by running a module of the model again, "
            "which overwrites its input in place: use an out-of-place operation, leave the layers out with layers=, or "
            "measure them with one-shot calls."
        )
    # A checkpoint around the model keeps its arguments, too, and computes it again without this.
    inputs = list(tensors_in(start.arguments))
    kept = keep(inputs, here=layer.enclosing is attachment.model)
    if index in own.hooked:
        return
    own.hooked.add(index)
    behind = [type(t.grad_fn).__name__ for t in inputs]
    record.path += [(number_of(t.grad_fn), *behind) for t in tensors if t.grad_fn is not None]
    arguments = map_tensors(lambda t: torch.empty(0, dtype=t.dtype, device=t.device), start.arguments)
    call = ModuleCall(arguments, start.state, index, gradients=[None] * len(tensors))
    gradient = _ModuleGradient(attachment, record, layer, call, kept)
    mark_calls(attachment, record, layer.name, index, [t for t in tensors if t.requires_grad])
    for position, tensor in enumerate(tensors):
        if tensor.requires_grad:
            node, number = lasting_place(tensor)
            node.register_prehook(partial(gradient, position, number, tensor.shape))


class _LayerGradient:
    """What the gradient on a layer's output does, as it goes on from there: after hooks on the output have changed it.

    A prehook on the output's node of the graph.
    """

    shape: torch.Size | None = None  #: of the output, where its gradient comes in another
    ends: Layouts | None = None  #: of a layer that lies in parts over the ranks: how its input and the gradient do
    total: Tensor | None = None  #: the sum of the gradient's elements, when it has come
    freed = False  #: whether no second gradient can come, since the graph is not kept

    def __init__(
        self,
        attachment: "Attachment",
        record: ForwardRecord,
        layer: Layer,
        index: int,
        number: int,
        kept: Kept,
        node: Any,
    ) -> None:
        self.attachment, self.record, self.layer = attachment, record, layer
        self.index, self.number, self.node = index, number, node
        self.kept: Kept | None = kept

    @never_compiled
    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        g, attachment = gradients[self.number], self.attachment
        if g is not None and not attachment.pauses and not inside_transform():
            g = g if self.shape is None else g.reshape(self.shape)
            attachment.fisher.troubles.guarded(self.record, (self.layer.name,), quietly, self.receive, g)

    def receive(self, g: Tensor) -> None:
        fisher, record, layer = self.attachment.fisher, self.record, self.layer
        counts = self.node is not None and will_accumulate(self.node)
        if record.layers[layer.name].replaced or not (counts or counts_in(fisher, record, [layer], self.node)):
            return
        if not (record.runs_in(current_backward()) or enter(self.attachment, record)):
            if not self.freed:
                second_backward(fisher, record, [layer.name], self.total, total_of(local(g)))
            return
        kept, self.kept = self.kept, None
        if kept is None:
            self.total = total_of(local(g))
            return
        call: Any
        try:
            inputs = _unpacked(kept)
            # What the weight's gradient is made of was saved in the graph: another pass fails without it.
            weight = layer.parameters.get("weight")
            self.freed = weight is not None and weight.requires_grad and not graph_is_kept()
            self.total = None if self.freed else total_of(local(g))
            if bring_rank_one(fisher, record, layer, inputs, g):
                return
            call = (inputs, g if self.ends is None else own_part(g, self.ends[1], "the gradient on its output"))
        except Exception as error:
            call = error
            self.total = total_of(local(g))
        if isinstance(call, Exception) and fisher.ranks is None:
            raise call
        bring(fisher, record, layer, self.index, call, self.total)


class _ModuleGradient:
    """What the gradients on an enclosing module's outputs do."""

    def __init__(
        self, attachment: "Attachment", record: ForwardRecord, layer: Layer, call: ModuleCall, kept: Kept
    ) -> None:
        self.attachment, self.record, self.layer, self.call = attachment, record, layer, call
        self.kept: Kept | None = kept
        self.totals: dict[int, Tensor] = {}

    @never_compiled
    def __call__(self, position: int, number: int, shape: torch.Size, gradients: tuple[Tensor | None, ...]) -> None:
        g = gradients[number]
        if g is None or self.attachment.pauses or inside_transform():
            return
        names = [layer.name for layer in self.record.parts_of(self.layer)]
        g = g if g.shape == shape else g.reshape(shape)
        self.attachment.fisher.troubles.guarded(self.record, names, quietly, self.receive, position, g)

    def receive(self, position: int, g: Tensor) -> None:
        fisher, record = self.attachment.fisher, self.record
        parts = record.parts_of(self.layer)
        fallen_back = any(x is self.layer for x in record.fallback)
        if not fallen_back:
            parts = [x for x in parts if not record.layers[x.name].replaced]
        if not parts:
            return
        if not counts_in(fisher, record, parts):
            return
        total = total_of(g)
        if not enter(self.attachment, record):
            second_backward(fisher, record, [layer.name for layer in parts], self.totals.get(position), total)
            return
        self.totals[position] = total
        kept, self.kept = self.kept, None
        if kept is not None:
            self.call.tensors = _unpacked(kept)
            record.layers[self.layer.name].modules += (self.call,)
        if self.call.gradients[position] is None:
            self.call.gradients[position] = g.detach()


def _unpacked(kept: Kept) -> tuple[Tensor, ...]:
    try:
        return kept.tensors()
    except OverwrittenError as error:
        raise AttributionError(OVERWRITTEN) from error


def counts_in(fisher: "OnlineFisher", record: ForwardRecord, layers: Sequence[Layer], node: Any = None) -> bool:
    """Whether this backward is a training step of the layers, reaching ``.grad`` of one of their parameters.

    For frozen layers: of any of the model's. ``node`` is where a parameter's gradient is accumulated, if known; inside
    of a checkpoint of the reentrant kind that is in a backward of its own.
    """
    if node is not None:
        counts = will_accumulate(node)
    else:
        own = [p for layer in layers for p in record.parameters(layer).values() if p.requires_grad]
        trained = own or [p for p in fisher.model.parameters() if p.requires_grad]
        counts = any(will_accumulate(accumulate_node(p)) for p in trained)
        if trained and not counts and accumulates_all():
            within = record.backward is not None and not record.runs_in(current_backward())
            counts = within or reentrant(nodes_behind([current_node()]))
    if not counts:
        names = [layer.name for layer in layers]
        for name in names:
            record.layers[name].passed = current_backward()
        if record.create_graph:
            fisher.troubles.saw_at("derivative", [own for name in names for own in record.attribution.owners(name)])
    return counts
