"""Does a loss that is computed of the model's outputs couple samples? Seen in its second derivatives.

Each sample has a loss of its own where the loss L of the batch is a sum of functions of single samples' outputs: then
∂²L/∂f_n∂f_m = 0 for any two samples n and m. So for a random v on some of the samples, ∂²L/∂f² · v must be zero on the
others. Where it is more than rounding (a contrastive loss, a statistic of the batch, the root of a mean), they are
coupled. Of several forwards that are looked at, n and m may be samples of different ones.

Choices among samples have no second derivative there: see :mod:`.choices`. What PyTorch knows no second derivative of,
such as a custom function, is not seen; what other samples bring as constants is no coupling (advantages that are
normalised, keys without a gradient).
"""

import torch
from torch import Tensor

from ..._torch.loss_graph import Place, pull_back
from ..._torch.random_state import fresh_generator
from ...layers.dtypes import rounding
from ...oneshot.independence import over_samples
from .seen import SeenLoss


def couples(loss: SeenLoss, *, statistics_fixed: bool = False) -> list[Place]:
    """The outputs of which some samples' gradients change with the numbers of others; raises :class:`UnknownNode`.

    The statistics of batch normalisation may be taken for constants.
    """
    chosen = {  # of forwards of one sample each, the first one's
        group: torch.randperm(count, generator=fresh_generator(), device="cpu") < (count + 1 - number % 2) // 2
        for number, (group, count) in enumerate(loss.groups.items())
    }
    with torch.enable_grad():
        gradients = pull_back(loss.roots, loss.outputs, statistics_fixed=True) if statistics_fixed else loss.gradients
        terms = []
        for place, g in gradients.items():
            if g.requires_grad:
                v = torch.randn(g.shape, generator=fresh_generator(), device="cpu", dtype=torch.float32).sign_().to(g)
                own = loss.outputs[place]
                mask = over_samples(chosen[own.group][None], g, own.layout)[0]
                terms.append((g * v.mul_(mask.to(g) * own.size)).sum())
        total = sum(terms)
    if not isinstance(total, Tensor) or total.grad_fn is None:  # the loss is linear in its outputs
        return []
    with torch.no_grad():
        begins = {(total.grad_fn, 0): torch.ones_like(total)}
        changes = pull_back(begins, loss.outputs, statistics_fixed=statistics_fixed)
    found = []
    for place, change in changes.items():
        own = loss.outputs[place]
        bound = rounding(change.dtype) * torch.maximum(change.abs().amax(), gradients[place].detach().abs().amax())
        others = own.layout.split(change)[~chosen[own.group].to(change.device)]
        if bool((others.abs() > bound).any()):  # not where the bound is no finite number
            found.append(place)
    return found
