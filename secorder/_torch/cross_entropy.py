"""Cross entropies, recognised by the nodes of their graph."""

from torch import Tensor

from .graph import RESHAPES, operation_of, recomputed, saved, shape_of, signed
from .loss_graph import place_of
from .loss_terms import MEAN, SUM


def is_cross_entropy_of_rows(loss: Tensor, output: Tensor) -> bool:
    """Whether a loss is a mean or sum of cross entropies of labels, of rows along the last dimension of an output.

    Its gradient in one row is then that of the row's own cross entropy, times a number that depends on no output.
    """
    node = loss.grad_fn
    while node is not None and node.name() == "ViewBackward0" and shape_of(*node.next_functions[0]) == ():
        node = node.next_functions[0][0]
    if node is None or node.name() != "NllLossBackward0" or recomputed(node) is not False or output.dim() < 2:
        return False
    if saved(node, "weight") is not None or saved(node, "reduction") not in (MEAN, SUM):
        return False
    (node, number), last = node.next_functions[0], output.shape[-1]
    if node is None or node.name() != "LogSoftmaxBackward0" or shape_of(node, number)[1:] != (last,):
        return False
    if signed(saved(node, "dim")) not in (1, -1):
        return False
    place = node.next_functions[0]
    while place != place_of(output):
        if place[0] is None or operation_of(place[0]) not in (*RESHAPES, "Slice") or shape_of(*place)[-1:] != (last,):
            return False
        place = place[0].next_functions[0]
    return True
