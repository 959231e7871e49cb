"""A penalty in the loss that is the same for each sample, such as an L2 term: it belongs to every ℓ_n.

An outside gradient R, the whole gradient less what the captured calls bring, is added to each sample's::

    Σ_n (g_n/c_n + R)² = Σ_n (g_n/c_n)² + 2 R Σ_n g_n/c_n + N R²
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._torch.compile import never_compiled
from ..._torch.engine import accumulate_node, will_accumulate
from ...layers.per_sample import PerSample, total_gradient
from ...layers.selection import Layer
from ..fisher import OnlineFisher
from ..record import Backward, ForwardRecord


def watch(backward: Backward, layers: list[Layer]) -> None:
    """Keep the whole gradients of the layers' parameters, as they are before hooks on the parameters change them."""
    if not backward.handles:
        parameters = {id(p): p for layer in layers for p in layer.parameters.values() if p.requires_grad}
        for parameter in parameters.values():
            keep = partial(_keep, backward, parameter, accumulate_node(parameter))
            backward.on_gradient(parameter, keep)


@never_compiled
def _keep(backward: Backward, parameter: Tensor, node: Any, gradient: Tensor) -> None:
    if will_accumulate(node):
        before = backward.whole.get(id(parameter))
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        backward.whole[id(parameter)] = gradient.detach().clone() if before is None else before + gradient.detach()


def keep_early(backward: Backward, record: ForwardRecord, layers: Sequence[Layer]) -> None:
    """Keep whole gradients that came before the backward reached the forward: those of a penalty alone."""
    for layer in layers:
        for p in layer.parameters.values() if not layer.sharded else ():
            if id(p) not in backward.whole and p.grad is not None and record.moved(p) and not record.held(p):
                backward.whole[id(p)] = (p.grad.to_dense() if p.grad.is_sparse else p.grad).detach()


def explains_all(record: ForwardRecord, layer: Layer) -> bool:
    """Whether all that came to a layer's parameters in a backward is known: what no call brings is the penalty's."""
    backward = record.backward
    moved = [p for p in layer.parameters.values() if record.moved(p)]
    return backward is not None and all(id(p) in backward.whole for p in moved)


def explain(record: ForwardRecord, layer: Layer, gradients: Mapping[str, PerSample]) -> None:
    """Sum up what the calls of a layer bring of the whole gradient."""
    for name, gradient in gradients.items():
        p = layer.parameters[name]
        part = total_gradient(gradient, p.numel())
        key = id(p)
        record.totals[key] = record.totals[key] + part if key in record.totals else part


def add_shared(fisher: OnlineFisher, backward: Backward, records: Sequence[ForwardRecord]) -> None:
    """Add what a penalty adds to the squares of each layer, whose gradient is a part of each sample's."""
    if len(records) > 1 or any(record.weights is not None for record in records):
        fisher.troubles.mark(
            fisher.sums, 'penalty="shared" goes with one forward for each backward, and with reduction="mean" or "sum".'
        )
        return
    for record in records:
        count, scale = record.num_samples, fisher.loss_scale_of(backward)
        inverse = float(count) if record.mean else 1.0  # 1 / c_n, the same for every sample
        alpha = 1.0 if fisher.decay is None else (1 - fisher.decay) / count
        for layer in [x for x in fisher.layers if not record.layers[x.name].troubled]:
            for total, p in zip(fisher.sums[layer.name].sums, layer.parameters.values(), strict=True):
                whole = backward.whole.get(id(p))
                if whole is None:
                    continue
                explained = record.totals.get(id(p))
                explained = torch.zeros_like(total) if explained is None else explained.to(total)
                outside = (whole.flatten().to(total) - explained) / scale
                extra = outside * (2 * inverse * explained / scale + count * outside)
                good = extra.sum().isfinite()
                total.add_(extra.nan_to_num_().mul_(good), alpha=alpha)
