"""Per-sample gradients of any module's parameters, from the module's own calls in training.

The module runs again on the inputs it was called with, from the random state, the buffers and the Python objects of
that call, and one vector-Jacobian product per sample pulls the gradients on its outputs back to its parameters. Slower
than a rule, for any module.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._torch.graph import least_precise
from .._torch.pytree import map_tensors, tensors_in
from .._torch.random_state import get_random_state, same_beside_torch
from .._torch.vjp import chunks, default_chunk_size, gradients, stacked_vjp
from ..errors import AttributionError
from ..layers.dtypes import compute_dtype
from ..layers.layout import Layout
from ..layers.selection import Layer
from ..oneshot.independence import over_samples
from ..oneshot.isolation import IsolatedModel, isolate
from .carried import carried_cut_off
from .layer_record import ModuleCall, as_it_started

#: An output of a call that ran again, the gradient on it that comes from outside, and where its samples are.
End = tuple[Tensor, Tensor, Layout]


def rerun_gradients(
    layers: Sequence[Layer], calls: Sequence[ModuleCall], count: int, *, direct: bool = False
) -> Iterator[list[list[Tensor]]]:
    """Dense per-sample gradients, summed over calls, in chunks of samples: ``(chunk, *shape)`` by layer and parameter.

    The layers are parts of the one module that was called. See :func:`secorder.oneshot.isolation.run_isolated`.
    """
    kinds = [compute_dtype(layer) for layer in layers for _ in layer.parameters]
    elements = 4 * sum(p.numel() for layer in layers for p in layer.parameters.values())
    module = layers[0].enclosing
    with (
        as_it_started(module, calls[0].state),
        carried_cut_off(module),
        isolate(module, None, layers, direct=direct) as isolated,
    ):
        replacements = [s for layer in layers for s in isolated.replacements(layer)]
        graphs = [_run_again(isolated, layers[0], call) for call in calls]
        for ids in chunks(count, default_chunk_size(elements, replacements[0], None)):
            masks = torch.zeros(len(ids), count, dtype=torch.bool, device="cpu")
            masks[range(len(ids)), list(ids)] = True
            total = [s.new_zeros(len(ids), *s.shape, dtype=kind) for s, kind in zip(replacements, kinds, strict=True)]
            for ends in graphs:
                if ends:
                    outputs = [f for f, _, _ in ends]
                    cotangents = [g * over_samples(masks.to(g.device), g, layout) for _, g, layout in ends]
                    for part, g in zip(total, stacked_vjp(outputs, replacements, cotangents), strict=True):
                        part += g
            rest = iter(total)
            yield [[next(rest) for _ in layer.parameters] for layer in layers]


def _run_again(isolated: IsolatedModel, layer: Layer, call: ModuleCall) -> list[End]:
    """One call, run again: the outputs of samples that the loss depends on.

    What comes to others, such as the loss of a model that returns it, is what comes through these; that nothing else
    does is for the audit to see.
    """
    rest = iter(call.tensors)
    arguments = map_tensors(lambda _: next(rest), call.arguments)
    before = get_random_state(())
    outputs = isolated.run(
        lambda copied: layer.enclosing(*copied[0], **copied[1]), arguments, call.state.random_state, call.state.autocast
    )
    if call.state.random_state.python is None and not same_beside_torch(before, get_random_state(())):
        raise AttributionError(
            "its samples are found in this batch by running the model again, which draws random numbers of Python's or "
            "NumPy's, as it did in no batch before that was looked at: draw them with torch, or measure the layer with "
            "one-shot calls."
        )
    isolated.require_replacements(outputs)
    tensors = [t for t in tensors_in(outputs) if t.is_floating_point()]
    ends = [
        (f, g, layout)
        for i, (f, g, layout) in enumerate(zip(tensors, call.gradients, call.layouts, strict=True))
        if g is not None
        and layout is not None
        and f.requires_grad
        and not any(f is other for other in tensors[:i])  # what is returned twice
    ]
    call.computed_in = least_precise([f for f, _, _ in ends]) if ends else None
    return _from_outside(ends) if len(ends) > 1 else ends


def _from_outside(ends: list[End]) -> list[End]:
    """The gradients less what comes through other outputs: a module may return what it goes on computing with.

    A hook on an output sees the whole gradient, such as that on the cell of an LSTM, part of which comes through the
    hidden state that the module computes from it. That part is the module's own affair.
    """
    outputs = [f for f, _, _ in ends]
    reached = [gradients(f, [other for other in outputs if other is not f], [torch.ones_like(f)]) for f in outputs]
    for i, found in enumerate(reached):
        found.insert(i, None)
    # For each output, those that depend on it.
    behind = [[j for j, found in enumerate(reached) if found[i] is not None] for i in range(len(outputs))]
    own: dict[int, Tensor] = {}
    while len(own) < len(ends):
        i = next(i for i, later in enumerate(behind) if i not in own and all(j in own for j in later))
        g = ends[i][1]
        if behind[i]:
            (through,) = gradients([outputs[j] for j in behind[i]], [outputs[i]], [own[j] for j in behind[i]])
            g = g if through is None else g - through.to(g.dtype)
        own[i] = g
    return [(f, own[i], layout) for i, (f, _, layout) in enumerate(ends)]
