"""A part of the autograd graph, from tensors on to others that they were computed from, differentiated node by node.

No hook is called, nothing is accumulated, and nothing that nodes have saved is freed, as the engine would do.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .graph import (
    Node,
    collection_paused,
    is_complex,
    operation_of,
    passes_on,
    recomputed,
    run_node_once,
    runs_alone,
    saved,
    shape_of,
)

#: A tensor that the graph knows: the node that computed it, and which of its outputs it is.
Place = tuple[Node, int]

_NORMALISATIONS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")


class UnknownNode(Exception):
    """A node that is not run by itself: a custom function's, a script's, or one that a checkpoint computes again."""


def place_of(tensor: Tensor | GradientEdge) -> Place:
    """Where the graph knows a tensor, or what stands for it where a backward pass begins."""
    edge = get_gradient_edge(tensor) if isinstance(tensor, Tensor) else tensor
    return edge.node, edge.output_nr


def made_by(end: Tensor | GradientEdge) -> Node | None:
    """The node at which a backward pass begins; None of what has no graph."""
    return end.grad_fn if isinstance(end, Tensor) else end.node


@collection_paused()
def nodes_between(roots: Iterable[Node], ends: Collection[Node]) -> list[Node]:
    """The nodes that lead from some to others, these excluded, each behind all that its gradients come from."""
    leads = dict.fromkeys(ends, True)
    entered: set[Node] = set()
    order: list[Node] = []
    waiting = list(roots)
    while waiting:
        node = waiting[-1]
        before = [x for x, _ in node.next_functions if x is not None]
        if node in leads:
            waiting.pop()
        elif node not in entered:
            entered.add(node)
            waiting.extend(x for x in before if x not in leads and x not in entered)
        else:
            waiting.pop()
            leads[node] = any(leads.get(x, False) for x in before)
            if leads[node]:
                order.append(node)
    return order[::-1]


def normalises(node: Node) -> bool:
    """Whether a node is batch normalisation by the statistics of the batch."""
    return operation_of(node) in _NORMALISATIONS and bool(saved(node, "training"))


def _by_constants(node: Node, g: Tensor) -> Tensor:
    """The gradient on what batch normalisation is given, as if the statistics of the batch were constants."""
    scale: Tensor = saved(node, "result2")
    weight: Tensor | None = saved(node, "weight")
    scale = scale if weight is None else scale * weight
    return g * scale.to(g).view(-1, *(1 for _ in range(g.dim() - 2)))


def pull_back(
    gradients: Mapping[Place, Tensor], ends: Collection[Place], *, statistics_fixed: bool = False
) -> dict[Place, Tensor]:
    """The gradients on tensors, pulled back to others (``ends``) by all nodes between; where none comes, there is none.

    Differentiable where gradients are enabled. Raises :class:`UnknownNode` where a node is not to be run. The
    statistics of batch normalisation may be taken for constants.
    """
    found = dict(gradients)
    at = {node for node, _ in ends}
    order = nodes_between([node for node, _ in gradients], at)
    leads = at.union(order)
    for node in order:
        own = [found.pop((node, i), None) for i in range(len(node._input_metadata))]
        if all(g is None for g in own):
            continue
        on = passes_on(node)
        if not on and (not runs_alone(node) or is_complex(node) or recomputed(node) is not False):
            raise UnknownNode(node.name())
        wanted = [k for k, (before, _) in enumerate(node.next_functions) if before in leads]
        if statistics_fixed and wanted == [0] and own[0] is not None and normalises(node):
            pulled: Sequence[Tensor | None] = [_by_constants(node, own[0])]
        elif on:
            pulled = [own[k] for k in wanted]
        else:
            pulled = run_node_once(node, own, wanted)
        for k, g in zip(wanted, pulled, strict=True):
            if g is None:
                continue
            place = node.next_functions[k]
            g = g.to(place[0]._input_metadata[place[1]].dtype)
            found[place] = found[place] + g if place in found else g
    return {place: g for place, g in found.items() if place in ends}


def elements_of(nodes: Iterable[Node]) -> int:
    """How many numbers nodes have computed."""
    return sum(prod(shape_of(node, i)) for node in nodes for i in range(len(node._input_metadata)))
