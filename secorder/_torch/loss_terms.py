"""What the last operations of a loss tell: its terms, what these are multiplied by, and the targets of a mean."""

from collections.abc import Collection, Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .graph import Node, operation_of, passes_on, recomputed, run_node, runs_alone, saved, shape_of, signed
from .loss_graph import UnknownNode, place_of, pull_back

#: How nodes of PyTorch's losses have saved ``reduction="mean"`` and ``"sum"``.
MEAN, SUM = 1, 2

#: What multiplies by constants.
PRODUCTS = ("Bmm", "Div", "Dot", "Mm", "Mul", "Mv")

#: What makes one number of others, and how many of these are looked at.
ARITHMETIC, MOST = ("Add", "Div", "Mul", "Neg", "Sub"), 16


def terms(root: Node, ends: Collection[Node] = ()) -> Iterator[Node]:
    """What computed a number, and those that it is made of by arithmetic: the latest first, none behind ``ends``."""
    found = [root]
    for node in found:  # which grows
        if node not in ends:
            yield node
            if operation_of(node) in ARITHMETIC:
                found.extend(x for x, _ in node.next_functions if x is not None and len(found) < MOST)


def factors_between(root: Node, ends: Collection[Node]) -> list[float]:
    """The numbers that a loss is multiplied by, the latest first; of a sum that is made a mean, not what divides it."""
    found: list[float] = []
    node = root
    while node not in ends and (step := _multiplied(node)):
        if operation_of(node) != "ToCopy":
            found.append(step[1])
        node = step[0]
    if found and (count := summed(node)) and count * found[-1] < 1:  # divided by more than there is
        return [*found[:-1], count * found[-1]]
    return found[:-1] if any(map(sums, terms(node, ends))) else found


def _multiplied(node: Node) -> tuple[Node, float] | None:
    """What computed the number that a node has multiplied, and by what; None where a node does anything else."""
    before = [(index, place) for index, place in enumerate(node.next_functions) if place[0] is not None]
    if operation_of(node) not in ("Div", "Mul", "ToCopy") or len(before) != 1 or recomputed(node) is not False:
        return None
    index, source = before[0]
    if shape_of(node, 0) or shape_of(*source) or (index and operation_of(node) == "Div"):
        return None
    return source[0], float(run_node(node, [ones_for(node)], index))


def summed(node: Node) -> int:
    """How many numbers a node has added up to one; 0 where it is no sum of all of its numbers."""
    adds = operation_of(node) in ("Sum", "Nansum") or (sums(node) and recomputed(node) is False)
    return _reduced(node) if adds and not shape_of(node, 0) else 0


def averaged(node: Node) -> int:
    """How many numbers each one is the mean of that a node makes; 0 where it is no mean."""
    return _reduced(node) if is_mean(node) and recomputed(node) is False else 0


def _reduced(node: Node) -> int:
    """How many numbers a node reduces to each one that it makes: of a loss of targets, how many targets."""
    if operation_of(node) in ("NllLoss", "NllLoss2D"):
        return int(node._saved_target.numel())
    before = next(place for place in node.next_functions if place[0] is not None)
    return prod(shape_of(*before)) // max(prod(shape_of(node, 0)), 1)


def sums(node: Node) -> bool:
    """Whether a node is the sum of numbers, or of losses."""
    return operation_of(node) == "Sum" or getattr(node, "_saved_reduction", None) == SUM


def is_mean(node: Node) -> bool:
    """Whether a node is the mean of numbers, or of losses."""
    return operation_of(node) == "Mean" or getattr(node, "_saved_reduction", None) == MEAN


def selected(node: Node) -> tuple[int, ...]:
    """The shape of what a node has selected by indices, a mask, or lengths; empty where it does anything else."""
    selects = operation_of(node) in ("Index", "IndexSelect", "MaskedSelect", "PackPaddedSequence")
    return tuple(shape_of(node, 0)) if selects else ()


def ones_for(node: Node, number: int = 0) -> Tensor:
    """Ones in place of one of the tensors that a node has computed."""
    made = node._input_metadata[number]
    return torch.ones(shape_of(node, number), dtype=made.dtype, device=made.device)


def alone(node: Node, number: int, g: Tensor) -> list[Tensor | None]:
    """A gradient on one of the tensors that a node has computed, and none on the others."""
    return [g if k == number else None for k in range(len(node._input_metadata))]


def hides(node: Node) -> bool:
    """Whether a node does not tell what it does: a custom function's, or of what a checkpoint computes again."""
    return not passes_on(node) and (not runs_alone(node) or recomputed(node) is not False)


def multiplier(node: Node, index: int, leads: Collection[Node], most: int = 0, number: int = 0) -> Tensor | None:
    """What a node multiplies an input by for an output, number by number; None where that is no constant.

    What is among ``leads`` is no constant. Of operations that are no products, those are looked at that make ``most``
    numbers, and no more than they are given, for one factor of all that they take: they are linear where what they make
    of a gradient does not depend on their inputs.
    """
    others = [before for k, (before, _) in enumerate(node.next_functions) if k != index and before in leads]
    product = operation_of(node) in PRODUCTS and not others and not (operation_of(node) == "Div" and index)
    small = prod(shape_of(node, number)) <= min(most, prod(shape_of(*node.next_functions[index])))
    if not product and not small:
        return None
    ones = ones_for(node, number)
    if operation_of(node) in ("Div", "Mul") and not ones.is_complex():  # a twelfth is none in half precision
        ones = ones.to(torch.promote_types(ones.dtype, torch.float32))
    with torch.enable_grad():
        found = run_node(node, alone(node, number, ones), index)
    if product or not found.numel():
        return found.detach()
    taken = found.detach()[found.detach() != 0]
    one = min(found.numel(), 2) <= taken.numel() and uniform(taken)
    return taken if one and not _depends(found, node, leads) else None


def _depends(made: Tensor, node: Node, leads: Collection[Node]) -> bool:
    """Whether what a node makes of a gradient depends on what it was given: PyTorch may have zeros for that."""
    if made.grad_fn is None:
        return False
    given = [place for place in node.next_functions if place[0] in leads]
    try:
        found = pull_back({place_of(made): torch.ones_like(made)}, given)
    except (UnknownNode, RuntimeError):  # such as what has no second derivative
        return True
    return any(bool(g.any()) for g in found.values())


def divides_by_tensor(node: Node) -> bool:
    """Whether a node divides by one number that a tensor held, such as a count of targets, and no Python number."""
    if operation_of(node) != "Div" or recomputed(node) is not False or not isinstance(by := node._saved_other, Tensor):
        return False
    least = torch.float16 if by.dtype.is_floating_point else torch.int16  # of which numbers make no other kind
    return by.numel() == 1 and torch.result_type(by, torch.ones((), dtype=least)) != least


def weights_within(node: Node) -> Tensor | None:
    """What a binary cross entropy multiplies its losses by, number by number; None where it has no weights."""
    if not operation_of(node).startswith("BinaryCrossEntropy") or (weight := saved(node, "weight")) is None:
        return None
    found: Tensor = weight.expand(shape_of(*node.next_functions[0]))
    return found


def uniform(numbers: Tensor) -> bool:
    """Whether numbers are all the same, to rounding."""
    least, most = numbers.aminmax()
    return bool(most - least <= 8 * torch.finfo(numbers.dtype).eps * torch.maximum(most.abs(), least.abs()))


class Targets(NamedTuple):
    """What a mean over targets has saved."""

    by_class: Tensor | None  #: the weights of the classes, or None
    ignored: Tensor  #: which targets do not count
    classes: int  #: how many there are


def mean_over_targets(node: Node) -> Targets | None:
    """Of a node that is the mean of losses of targets among classes; None for another, or one in a checkpoint."""
    if operation_of(node) not in ("NllLoss", "NllLoss2D") or not is_mean(node):
        return None
    if recomputed(node) is not False:  # to ask for what it has saved would compute it again
        return None
    ignored = saved(node, "target") == signed(node._saved_ignore_index)
    return Targets(saved(node, "weight"), ignored, shape_of(*node.next_functions[0])[-1 if ignored.dim() < 2 else 1])
