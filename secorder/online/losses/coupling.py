"""Does a loss that is computed of the model's outputs couple samples? Seen where a batch is looked at.

Each sample has a loss of its own where the loss L of the batch is a sum of functions of single samples' outputs: then
∂²L/∂f_n∂f_m = 0 for any two samples n and m. So for a random v on some of the samples, ∂²L/∂f² · v must be zero on the
others. Where it is more than rounding (a contrastive loss, a statistic of the batch, the root of a mean), they are
coupled. It takes the part of the graph between loss and outputs, twice, before the user's backward pass frees it. Of
several forwards that are looked at, n and m may be samples of different ones.

Choices among samples have no second derivative there: see :mod:`.choices`. What PyTorch knows no second
derivative of, such as a custom function, is not seen; what other samples bring as constants is no coupling (advantages
that are normalised, keys without a gradient).
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from ..._torch.autocast import no_autocast
from ..._torch.beginning import before_backward
from ..._torch.graph import Node, shape_of, tells_recomputation
from ..._torch.loss_graph import Place, UnknownNode, elements_of, nodes_between, normalises, place_of, pull_back
from ..._torch.random_state import fresh_generator
from ...errors import SecorderError
from ...layers.dtypes import rounding
from ...oneshot.independence import over_samples
from ..record import ForwardRecord
from ..troubles import tell_normalised
from .accumulation import tell_division
from .beside import layers_behind
from .choices import chooses
from .marks import Output, in_groups, mark_outputs, outputs_behind
from .mean_of_several import MEAN_OF_SEVERAL, takes_mean_of_several
from .scale import tell_scaler
from .weights import weights_of_loss

if TYPE_CHECKING:
    from ..fisher import OnlineFisher
    from ..hooks import Attachment

__all__ = ["couples", "watch_coupling"]

#: Numbers between loss and outputs, at most: so many, or so many times those of the outputs.
MOST_ELEMENTS, TIMES_OUTPUTS = 1 << 22, 16

_COUPLED = (
    "the loss couples the samples of a batch: the gradient on each one's outputs changes with those of others (a "
    "contrastive loss, the hardest samples, a statistic of the batch, the root of a mean), so that no sample has a "
    "gradient of its own: {}use a loss that is a mean or a sum over samples, or leave the layers out with layers=."
)

_UNSEEN = (
    "it cannot be seen whether the loss couples the samples of a batch, since {}: it was taken to be a mean or a sum "
    "over samples; let probe.verify(loss_fn, inputs, targets) find out."
)

_THROUGH = "it runs through {} (a custom function, a checkpoint, or complex numbers)"

_OF_SEVERAL = 'say forwards="joined" if only row n of one forward meets row n of another, '


def watch_coupling(attachment: "Attachment", record: ForwardRecord, output: Any) -> None:
    """Look at the loss once a backward pass begins that leads to what a forward has returned, and mark its layers.

    Args:
        record: of the forward, of a batch that is looked at.
    """
    found = record.attribution
    told = not found.provisional and found.alternative is None
    if tells_recomputation() and mark_outputs(attachment, record, output, found.outputs if told else ()):
        before_backward(record, partial(_begins, ref(attachment)), attachment)


def _begins(
    attachment: "ref[Attachment]", record: ForwardRecord, ends: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> bool:
    """A backward pass begins; whether this forward is watched no more."""
    own = attachment()
    if own is None or own.pauses or record.closed or own.fisher.troubles.has_seen("computed"):
        return True  # what adapted parameters are computed from is told of as that
    if record.thread != threading.get_ident():
        return False
    reached: list[Place] = []
    own.fisher.troubles.guarded(None, (), _look_or_say, own, record, ends, gradients, reached)
    return bool(reached)


def _look_or_say(attachment: "Attachment", *arguments: Any) -> None:
    """Look at a loss, and have the first read say so where that fails."""
    try:
        _look(attachment, *arguments)
    except SecorderError:  # of a strict probe
        raise
    except Exception as error:
        attachment.fisher.troubles.unseen = _UNSEEN.format(f"looking at it failed ({type(error).__name__}: {error})")
        raise


def _look(
    attachment: "Attachment",
    record: ForwardRecord,
    ends: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    reached: list[Place],
) -> None:
    pairs = [(t, g) for t, g in zip(ends, gradients, strict=True) if t.grad_fn is not None]
    roots = {place_of(t): torch.ones_like(t) if g is None else g.detach() for t, g in pairs}
    by_record = outputs_behind([node for node, _ in roots], attachment)
    reached.extend(by_record.get(id(record), ()))
    if not reached:
        return
    tell_scaler(attachment.fisher, [node for node, _ in roots])
    tell_division(attachment.fisher, roots, {node for places in by_record.values() for node, _ in places})
    outputs = in_groups(by_record, joined=attachment.fisher.forwards == "joined")
    if sum(group.num_samples for group in {own.group: own for own in outputs.values()}.values()) < 2:
        return
    order = nodes_between([node for node, _ in roots], {node for node, _ in outputs})
    sizes = [math.prod(shape_of(*place)) for place in outputs]
    if not order or elements_of(order) > max(MOST_ELEMENTS, TIMES_OUTPUTS * sum(sizes)):
        return
    fisher = attachment.fisher
    coupled = _seen(fisher, order, roots, outputs, (chooses, couples))
    if not coupled:
        _tell_no_mean(fisher, order, roots, outputs)
        return
    if any(map(normalises, order)):
        tell_normalised(fisher.troubles, layers_behind(fisher.layers, [node for node, _ in coupled]))
        coupled = _seen(fisher, order, roots, outputs, (partial(couples, statistics_fixed=True),))  # and besides
    several = len({own.group for own in outputs.values()}) > 1
    if coupled:
        names = layers_behind(fisher.layers, [node for node, _ in coupled])
        fisher.troubles.mark(names, _COUPLED.format(_OF_SEVERAL if several else ""))


def _seen(
    fisher: "OnlineFisher",
    order: Sequence[Node],
    roots: Mapping[Place, Tensor],
    outputs: Mapping[Place, Output],
    ways: Sequence[Callable[..., list[Place]]],
) -> list[Place]:
    """The outputs whose samples the first of some ways of looking sees to be coupled, if any does."""
    for sees in ways:
        try:
            with no_autocast():
                coupled = sees(order, roots, outputs)
        except UnknownNode as unknown:
            fisher.troubles.unseen = _UNSEEN.format(_THROUGH.format(unknown))
        except Exception:  # of what has no second derivative
            continue
        else:
            if coupled:
                return coupled
    return []


def _tell_no_mean(
    fisher: "OnlineFisher", order: Sequence[Node], roots: Mapping[Place, Tensor], outputs: Mapping[Place, Output]
) -> None:
    """Mark layers where the loss is told, or assumed, to be a mean over the samples of each forward, and is not."""
    if fisher.reduction != "mean":
        return
    groups = {own.group: own.num_samples for own in outputs.values()}
    reason = ""
    if len(groups) == 1:
        reason = weights_of_loss(order, roots, outputs, *groups.values())
    elif fisher.returned is None and (fisher.forwards is not None or len(set(groups.values())) > 1):
        reason = MEAN_OF_SEVERAL if takes_mean_of_several(order, outputs) else ""
    if reason:
        fisher.troubles.mark(layers_behind(fisher.layers, [node for node, _ in outputs]), reason)


def couples(
    order: Sequence[Node],
    roots: Mapping[Place, Tensor],
    outputs: Mapping[Place, Output],
    *,
    statistics_fixed: bool = False,
) -> list[Place]:
    """The outputs of which some samples' gradients change with the numbers of others.

    Args:
        order: the nodes between the loss and the outputs.
        roots: the gradients that the backward pass begins with.
        outputs: of the model, by where the graph has them.
        statistics_fixed: take those of batch normalisation for constants.

    Raises:
        UnknownNode: what is between them cannot be looked at.
    """
    chosen: dict[int, Tensor] = {}
    for own in outputs.values():
        if own.group not in chosen:  # of forwards of one sample each, the first one's
            half = (own.num_samples + (len(chosen) + 1) % 2) // 2
            chosen[own.group] = torch.randperm(own.num_samples, generator=fresh_generator(), device="cpu") < half
    with torch.enable_grad():
        gradients = pull_back(order, roots, outputs, statistics_fixed=statistics_fixed)
        terms = []
        for place, g in gradients.items():
            if g.requires_grad:
                signs = torch.randn(g.shape, generator=fresh_generator(), device="cpu", dtype=torch.float32).sign()
                own = outputs[place]
                mask = over_samples(chosen[own.group][None], g, own.layout)[0]
                terms.append((g * (signs * own.size).to(g) * mask.to(g)).sum())
        total = sum(terms)
    if not isinstance(total, Tensor) or total.grad_fn is None:  # the loss is linear in its outputs
        return []
    again = nodes_between([total.grad_fn], {node for node, _ in outputs})
    with torch.no_grad():
        begins = {(total.grad_fn, 0): torch.ones_like(total)}
        changes = pull_back(again, begins, outputs, statistics_fixed=statistics_fixed)
    found = []
    for place, change in changes.items():
        by_sample = outputs[place].layout.split(change)
        bound = rounding(change.dtype) * torch.maximum(change.abs().amax(), gradients[place].detach().abs().amax())
        others = ~chosen[outputs[place].group].to(change.device)
        if bool(change.isfinite().all()) and bool((by_sample[others].abs() > bound).any()):
            found.append(place)
    return found
