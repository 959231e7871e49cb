"""What the graph of a forward is marked with where its loss is to be looked at: whose rows tensors have.

Marks are in the nodes' metadata, which ends with the graph. A loss begins at what the model returned; where it takes
something else that the forward made (features that a hook has kept, say), at what the layers before that returned.
"""

import itertools
from collections.abc import Iterable, Sequence
from math import isfinite, sqrt
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from ..._torch.graph import Node, number_of, shape_of
from ..._torch.loss_graph import Place, place_of
from ..._torch.views import lasting_place
from ...layers.layout import Layout, layout_of
from ..record import ForwardRecord
from ..samples.hypotheses import floating
from ..samples.relation import Shape, whole_call

#: More nodes than these are not gone through.
MOST_NODES = 1024

#: In a node's metadata, by attachment, record, and which of its outputs it is.
_KEY = "secorder.outputs"


class Output(NamedTuple):
    """An output of the model, or of a layer in it, that holds samples."""

    layout: Layout  #: where they are
    size: float  #: of its numbers, about
    num_samples: int  #: how many there are
    group: int = 0  #: the same number for outputs whose row n is one sample


class _Call(NamedTuple):
    """Of what a layer's call has returned, which of its tensors it is; where samples are in it is told later."""

    record: "ref[ForwardRecord]"
    name: str
    call: int
    position: int
    shapes: tuple[Shape, Shape]  #: of the tensor, and of where it is marked

    def output(self) -> Output | None:
        """What is known of it by now."""
        record = self.record()
        layouts = () if record is None else record.layers[self.name].layouts
        if record is None or self.call >= len(layouts) or self.position >= len(layouts[self.call]):
            return None
        own = layouts[self.call][self.position]
        layout = None if own is None else _seen_as(own, *self.shapes, record.num_samples)
        return None if layout is None else Output(layout, 1.0, record.num_samples)


#: None for an output of the model of which too little is known.
_Mark = Output | _Call | None


def mark_outputs(attachment: object, record: ForwardRecord, output: Any, layouts: Sequence[Layout | None]) -> bool:
    """Mark what the model has returned; whether there is anything that a loss can be computed from."""
    marked = False
    for tensor, layout in itertools.zip_longest(floating(output), layouts):
        if tensor is None or tensor.grad_fn is None:
            continue
        shape, count = tuple(tensor.shape), record.num_samples
        known = None if tensor.is_complex() else _output(shape, layout, count, _size(tensor.detach()) or 1.0)
        for place, seen in _places(tensor):
            here = None if known is None else _seen_as(known.layout, shape, seen, count)
            _put(attachment, record, place, None if known is None or here is None else known._replace(layout=here))
        marked = True
    return marked


def mark_by_number(attachment: object, record: ForwardRecord, roots: Iterable[Node]) -> None:
    """:func:`mark_outputs` of a forward whose outputs are gone, where a graph leads to them."""
    found = record.attribution
    layouts = () if found.provisional else found.outputs
    ends = {end: layout for end, layout in itertools.zip_longest(record.ends, layouts) if end is not None}
    numbers = {number for number, _ in ends}
    waiting = list(dict.fromkeys(roots))
    seen = set(waiting)
    for node in waiting:  # which grows meanwhile
        if number_of(node) in numbers:
            for (number, output), layout in ends.items():
                if number == number_of(node):
                    known = _output(shape_of(node, output), layout, record.num_samples, 1.0)
                    _put(attachment, record, (node, output), known)
            continue
        new = {x for x, _ in node.next_functions if x is not None} - seen
        seen |= new
        waiting += new
        if len(waiting) > MOST_NODES:
            return


def mark_calls(
    attachment: object, record: ForwardRecord, name: str, index: int, made: Iterable[Tensor | Place]
) -> None:
    """Mark what a layer's call has returned, where the loss is to be looked at.

    What is known to couple samples beside the model's outputs is told of by itself: see :mod:`.beside`.
    """
    for position, one in enumerate(made if record.scheduled and not record.attribution.coupling else ()):
        places = _places(one) if isinstance(one, Tensor) else [(one, shape_of(*one))]
        for place, seen in places:
            shape = tuple(one.shape) if isinstance(one, Tensor) else seen
            _put(attachment, record, place, _Call(ref(record), name, index, position, (shape, seen)))


def _places(tensor: Tensor) -> list[tuple[Place, Shape]]:
    """Where gradients on a tensor come, as it is and once it is overwritten in place, and the shapes that they have."""
    place, lasting = place_of(tensor), lasting_place(tensor)
    own = [(place, tuple(tensor.shape))]
    return own if lasting == place else [*own, (lasting, shape_of(*lasting))]


def _seen_as(layout: Layout, shape: Shape, other: Shape, count: int) -> Layout | None:
    """Where samples are in a tensor that is seen in another shape, its elements in the same order."""
    if other == shape:
        return layout
    if count == 1:
        return whole_call(other)
    return layout_of(other, count, layout.inner_size(shape))


def _put(attachment: object, record: ForwardRecord, place: Place, mark: _Mark) -> None:
    held: dict[Any, _Mark] = place[0].metadata.setdefault(_KEY, {})
    key = id(attachment), id(record), place[1]
    if not (isinstance(mark, _Call) and isinstance(held.get(key), Output)):  # what is known as an output stays one
        held[key] = mark


def _output(shape: Shape, layout: Layout | None, count: int, size: float) -> Output | None:
    layout = whole_call(shape) if count == 1 and shape else layout
    if layout is None or len(shape) <= layout.dim or shape[layout.dim] != count * layout.rows:
        return None
    return Output(layout, size, count)


def _size(values: Tensor) -> float:
    """The root of the mean square of what is finite."""
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    if not isfinite(norm):  # to pick some of the values takes thirty times as long
        values = values[values.isfinite()]
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return norm / sqrt(values.numel() or 1)


def outputs_behind(roots: Sequence[Node], attachment: object) -> dict[int, dict[Place, Output | None]]:
    """The outputs of records that a graph leads to, by ``id`` of the record; none where there is too much to look at.

    What is behind those of which enough is known is not looked for. Behind others, such as a loss that the model
    returned, what layers returned is a part of the model.
    """
    found: dict[int, dict[Place, Output | None]] = {}
    seen, inside = set(roots), set[Node]()
    waiting = list(roots)
    while waiting:
        node = waiting.pop(0)
        held = getattr(node, "metadata", {}).get(_KEY, {})
        known: dict[tuple[int, Place], Output | None] = {}
        for (owner, record, number), mark in held.items():
            if owner == id(attachment) and not (isinstance(mark, _Call) and node in inside):
                known[record, (node, number)] = mark.output() if isinstance(mark, _Call) else mark
        for (record, place), output in known.items():
            found.setdefault(record, {})[place] = output
        if any(output is not None for output in known.values()):
            continue
        new = {x for x, _ in node.next_functions if x is not None} - seen
        if known or node in inside:
            inside |= new
        seen |= new
        waiting.extend(new)
        if len(seen) > MOST_NODES:
            return {}
    return found
