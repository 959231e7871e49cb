"""A part of the autograd graph, from tensors on to others that they were computed from, differentiated node by node.

No hook is called, nothing is accumulated, and nothing that nodes have saved is freed, as the engine would do.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .graph import (
    Node,
    collection_paused,
    is_complex,
    operation_of,
    recomputed,
    run_node,
    run_node_once,
    saved,
    shape_of,
    signed,
)

__all__ = [
    "MEAN", "Place", "Targets", "UnknownNode", "divisor_of_sum", "elements_of", "factors_between", "mean_over_targets",
    "nodes_between", "normalises", "place_of", "pull_back",
]  # fmt: skip

#: A tensor that the graph knows: the node that computed it, and which of its outputs it is.
Place = tuple[Node, int]


#: How nodes of PyTorch's losses have saved ``reduction="mean"`` and ``"sum"``.
MEAN, SUM = 1, 2

#: What makes one number of others, and of how many it is asked.
BETWEEN, MOST = ("Add", "Div", "Mul", "Neg", "Sub"), 16

_NORMALISATIONS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")


class UnknownNode(Exception):
    """A node that is not run by itself: a custom function's, or one whose saved tensors a checkpoint computes again."""


def place_of(tensor: Tensor) -> Place:
    """Where the graph knows a tensor."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


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
    order: Sequence[Node],
    gradients: Mapping[Place, Tensor],
    ends: Collection[Place],
    *,
    statistics_fixed: bool = False,
) -> dict[Place, Tensor]:
    """The gradients on tensors, pulled back to others (``ends``) by the nodes between; where none comes, there is none.

    Differentiable where gradients are enabled. Raises :class:`UnknownNode` where a node is not to be run.

    Args:
        statistics_fixed: take those of batch normalisation for constants.
    """
    found = dict(gradients)
    leads = {*order, *(node for node, _ in ends)}
    for node in order:
        own = [found.pop((node, i), None) for i in range(len(node._input_metadata))]
        if all(g is None for g in own):
            continue
        if not callable(node) or is_complex(node) or recomputed(node) is not False:
            raise UnknownNode(node.name())
        wanted = [k for k, (before, _) in enumerate(node.next_functions) if before in leads]
        if statistics_fixed and wanted == [0] and own[0] is not None and normalises(node):
            pulled: Sequence[Tensor] = [_by_constants(node, own[0])]
        else:
            pulled = run_node_once(node, own, wanted)
        for k, g in zip(wanted, pulled, strict=True):
            place = node.next_functions[k]
            g = g.to(place[0]._input_metadata[place[1]].dtype)
            found[place] = found[place] + g if place in found else g
    return {place: g for place, g in found.items() if place in ends}


def elements_of(nodes: Iterable[Node]) -> int:
    """How many numbers nodes have computed."""
    shapes = [shape_of(node, i) for node in nodes for i in range(len(node._input_metadata))]
    return sum(torch.Size(shape).numel() for shape in shapes)


def factors_between(root: Node, ends: Collection[Node]) -> list[float]:
    """The numbers that a loss is multiplied by, the latest first; of a sum that is made a mean, not what divides it.

    Args:
        root: what computed the loss.
        ends: what is behind these is not looked at.
    """
    found: list[float] = []
    node = root
    while node not in ends and operation_of(node) in ("Div", "Mul", "ToCopy") and recomputed(node) is False:
        before = [(i, place) for i, place in enumerate(node.next_functions) if place[0] is not None]
        if len(before) != 1 or shape_of(node, 0) or shape_of(*before[0][1]):
            break
        if operation_of(node) != "ToCopy":
            found.append(_factor(node, before[0][0]))
        node = before[0][1][0]
    if found and (count := _summed(node)) and count * found[-1] < 1:  # divided by more than there is
        return [*found[:-1], count * found[-1]]
    return found[:-1] if _is_sum(node, ends) else found


class Targets(NamedTuple):
    """What a mean over targets has saved.

    Attributes:
        by_class: the weights of the classes, or None.
        ignored: which targets do not count.
        classes: how many there are.
    """

    by_class: Tensor | None
    ignored: Tensor
    classes: int


def mean_over_targets(node: Node) -> Targets | None:
    """Of a node that is the mean of losses of targets among classes; None for another, or one in a checkpoint."""
    if operation_of(node) not in ("NllLoss", "NllLoss2D") or node._saved_reduction != MEAN:
        return None
    if recomputed(node) is not False:  # to ask for what it has saved would compute it again
        return None
    ignored = saved(node, "target") == signed(node._saved_ignore_index)
    return Targets(saved(node, "weight"), ignored, shape_of(*node.next_functions[0])[-1 if ignored.dim() < 2 else 1])


def divisor_of_sum(node: Node) -> tuple[float, int]:
    """What a sum is divided by, and how many numbers it has, where that is all that a node does; else zeros."""
    before = [(i, place) for i, place in enumerate(node.next_functions) if place[0] is not None]
    if operation_of(node) != "Div" or len(before) != 1 or recomputed(node) is not False:
        return 0.0, 0
    index, (source, _) = before[0]
    count = _summed(source)
    return (1 / _factor(node, index), count) if index == 0 and count > 1 and not shape_of(node, 0) else (0.0, 0)


def _summed(node: Node) -> int:
    """How many numbers a node has added up to one; 0 where it is no sum of all of its numbers."""
    if shape_of(node, 0):
        return 0
    if operation_of(node) == "Sum":
        return torch.Size(shape_of(*node.next_functions[0])).numel()
    if getattr(node, "_saved_reduction", None) == SUM and recomputed(node) is False:
        target: Tensor = getattr(node, "_saved_target", torch.empty(0))
        return target.numel()
    return 0


def _factor(node: Node, index: int) -> float:
    """What a node multiplies one number by."""
    seen = node._input_metadata[0]
    return float(run_node(node, [torch.ones((), dtype=seen.dtype, device=seen.device)], index))


def _is_sum(node: Node, ends: Collection[Node]) -> bool:
    """Whether a number is a sum over samples, or made of several such sums."""
    waiting = [node]
    for term in waiting:  # which grows
        if term in ends:
            continue
        if operation_of(term) == "Sum" or getattr(term, "_saved_reduction", None) == SUM:
            return True
        if operation_of(term) in BETWEEN and not shape_of(term, 0):
            waiting.extend(x for x, _ in term.next_functions if x is not None and len(waiting) < MOST)
    return False
