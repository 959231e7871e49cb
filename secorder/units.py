"""Per-sample gradients of a module without a rule, from one of its own calls in training.

The module runs again on the inputs it was called with, from the random state of that call, and one vector-Jacobian
product per sample pulls the gradients on its outputs back to its parameters. Slower than a rule, for any module.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .capture import UnitCall
from .layers import Layer
from .loan import borrow
from .products import chunks, default_chunk_size, stacked_vjp
from .rules import Layout
from .trees import map_tensors, tensors_in
from .zspace import compute_dtype, over_samples

__all__ = ["unit_gradients"]


def unit_gradients(layer: Layer, calls: Sequence[UnitCall], count: int) -> Iterator[dict[str, Tensor]]:
    """Dense per-sample gradients, summed over calls, in chunks of samples: ``(chunk, *parameter.shape)`` by parameter.

    Args:
        layer: the layer; its ``unit`` is the module that was called.
        calls: its calls in one forward of the model.
        count: number of samples of the batch.
    """
    kind = compute_dtype(layer)
    stacks: list[tuple[list[Tensor], list[tuple[Tensor, Layout]], list[Tensor]]] = []
    for call in calls:
        with borrow(layer.unit, None, [layer], random_state=call.random_state) as loan:
            rest = iter(call.tensors)
            arguments = map_tensors(lambda _, rest=rest: next(rest), call.arguments)
            outputs = loan.run(lambda copied: layer.unit(*copied[0], **copied[1]), arguments)
            loan.require_stand_ins(outputs)
            floating = [t for t in tensors_in(outputs) if t.is_floating_point()]
            pairs = [
                (f, g, layout)
                for f, g, layout in zip(floating, call.gradients, call.layouts, strict=True)
                if g is not None and f.requires_grad
            ]
            heads = [f for f, _, _ in pairs]
            stacks.append((heads, [(g, layout) for _, g, layout in pairs], loan.stand_ins(layer)))
    elements = 4 * sum(p.numel() for p in layer.parameters.values())
    size = default_chunk_size(elements, next(iter(layer.parameters.values())), None)
    for ids in chunks(count, size):
        masks = torch.zeros(len(ids), count, dtype=torch.bool)
        masks[range(len(ids)), list(ids)] = True
        total: list[Tensor] | None = None
        for heads, gradients, stand_ins in stacks:
            cotangents = [g * over_samples(masks.to(g.device), g, layout) for g, layout in gradients]
            found = (
                stacked_vjp(heads, stand_ins, cotangents)
                if heads
                else [s.new_zeros(len(ids), *s.shape) for s in stand_ins]
            )
            found = [g.to(kind) for g in found]
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        assert total is not None
        yield dict(zip(layer.parameters, total, strict=True))
