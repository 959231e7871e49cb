"""Does a loss that is computed of the model's outputs couple samples? Seen where a batch is looked at.

Each sample has a loss of its own where the loss L of the batch is a sum of functions of single samples' outputs: then
∂²L/∂f_n∂f_m = 0 for any two samples n and m. So for a random v on some of the samples, ∂²L/∂f² · v must be zero on the
others. Where it is more than rounding (a contrastive loss, a statistic of the batch, the root of a mean), they are
coupled. It takes the part of the graph between loss and outputs, twice, before the user's backward pass frees it. Of
several forwards that are looked at, n and m may be samples of different ones.

Choices among samples have no second derivative there: see :mod:`secorder.online.choices`. What PyTorch knows no second
derivative of, such as a custom function, is not seen; what other samples bring as constants is no coupling (advantages
that are normalised, keys without a gradient).
"""

import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from .._torch.autocast import no_autocast
from .._torch.beginning import before_backward
from .._torch.graph import Node, shape_of, tells_recomputation
from .._torch.loss_graph import Place, UnknownNode, elements_of, nodes_between, normalises, place_of, pull_back
from .._torch.random_state import fresh_generator
from ..layers.dtypes import rounding
from ..layers.layout import Layout
from ..oneshot.independence import over_samples
from .accumulation import tell_division
from .beside import layers_behind
from .choices import chooses
from .loss_scale import tell_scaler
from .mean_of_several import MEAN_OF_SEVERAL, takes_mean_of_several
from .record import ForwardRecord
from .relation import whole_call
from .samples import floating
from .troubles import tell_normalised

if TYPE_CHECKING:
    from .fisher import OnlineFisher
    from .hooks import Attachment

__all__ = ["couples", "watch_coupling"]

#: Numbers between loss and outputs, at most: so many, or so many times those of the outputs; and nodes.
MOST_ELEMENTS, TIMES_OUTPUTS, MOST_NODES = 1 << 22, 16, 1024

#: In a node's metadata, where the outputs are of which record.
_KEY = "secorder.outputs"

_COUPLED = (
    "the loss couples the samples of a batch: the gradient on each one's outputs changes with those of others (a "
    "contrastive loss, the hardest samples, a statistic of the batch, the root of a mean), so that no sample has a "
    "gradient of its own: {}use a loss that is a mean or a sum over samples, or leave the layers out with layers=."
)

_UNSEEN = (
    "it cannot be seen whether the loss couples the samples of a batch, since it runs through {} (a custom function, a "
    "checkpoint, or complex numbers): it was taken to be a mean or a sum over samples; let probe.verify(loss_fn, "
    "inputs, targets) find out."
)

_OF_SEVERAL = 'say forwards="joined" if only row n of one forward meets row n of another, '


class Output(NamedTuple):
    """An output of the model that holds samples.

    Attributes:
        layout: where they are.
        size: of its numbers, about.
        num_samples: how many there are.
        group: the same number for outputs whose row n is one sample.
    """

    layout: Layout
    size: float
    num_samples: int
    group: int = 0


def watch_coupling(attachment: "Attachment", record: ForwardRecord, output: Any) -> None:
    """Look at the loss once a backward pass begins that leads to what a forward has returned, and mark its layers.

    Args:
        record: of the forward, of a batch that is looked at.
    """
    found = record.attribution
    told = not found.provisional and found.alternative is None
    known = False
    for tensor, layout in itertools.zip_longest(floating(output), found.outputs if told else ()):
        if tensor is None or tensor.grad_fn is None or not tells_recomputation():
            continue
        if record.num_samples == 1 and tensor.dim():
            layout = whole_call(tuple(tensor.shape))
        node, number = place_of(tensor)
        held = node.metadata.setdefault(_KEY, {})
        held[id(attachment), id(record), number] = _output(tensor, layout, record.num_samples)
        known = True
    if known:
        before_backward(record, partial(_begins, ref(attachment)), attachment)


def _output(tensor: Tensor, layout: Layout | None, count: int) -> Output | None:
    """What is known of an output; None where that is not enough to look at the loss for it."""
    if layout is None or tensor.is_complex():
        return None
    if tensor.dim() <= layout.dim or tensor.shape[layout.dim] != count * layout.rows:
        return None
    finite = tensor.detach()[tensor.detach().isfinite()]
    size = float(finite.double().square().mean().sqrt()) if finite.numel() else 0.0
    return Output(layout, size or 1.0, count)


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
    own.fisher.troubles.guarded(None, (), _look, own, record, ends, gradients, reached)
    return bool(reached)


def _look(
    attachment: "Attachment",
    record: ForwardRecord,
    ends: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    reached: list[Place],
) -> None:
    pairs = [(t, g) for t, g in zip(ends, gradients, strict=True) if t.grad_fn is not None]
    roots = {place_of(t): torch.ones_like(t) if g is None else g.detach() for t, g in pairs}
    by_record = _outputs_behind([node for node, _ in roots], id(attachment))
    reached.extend(by_record.get(id(record), ()))
    if not reached:
        return
    tell_scaler(attachment.fisher, [node for node, _ in roots])
    tell_division(attachment.fisher, roots, {node for places in by_record.values() for node, _ in places})
    outputs = _in_groups(attachment.fisher, by_record)
    if sum(group.num_samples for group in {own.group: own for own in outputs.values()}.values()) < 2:
        return
    order = nodes_between([node for node, _ in roots], {node for node, _ in outputs})
    sizes = [math.prod(shape_of(*place)) for place in outputs]
    if not order or elements_of(order) > max(MOST_ELEMENTS, TIMES_OUTPUTS * sum(sizes)):
        return
    fisher = attachment.fisher
    coupled = _seen(fisher, order, roots, outputs, (chooses, couples))
    if not coupled:
        if _is_mean_of_each(fisher, outputs) and takes_mean_of_several(order, outputs):
            fisher.troubles.mark(layers_behind(fisher.layers, [node for node, _ in outputs]), MEAN_OF_SEVERAL)
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
            fisher.troubles.unseen = _UNSEEN.format(unknown)
        except Exception:  # of what has no second derivative
            continue
        else:
            if coupled:
                return coupled
    return []


def _outputs_behind(roots: Sequence[Node], attachment: int) -> dict[int, dict[Place, Output | None]]:
    """The outputs of records that a graph leads to, by record; none where it is too large to be looked at.

    What is behind those of which enough is known is not looked for.
    """
    found: dict[int, dict[Place, Output | None]] = {}
    seen, waiting = set(roots), list(roots)
    while waiting:
        node = waiting.pop()
        held = getattr(node, "metadata", {}).get(_KEY, {})
        keys = [key for key in held if key[0] == attachment]
        for key in keys:
            found.setdefault(key[1], {})[node, key[2]] = held[key]
        if any(held[key] is not None for key in keys):
            continue
        new = {x for x, _ in node.next_functions if x is not None} - seen
        seen |= new
        waiting.extend(new)
        if len(seen) > MOST_NODES:
            return {}
    return found


def _in_groups(fisher: "OnlineFisher", by_record: Mapping[int, Mapping[Place, Output | None]]) -> dict[Place, Output]:
    """The outputs of which enough is known; row n of all of one group is one sample."""
    counts = {own.num_samples for outputs in by_record.values() for own in outputs.values() if own is not None}
    joined = fisher.forwards == "joined" and len(counts) == 1
    return {
        place: own._replace(group=0 if joined else group)
        for group, outputs in enumerate(by_record.values())
        for place, own in outputs.items()
        if own is not None
    }


def _is_mean_of_each(fisher: "OnlineFisher", outputs: Mapping[Place, Output]) -> bool:
    """Whether the loss is told, or assumed, to be a mean over the samples of each forward, and nothing of its scale."""
    same = len({own.num_samples for own in outputs.values()}) == 1
    untold = fisher.forwards is None and same  # what a sample is, which is asked first
    return fisher.reduction == "mean" and fisher.returned is None and not untold


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
