"""How does the loss of several forwards reduce their samples, where each forward has samples of its own?

Where each of several forwards has samples of its own, ``reduction="mean"`` is a mean over these: L = Σ_f (1/N_f) Σ_n
ℓ_fn, as of D(real) + D(fake). A loss of outputs that were put together before, such as of a batch that is cut into
chunks, or of the steps of an episode, divides by the number of all samples, and so does a mean of the forwards' means,
or a sum that is divided by that number.
"""

from math import isclose, prod

from ..._torch.graph import Node, operation_of, shape_of
from ..._torch.loss_terms import is_mean
from .powers import paths_of, reduced_otherwise
from .seen import SeenLoss
from .sizes import as_a_mean

MEAN_OF_SEVERAL = (
    'the loss is one mean over what several forwards returned, where reduction="mean" is a mean over the '
    'samples of each forward: pass loss_scale=1/k for k forwards of as many samples each, reduction="sum" and '
    "loss_scale=1/n for n samples in all, or loss_scale=1 where it is as specified."
)


def reduced_over_several(loss: SeenLoss, told: str) -> str:
    """Why a loss is not the sum of what is told, a mean or a sum over each forward's samples; else empty."""
    if takes_mean_of_several(loss):
        return MEAN_OF_SEVERAL
    number, total = len(loss.groups), sum(loss.groups.values())
    shares = []
    for group, count in loss.groups.items():
        part = loss.of_group(group)
        paths = paths_of(part, count, told)
        reason, sure = reduced_otherwise(part, paths, told) if count > 1 else ("", False)
        if sure and reason:
            return reason
        shares += [(as_a_mean(path, count), count / total) for path in paths]
    divided = [any(isclose(by, share, rel_tol=1e-4) for share in (of_all, 1 / number)) for by, of_all in shares]
    return MEAN_OF_SEVERAL if divided and all(divided) else ""


def takes_mean_of_several(loss: SeenLoss) -> bool:
    """Whether a loss puts outputs of several groups into one tensor, and takes a mean of that."""
    groups: dict[Node, set[int]] = {}
    together: set[Node] = set()
    for node in reversed(loss.order):
        before = [place for place in node.next_functions if place[0] is not None]
        own = [{loss.outputs[x].group} if x in loss.outputs else groups.get(x[0], set()) for x in before]
        groups[node] = set().union(*own)
        if operation_of(node) in ("Cat", "Stack") and len(groups[node]) > 1:
            together.add(node)
        elif any(x in together for x, _ in before):
            if prod(shape_of(node, 0)) == 1 and is_mean(node):
                return True
            together.add(node)
    return False
