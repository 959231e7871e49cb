"""Layers that are measured by operations: their uses in a recorded forward, and what the gradients on these do."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._torch.engine import current_backward, graph_is_kept, will_accumulate
from .._torch.graph import Node, collection_paused, current_node, dtypes_of, number_of, users_of
from .._torch.surroundings import inside_transform
from ..layers.dtypes import compute_dtype
from ..layers.layout import Layout
from ..layers.operations import OperationCall
from ..layers.selection import Layer
from ..layers.uses import Later, Piece, Use, Uses, brought, find_uses, hidden, reentrant
from .audit.rounding import before_sums
from .backward import enter
from .capture import counts_in
from .closing import second_backward
from .delivery import bring
from .finite import total_of
from .fisher import quietly
from .layer_record import LayerRecord
from .losses.marks import mark_calls
from .record import ForwardRecord
from .samples.attribution import Attribution
from .samples.relation import Verified, explain

if TYPE_CHECKING:
    from .hooks import Attachment


@collection_paused()
def follow(
    record: ForwardRecord, attribution: Attribution, outputs: Iterable[Tensor], inputs: Iterable[Tensor]
) -> bool:
    """Find the uses of the layers that are measured by them; whether a checkpoint hides any."""
    layers = [layer for layer in record.attribution.layers if layer.by_operations]
    users = users_of(outputs, inputs)
    checkpoints, in_part = False, reentrant(users)
    for layer in layers:
        found = find_uses(users, layer.parameters, attribution.routes.get(layer.name, ()))
        out_of_sight = in_part or (found is not None and hidden(found))
        checkpoints |= out_of_sight
        own = record.layers[layer.name]
        own.uses = None if out_of_sight else found
        own.unfollowed = own.uses is None
        uses = own.uses.uses if own.uses else []
        own.calls = [tuple(output.shape for output in use.outputs) for use in uses]
        nodes = [use.node for use in uses]
        record.path += [(number_of(x), *[type(before).__name__ for before, _ in x.next_functions]) for x in nodes]
    return checkpoints


def explain_uses(record: ForwardRecord, uses: Uses, known: Sequence[Verified]) -> list[list[Layout | None]]:
    """The layouts of a layer's uses, by what was verified of such as are on the same routes."""
    explained: dict[object, list[Layout | None]] = {}
    layouts = []
    for use in uses.uses:
        key = (*use.routes, *use.outputs)
        if key not in explained:
            explained[key] = [
                explain(known, place, output.shape, record.shapes, record.num_samples)
                for place, output in zip(use.places, use.outputs, strict=True)
            ]
        layouts.append(explained[key])
    return layouts


def hook_uses(attachment: "Attachment", record: ForwardRecord) -> None:
    """Hook the operations of which it is known where the samples are."""
    for layer in record.attribution.layers if record.attribution.by_operations else ():
        own = record.layers[layer.name]
        found, own.uses = own.uses, None  # the graph is held by what holds it, and by nothing of ours that it holds
        if found is None or not own.layouts or own.replaced or own.troubled:
            continue
        kind = compute_dtype(layer)
        record.note_digits(kind, dtypes_of(found.followed))
        every = _LayerUses(attachment, record, layer, own, found.leaves, found.followed, kind)
        for index, use in enumerate(found.uses):
            own.hooked.add(index)
            use.node.register_prehook(_UseGradient(every, index, use))
            if record.scheduled:
                mark_calls(attachment, record, layer.name, index, [(use.node, output.number) for output in use.outputs])


def _note_sizes(record: ForwardRecord, layer: Layer, found: Piece, cotangents: Sequence[Tensor]) -> None:
    """Keep the size of what dense per-sample gradients are sums of, which may cancel: rounding is relative to that."""
    assert record.backward is not None
    for name, part in found:
        if isinstance(part, Tensor) and record.backward.audit.covers(layer.parameters[name]):
            size = before_sums(cotangents, part)
            if size is not None:
                own = record.layers[layer.name]
                own.sizes = {**own.sizes, name: size + own.sizes[name] if name in own.sizes else size}


def _total(gradients: Sequence[Tensor]) -> Tensor:
    first, *others = map(total_of, gradients)
    return sum(others, first)


@dataclass(eq=False, slots=True)
class _LayerUses:
    """What the uses of a layer have in common."""

    attachment: "Attachment"  #: that hooks them
    record: ForwardRecord  #: of the forward
    layer: Layer  #: whose they are
    own: LayerRecord  #: what the record tells of it
    leaves: Mapping[Node, str]  #: by the node of each parameter, its name
    followed: Collection[Node]  #: the nodes between
    kind: torch.dtype  #: the dtype that is computed in

    def counts(self, number: int) -> bool:
        """Whether this backward is a training step of the layer: asked once for all of its uses."""
        if self.own.counting == number:
            return True
        if True not in map(will_accumulate, self.leaves):
            return counts_in(self.attachment.fisher, self.record, [self.layer])
        self.own.counting = number
        return True


class _UseGradient:
    """What the gradients on an operation's outputs do."""

    __slots__ = ("came", "every", "freed", "index", "numbers", "sources", "targets", "total")

    def __init__(self, every: _LayerUses, index: int, use: Use) -> None:
        self.every, self.index = every, index
        # Nodes that the operation's own leads to, so that no cycle forms with what it holds.
        self.sources, self.targets = use.sources, use.targets
        self.numbers = [output.number for output in use.outputs]
        self.came = self.freed = False  # freed: no second gradient can come, since the graph is not kept
        self.total: Tensor | None = None  # the sum of the gradients' elements, where one may

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        every = self.every
        attachment = every.attachment
        if all(g is None for g in gradients) or attachment.pauses or inside_transform():
            return
        attachment.fisher.troubles.guarded(every.record, (every.layer.name,), quietly, self.receive, gradients)

    def receive(self, gradients: Sequence[Tensor | None]) -> None:
        every, number = self.every, current_backward()
        fisher, record, layer, own = every.attachment.fisher, every.record, every.layer, every.own
        if own.replaced or not every.counts(number):
            return
        cotangents = [gradients[number] for number in self.numbers]
        given = [g for g in cotangents if g is not None]
        if not (record.runs_in(number) or enter(every.attachment, record)):
            if not self.freed:
                second_backward(fisher, record, [layer.name], self.total, _total(given))
            return
        if self.came or not own.layouts or own.troubled:
            return
        self.came = True
        record.note_digits(every.kind, [g.dtype for g in given])
        layouts: Any = own.layouts[self.index]
        call = OperationCall(current_node(), cotangents, layouts, record.num_samples, every.kind)
        several = len(own.calls) > 1
        found = brought(call, self.sources, every.leaves, every.followed, self.targets if several else None)
        if isinstance(found, Later):  # what a weight's gradient is made of was saved in the graph: a bias's is not
            self.freed = found.targets.names.keys() != {0} and not graph_is_kept()
        else:
            _note_sizes(record, layer, found, given)
        self.total = None if self.freed else _total(given)
        bring(fisher, record, layer, self.index, found, self.total)
