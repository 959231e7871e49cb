"""What the last operations of a loss tell: its terms, what these are multiplied by, and the targets of a mean."""

from collections.abc import Collection, Iterable, Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .ddp import passes_on
from .graph import Node, operation_of, recomputed, run_node, saved, shape_of, signed

__all__ = [
    "Targets", "divided_by", "divisor_of_sum", "factors_between", "is_mean", "mean_over_targets", "reduced_alone",
    "selected", "terms", "weighted",
]  # fmt: skip

#: How nodes of PyTorch's losses have saved ``reduction="mean"`` and ``"sum"``.
MEAN, SUM = 1, 2

#: What a loss may do with outputs before it adds up or takes a mean, so that no number is multiplied by a constant,
#: none is left out, and none is a mean already.
PLAIN = frozenset({
    "Abs", "Add", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "Exp", "Gather", "HuberLoss", "LogSigmoid",
    "LogSoftmax", "Log", "Logsumexp", "Mul", "MseLoss", "Neg", "NllLoss", "NllLoss2D", "Permute", "Pow", "Reshape",
    "Rsub", "Sigmoid", "SmoothL1Loss", "SoftMarginLoss", "Softmax", "Softplus", "Sqrt", "Squeeze", "Sub", "T", "Tanh",
    "ToCopy", "Transpose", "Unsqueeze", "View",
})  # fmt: skip

#: And what it may do with the numbers of each sample, while these stay in the first dimension.
OF_EACH = frozenset({"Index", "Mean", "Select", "Slice"})

#: A factor below so many times the number of samples makes no mean of a sum.
FAR = 0.75

#: What makes one number of others, and how many of these are looked at.
ARITHMETIC, ADDITION, MOST = ("Add", "Div", "Mul", "Neg", "Sub"), ("Add", "Neg", "Sub"), 16


def terms(root: Node, ends: Collection[Node] = (), by: Collection[str] = ARITHMETIC) -> Iterator[Node]:
    """What computed a number, and those that it is made of by arithmetic: the latest first, none behind ``ends``."""
    found = [root]
    for node in found:  # which grows
        if node not in ends:
            yield node
            if operation_of(node) in by:
                found.extend(x for x, _ in node.next_functions if x is not None and len(found) < MOST)


def factors_between(root: Node, ends: Collection[Node]) -> list[float]:
    """The numbers that a loss is multiplied by, the latest first; of a sum that is made a mean, not what divides it.

    Args:
        root: what computed the loss.
        ends: what is behind these is not looked at.
    """
    found: list[float] = []
    node = root
    while node not in ends and (step := _multiplied(node)):
        if operation_of(node) != "ToCopy":
            found.append(step[1])
        node = step[0]
    if found and (count := _summed(node)) and count * found[-1] < 1:  # divided by more than there is
        return [*found[:-1], count * found[-1]]
    return found[:-1] if any(map(_sums, terms(node, ends))) else found


def divisor_of_sum(node: Node) -> tuple[float, int]:
    """What a sum, or several that are added, is divided by, and how many numbers it has; zeros for any other node."""
    step = _multiplied(node) if operation_of(node) == "Div" else None
    parts = [] if step is None else [x for x in terms(step[0], by=ADDITION) if operation_of(x) not in ADDITION]
    count = min(map(_summed, parts), default=0)
    return (0.0, 0) if step is None or count < 2 else (1 / step[1], count)


def divided_by(order: Iterable[Node], number: int) -> set[Node]:
    """The nodes whose number is divided by this one."""
    steps = [step for node in order if operation_of(node) == "Div" and (step := _multiplied(node))]
    return {before for before, factor in steps if abs(factor * number - 1) < 1e-6}


def _multiplied(node: Node) -> tuple[Node, float] | None:
    """What computed the number that a node has multiplied, and by what; None where a node does anything else."""
    operand = _operand(node) if operation_of(node) in ("Div", "Mul", "ToCopy") else None
    if operand is None or shape_of(node, 0) or shape_of(*operand[1]):
        return None
    index, source = operand
    seen = node._input_metadata[0]
    one = torch.ones((), dtype=seen.dtype, device=seen.device)
    return source[0], float(run_node(node, [one], index))


def _summed(node: Node) -> int:
    """How many numbers a node has added up to one; 0 where it is no sum of all of its numbers."""
    if shape_of(node, 0):
        return 0
    if operation_of(node) in ("Sum", "Nansum"):
        return prod(shape_of(*node.next_functions[0]))
    if _sums(node) and recomputed(node) is False:
        target: Tensor = getattr(node, "_saved_target", torch.empty(0))
        return target.numel()
    return 0


def _sums(node: Node) -> bool:
    return operation_of(node) == "Sum" or getattr(node, "_saved_reduction", None) == SUM


def is_mean(node: Node) -> bool:
    """Whether a node is the mean of numbers, or of losses."""
    return operation_of(node) == "Mean" or getattr(node, "_saved_reduction", None) == MEAN


def reduced_alone(order: Iterable[Node], num_samples: int) -> str:
    """``"sum"`` or ``"mean"`` of a loss that does nothing else with numbers of samples; empty of any other.

    It may be multiplied by numbers, such as the half of a Gaussian's divergence, that do not make one of the other.

    Args:
        order: the nodes between loss and outputs.
    """
    kinds, factor = set(), 1.0
    for node in order:
        step = _multiplied(node)
        if step is None:
            kinds.add(_reduction(node, num_samples))
        elif not step[1]:
            return ""
        else:
            factor *= max(abs(step[1]), 1 / abs(step[1]))
    kinds.discard("none")
    return kinds.pop() if len(kinds) == 1 and factor < FAR * num_samples else ""


def _reduction(node: Node, num_samples: int) -> str:
    """How a node reduces numbers of samples: ``"none"`` where it makes as many, empty where that is not known."""
    if passes_on(node):
        return "none"
    name, before = operation_of(node), [place for place in node.next_functions if place[0] is not None]
    if shape := shape_of(node, 0):
        own = name in OF_EACH and shape[0] == num_samples == shape_of(*before[0])[0]
        return "none" if own or (name in PLAIN and (name != "Mul" or len(before) == 2)) else ""
    if name in ADDITION:
        return "none"
    count = prod(shape_of(*before[0])) if len(before) == 1 else 0
    if num_samples < 2 or count < num_samples or count % num_samples:
        return ""
    targets = mean_over_targets(node)
    if targets is not None and (targets.by_class is not None or bool(targets.ignored.any())):
        return ""
    return "mean" if is_mean(node) else "sum" if _sums(node) else ""


def selected(node: Node) -> tuple[int, ...]:
    """The shape of what a node has selected by indices, a mask, or lengths; empty where it does anything else."""
    selects = operation_of(node) in ("Index", "IndexSelect", "MaskedSelect", "PackPaddedSequence")
    return tuple(shape_of(node, 0)) if selects else ()


def weighted(node: Node) -> int | None:
    """Which operand a node multiplies by constants, of more than one number; None where it does anything else."""
    products = ("Bmm", "Div", "Dot", "Mm", "Mul", "Mv")
    operand = _operand(node) if operation_of(node) in products else None
    return operand[0] if operand is not None and prod(shape_of(*operand[1])) > 1 else None


def _operand(node: Node) -> tuple[int, tuple[Node, int]] | None:
    """The one operand of a node that the graph has, by number and place; None where it is what the node divides by.

    None, too, where what the node has saved would be computed again.
    """
    before = [(index, place) for index, place in enumerate(node.next_functions) if place[0] is not None]
    if len(before) != 1 or recomputed(node) is not False:
        return None
    return None if operation_of(node) == "Div" and before[0][0] else before[0]


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
    if operation_of(node) not in ("NllLoss", "NllLoss2D") or not is_mean(node):
        return None
    if recomputed(node) is not False:  # to ask for what it has saved would compute it again
        return None
    ignored = saved(node, "target") == signed(node._saved_ignore_index)
    return Targets(saved(node, "weight"), ignored, shape_of(*node.next_functions[0])[-1 if ignored.dim() < 2 else 1])
