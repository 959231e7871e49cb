"""Per-sample gradients of any module's parameters, from the module's own calls in training.

The module runs again on the inputs it was called with, from the random state of that call, and one vector-Jacobian
product per sample pulls the gradients on its outputs back to its parameters. Slower than a rule, for any module.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from .._torch.pytree import map_tensors, tensors_in
from .._torch.vjp import chunks, default_chunk_size, stacked_vjp
from ..layers.dtypes import compute_dtype
from ..layers.layout import Layout
from ..layers.selection import Layer
from ..oneshot.independence import over_samples
from ..oneshot.isolation import isolate
from .calls import ModuleCall

__all__ = ["rerun_gradients"]


def _next(rest: Iterator[Tensor], _: Tensor) -> Tensor:
    return next(rest)


def rerun_gradients(
    layers: Sequence[Layer], calls: Sequence[ModuleCall], count: int, *, direct: bool = False
) -> Iterator[list[list[Tensor]]]:
    """Dense per-sample gradients, summed over calls, in chunks of samples: ``(chunk, *shape)`` by layer and parameter.

    Args:
        layers: layers that are parts of one module, the one that was called.
        calls: its calls in one forward of the model.
        count: number of samples of the batch.
        direct: on a direct isolated (see :func:`secorder.oneshot.isolation.run_isolated`).
    """
    enclosing = layers[0].enclosing
    kinds = [compute_dtype(layer) for layer in layers for _ in layer.parameters]
    elements = 4 * sum(p.numel() for layer in layers for p in layer.parameters.values())
    with isolate(enclosing, None, layers, direct=direct) as isolated:
        replacements = [s for layer in layers for s in isolated.replacements(layer)]
        graphs: list[tuple[list[Tensor], list[tuple[Tensor, Layout]]]] = []
        for call in calls:
            rest = iter(call.tensors)
            arguments = map_tensors(partial(_next, rest), call.arguments)
            outputs = isolated.run(
                lambda copied: enclosing(*copied[0], **copied[1]), arguments, call.random_state, call.autocast
            )
            isolated.require_replacements(outputs)
            floating = [t for t in tensors_in(outputs) if t.is_floating_point()]
            pairs = [
                (f, g, layout)
                for f, g, layout in zip(floating, call.gradients, call.layouts, strict=True)
                if g is not None and f.requires_grad
            ]
            graphs.append(([f for f, _, _ in pairs], [(g, layout) for _, g, layout in pairs]))
        for ids in chunks(count, default_chunk_size(elements, replacements[0], None)):
            masks = torch.zeros(len(ids), count, dtype=torch.bool)
            masks[range(len(ids)), list(ids)] = True
            total = [s.new_zeros(len(ids), *s.shape, dtype=kind) for s, kind in zip(replacements, kinds, strict=True)]
            for model_outputs, gradients in graphs:
                if model_outputs:
                    cotangents = [g * over_samples(masks.to(g.device), g, layout) for g, layout in gradients]
                    for part, g in zip(total, stacked_vjp(model_outputs, replacements, cotangents), strict=True):
                        part += g
            rest = iter(total)
            yield [[next(rest) for _ in layer.parameters] for layer in layers]
