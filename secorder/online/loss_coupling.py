"""Does a loss that is computed of the model's outputs couple samples? Seen where a batch is looked at.

Each sample has a loss of its own where the loss L of the batch is a sum of functions of single samples' outputs: then
∂²L/∂f_n∂f_m = 0 for any two samples n and m. So for a random v on some of the samples, ∂²L/∂f² · v must be zero on the
others. Where it is more than rounding (a contrastive loss, a statistic of the batch, the root of a mean), they are
coupled. It takes the part of the graph between loss and outputs, twice, before the user's backward pass frees it.

Choices among samples have no second derivative there: see :mod:`secorder.online.choices`. A hinge on a mean, and what
PyTorch knows no second derivative of, are not seen; what other samples bring as constants is no coupling (advantages
that are normalised, keys without a gradient).
"""

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
from .._torch.loss_graph import Place, elements_of, nodes_between, normalises, place_of, pull_back
from .._torch.vjp import fresh_generator
from ..layers.dtypes import rounding
from ..layers.layout import Layout
from ..oneshot.independence import over_samples
from .beside import layers_behind
from .choices import chooses
from .loss_scale import tell_scaler
from .record import ForwardRecord
from .samples import floating
from .troubles import tell_normalised

if TYPE_CHECKING:
    from .hooks import Attachment

__all__ = ["couples", "watch_coupling"]

#: Numbers between loss and outputs, at most: so many, or so many times those of the outputs; and nodes.
MOST_ELEMENTS, TIMES_OUTPUTS, MOST_NODES = 1 << 22, 16, 1024

#: In a node's metadata, where the outputs are of which record.
_KEY = "secorder.outputs"

_COUPLED = (
    "the loss couples the samples of a batch: the gradient on each one's outputs changes with those of others (a "
    "contrastive loss, the hardest samples, a statistic of the batch, the root of a mean), so that no sample has a "
    "gradient of its own: use a loss that is a mean or a sum over samples, or leave the layers out with layers=."
)


class Output(NamedTuple):
    """An output of the model that holds samples.

    Attributes:
        layout: where they are.
        size: of its numbers, about.
    """

    layout: Layout
    size: float


def watch_coupling(attachment: "Attachment", record: ForwardRecord, output: Any) -> None:
    """Look at the loss once a backward pass begins that leads to what a forward has returned, and mark its layers.

    Args:
        record: of the forward, of a batch that is looked at.
    """
    found = record.attribution
    if record.num_samples < 2 or found.provisional or found.alternative is not None or not tells_recomputation():
        return
    known = False
    for tensor, layout in zip(floating(output), found.outputs, strict=False):
        if layout is None or tensor.grad_fn is None or tensor.is_complex():
            continue
        if tensor.dim() > layout.dim and tensor.shape[layout.dim] == record.num_samples * layout.rows:
            finite = tensor.detach()[tensor.detach().isfinite()]
            size = float(finite.double().square().mean().sqrt()) if finite.numel() else 0.0
            node, number = place_of(tensor)
            held = node.metadata.setdefault(_KEY, {})
            held[id(attachment), id(record), number] = Output(layout, size or 1.0)
            known = True
    if known:
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
    outputs = _outputs_behind([node for node, _ in roots], id(attachment), id(record))
    reached.extend(outputs)
    if reached:
        tell_scaler(attachment.fisher, [node for node, _ in roots])
    order = nodes_between([node for node, _ in roots], {node for node, _ in outputs})
    sizes = [math.prod(shape_of(*place)) for place in outputs]
    if not order or elements_of(order) > max(MOST_ELEMENTS, TIMES_OUTPUTS * sum(sizes)):
        return

    def seen(*ways: Callable[..., list[Place]]) -> list[str]:
        """The layers behind the outputs that one of these ways of looking sees to be coupled."""
        for way in ways:
            try:
                with no_autocast():
                    coupled = way(order, roots, outputs)
            except Exception:  # of what has no second derivative, or is not to be run
                continue
            if coupled:
                return layers_behind(attachment.fisher.layers, [node for node, _ in coupled])
        return []

    by_values = partial(couples, count=record.num_samples)
    names = seen(chooses, by_values)
    if names and any(map(normalises, order)):
        tell_normalised(attachment.fisher.troubles, names)
        names = seen(partial(by_values, statistics_fixed=True))  # by something else, besides
    if names:
        attachment.fisher.troubles.mark(names, _COUPLED)


def _outputs_behind(roots: Sequence[Node], attachment: int, record: int) -> dict[Place, Output]:
    """The outputs of a record that a graph leads to; none where it is too large to be looked at.

    What is behind other outputs of the same model is not looked for. The marks are taken off.
    """
    found: dict[Place, Output] = {}
    seen, waiting = set(roots), list(roots)
    while waiting:
        node = waiting.pop()
        held = getattr(node, "metadata", {}).get(_KEY, {})
        keys = [key for key in held if key[0] == attachment]
        if keys:
            found |= {(node, key[2]): held.pop(key) for key in keys if key[1] == record}
            continue
        new = {x for x, _ in node.next_functions if x is not None} - seen
        seen |= new
        waiting.extend(new)
        if len(seen) > MOST_NODES:
            return {}
    return found


def couples(
    order: Sequence[Node],
    roots: Mapping[Place, Tensor],
    outputs: Mapping[Place, Output],
    count: int,
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
    chosen = torch.randperm(count, generator=fresh_generator(), device="cpu") < (count + 1) // 2
    with torch.enable_grad():
        slopes = pull_back(order, roots, outputs, statistics_fixed=statistics_fixed)
        terms = []
        for place, g in slopes.items():
            if g.requires_grad:
                signs = torch.randn(g.shape, generator=fresh_generator(), device="cpu", dtype=torch.float32).sign()
                mask = over_samples(chosen[None], g, outputs[place].layout)[0]
                terms.append((g * (signs * outputs[place].size).to(g) * mask.to(g)).sum())
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
        bound = rounding(change.dtype) * torch.maximum(change.abs().amax(), slopes[place].detach().abs().amax())
        if bool(change.isfinite().all()) and bool((by_sample[~chosen.to(change.device)].abs() > bound).any()):
            found.append(place)
    return found
