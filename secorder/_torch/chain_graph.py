"""A recorded autograd graph as a chain of segments between cuts: tensors that every path to the output contains."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .graph import RESHAPES, Node, operation_of, shape_of, signed
from .loss_graph import nodes_between
from .sample_graph import ELEMENTWISE, SHARED, InnerSizes, samples_in_nodes
from .vjp import quiet_vmap


class Kind(Enum):
    """What a segment does to its input."""

    SAME = "nothing but a constant is added, or the shape is another"
    ELEMENTWISE = "a function of each element alone"
    LINEAR = "rows times a matrix"
    GENERAL = "anything"


@dataclass(eq=False)
class Segment:
    """The part of the graph between a cut and the one before it."""

    kind: Kind  #: what it does
    out: GradientEdge  #: the cut at its end
    shape: tuple[int, ...]  #: of the tensor there
    into: GradientEdge | None = None  #: the cut at its beginning; None where none of the leaves is before it
    shape_before: tuple[int, ...] = ()  #: of the tensor there
    #: the leaves inside with samples in dim 0, by ``id``; of a segment that does nothing, the leaf is added to its
    #: output
    leaves: list[int] = field(default_factory=list)
    weight: Tensor | None = None  #: of a matrix, (in, out)
    #: of a function of each element, whether its nodes tell that it has no second derivative
    piecewise_linear: bool = False
    work: int = 0  #: multiplications of one sample's forward, about


#: Functions of each element of one tensor, by the names of their nodes.
_ELEMENTWISE = ELEMENTWISE - {"Atan2", "PreluKernel", "ToCopy", "Minimum", "Maximum", "Lerp"}

#: Those of them that have no second derivative, as autograd has it.
_PIECEWISE_LINEAR = frozenset({
    "Add", "Sub", "Rsub", "Neg", "Abs", "Relu", "Threshold", "LeakyRelu", "Hardtanh", "Clamp", "ClampMin", "ClampMax",
    "Where", "MaskedFill", "Clone", "Alias", "NativeDropout",
})  # fmt: skip


def segments_of(output: Tensor, leaves: Sequence[Tensor], count: int) -> list[Segment]:
    """The chain from the output (N, …) to leaves, as far as samples lie one after the other in every tensor on the way.

    A node of which all samples are known to lie so acts on each alone (see :mod:`.sample_graph`). Hooks are not seen.
    """
    wanted = {id(leaf) for leaf in leaves}
    places = samples_in_nodes([output], count)
    start: Node = output.grad_fn
    order = {
        node: k for k, node in enumerate(nodes_between([start], [get_gradient_edge(leaf).node for leaf in leaves]))
    }
    leads = set(order)
    if start not in leads:
        return []
    heap = [(order[start], 0, start)]
    used: dict[Node, set[int]] = {start: {output.output_nr}}
    end = GradientEdge(start, output.output_nr)
    found: list[Segment] = []
    inside: list[Node] = []
    while heap:
        node: Node = heapq.heappop(heap)[2]
        whole = all(_one_after_the_other(node, index, places, count) for index in used[node])
        if not (whole or any(places.get((node, index)) for index in used[node])):
            return found  # samples are mixed, or nobody knows
        if not heap and whole and len(used[node]) == 1:
            edge = GradientEdge(node, next(iter(used[node])))
            if inside:
                found.append(_segment(inside, end, edge, wanted, leads, count, places))
            inside, end = [], edge
        inside.append(node)
        for following, index in node.next_functions:
            if following in leads:
                if following not in used:
                    used[following] = set()
                    heapq.heappush(heap, (order[following], id(following), following))
                used[following].add(index)
    found.append(_segment(inside, end, None, wanted, leads, count, places))
    return found


def _one_after_the_other(node: Node, index: int, places: InnerSizes, count: int) -> bool:
    inner = places.get((node, index)) or SHARED
    return inner != SHARED and inner * count == _numel(shape_of(node, index))


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _segment(
    nodes: list[Node],
    out: GradientEdge,
    into: GradientEdge | None,
    wanted: set[int],
    leads: set[Node],
    count: int,
    places: InnerSizes,
) -> Segment:
    shape = shape_of(out.node, out.output_nr)
    before = () if into is None else shape_of(into.node, into.output_nr)
    found = Segment(Kind.GENERAL, out, shape, into, before)
    for node in nodes:
        own = [f for f, _ in node.next_functions if id(getattr(f, "variable", None)) in wanted]
        own = [f for f in own if shape_of(f, 0)[:1] == (count,) and _one_after_the_other(f, 0, places, count)]
        found.leaves += [id(f.variable) for f in own]
        found.work += _work(node)
    name = operation_of(nodes[0])
    if len(nodes) == 1 and _adds_nothing(nodes[0], name, leads, shape, before):
        found.kind = Kind.SAME
    elif not found.leaves and all(_is_elementwise(node, leads, shape) for node in nodes) and shape == before:
        found.kind = Kind.ELEMENTWISE
        found.piecewise_linear = all(_is_piecewise_linear(node, leads) for node in nodes)
    elif len(nodes) == 1 and not found.leaves and name in ("Addmm", "Mm") and before[:1] == (count,):
        found.weight = _matrix(nodes[0], name, leads, before)
        found.kind = Kind.GENERAL if found.weight is None else Kind.LINEAR
    return found


def _adds_nothing(node: Node, name: str, leads: set[Node], shape: tuple[int, ...], before: tuple[int, ...]) -> bool:
    """Whether a node changes the shape alone, or adds what does not depend on its input."""
    if name in RESHAPES or (name == "Permute" and _is_identity(node._saved_dims)):
        return True
    if name != "Add" or getattr(node, "_saved_alpha", 1) != 1:
        return False
    live = [k for k, (f, _) in enumerate(node.next_functions) if f in leads]
    return len(live) < 2 and before in ((), shape)


def _is_identity(dims: Sequence[int]) -> bool:
    return all(signed(d) in (k, k - len(dims)) for k, d in enumerate(dims))


def _is_elementwise(node: Node, leads: set[Node], shape: tuple[int, ...]) -> bool:
    live = [(f, index) for f, index in node.next_functions if f in leads]
    return operation_of(node) in _ELEMENTWISE and all(shape_of(f, index) == shape for f, index in live)


def _is_piecewise_linear(node: Node, leads: set[Node]) -> bool:
    name, live = operation_of(node), [k for k, (f, _) in enumerate(node.next_functions) if f in leads]
    return name in _PIECEWISE_LINEAR or (name == "Mul" and len(live) == 1) or (name == "Div" and live == [0])


def _matrix(node: Node, name: str, leads: set[Node], before: tuple[int, ...]) -> Tensor | None:
    """What a node multiplies its rows with, where that and what is added do not depend on its input."""
    where = 1 if name == "Addmm" else 0
    live = [k for k, (f, _) in enumerate(node.next_functions) if f in leads]
    if live != [where] or getattr(node, "_saved_alpha", 1) != 1:
        return None
    weight: Tensor | None = node._saved_mat2
    return weight.detach() if weight is not None and weight.shape[0] == before[1] else None


def _work(node: Node) -> int:
    """Multiplications of a node's forward, about; of all samples."""
    size = _numel(shape_of(node, 0))
    matrix = getattr(node, "_saved_mat2", None) if operation_of(node) in ("Addmm", "Mm", "Bmm", "Baddbmm") else None
    if matrix is None and operation_of(node) == "Convolution":
        weight = node._saved_weight
        return size * (4 if weight is None else weight[0].numel())
    return size * (4 if matrix is None else matrix.shape[-2])


def batched_gradients(out: Any, into: Sequence[Any], cotangents: Tensor) -> list[Tensor | None]:
    """:func:`~.vjp.gradients` of cotangents that are stacked in dim 0, in one pass."""
    with quiet_vmap():
        return list(
            torch.autograd.grad(
                [out], list(into), [cotangents], retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        )
