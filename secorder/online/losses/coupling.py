"""Does a loss that is computed of the model's outputs couple samples? Seen in its second derivatives.

Each sample has a loss of its own where the loss L of the batch is a sum of functions of single samples' outputs: then
∂²L/∂f_n∂f_m = 0 for any two samples n and m. So for a random v on some of the samples, ∂²L/∂f² · v must be zero on the
others. Where it is more than rounding (a contrastive loss, a statistic of the batch, the root of a mean), they are
coupled. Of several forwards that are looked at, n and m may be samples of different ones.

Where the graph shows each number that the loss adds up to be of one sample, as those of a cross entropy, no derivative
is taken: it takes several times the memory of the outputs, which may be logits over all words of a language.

Choices among samples have no second derivative there: see :mod:`.choices`. What PyTorch knows no second derivative of,
such as a custom function, is not seen; what other samples bring as constants is no coupling (advantages that are
normalised, keys without a gradient).
"""

import torch
from torch import Tensor

from ..._torch.graph import is_complex, operation_of
from ..._torch.loss_graph import Place, place_of, pull_back
from ..._torch.loss_terms import hides
from ..._torch.random_state import fresh_generator
from ...layers.dtypes import rounding
from ...oneshot.independence import over_samples
from ..finite import largest
from .extent import is_of_samples
from .seen import SeenLoss

#: Operations that are linear in all that they are given, and those that are so in the first.
SUMS = frozenset({"Add", "Mean", "Neg", "Sub", "Sum"})
LINEAR_IN_FIRST = frozenset({"Div", "Mul", "NllLoss", "NllLoss2D"})


def couples(loss: SeenLoss, *, statistics_fixed: bool = False) -> list[Place]:
    """The outputs of which some samples' gradients change with the numbers of others; raises :class:`UnknownNode`.

    The statistics of batch normalisation may be taken for constants.
    """
    if adds_up_samples(loss):
        return []
    chosen = {  # of forwards of one sample each, the first one's
        group: torch.randperm(count, generator=fresh_generator(), device="cpu") < (count + 1 - number % 2) // 2
        for number, (group, count) in enumerate(loss.groups.items())
    }
    with torch.enable_grad():
        gradients = pull_back(loss.roots, loss.outputs, statistics_fixed=True) if statistics_fixed else loss.gradients
        begins: dict[Place, Tensor] = {}
        for place, g in gradients.items():
            if g.grad_fn is not None:
                own = loss.outputs[place]
                mask = over_samples((chosen[own.group][None] * own.size).to(g), g, own.layout)[0]
                v, begin = _numbers(g).mul_(mask), place_of(g)
                begins[begin] = begins[begin] + v if begin in begins else v  # a sum passes one gradient on to several
    if not begins:  # the loss is linear in its outputs
        return []
    with torch.no_grad():
        changes = pull_back(begins, loss.outputs, statistics_fixed=statistics_fixed)
    found = []
    for place, change in changes.items():
        own = loss.outputs[place]
        bound = rounding(change.dtype) * torch.maximum(largest(change), largest(gradients[place].detach()))
        others = own.layout.split(change)[~chosen[own.group].to(change.device)]
        if others.numel() and bool(largest(others) > bound):  # not where the bound is no finite number
            found.append(place)
    return found


def adds_up_samples(loss: SeenLoss) -> bool:
    """Whether the graph shows a loss to be linear in numbers of which each is computed from one sample's outputs."""
    if len(loss.groups) > 1 or any(hides(node) or is_complex(node) for node in loss.order):
        return False
    (count,) = loss.groups.values()
    leads = {*loss.order, *(node for node, _ in loss.outputs)}
    waiting = [place for place in loss.roots if place[0] in leads]
    terms = set()
    for place in waiting:  # which grows meanwhile
        node = place[0]
        before = [(k, source) for k, source in enumerate(node.next_functions) if source[0] in leads]
        operation = operation_of(node)
        if place in loss.outputs:
            continue
        if operation in SUMS or (operation in LINEAR_IN_FIRST and [k for k, _ in before] == [0]):
            waiting += [source for _, source in before if source not in waiting]
        else:
            terms.add(place)
    return all(is_of_samples(place, loss, count) for place in terms)


def _numbers(like: Tensor) -> Tensor:
    """Random numbers from -1 to 1, of one byte each: normal ones of a language's logits take as long as a product.

    No signs: a softmax's gradients add up to zero, so that those of three classes are lost on a quarter of all signs.
    """
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64, device="cpu")
    words.random_(-(2**63), None, generator=fresh_generator())
    return words.view(torch.int8)[: like.numel()].view(like.shape).to(like).add_(0.5).div_(128)
